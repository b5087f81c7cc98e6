"""The cases of a benchmark: a fresh process each, and none for what is on record."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import REPOSITORY
from benchmarks.harness.records import RECORDS, Record, finished_record, write_record
from benchmarks.harness.tables import describe_record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One case of a benchmark, for `run_cases`."""

    label: str
    arguments: Sequence[str]
    threads: int
    expected_seconds: float
    finished: Record | None  # of an earlier run; the case is then shown, not measured


def case_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of a kernel has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,fp32", help="comma-separated: bf16, fp16, fp32, fp64")
    parser.add_argument("--threads", default="1,2", help="comma-separated; ignored on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="turns of every call; fast calls take up to three times")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds below which a call takes further turns")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--roofline", action="store_true", help="a row of the least a call can take; always on a GPU")
    parser.add_argument("--quick", action="store_true", help="small shapes, no compile")
    parser.add_argument("--force", action="store_true", help="measure again what is on record")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process measures the one case
    return parser


def linear_arguments(doc: str | None, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, int]]:
    """Options and shape of a benchmark from hidden states."""
    parser = case_parser(doc)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--teacher-width", type=int, help="default: the student's")
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.width, args.vocab, args.no_compile, args.budget = 64, 256, 8192, True, 0.2
    widths = {"width": args.width, "teacher_width": args.teacher_width or args.width}
    return args, {"tokens": args.tokens, **widths, "vocab": args.vocab}


def drive(
    module: str,
    args: argparse.Namespace,
    shape: Mapping[str, int],
    sources: str,
    measure: Callable[[str, int], Record],
    expected_seconds: Callable[[str, int], float],
) -> int:
    """Run every (dtype, threads) of `args`, each in a fresh process; in such a process (`--here`) measure the one."""
    threads = [int(n) for n in args.threads.split(",")] if args.device == "cpu" else [0]
    choices = [(dtype, n) for dtype in args.dtype.split(",") for n in threads]
    if args.here:
        ((dtype, count),) = choices
        if count:
            torch.set_num_threads(count)
        record = measure(dtype, count)
        print(f"record: {write_record(record, args.records)}\n{describe_record(record)}", flush=True)
        return 0 if record.gate.passed else 1
    passed_on = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    passed_on += [f"--{key}={getattr(args, key)}" for key in ("device", "rounds", "budget")]
    flags = [f"--{name.replace('_', '-')}" for name in ("no_compile", "roofline") if getattr(args, name)]
    passed_on += [f"--records={args.records.resolve()}", "--here", *flags]
    benchmark = module.rsplit(".", 1)[-1]
    return run_cases(
        module,
        [
            Case(
                label=f"{dtype}{f', {n} threads' if n else ''}",
                arguments=[*passed_on, f"--dtype={dtype}", f"--threads={n}"],
                threads=n,
                expected_seconds=expected_seconds(dtype, n),
                finished=None
                if args.force
                else finished_record(benchmark, case_of(shape, dtype, n), sources, args.device, args.records),
            )
            for dtype, n in choices
        ],
    )


def case_of(shape: Mapping[str, int], dtype: str, threads: int) -> dict[str, Any]:
    """A record's case; `threads` 0 (a GPU) is left out."""
    return {**shape, "dtype": dtype} | ({"threads": threads} if threads else {})


def run_cases(module: str, cases: Sequence[Case]) -> int:
    """Run the unfinished cases, each in a fresh process, with an estimate before; 0 unless one failed."""
    remaining = [case for case in cases if case.finished is None]
    expected = sum(case.expected_seconds for case in remaining)
    print(f"{module}: {len(remaining)} of {len(cases)} cases to measure, about {expected / 60:.1f} min", flush=True)
    status = 0
    for case in cases:
        print(f"\n== {case.label}", flush=True)
        if case.finished is not None:
            print(f"on record (--force measures again)\n{describe_record(case.finished)}", flush=True)
            status = status or int(not case.finished.gate.passed)
        else:
            status = run_case(module, case.arguments, case.threads) or status
    return status


def run_case(module: str, arguments: Sequence[str], threads: int) -> int:
    """Run one case in a fresh process with that many threads (0: as they are); its exit status."""
    variables = dict(os.environ)
    if threads:
        variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, check=False).returncode
