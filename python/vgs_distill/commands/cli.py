"""The `vgs` command: turns flags into calls, errors into one sentence and an exit code. No logic of its own.

Exit codes: 0 fine, 1 failed on the way, 2 bad input, 130 stopped by hand. Bad input is one sentence without a
traceback, unless `vgs --debug` or VGS_DEBUG=1 asks for it.

Layer: cli. Heavy imports happen inside the commands, so that `vgs --help` answers at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vgs_distill.errors import InputError, TrainingStopped

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil vision-language models with visual gradient steering.",
)


# Their flags are the fields of dataclasses, which the parser of the command knows; typer hands all of them on.
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_Rest = Annotated[list[str] | None, typer.Argument(metavar="[--config FILE] [--FIELD VALUE]...")]


@app.callback()
def _vgs(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, as VGS_DEBUG=1 does.")] = False) -> None:
    """Distil vision-language models with visual gradient steering."""
    if debug:
        os.environ["VGS_DEBUG"] = "1"


@app.command(context_settings=_PASS_ON)
def train(arguments: _Rest = None) -> None:
    """Distil a teacher into a student of your own, from a YAML file and flags. --help lists every field."""
    with _one_sentence():
        from vgs_distill.commands.train import train as run

        run(arguments or [])


@app.command("eval", context_settings=_PASS_ON)
def evaluate(arguments: _Rest = None) -> None:
    """Measure a model with and without its images: accuracy, and the divergence from a teacher. --help lists all."""
    with _one_sentence():
        from vgs_distill.commands.evaluate import evaluate as run

        run(arguments or [])


class Task(str, Enum):
    digits = "digits"
    shapes = "shapes"


class Decomposition(str, Enum):
    matched = "matched"
    bayes = "bayes"
    teacher_prior = "teacher_prior"


class Steering(str, Enum):
    exact = "exact"
    amortized = "amortized"


@app.command()
def demo(
    task: Annotated[
        Task, typer.Option(help="digits: handwritten digits in a grid; shapes: coloured shapes in a grid.")
    ] = Task.digits,
    seeds: Annotated[int, typer.Option(min=1, help="Number of student starts; every method runs from each.")] = 1,
    decomposition: Annotated[
        list[Decomposition] | None,
        typer.Option(help="Steered variants beside the monolithic baseline; repeat for several. (default: matched)"),
    ] = None,
    steering: Annotated[
        list[Steering] | None,
        typer.Option(help="How the variants get their gradient; repeat for both. (default: exact)"),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(help="Share of the visual direction in [0, 1]. (default: 0.8, for bayes 0.7)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Distillation steps. (default: the task's recipe)")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where results, report and students go. (default: runs/demo-TASK)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and a smaller test set.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Worker processes. (default: one per processor)")] = None,
) -> None:
    """Train a small Qwen3-VL student from a teacher, on this machine, without a GPU.

    The teacher is trained first and kept for the next time. From one start the student then goes through monolithic
    on-policy distillation (OPD) and through visual gradient steering (VGS), and answers questions about pictures it
    has never seen. Leaves results.json, report.html and the students, which transformers loads.
    """
    from vgs_distill.demo.run import DemoError, run_demo

    try:
        with _one_sentence():
            run_demo(
                task.value,
                seeds=range(seeds),
                decompositions=[d.value for d in decomposition or [Decomposition.matched]],
                steering=[s.value for s in steering or [Steering.exact]],
                gamma=gamma,
                steps=steps,
                output_dir=output_dir or Path("runs") / f"demo-{task.value}",
                quick=quick,
                jobs=jobs,
            )
    except DemoError as error:
        _fail(str(error), code=1)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Output directory of a training run, finished or not.")],
    output: Annotated[Path | None, typer.Option(help="The file to write. (default: RUN_DIR/report.html)")] = None,
) -> None:
    """Write one self-contained HTML page about a training run: losses, gradients, time, and what the student wrote.

    The page needs no network and no script, reads on a phone and prints; a run that still trains may be reported too.
    Accuracies are those that `vgs eval --output_file` left as eval*.json in RUN_DIR or its checkpoint-* folders.
    """
    from vgs_distill.report.run import write_report

    with _one_sentence():
        typer.echo(f"Written: {write_report(run_dir, output)}")


@app.command()
def doctor() -> None:
    """Say which backend runs every kernel here and why nothing faster does; test all, with exit code 1 if one errs."""
    from rich.console import Console

    from vgs_distill.commands.doctor import doctor as run

    if not run(Console()):
        raise typer.Exit(1)


@app.command(context_settings=_PASS_ON)
def bench(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[NAME]... [OPTIONS]")] = None,
) -> None:
    """Measure the kernels against plain torch, TRL and Liger, and write docs/benchmarks.md. --help lists the options.

    The benchmarks write records and documentation into the repository, so they are part of it and not of the package.
    """
    import vgs_kernels

    repository = Path(vgs_kernels.__file__).resolve().parent.parent
    if not (repository / "benchmarks" / "__main__.py").exists():
        _fail(
            "the benchmarks are in the repository, not in the installed package: clone it, "
            "`pip install --no-build-isolation -e '.[bench]'` there, and call `vgs bench` again"
        )
    command = [sys.executable, "-m", "benchmarks", *(arguments or [])]
    raise typer.Exit(subprocess.run(command, cwd=repository, check=False).returncode)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        if os.environ.get("VGS_DEBUG", "0") not in ("", "0"):
            raise
        _fail(str(error))
    except TrainingStopped as error:
        _fail(str(error), code=1)


def _fail(sentence: str, code: int = 2) -> None:
    typer.echo(f"vgs: {sentence}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `vgs` script."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("vgs: stopped; what had finished is on disk", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
