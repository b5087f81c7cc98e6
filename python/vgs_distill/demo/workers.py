"""Worker processes: each takes one job at a time over a pipe and reports back over it.

Processes are spawned, not forked (torch's thread pools do not survive a fork), and they live for the whole demo:
importing torch, transformers and trl takes several seconds on a small machine, so it is paid once per core and not
once per job. Each computes on one thread; two methods of one seed then race side by side on two cores.

The pipe is also the life line. A worker whose parent has gone finds the pipe closed at its next progress report and
ends; a parent whose worker has gone finds the same. Workers ignore Ctrl-C: the parent hears it and stops them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vgs_distill.demo.methods import Method
from vgs_distill.demo.recipes import DemoRecipe

_REPORT_EVERY = 0.1  # seconds between progress messages; more would only redraw the same bar


@dataclass(frozen=True)
class TeacherJob:
    """Train or fetch the teacher, and evaluate it with and without the picture."""

    name: str
    recipe: DemoRecipe
    label: str = "teacher"


@dataclass(frozen=True)
class StartJob:
    """Train or fetch one seed's student start, and evaluate it."""

    name: str
    recipe: DemoRecipe
    seed: int
    label: str


@dataclass(frozen=True)
class DistillJob:
    """Distil one student with one method from its seed's start; save it and its history below `folder`."""

    name: str
    recipe: DemoRecipe
    seed: int
    method: Method
    teacher: Path
    start: Path
    folder: Path
    label: str


Job = TeacherJob | StartJob | DistillJob


@dataclass(frozen=True)
class Progressed:
    job: str
    done: int
    total: int
    note: str


@dataclass(frozen=True)
class Said:
    job: str
    message: str


@dataclass(frozen=True)
class Finished:
    job: str
    result: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    job: str
    sentence: str
    trace: str


Message = Progressed | Said | Finished | Failed


class NamedJob(Protocol):
    """What any job has: the name that its messages carry, and what a person reads."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=NamedJob)
RunJob = Callable[[AnyJob, Callable[[Message], None]], dict[str, Any]]


class Worker(Generic[AnyJob]):
    """The parent's end of one worker process, which runs `run` on each job; `run` is sent by name."""

    def __init__(self, index: int, run: RunJob[AnyJob]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run), name=f"vgs-demo-{index}", daemon=True)
        with _single_threaded_environment(), _interrupts_ignored():
            self.process.start()
        theirs.close()  # so that the pipe closes when the worker ends, however it ends
        self.job: AnyJob | None = None

    def give(self, job: AnyJob) -> None:
        self.job = job
        self.connection.send(job)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


@contextmanager
def _single_threaded_environment() -> Iterator[None]:
    """While a worker is spawned: one OpenMP thread, no library chatter, no look-ups of models on the network."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """While a worker is spawned: it inherits the ignored Ctrl-C, so that one pressed during its first seconds of
    imports does not print a traceback per worker."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it hears Ctrl-C
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def with_news(workers: Sequence[Worker[AnyJob]]) -> list[Worker[AnyJob]]:
    """Wait; then the workers whose pipe has something to read, an unexpected end included."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


class WorkerEnded(Exception):
    """A worker process is gone: one sentence to show as it is."""


def receive(worker: Worker[Any]) -> Message:
    """The next message of a worker that has news; raises `WorkerEnded` if its end is the news."""
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(timeout=5)
        label = worker.job.label if worker.job else "an idle worker"
        raise WorkerEnded(
            f"The process running {label} ended without a word (exit code {worker.process.exitcode}); "
            "a negative code is a signal, and -9 usually means that memory ran out."
        ) from None


def _serve(connection: Connection, run: RunJob[Any]) -> None:
    """Run jobs until the parent closes the pipe."""
    try:
        _quiet_libraries()
        while True:
            job = connection.recv()
            try:
                connection.send(Finished(job.name, run(job, connection.send)))
            except (BrokenPipeError, EOFError, ConnectionError):
                return
            except Exception as error:
                connection.send(Failed(job.name, one_sentence(error), traceback.format_exc()))
    except (BrokenPipeError, EOFError, ConnectionError):
        return


def one_sentence(error: BaseException) -> str:
    """The first line of an error, with its kind when the line does not say it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _quiet_libraries() -> None:
    import logging
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def run_job(job: Job, send: Callable[[Message], None]) -> dict[str, Any]:
    """Do one job; the result is plain data, ready for `results.json`."""
    if isinstance(job, TeacherJob):
        return _run_teacher(job, send)
    if isinstance(job, StartJob):
        return _run_start(job, send)
    return _run_distillation(job, send)


def progress_reporter(name: str, send: Callable[[Message], None]) -> Callable[[int, int, float], None]:
    """A progress callback of the job called `name` that sends at most ten messages a second."""
    last = 0.0

    def report(done: int, total: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _REPORT_EVERY:
            last = now
            send(Progressed(name, done, total, f"loss {loss:.3f}"))

    return report


def _run_teacher(job: TeacherJob, send: Callable[[Message], None]) -> dict[str, Any]:
    from vgs_distill.demo import stages

    began = time.perf_counter()
    folder, was_cached = _supervised_model(job, "teacher", job.recipe.teacher_seed, send)
    trained = time.perf_counter()
    model, processor = stages.load(folder)
    with_image = stages.judge(model, processor, job.recipe)
    without_image = stages.judge(model, processor, job.recipe, with_image=False)
    return {
        "folder": str(folder),
        "cached": was_cached,
        "with_image": with_image,
        "without_image": without_image,
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
    }


def _run_start(job: StartJob, send: Callable[[Message], None]) -> dict[str, Any]:
    from vgs_distill.demo import stages

    began = time.perf_counter()
    folder, was_cached = _supervised_model(job, "student", job.seed, send)
    trained = time.perf_counter()
    evaluation = stages.judge(*stages.load(folder), job.recipe)
    return {
        "folder": str(folder),
        "cached": was_cached,
        "seed": job.seed,
        "evaluation": evaluation,
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
    }


def _supervised_model(
    job: TeacherJob | StartJob, role: str, seed: int, send: Callable[[Message], None]
) -> tuple[Path, bool]:
    from vgs_distill.demo.stages import supervised_model

    return supervised_model(
        job.recipe, role, seed, progress_reporter(job.name, send), lambda message: send(Said(job.name, message))
    )


def _run_distillation(job: DistillJob, send: Callable[[Message], None]) -> dict[str, Any]:
    from vgs_distill.demo import stages

    recipe = job.recipe
    student, processor = stages.load(job.start)
    teacher, _ = stages.load(job.teacher)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        history, ratio = stages.distilled(
            recipe,
            job.method,
            job.seed,
            student,
            teacher,
            processor,
            Path(scratch),
            progress_reporter(job.name, send),
        )
    trained = time.perf_counter()
    evaluation = stages.judge(student, processor, recipe)
    without_image = stages.judge(student, processor, recipe, with_image=False)
    del without_image["judgements"]
    evaluated = time.perf_counter()
    folder = job.folder / job.name
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "history.json").write_text(json.dumps(history))
    return {
        "folder": str(folder),
        "seed": job.seed,
        "method": job.method.name,
        "evaluation": evaluation,
        "without_image": without_image,
        "history": history,
        "step_ratio": ratio,
        "seconds": {"training": trained - began, "evaluation": evaluated - trained},
    }
