"""Worker processes: each takes one job at a time over a pipe and reports back over it.

Processes are spawned, not forked (torch's thread pools do not survive a fork), and they live for the whole demo:
importing torch, transformers and trl takes several seconds on a small machine, so it is paid once per core and not
once per job. Each computes on one thread; two methods of one seed then race side by side on two cores.

The pipe is also the life line. A worker whose parent has gone finds the pipe closed at its next progress report and
ends; a parent whose worker has gone finds the same. Workers ignore Ctrl-C: the parent hears it and stops them.

Layer: `run` sends jobs; only this page runs the heavy modules, inside the workers.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), name=f"vgs-demo-{index}", daemon=True)
        with _single_threaded_environment(), _interrupts_ignored():
            self.process.start()
        theirs.close()  # so that the pipe closes when the worker ends, however it ends
        self.job: Job | None = None

    def give(self, job: Job) -> None:
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


def _serve(connection: Connection) -> None:
    """Run jobs until the parent closes the pipe."""
    try:
        _quiet_libraries()
        while True:
            job = connection.recv()
            try:
                connection.send(Finished(job.name, run_job(job, connection.send)))
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


def _reporter(job: Job, send: Callable[[Message], None]) -> Callable[[int, int, float], None]:
    """A progress callback that sends at most ten messages a second."""
    last = 0.0

    def report(done: int, total: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _REPORT_EVERY:
            last = now
            send(Progressed(job.name, done, total, f"loss {loss:.3f}"))

    return report


def _run_teacher(job: TeacherJob, send: Callable[[Message], None]) -> dict[str, Any]:
    recipe = job.recipe
    began = time.perf_counter()
    folder, was_cached = _supervised_model(job, "teacher", recipe.teacher_seed, send)
    trained = time.perf_counter()
    with_image = _evaluate_folder(folder, recipe, with_image=True)
    without_image = _evaluate_folder(folder, recipe, with_image=False)
    return {
        "folder": str(folder),
        "cached": was_cached,
        "with_image": with_image,
        "without_image": without_image,
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
    }


def _run_start(job: StartJob, send: Callable[[Message], None]) -> dict[str, Any]:
    began = time.perf_counter()
    folder, was_cached = _supervised_model(job, "student", job.seed, send)
    trained = time.perf_counter()
    evaluation = _evaluate_folder(folder, job.recipe, with_image=True)
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
    """The cached folder of a supervised model: weights and processor."""
    from vgs_distill.demo.cache import cached_folder, entry_key
    from vgs_distill.demo.models import build_processor
    from vgs_distill.demo.supervised import train_supervised
    from vgs_distill.demo.worlds import make_world

    recipe = job.recipe
    size, training = (
        (recipe.teacher_size, recipe.teacher) if role == "teacher" else (recipe.student_size, recipe.student_start)
    )
    key = entry_key(
        f"{recipe.task}-{role}-seed{seed}",
        {"task": recipe.task, "size": size, "training": training, "seed": seed},
    )

    def build(folder: Path) -> None:
        world = make_world(recipe.task)
        processor = build_processor(world.words)
        model = train_supervised(world, processor, size, training, seed, _reporter(job, send))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return cached_folder(key, build, say=lambda message: send(Said(job.name, message)))


def _evaluate_folder(folder: Path, recipe: DemoRecipe, *, with_image: bool) -> dict[str, Any]:
    from vgs_distill.demo.worlds import make_world

    model, processor = _load(folder)
    examples = make_world(recipe.task).balanced_test(recipe.evaluation.examples, recipe.evaluation.seed)
    return _evaluation_record(model, processor, examples, recipe, with_image=with_image)


def _evaluation_record(
    model: Any, processor: Any, examples: Any, recipe: DemoRecipe, *, with_image: bool = True
) -> dict[str, Any]:
    from vgs_distill.demo.evaluate import evaluate

    return asdict(evaluate(model, processor, examples, recipe.evaluation, with_image=with_image))


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def _run_distillation(job: DistillJob, send: Callable[[Message], None]) -> dict[str, Any]:
    from vgs_distill.demo.distillation import distill
    from vgs_distill.demo.worlds import make_world, to_prompt_dataset

    recipe = job.recipe
    world = make_world(recipe.task)
    # Prompts differ from seed to seed and are the same for all methods of one seed.
    prompts = to_prompt_dataset(
        world.training_questions(
            recipe.distillation.prompts, job.seed, recipe.distillation.prior, stream="distillation"
        )
    )
    student, processor = _load(job.start)
    teacher, _ = _load(job.teacher)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        history = distill(
            student,
            teacher,
            processor,
            prompts,
            recipe.distillation,
            job.method,
            job.seed,
            Path(scratch),
            _reporter(job, send),
        )
    trained = time.perf_counter()
    examples = world.balanced_test(recipe.evaluation.examples, recipe.evaluation.seed)
    evaluation = _evaluation_record(student, processor, examples, recipe)
    without_image = _evaluation_record(student, processor, examples, recipe, with_image=False)
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
        "seconds": {"training": trained - began, "evaluation": evaluated - trained},
    }
