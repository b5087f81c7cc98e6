"""Runs of the study in worker processes, one thread each, and their records: one JSON line per run.

A finished line is never written again; an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgs_distill.demo.progress import Display
from vgs_distill.demo.workers import (
    Failed,
    Finished,
    Message,
    Progressed,
    Said,
    Worker,
    WorkerEnded,
    progress_reporter,
    receive,
    with_news,
)

from benchmarks.harness.machine import commit
from benchmarks.harness.records import RECORDS
from benchmarks.study.plan import ARMS, Run

if TYPE_CHECKING:
    from vgs_distill.demo.recipes import DemoRecipe

RECORDS = RECORDS / "study.jsonl"
SERIES = {
    "standard": "loss/standard",
    "lang": "loss/lang",
    "vis": "loss/vis",
    "entropy": "entropy",
    "norm_standard": "gradient/norm_standard",
    "norm_lang": "gradient/norm_lang",
    "norm_vis": "gradient/norm_vis",
    "cosine": "gradient/cosine",
    "eta": "steering/eta",
    "preservation": "steering/language_preservation",
    "weight_ratio": "steering/weight_ratio",
    "clipped": "completions/clipped_ratio",
}
"""What a line keeps of every step, three digits each. Lines of `vgs_unit` from before `vis` was KL(p ‖ q*) have instead
`vis_less_log_z`, the same without the log of the normaliser of q*: its gradient is the same."""
WINDOW = 10  # steps that one entry of the losses by dependency is the mean of

Next = Callable[[], Run | None]


class StudyError(Exception):
    """A run failed: one sentence, and the worker's trace."""


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a records file by run name, without those of runs whose definition has changed since."""
    if not path.exists():
        return {}
    records = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            run = Run(**record["run"])
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a kill: its run is run again
        if run.arm in ARMS and record["digest"] == run.digest():
            records[run.name] = record
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """One line, on disk before this returns; after a line that a kill cut off it begins a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def work(next_run: Next, keep: Callable[[dict[str, Any]], None], display: Display, jobs: int) -> None:
    """Run what `next_run` hands out until it has no more, `jobs` at a time; `keep` receives each record."""
    workers = [Worker(index, run_job) for index in range(jobs)]
    try:
        while True:
            for worker in workers:
                if worker.job is None and (run := next_run()) is not None:
                    display.begin(run.name, run.name)
                    worker.give(run)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            for worker in with_news(busy):
                _take(worker, keep, display)
    finally:
        for worker in workers:
            worker.stop()


def _take(worker: Worker[Run], keep: Callable[[dict[str, Any]], None], display: Display) -> None:
    assert worker.job is not None
    try:
        message = receive(worker)
    except WorkerEnded as error:
        raise StudyError(str(error)) from None
    if isinstance(message, Progressed):
        display.advance(message.job, message.done, message.total, message.note)
    elif isinstance(message, Said):
        display.say(message.message)
    elif isinstance(message, Failed):
        raise StudyError(f"{message.job} failed with {message.sentence}\n{message.trace}")
    elif isinstance(message, Finished):
        keep(message.result)
        display.end(worker.job.name, f"{100 * message.result['accuracy']:.1f} %")
        worker.job = None


def run_job(run: Run, send: Callable[[Message], None]) -> dict[str, Any]:
    """Distil and judge one student; the record of it. Runs inside a worker."""
    from vgs_distill.demo import stages

    def say(message: str) -> None:
        send(Said(run.name, message))

    recipe = run.recipe()
    progress = progress_reporter(run.name, send)
    teacher, _ = stages.load(stages.supervised_model(recipe, "teacher", recipe.teacher_seed, progress, say)[0])
    student, processor = stages.load(stages.supervised_model(recipe, "student", run.seed, progress, say)[0])
    found: dict[str, Any] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if run.arm == "start":
            found["diagnosis"] = asdict(stages.diagnosed(recipe, run.seed, student, teacher, processor, Path(scratch)))
        else:
            found |= _distilled(run, recipe, student, teacher, processor, Path(scratch), progress)
    seconds = time.perf_counter() - began
    seen, blind = (stages.judge(student, processor, recipe, with_image=flag) for flag in (True, False))
    return {
        "run": run.__dict__,
        "digest": run.digest(),
        "accuracy": seen["accuracy"],
        "against_prior": seen["against_prior"],
        "with_prior": seen["with_prior"],
        "by_question_type": seen["by_question_type"],
        "well_formed": seen["well_formed"],
        "without_image": blind["accuracy"],
        "seconds": round(seconds, 1),
        "commit": commit(),
        **found,
    }


def _distilled(
    run: Run, recipe: DemoRecipe, student: Any, teacher: Any, processor: Any, scratch: Path, progress: Any
) -> dict[str, Any]:
    """Distil the student and return what a line keeps of the way."""
    from vgs_distill.demo import stages
    from vgs_distill.report.log import read_run

    history, ratio = stages.distilled(
        recipe, ARMS[run.arm].method, run.seed, student, teacher, processor, scratch, progress
    )
    return {
        "alarm_step": _first_step(history, "runaway/alarm"),
        "step_seconds": _digits(statistics.median(row["processor_seconds"] for row in history)),
        **({} if ratio is None else {"step_ratio": _digits(ratio)}),
        "series": {
            name: list(_series(history, key)) for name, key in SERIES.items() if any(key in row for row in history)
        },
        **({"thirds": thirds} if (thirds := _thirds(read_run(scratch).thirds)) else {}),
    }


def _thirds(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Losses by thirds of the tokens by dependency, from the least dependent to the most, means over windows."""
    windows = [records[start : start + WINDOW] for start in range(0, len(records) - WINDOW + 1, WINDOW)]
    return [
        {
            "step": window[-1]["step"],
            **{
                part: [_digits(statistics.fmean(r[part][third] for r in window)) for third in range(3)]
                for part in ("standard", "lang", "vis")
                if all(None not in r[part] for r in window)
            },
        }
        for window in windows
    ]


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _series(history: Sequence[Mapping[str, float]], key: str) -> Iterator[float | None]:
    for row in history:
        yield _digits(row[key]) if key in row else None


def _first_step(history: Sequence[Mapping[str, float]], key: str) -> int | None:
    return next((int(row["step"]) for row in history if row.get(key)), None)
