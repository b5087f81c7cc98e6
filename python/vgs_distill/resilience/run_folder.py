"""The output folder of a run: whether one may start in it, the settings it records, the step of the model in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

RUN_FILE = "run.yaml"
_HEADER = (
    "# Every argument of this run, written by vgs train: --config with this file and another output_dir repeats it.\n"
)


class RunFile(TrainerCallback):
    """Writes the settings of a run into its folder once it has taken a step, so that a start that fails leaves those of
    the run before; where the run was resumed from is no setting, since the file is to repeat it from its beginning.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = {**settings, "resume_from_checkpoint": None}
        self._written = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._written:
            assert args.output_dir is not None
            text = _HEADER + yaml.safe_dump(self._settings, sort_keys=False)
            Path(args.output_dir).joinpath(RUN_FILE).write_text(text, encoding="utf-8")
        self._written = True


def settings_of(model: Path) -> dict[str, Any]:
    """The settings of the run that left a model, or a checkpoint, in this folder; empty if none of `vgs train` did."""
    text = _written_by_a_run(model.parent if model.name.startswith(PREFIX_CHECKPOINT_DIR) else model)
    try:
        found = yaml.safe_load(text or "")
    except yaml.YAMLError:  # somebody edited it
        return {}
    return found if isinstance(found, dict) else {}


def _written_by_a_run(folder: Path) -> str | None:
    """The text of `run.yaml`, if it is there and that of `vgs train`."""
    path = folder / RUN_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text if text.startswith(_HEADER) else None


def in_the_way(folder: Path) -> str | None:
    """The name of something in `folder` that a new run would overwrite; None if there is nothing.

    A start that failed leaves `run.yaml`, records and logs, which are not in the way.
    """
    patterns = [f"{PREFIX_CHECKPOINT_DIR}-*", "*.safetensors", "*.bin"]
    if _written_by_a_run(folder) is None:
        patterns += [RUN_FILE, "README.md", "config.json"]  # of something else
    found = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    return found[0] if found else None


def saved_step(folder: Path) -> int:
    """The step whose model lies in `folder`; -1 if none does. The trainer's state is saved after the model."""
    try:
        return int(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"])
    except (OSError, ValueError, KeyError):
        return -1
