"""Everything that only a GPU can show, in one command and under 30 minutes: is it right, and how near to its roofline.

    make gpu-check                                        with TRL, Liger and everything else that `.venv` holds
    python -m benchmarks.gpu_check --kernels-only         straight from a source tree; torch, triton, numpy, pytest
    python -m benchmarks.gpu_check --dry-run              the same plan on a CPU with tiny sizes; its times say nothing

Steps (`gpu_plan.py`) run one after the other, each in a process of its own: correctness first, then times, then a
proposal for the launch constants. A step that fails, or runs past its limit, is a line of the page and not the end.
Past `--minutes` nothing new begins. All of it goes to one folder, and into the archive beside it: the page, a record a
step and every step's output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import gpu_page
from benchmarks.gpu_plan import Options, Step, plan
from benchmarks.harness.machine import REPOSITORY, environment
from benchmarks.harness.records import read_records

FOLDER = REPOSITORY / "runs" / "gpu-check"
NO_GPU = (
    "gpu-check needs a CUDA or ROCm GPU that torch can see, and this machine has none; --dry-run walks its plan on the "
    "CPU, and `make test` is the check of a machine without one."
)
LEAST_S = 20.0  # a step that has less time than this is not begun


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    status: str  # "passed", "failed" or "left out"
    seconds: float = 0.0
    note: str = ""


def run_steps(steps: Iterable[Step], logs: Path, seconds: float) -> list[Outcome]:
    """Run every step that there is time for."""
    end = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        outcomes.append(_run(step, logs, end - time.monotonic()))
        last = outcomes[-1]
        print(f"{last.status:8}  {step.name}: {last.seconds:.0f} s {last.note}".rstrip(), flush=True)
    return outcomes


def _run(step: Step, logs: Path, left: float) -> Outcome:
    if step.left_out:
        return Outcome(step, "left out", note=step.left_out)
    if left < LEAST_S:
        return Outcome(step, "left out", note="no time was left for it (--minutes)")
    logs.mkdir(parents=True, exist_ok=True)
    log, limit, start = logs / f"{step.name.replace(' ', '-')}.log", min(step.limit_s, left), time.monotonic()
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(_import_paths())} | step.environment
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *step.arguments], cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            note = "" if status == 0 else f"exit code {status}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes, too: torch.compile starts some
            process.wait()
            status, note = 1, f"ran past {limit:.0f} s"
    return Outcome(step, "failed" if status else "passed", time.monotonic() - start, note)


def _import_paths() -> list[str]:
    """A source tree that nobody installed is imported from where it lies."""
    return [str(REPOSITORY), str(REPOSITORY / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def counts(junit_xml: str) -> dict[str, int]:
    """Of the outcomes of a test run."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))
    return {
        key: sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels-only", action="store_true", help="no trainer; no package beyond torch and triton")
    parser.add_argument("--dry-run", action="store_true", help="the whole plan on a CPU with tiny sizes")
    parser.add_argument("--all-tests", action="store_true", help="the whole test suite, not the GPU's tests alone")
    parser.add_argument("--minutes", type=float, default=28.0, help="after these no step begins")
    parser.add_argument("--only", default="", help="comma-separated names of steps, or their beginnings")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the page, the records and the logs")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    folder = args.folder / "dry-run" if args.dry_run else args.folder
    only = tuple(filter(None, args.only.split(",")))
    steps = plan(Options(folder, args.kernels_only, args.dry_run, args.all_tests, only))
    if not steps:
        parser.error(f"no step begins with {args.only}")
    for stale in (folder / "records", folder / "logs"):  # of another commit or machine
        shutil.rmtree(stale, ignore_errors=True)
    (folder / "records").mkdir(parents=True)
    where = environment("cpu" if args.dry_run else "cuda")
    print(f"gpu-check on {where['hardware']['name']}: {len(steps)} steps, at most {args.minutes:g} minutes", flush=True)
    outcomes = run_steps(steps, folder / "logs", 60 * args.minutes)
    tests = folder / "tests.xml"
    page = gpu_page.build(
        [gpu_page.StepLine(o.step.name, o.status, o.seconds, o.note) for o in outcomes],
        read_records(folder / "records"),
        where,
        counts(tests.read_text()) if tests.exists() and not args.dry_run else None,
        args.dry_run,
    )
    (folder / "page.md").write_text(page, encoding="utf-8")
    archive = shutil.make_archive(str(folder), "zip", folder)
    print(f"\n{page}\npage: {folder / 'page.md'}\neverything, to send: {archive}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
