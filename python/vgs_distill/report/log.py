"""Reads the recording of a run, finished or being written. `recording.py` describes the records."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgs_distill.errors import InputError

LOG_FILE = Path("recording") / "log.jsonl"
IMAGE_FOLDER = Path("recording") / "images"


@dataclass
class RunLog:
    """What a run has logged, in step order and each step once: of a resumed run only what still counts."""

    run_dir: Path
    settings: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    teacher_silent: str | None = None  # why there are no answers of the teacher
    ended_at: int | None = None  # the step at which training returned; None while it runs, or if it was killed
    last_time: float = 0.0  # of the last record, seconds since 1970
    sessions: list[list[tuple[int, float]]] = field(default_factory=list)  # per (re)start: step and time of each log
    steps: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> name -> value
    completions: list[dict[str, Any]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[int, str, dict[str, Any]]] = field(
        default_factory=list
    )  # step, file, what `vgs eval` wrote

    def line(self, name: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of every step that logged `name`."""
        return tuple((step, values[name]) for step, values in self.steps.items() if name in values)

    def _add(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        self.last_time = record["time"]
        if kind == "start":
            self._forget_after(step)
            self.settings, self.max_steps, self.ended_at = record["settings"], record["max_steps"], None
            self.teacher_silent = record.get("teacher_silent")
            self.sessions = [*(self.sessions if step else []), [(step, record["time"])]]
        elif kind == "metrics":
            self.steps.setdefault(step, {}).update(record["values"])
            if self.sessions:
                self.sessions[-1].append((step, record["time"]))
        elif kind == "completion":
            self.completions.append(record)
        elif kind == "modules":
            self.modules.append(record)
        elif kind == "end":
            self.ended_at = step

    def _forget_after(self, step: int) -> None:
        """A run that starts again from `step` takes the later steps anew."""
        self.steps = {at: values for at, values in self.steps.items() if at <= step}
        self.completions = [record for record in self.completions if record["step"] <= step]
        self.modules = [record for record in self.modules if record["step"] <= step]


def read_run(run_dir: Path) -> RunLog:
    """Read the log of a run; InputError, in one sentence, where there is none to read."""
    if not run_dir.is_dir():
        raise InputError(f"there is no directory {str(run_dir)!r}; give the output directory of a training run")
    path = run_dir / LOG_FILE
    if not path.is_file():
        raise InputError(
            f"{str(run_dir)!r} is not a training run (it has no {LOG_FILE}); give the output directory of a VGSTrainer"
        )
    log = RunLog(run_dir)
    with path.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                log._add(record)
    if not log.steps:
        raise InputError(
            f"nothing is logged in {str(path)!r} yet; wait for the first logging step (logging_steps) of the run"
        )
    log.evaluations = _evaluations(run_dir, max(log.steps))
    return log


def _evaluations(run_dir: Path, last_step: int) -> list[tuple[int, str, dict[str, Any]]]:
    """What `vgs eval` wrote into the run's folder, for its last step, and into those of its checkpoints."""
    found = []
    for path in sorted([*run_dir.glob("eval*.json"), *run_dir.glob("checkpoint-*/eval*.json")]):
        content = _parse(path.read_bytes())
        checkpoint = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
        step = int(checkpoint[1]) if checkpoint and path.parent != run_dir else last_step
        if content is not None and "with_image" in content and "without_image" in content:
            found.append((step, path.relative_to(run_dir).as_posix(), content))
    return sorted(found, key=lambda evaluation: evaluation[:2])


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for half a line: a run was killed while it wrote it, or is writing it now."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
