"""The `vgs` command: turns flags into calls, errors into one sentence and an exit code. No logic of its own.

Exit codes: 0 fine, 1 failed on the way, 2 bad input, 130 stopped by hand. Bad input is one sentence without a
traceback, unless `vgs --debug` or VGS_DEBUG=1 asks for it.

The standard library only, until a command is known: help answers at once, and `vgs doctor` runs where torch is all
that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compatibility import install, installed, summary, trl_problem
from ..errors import InputError, TrainingStopped, nearest
from ..steering.methods import METHODS
from . import fields
from .parsing import Parser

DESCRIPTION = "Distil vision-language models with visual gradient steering."


@dataclass(frozen=True)
class Command:
    """One subcommand; `run` takes the arguments behind its name and returns the exit code."""

    run: Callable[[Sequence[str]], int]
    summary: str
    extra: str | None  # what has to be installed for it, beside the kernels


def look_parser() -> Parser:
    """The flags of `vgs train` that are no fields; the others are left to it."""
    parser = Parser(prog="vgs train", add_help=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    parser.add_argument("--preview", type=int, nargs="?", const=1, default=0)
    parser.add_argument("--plan", type=int, nargs="?", const=1024, default=0)
    return parser


def _train(arguments: Sequence[str]) -> int:
    asked, others = look_parser().parse_known_args(arguments)
    if asked.preview < 0:
        raise InputError(f"preview must be 1 or more rows, got {asked.preview}")
    if asked.plan < 0:
        raise InputError(f"plan must be 1 or more tokens of a prompt, got {asked.plan}")
    if fields.answer("train", others):
        return 0
    if asked.plan:
        from .plan import plan

        plan(others, asked.plan)
        return 0
    from .train import train

    train(others, dry_run=asked.dry_run, preview=asked.preview)
    return 0


def diagnose_parser() -> Parser:
    """The flags of `vgs diagnose` that are none of `vgs train`."""
    parser = Parser(
        prog="vgs diagnose",
        description="Measure a student, its teacher and a few dozen prompts before any training: how far the student "
        "is from its teacher with the image and without, how many tokens need the image, the angles between the parts "
        "of the loss, what steering costs. Writes a page with a recommendation and its reason. Takes the YAML file and "
        "the flags of vgs train besides these, and trains nothing.",
        usage="vgs diagnose [--rows N] [--output PAGE] [--config FILE] [FLAG OF vgs train]...",
    )
    add = parser.add_argument
    add("--rows", type=int, default=48, metavar="N", help="Rows to sample a completion for. (default: 48)")
    add("--output", type=Path, default=Path("diagnosis.html"), metavar="PAGE", help="The page to write; its numbers "
        "go into a .json file beside it. (default: diagnosis.html)")  # fmt: skip
    return parser


def _diagnose(arguments: Sequence[str]) -> int:
    asked, others = diagnose_parser().parse_known_args(arguments)
    fields.check("train", ["--output_dir=none", *others])  # of a run, and there is none
    from .diagnose import run_diagnosis

    run_diagnosis(others, asked.rows, asked.output)
    return 0


def _eval(arguments: Sequence[str]) -> int:
    if fields.answer("eval", arguments):
        return 0
    from .evaluate import evaluate

    evaluate(arguments)
    return 0


def demo_parser() -> Parser:
    parser = Parser(
        prog="vgs demo",
        description="Train a small Qwen3-VL student from a teacher, on this machine, without a GPU. The teacher is "
        "trained first and kept for the next time. From one start the student then goes through plain on-policy "
        "distillation (OPD), through visual gradient steering (VGS), and through OPD for as long as VGS takes, and "
        "answers questions about pictures it has never seen. Leaves results.json, report.html and the students, which "
        "transformers loads.",
    )
    add = parser.add_argument
    add(
        "--task",
        choices=("digits", "shapes", "easyvqa"),
        default="digits",
        help="Handwritten digits in a grid, coloured shapes in a grid, or the public data set easy-VQA. "
        "(default: digits)",
    )
    add("--seeds", type=int, default=1, help="Number of student starts; every method runs from each. (default: 1)")
    add(
        "--method",
        choices=tuple(METHODS),
        action="append",
        help="What is compared; repeat for several. OPD, the baseline, runs in any case, and a "
        "second time for as long as the first steered method takes. (default: vgs)",
    )
    add(
        "--eta",
        type=_number_or_word,
        action="append",
        metavar="measured|amortized|FLOAT",
        help="How the weights of a method's two gradients are found; repeat to compare. (default: the method's own)",
    )
    add(
        "--gamma",
        type=float,
        help="Weight of the visual part, for vgs_unit, matched and teacher_prior a share in [0, 1]. (default: vgs 2, "
        "language 1, matched and teacher_prior 0.8, vgs_unit 0.7)",
    )
    add("--steps", type=int, help="Distillation steps. (default: the task's recipe)")
    add("--output-dir", type=Path, help="Where results, report and students go. (default: runs/demo-TASK)")
    add("--quick", action="store_true", help="Fewer steps and a smaller test set.")
    add("--jobs", type=int, help="Worker processes. (default: one per processor)")
    return parser


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _demo(arguments: Sequence[str]) -> int:
    asked = demo_parser().parse_args(arguments)
    from ..demo.run import DemoError, run_demo

    if asked.seeds < 1:
        raise InputError("seeds must be 1 or more")
    try:
        run_demo(
            asked.task,
            seeds=range(asked.seeds),
            methods=asked.method or ["vgs"],
            etas=asked.eta or [None],
            gamma=asked.gamma,
            steps=asked.steps,
            output_dir=asked.output_dir or Path("runs") / f"demo-{asked.task}",
            quick=asked.quick,
            jobs=asked.jobs,
        )
    except DemoError as error:
        return _fail(str(error), code=1)
    return 0


def report_parser() -> Parser:
    parser = Parser(
        prog="vgs report",
        description="Write one self-contained HTML page about a training run, or about several laid over each other: "
        "losses, gradients, time, and what the student wrote, beside what the teacher answers. The page needs no "
        "network and no script, reads on a phone and prints; runs that still train may be reported too. Accuracies are "
        "those that `vgs eval --output_file` left as eval*.json in RUN_DIR or its checkpoint-* folders.",
    )
    add = parser.add_argument
    add("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="Output directory of a run, finished or not.")
    add(
        "--output",
        type=Path,
        help="The file to write. (default: RUN_DIR/report.html; of several runs vgs-report.html in this folder)",
    )
    add(
        "--watch", action="store_true", help="Write it anew whenever a run logs, until Ctrl-C; the page reloads itself."
    )
    return parser


def _report(arguments: Sequence[str]) -> int:
    asked = report_parser().parse_args(arguments)
    from ..report.run import write_report
    from ..report.watch import watch

    if asked.watch:
        watch(asked.run_dirs, asked.output)
    else:
        print(f"Written: {write_report(asked.run_dirs, asked.output)}")
    return 0


def export_parser() -> Parser:
    parser = Parser(
        prog="vgs export",
        description="Write the model of a run, or of one of its checkpoints, with its processor into a folder of its "
        "own, without what only training needs. An adapter stays one, unless --merge adds it to the model it belongs "
        "to.",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="Output directory of a run, or a checkpoint in it.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL", help="The folder to make.")
    parser.add_argument("--merge", action="store_true", help="Add a LoRA adapter to the weights of its model.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that the model's repository ships.")
    return parser


def _export(arguments: Sequence[str]) -> int:
    asked = export_parser().parse_args(arguments)
    from .export import export

    written = export(asked.run_dir, asked.output, merge=asked.merge, trust_remote_code=asked.trust_remote_code)
    print(f"Written: {asked.output} ({written})")
    return 0


def doctor_parser() -> Parser:
    return Parser(
        prog="vgs doctor",
        description="Say which backend runs every kernel here and why nothing faster does, with versions and devices; "
        "test all of them, with exit code 1 if one errs. Needs torch only.",
    )


def _doctor(arguments: Sequence[str]) -> int:
    doctor_parser().parse_args(arguments)
    from .doctor import doctor

    return 0 if doctor() else 1


def _bench(arguments: Sequence[str]) -> int:
    """The benchmarks write records and documentation into the repository: part of it and not of the package."""
    found = importlib.util.find_spec("vgs_kernels")
    assert found is not None
    assert found.origin is not None
    repository = Path(found.origin).resolve().parent.parent
    if not (repository / "benchmarks" / "__main__.py").exists():
        raise InputError(
            "the benchmarks are in the repository, not in the installed package: clone it, "
            "`pip install --no-build-isolation -e '.[bench]'` there, and call `vgs bench` again"
        )
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=repository, check=False).returncode


COMMANDS = {
    "train": Command(_train, "distil a teacher into a student of your own, from a YAML file and flags", "train"),
    "diagnose": Command(_diagnose, "say before any training whether steering is worth it, and why", "train"),
    "eval": Command(_eval, "measure a model with and without its images: accuracy, divergence from a teacher", "train"),
    "export": Command(_export, "write the model of a run into a folder of its own; merge its adapter", "train"),
    "report": Command(_report, "write one HTML page about runs: losses, gradients, what the student wrote", "train"),
    "demo": Command(_demo, "train a small Qwen3-VL student from a teacher on this machine, without a GPU", "demo"),
    "doctor": Command(_doctor, "say which backend runs every kernel and why nothing faster does; test all", None),
    "bench": Command(_bench, "measure the kernels against plain torch, TRL and Liger", "bench"),
}


def parser() -> Parser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="vgs",
        usage="vgs [--debug] COMMAND [ARGUMENT]...",
        description=f"{DESCRIPTION}\n\ncommands:\n{listing}\n\n`vgs COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks, as VGS_DEBUG=1 does")
    parser.add_argument("--version", action="store_true", help="show the version and how it was built")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `vgs` with these arguments and return its exit code; `--help` ends in SystemExit, as argparse does."""
    name = None
    try:
        asked = parser().parse_args(arguments)
        if asked.debug:
            os.environ["VGS_DEBUG"] = "1"
        if asked.version:
            print(summary())
            return 0
        name = asked.command
        if name is None:
            parser().print_help()
            return 2
        if name not in COMMANDS:
            remedy = nearest(name, COMMANDS) or "; vgs --help lists them"
            raise InputError(f"vgs has no command {name!r}{remedy}")
        command = COMMANDS[name]
        if command.extra is not None and (problem := trl_problem(installed("trl"))) is not None:
            return _fail(problem)
        return command.run(asked.arguments)
    except InputError as error:
        if os.environ.get("VGS_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(str(error))
    except TrainingStopped as error:
        return _fail(str(error), code=1)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = COMMANDS[name].extra if name in COMMANDS else None
        if extra is None or module in ("", "vgs_distill", "vgs_kernels"):
            raise
        return _fail(f"vgs {name} needs {module}, which is not installed; install it with: {install(extra)}")
    except KeyboardInterrupt:
        return _fail("stopped; what had finished is on disk", code=130)


def _fail(sentence: str, code: int = 2) -> int:
    print(f"vgs: {sentence}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Leave out what a user can do nothing about. To be called before the libraries are imported.

    TRL uses names that transformers has replaced, and is told so many times a run. Bars for loading weights and reading
    rows fill a file with repetitions where there is no terminal.
    """
    warnings.filterwarnings(
        "ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated and will be removed in v6", FutureWarning
    )
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Entry point of the `vgs` script."""
    quiet_libraries()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE
    sys.exit(code)


if __name__ == "__main__":
    main()
