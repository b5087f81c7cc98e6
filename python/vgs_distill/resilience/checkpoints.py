"""Checkpoints that are whole or not there, and resuming from them.

transformers writes a checkpoint file by file under its final name; whatever stops it there leaves a folder that looks
like a checkpoint. Here it writes into a folder of another name, which takes the final one when every file is on disk;
older checkpoints are deleted after that. `STATE_FILE` lists the files, so that a folder that lost some is known, and
carries what transformers knows nothing of.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from datasets import IterableDataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..config import VGSConfig
from ..errors import InputError, TrainingStopped
from ..models.weights import load_weights

logger = logging.get_logger(__name__)

STATE_FILE = "vgs_state.json"  # beside trainer_state.json in a checkpoint
STAGING = ".incomplete"  # folder in the output directory

_SAME_LOSS = ("method", "eta", "modality", "image_mask", "steering_scale")
_SAME_RUN = (
    "gamma",
    "gamma_min",
    "gamma_max",
    "gamma_start",
    "gamma_schedule",
    "language_preservation",
    "dependency_quantile",
    "ratio_bound",
    "ratio_floor",
    "max_weight_ratio",
    "runaway_action",
    "token_steering",
    "plausibility",
    "teacher_smoothing",
    "refresh_every",
    "temperature",
    "learning_rate",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
)


_TORCH_SAVE_FAILED = ("inline_container", "PytorchStreamWriter", "iostream")  # it raises a bare RuntimeError


class Stateful(Protocol):
    """What goes on in a resumed run from where it was. Its state is plain values, for JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AtomicCheckpoints(Trainer):
    """A `Trainer` whose checkpoints appear whole, and carry the state of `checkpoint_parts` besides its own."""

    args: VGSConfig
    _initial_global_step: int  # transformers': where `train` began
    checkpoint_parts: dict[str, Stateful]
    _staging: Path | None = None  # while a checkpoint is written
    _resumed_position: tuple[int, int] | None = None  # in a stream: epoch, micro-batches of it

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers', from a whole checkpoint only; True: the last whole one in the output directory.

        Raises:
            InputError: there is no such checkpoint, it is not whole, or it belongs to another loss than the config's.
        """
        self._resumed_position = None
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        folder = find_checkpoint(Path(self._get_output_dir(None)), resume_from_checkpoint)
        state = read_state(folder)
        check_settings(folder, state["settings"], self.args)
        for name, part in self.checkpoint_parts.items():
            part.load_state_dict(state["state"][name])
        self._resumed_position = state["stream_position"]
        return super().train(str(folder), *args, **kwargs)

    @property
    def took_a_step(self) -> bool:
        """Whether the last `train` went beyond where it resumed; of a finished run it does not."""
        return self.state.global_step > self._initial_global_step

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with _explained(run_dir, name):
            self._staging = run_dir / STAGING
            try:
                if self.args.should_save:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    self._staging.mkdir(parents=True)
                    check_space(run_dir, self._checkpoint_bytes())
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self._point_to_best(run_dir / name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    settings = {key: getattr(self.args, key) for key in (*_SAME_LOSS, *_SAME_RUN)}
                    position = self._stream_position()
                    parts = {part: stateful.state_dict() for part, stateful in self.checkpoint_parts.items()}
                    state = {"settings": settings, "stream_position": position, "state": parts}
                    write_state(self._staging / name, state)
                    _publish(self._staging / name, run_dir / name)
            finally:
                if self.args.should_save:
                    shutil.rmtree(self._staging, ignore_errors=True)
                self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers' reads the names of the hub as if they were the model's own, and passes over what is left."""
        if self.is_fsdp_enabled:  # whose checkpoints keep the model's names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self._unwrapped_model(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            load_weights(self._unwrapped_model(), Path(self.state.best_model_checkpoint))

    def _unwrapped_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """transformers', which takes a step more than `max_steps` of a run that had ended within an epoch, and takes a
        stream, not knowing its length, to be in its first epoch for ever.
        """
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if self.state.global_step >= max_steps:
            return epochs, 0
        return position if self.args.ignore_data_skip else self._resumed_position or position

    def _stream_position(self) -> tuple[int, int] | None:
        """Epoch and micro-batches of it that are done; None where the dataset is no stream."""
        if not isinstance(self.train_dataset, IterableDataset):
            return None
        epoch, part = divmod(self.state.epoch or 0.0, 1.0)  # of `max_steps`, where the length is not known
        return int(epoch), round(part * self.state.max_steps) * self.args.gradient_accumulation_steps

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _point_to_best(self, final: Path) -> None:
        """transformers has noted the checkpoint it is writing as the best one, by the name it is written under."""
        assert self._staging is not None
        staged = self._staging / final.name
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _checkpoint_bytes(self) -> int:
        """Weights that are saved and the optimizer's state; the rest is small."""
        assert self.model is not None
        assert self.optimizer is not None
        parameters = list(self.model.parameters())
        if getattr(self.model, "peft_config", None) is not None:
            parameters = [p for p in parameters if p.requires_grad]
        saved: list[Tensor] = list(parameters)
        if not self.args.save_only_model:
            saved += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in saved)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step in `run_dir`."""
    if not run_dir.is_dir():
        return None
    steps = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdecimal()
    }
    return next((steps[step] for step in sorted(steps, reverse=True) if _missing(steps[step]) is None), None)


def find_checkpoint(run_dir: Path, asked: str | Literal[True]) -> Path:
    """The folder asked for, or with True the last one of `run_dir`; InputError unless a run can go on from it."""
    folder = last_checkpoint(run_dir) if asked is True else Path(asked)
    if folder is None:
        raise InputError(
            f"there is no whole checkpoint in {str(run_dir)!r} to resume from; leave out resume_from_checkpoint to "
            "start from the beginning"
        )
    if not folder.is_dir():
        raise InputError(
            f"resume_from_checkpoint={str(folder)!r} is not a folder; give one such as 'run/checkpoint-500', or True "
            "for the last one in output_dir"
        )
    missing = _missing(folder)
    if missing is not None:
        last = last_checkpoint(folder.parent)
        remedy = "start from the beginning" if last is None else f"resume from {str(last)!r}"
        raise InputError(f"{str(folder)!r} is not a whole checkpoint of this trainer: {missing}; {remedy}")
    if not any(Path(name).name.startswith(("scheduler", "global_step")) for name in read_state(folder)["files"]):
        raise InputError(
            f"{str(folder)!r} holds the model only (save_only_model=True), from which a run cannot go on; start a new "
            "one with it as the student"
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, and the list of files with their sizes."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """The last file of a checkpoint: the list of the others with their sizes, and `state`."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / STATE_FILE).write_text(json.dumps({"files": files, **state}, indent=1))


def check_settings(folder: Path, saved: dict[str, Any], config: VGSConfig) -> None:
    """InputError if the checkpoint belongs to another loss; a warning if the run will not go on as it would have."""
    for name in _SAME_LOSS:
        if saved[name] != getattr(config, name):
            raise InputError(
                f"{str(folder)!r} was trained with {name}={saved[name]!r}, but {name} is {getattr(config, name)!r}; "
                "set it back, or start a new run with the checkpoint as the student"
            )
    changed = [
        f"{name} {saved[name]!r} -> {getattr(config, name)!r}"
        for name in _SAME_RUN
        if saved[name] != getattr(config, name)
    ]
    if changed:
        logger.warning(
            "resuming %s with other settings than it was trained with (%s): the run will not end as it would have "
            "without the interruption.", folder, ", ".join(changed),
        )  # fmt: skip


def check_space(directory: Path, needed: int) -> None:
    """OSError unless `needed` bytes fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"{needed / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB free")


def _missing(folder: Path) -> str | None:
    """What a checkpoint lacks to be whole; None if nothing."""
    try:
        files = json.loads((folder / STATE_FILE).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {STATE_FILE} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _publish(staged: Path, final: Path) -> None:
    """Give a written checkpoint its name, once its files are on disk and not only in memory."""
    for path in (*staged.rglob("*"), staged):
        _flush(path)
    if final.exists():  # of an earlier run in the same directory; a folder that is not empty cannot be replaced
        final.rename(staged.with_name("replaced"))
    staged.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(run_dir: Path, name: str) -> Iterator[None]:
    """Turn what the libraries raise when they cannot write into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        if type(error) is RuntimeError:
            if not any(mark in reason for mark in _TORCH_SAVE_FAILED):
                raise
            reason = f"torch.save failed, as on a full disk ({reason})"
        last = last_checkpoint(run_dir)
        kept = "no checkpoint was written before" if last is None else f"{str(last)!r} is whole and can be resumed from"
        raise TrainingStopped(
            f"cannot write {name} into {str(run_dir)!r}: {reason}; make room or choose another output_dir ({kept})"
        ) from error
