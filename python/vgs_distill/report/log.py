"""Reads the recording of a run, finished or being written. `recording.py` describes the records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgs_distill.errors import InputError

LOG_FILE = Path("recording") / "log.jsonl"
IMAGE_FOLDER = Path("recording") / "images"

Points = tuple[tuple[float, float], ...]  # (step, value), in step order


class NothingLogged(InputError):
    """There is a run, which has not reached its first logging step."""


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
    angles_silent: str | None = None  # why there are no angles, where they were asked for
    angles: list[dict[str, Any]] = field(default_factory=list)  # between gradients, by tenths of VDS
    thirds: list[dict[str, Any]] = field(default_factory=list)  # losses by thirds of VDS
    evaluations: list[tuple[int, str, dict[str, Any]]] = field(
        default_factory=list
    )  # step, file, what `vgs eval` wrote

    def line(self, name: str) -> Points:
        """(step, value) of every step that logged `name`."""
        return tuple((step, values[name]) for step, values in self.steps.items() if name in values)

    def accuracy(self, view: str) -> Points:
        """(step, percent) of what `vgs eval` measured in a view, `with_image` or `without_image`."""
        return tuple({step: 100 * content[view]["accuracy"] for step, _, content in self.evaluations}.items())

    def seconds_per_step(self) -> float | None:
        """Wall clock over steps, of every (re)start from its first log on: what comes before is loading, not steps."""
        seconds = steps = 0.0
        for _, *logs in self.sessions:
            if logs:
                seconds += logs[-1][1] - logs[0][1]
                steps += logs[-1][0] - logs[0][0]
        return seconds / steps if steps else None

    def _add(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        self.last_time = record["time"]
        if kind == "start":
            self._forget_after(step)
            self.settings, self.max_steps, self.ended_at = record["settings"], record["max_steps"], None
            self.teacher_silent, self.angles_silent = record["teacher_silent"], record["angles_silent"]
            self.sessions = [*(self.sessions if step else []), [(step, record["time"])]]
        elif kind == "metrics":
            self.steps.setdefault(step, {}).update(record["values"])
            if self.sessions:
                self.sessions[-1].append((step, record["time"]))
        elif kind == "completion":
            self.completions.append(record)
        elif kind == "modules":
            self.modules.append(record)
        elif kind == "dependency":
            self.angles.append(record)
        elif kind == "thirds":
            self.thirds.append(record)
        else:
            self.ended_at = step

    def _forget_after(self, step: int) -> None:
        """A run that starts again from `step` takes the later steps anew."""
        self.steps = {at: values for at, values in self.steps.items() if at <= step}
        self.completions = [record for record in self.completions if record["step"] <= step]
        self.modules = [record for record in self.modules if record["step"] <= step]
        self.angles = [record for record in self.angles if record["step"] <= step]
        self.thirds = [record for record in self.thirds if record["step"] <= step]


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
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except RecursionError:
                record = None
            except ValueError:
                continue  # half a line: a run was killed while it wrote it, or is writing it now
            if (fault := _fault_of_record(record)) is not None:
                raise InputError(f"line {number} of {str(path)!r} is no record of a run: {fault}; remove the line")
            log._add(record)
    if log.steps and not log.settings:
        raise InputError(f"{str(path)!r} has no record of a start; was its beginning cut off?")
    if not log.steps:
        raise NothingLogged(
            f"nothing is logged in {str(path)!r} yet; wait for the first logging step (logging_steps) of the run"
        )
    log.evaluations = _evaluations(run_dir, max(log.steps))
    return log


def last_change(run_dir: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when there is something new to read: the files of a run with their sizes and times."""
    files = [run_dir / LOG_FILE, *_evaluation_files(run_dir)]
    found = [(path, path.stat()) for path in files if path.is_file()]
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _evaluation_files(run_dir: Path) -> list[Path]:
    return sorted([*run_dir.glob("eval*.json"), *run_dir.glob("checkpoint-*/eval*.json")])


def _evaluations(run_dir: Path, last_step: int) -> list[tuple[int, str, dict[str, Any]]]:
    """What `vgs eval` wrote into the run's folder, for its last step, and into those of its checkpoints."""
    found = []
    for path in filter(Path.is_file, _evaluation_files(run_dir)):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict) or not {"with_image", "without_image"} <= content.keys():
            continue  # another program's
        if (fault := _fault(content, _EVALUATION)) is not None:
            raise InputError(f"{str(path)!r} is not what vgs eval writes: {fault}; move it out of the run's folder")
        checkpoint = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
        step = int(checkpoint[1]) if checkpoint and path.parent != run_dir else last_step
        found.append((step, path.relative_to(run_dir).as_posix(), content))
    return sorted(found, key=lambda evaluation: evaluation[:2])


# ---------------------------------------------------------------------- the shape of a record

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100  # no NaN either


def _count(value: Any) -> bool:
    return _number(value) and isinstance(value, int) and value >= 0


def _time(value: Any) -> bool:
    return _number(value) and 0 <= value < 2e11  # seconds: up to the year 8307, which a date can hold


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _settings(value: Any) -> bool:
    names = ("student", "teacher", "method")
    return isinstance(value, dict) and "gamma" in value and all(_text(value.get(name)) for name in names)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _measured(value: Any) -> bool:
    return isinstance(value, dict) and _fault(value, {"accuracy": _number, "standard": _or_none(_number)}) is None


_BY_GROUP = (
    "dependency",
    "norm_standard",
    "norm_vis",
    "norm_lang",
    "angle_lang_vis",
    "angle_standard_vis",
    "angle_standard_lang",
)
_RECORDS: dict[str, dict[str, Check]] = {
    "start": {
        "max_steps": _count,
        "settings": _settings,
        "teacher_silent": _or_none(_text),
        "angles_silent": _or_none(_text),
    },
    "metrics": {"values": _numbers},
    "completion": {
        "prompt": _text,
        "images": _list_of(_text),
        "tokens": _list_of(_text),
        "log_ratios": _or_none(_list_of(_or_none(_number))),
        "dependency": _or_none(_list_of(_or_none(_number))),
        "reference": _or_none(_text),
        "teacher": _or_none(_text),
    },
    "modules": {
        "parts": _list_of(_text),
        "names": _list_of(_text),
        "norms_first": _list_of(_number),
        "norms_second": _list_of(_number),
        "cosines": _list_of(_or_none(_number)),
    },
    "dependency": {"tokens": _list_of(_count), **dict.fromkeys(_BY_GROUP, _list_of(_or_none(_number)))},
    "thirds": {
        "tokens": _list_of(_count),
        "standard": _list_of(_or_none(_number)),
        "vis": _list_of(_or_none(_number)),
        "lang": _list_of(_or_none(_number)),
    },
    "end": {},
}
_AS_LONG = {
    "completion": ("tokens", "log_ratios", "dependency"),
    "modules": ("names", "norms_first", "norms_second", "cosines"),
    "dependency": ("tokens", *_BY_GROUP),
    "thirds": ("tokens", "standard", "vis", "lang"),
}
_EVALUATION: dict[str, Check] = {"rows": _count, "with_image": _measured, "without_image": _measured}


def _fault_of_record(record: Any) -> str | None:
    """What is wrong with the shape of a record, or None."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _RECORDS:
        return f"its kind is not one of {', '.join(_RECORDS)}"
    fault = _fault(record, {"step": _count, "time": _time, **_RECORDS[kind]})
    if fault is not None:
        return fault
    lengths = {len(record[name]) for name in _AS_LONG.get(kind, ()) if record[name] is not None}
    return f"{', '.join(_AS_LONG[kind])} differ in length" if len(lengths) > 1 else None


def _fault(record: Mapping[str, Any], shape: Mapping[str, Check]) -> str | None:
    for name, check in shape.items():
        if name not in record:
            return f"it has no {name!r}"
        if not check(record[name]):
            return f"its {name!r} is of another shape"
    return None
