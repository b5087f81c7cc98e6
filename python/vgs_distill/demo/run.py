"""The demo end to end: teacher, student starts, one run per seed and method, results, report, table.

Arguments are checked before any time is spent. Jobs go to worker processes as soon as what they need is there: the
student starts train while the teacher is evaluated, and a seed's methods race from the same start. Whatever has
finished stays on disk if the demo ends early.

Imports no torch: the parent process only schedules and draws.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vgs_distill.demo.methods import Method, methods_for
from vgs_distill.demo.progress import Display, make_display
from vgs_distill.demo.recipes import DemoRecipe, demo_recipe
from vgs_distill.demo.report import render_report
from vgs_distill.demo.results import summarize
from vgs_distill.demo.table import percent, results_table
from vgs_distill.demo.workers import (
    DistillJob,
    Failed,
    Finished,
    Job,
    Message,
    Progressed,
    Said,
    StartJob,
    TeacherJob,
    Worker,
    WorkerEnded,
    receive,
    run_job,
    with_news,
)
from vgs_distill.demo.worlds import make_world, world_names
from vgs_distill.errors import InputError
from vgs_distill.resilience.output_dir import check_output_dir
from vgs_distill.steering.methods import METHODS

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
_TRACE_SUFFIX = "-error.txt"
_METHODS = ("opd", "vgs")
_ETAS = ("measured", "amortized")


class DemoError(Exception):
    """Why the demo could not finish: one sentence to show as it is."""


@dataclass(frozen=True)
class DemoRequest:
    """Checked arguments of a demo."""

    recipe: DemoRecipe
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    folder: Path
    quick: bool
    jobs: int


@dataclass
class _State:
    """What has finished so far."""

    teacher: dict[str, Any] | None = None
    starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    runs: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)


def run_demo(
    task: str = "digits",
    *,
    seeds: Sequence[int] = (0,),
    methods: Sequence[str] = _METHODS,
    gamma: float | None = None,
    etas: Sequence[float | str | None] = (None,),
    steps: int | None = None,
    output_dir: str | os.PathLike[str] = "runs/demo",
    quick: bool = False,
    jobs: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and return its results dictionary (schema in `results.py`).

    Args:
        task: "digits", "shapes" or "easyvqa".
        seeds: one student start, and one run of each method, per seed.
        methods: what is compared, of the methods of `VGSConfig`; "opd" runs in any case, and a second time for as long
            as the first of the others takes.
        gamma: gamma of every steered method; None takes each one's recommended value.
        etas: how the steered methods find their weights, "measured", "amortized" or a number; one run for each.
            None: the method's own.
        steps: distillation steps; None takes the recipe's.
        output_dir: receives `results.json`, `report.html` and one folder per student.
        quick: fewer steps and a smaller test set. Says less, but within about a minute.
        jobs: worker processes, each on one thread; None takes one per processor.
        console: where to draw; None takes the standard output.

    Raises:
        InputError: an argument is wrong, or the output folder cannot be written.
        DemoError: a worker failed.
        KeyboardInterrupt: passed on once the workers are stopped and what has finished is saved.
    """
    request = check_request(
        task,
        seeds=seeds,
        methods=methods,
        gamma=gamma,
        etas=etas,
        steps=steps,
        output_dir=output_dir,
        quick=quick,
        jobs=jobs,
    )
    console = console if console is not None else Console()
    began = time.monotonic()
    state = _State()
    error: str | None = None
    for trace in request.folder.glob(f"*{_TRACE_SUFFIX}"):
        trace.unlink()  # of an earlier attempt in this folder
    try:
        with make_display(console) as display:
            _work(request, state, display)
    except DemoError as failure:
        error = str(failure)
        raise
    except KeyboardInterrupt:
        error = "Interrupted."
        raise
    finally:
        results = _write(request, state, time.monotonic() - began, error)
    console.print(results_table(results))
    console.print(f"Report: {request.folder / REPORT_FILE}", soft_wrap=True, highlight=False)
    return results


def check_request(
    task: str,
    *,
    seeds: Sequence[int] = (0,),
    methods: Sequence[str] = _METHODS,
    gamma: float | None = None,
    etas: Sequence[float | str | None] = (None,),
    steps: int | None = None,
    output_dir: str | os.PathLike[str] = "runs/demo",
    quick: bool = False,
    jobs: int | None = None,
) -> DemoRequest:
    """Check every argument and make the output folder; raises `InputError` with one sentence."""
    if task not in world_names():
        raise InputError(f"There is no task called {task!r}; choose one of: {', '.join(world_names())}.")
    if not seeds:
        raise InputError("At least one seed is needed.")
    if len(set(seeds)) != len(seeds):
        raise InputError("Each seed may be given once: a repeated one would repeat its run.")
    if min(seeds) < 0:
        raise InputError(f"Seeds must be 0 or more, got {min(seeds)}.")
    _check_methods(methods, gamma, etas)
    if steps is not None and steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}.")
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs must be 1 or more, got {jobs}.")
    folder = Path(output_dir).expanduser().resolve()
    check_output_dir(folder).mkdir(parents=True, exist_ok=True)
    compared = methods_for(methods, gamma, etas)
    return DemoRequest(
        recipe=demo_recipe(task, quick=quick, steps=steps),
        seeds=tuple(seeds),
        methods=compared,
        folder=folder,
        quick=quick,
        # More workers than runs would only import torch for nothing; a second one trains starts beside the teacher.
        jobs=min(jobs or _usable_processors(), max(2, len(seeds) * len(compared))),
    )


def _check_methods(names: Sequence[str], gamma: float | None, etas: Sequence[float | str | None]) -> None:
    """The sentences of `VGSConfig` would come from a worker, after the teacher is trained."""
    for name in names:
        if name not in METHODS:
            raise InputError(f"There is no method called {name!r}; choose from: {', '.join(METHODS)}.")
    shares = [name for name in names if METHODS[name].unit]
    # Written so that NaN fails too.
    if gamma is not None and not 0.0 <= gamma < math.inf:
        raise InputError(f"gamma must be a number of at least 0, got {gamma}.")
    if gamma is not None and shares and not gamma <= 1.0:
        raise InputError(
            f"gamma must lie between 0 and 1 for the method {shares[0]!r}, whose share it is, got {gamma}."
        )
    for eta in etas:
        known = eta is None or (eta in _ETAS if isinstance(eta, str) else 0.0 < eta < math.inf)
        if not known:
            raise InputError(f"eta must be {', '.join(_ETAS)} or a positive number, got {eta}.")
        if isinstance(eta, int | float) and shares:
            raise InputError(
                f"eta cannot be a number for the method {shares[0]!r}, which has two weights; "
                f"choose from: {', '.join(_ETAS)}."
            )


def _usable_processors() -> int:
    try:
        return len(os.sched_getaffinity(0))  # fewer than cpu_count in a container
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _work(request: DemoRequest, state: _State, display: Display) -> None:
    """Hand out jobs until all are done; workers are stopped however this ends."""
    waiting: list[Job] = [
        TeacherJob("teacher", request.recipe),
        *(StartJob(f"seed{seed}-start", request.recipe, seed, f"seed {seed} student start") for seed in request.seeds),
    ]
    remaining = len(waiting) + len(request.seeds) * len(request.methods)
    workers: list[Worker[Job]] = []
    try:
        workers = [Worker(index, run_job) for index in range(request.jobs)]
        while remaining:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.give(waiting.pop(0))
                    assert worker.job is not None
                    display.begin(worker.job.name, worker.job.label)
            for worker in with_news(workers):
                message = receive(worker)
                if isinstance(message, Finished):
                    job, worker.job = worker.job, None
                    assert job is not None
                    waiting += _record(request, state, job, message.result)
                    display.end(job.name, _outcome(job, message.result))
                    remaining -= 1
                else:
                    _show(request, message, display)
    except WorkerEnded as error:
        raise DemoError(str(error)) from None
    finally:
        for worker in workers:
            worker.stop()


def _show(request: DemoRequest, message: Message, display: Display) -> None:
    """Progress and remarks go to the display; a failure ends the demo and leaves its trace in the output folder."""
    if isinstance(message, Progressed):
        display.advance(message.job, message.done, message.total, message.note)
    elif isinstance(message, Said):
        display.say(message.message)
    elif isinstance(message, Failed):
        trace = request.folder / f"{message.job}{_TRACE_SUFFIX}"
        trace.write_text(message.trace)
        raise DemoError(f"{message.job} failed with {message.sentence} (the full trace is in {trace}).")


def _record(request: DemoRequest, state: _State, job: Job, result: dict[str, Any]) -> list[Job]:
    """Keep a job's result; returns the jobs that can start now because of it."""
    if isinstance(job, TeacherJob):
        state.teacher = result
        return [run for seed in state.starts for run in _runs_of(request, state, seed)]
    if isinstance(job, StartJob):
        state.starts[job.seed] = result
        return _runs_of(request, state, job.seed) if state.teacher is not None else []
    state.runs[job.seed, job.method.name] = result
    return []


def _runs_of(request: DemoRequest, state: _State, seed: int) -> list[Job]:
    """One job per method, all from the same start."""
    assert state.teacher is not None
    return [
        DistillJob(
            name=f"seed{seed}-{method.name}",
            recipe=request.recipe,
            seed=seed,
            method=method,
            teacher=Path(state.teacher["folder"]),
            start=Path(state.starts[seed]["folder"]),
            folder=request.folder,
            label=f"seed {seed} {method.label}",
        )
        for method in request.methods
    ]


def _outcome(job: Job, result: dict[str, Any]) -> str:
    """A finished job in a few words."""
    if isinstance(job, TeacherJob):
        seen = percent(result["with_image"]["accuracy"])
        masked = percent(result["without_image"]["accuracy"])
        text = f"{seen} % with the image, {masked} % without"
    else:
        text = f"{percent(result['evaluation']['accuracy'])} %"
    return f"{text} (from the cache)" if result.get("cached") else text


def _write(request: DemoRequest, state: _State, seconds: float, error: str | None) -> dict[str, Any]:
    """Write results and, if any model was judged, the report."""
    order = [(seed, method.name) for seed in request.seeds for method in request.methods]
    runs = [state.runs[key] for key in order if key in state.runs]
    evaluation = request.recipe.evaluation
    examples = make_world(request.recipe.task).balanced("test", evaluation.examples, evaluation.seed)
    results = summarize(
        recipe=request.recipe,
        quick=request.quick,
        seeds=request.seeds,
        methods=request.methods,
        workers=request.jobs,
        teacher=state.teacher,
        starts=state.starts,
        runs=runs,
        examples=examples,
        folder=request.folder,
        total_seconds=seconds,
        error=error,
    )
    (request.folder / RESULTS_FILE).write_text(json.dumps(results, indent=1))
    histories = {Path(run["folder"]).name: run["history"] for run in runs}
    pictures = [examples[item["index"]].image for item in results["gallery"]]
    (request.folder / REPORT_FILE).write_text(render_report(results, histories, pictures), encoding="utf-8")
    return results
