"""How time and memory of OPD and VGS grow with tokens, vocabulary and width; the data of the report's plot.

    python -m benchmarks.sweep            three sweeps, bf16, 2 threads; a few minutes
    python -m benchmarks.sweep --quick    three small points each

One record an axis, rows named `call@value`. Each record's gate runs at the sweep's smallest and largest point.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_gate, peers, products
from benchmarks.harness.cases import DTYPES, Case, run_cases
from benchmarks.harness.gates import Gate
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD
from benchmarks.harness.records import RECORDS, Record, Row, finished_record, write_record
from benchmarks.harness.tables import describe_record, seconds_text
from benchmarks.harness.timing import Timing, interleaved
from benchmarks.inputs import random_heads, random_streams
from benchmarks.linear_gate import HELD_TO, run_gate
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.products import floor_rows, product_calls
from vgs_kernels import backend

NAME = "sweep"
BASE = {"tokens": 128, "vocab": 32768, "width": 512}
AXES = {
    "tokens": (32, 64, 128, 256, 512, 1024, 2048),
    "vocab": (8192, 16384, 32768, 65536, 131072, 151936),
    "width": (128, 256, 512, 1024, 2048),
}
QUICK_BASE = {"tokens": 32, "vocab": 4096, "width": 64}
QUICK_AXES = {"tokens": (16, 32, 64), "vocab": (2048, 4096, 8192), "width": (32, 64, 128)}
LABELS = {
    "plain_opd": "plain torch, OPD",
    "plain_vgs": "plain torch, VGS",
    "opd": "ours, OPD",
    "vgs": "ours, VGS",
    "floor_6": "the 6 products of VGS alone",
}


def calls(shape: dict[str, int], heads: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed at a point, by the names of `LABELS` and of the products."""
    streams = random_streams(shape["tokens"], heads)
    wide = torch.promote_types(heads[0].dtype, torch.float32)
    return {
        **{name: call for name, (_, call) in product_calls(streams).items()},
        "plain_opd": lambda: peers.plain(OBJECTIVES["standard"], streams, wide),
        "plain_vgs": lambda: peers.plain(OBJECTIVES["vgs"], streams, wide),
        "opd": lambda: METHODS["opd"].ours(streams),
        "vgs": lambda: METHODS["vgs"].ours(streams),
    }


def rows_of(point: str, timings: Mapping[str, Timing]) -> list[Row]:
    """The floor and every call at one value of the axis; `point` says which."""
    (floor,) = (row for row in floor_rows(timings, ("vgs",)) if row.name == "floor_6")
    value = point.rpartition(" ")[2]
    floor.name, floor.label = f"floor_6@{value}", f"{LABELS['floor_6']}, {point}"
    found = [floor]
    for name in (name for name in LABELS if name in timings):
        row = Row(
            f"{name}@{value}", f"{LABELS[name]}, {point}", timings[name].seconds, note=timings[name].problem or ""
        )
        row.peak_bytes = timings[name].peak_bytes
        row.floor = floor.name if name == "vgs" else None
        row.ours = f"{name.removeprefix('plain_')}@{value}" if name.startswith("plain_") else None
        found.append(row)
    return found


def measure(axis: str, base: dict[str, int], values: Sequence[int], dtype: str, args: argparse.Namespace) -> Record:
    """One record: every call at every value of the axis, the other sizes as in `base`."""
    start = time.perf_counter()
    gates, rows = [], []
    for value in values:
        shape = base | {axis: value}
        heads = random_heads(shape["width"], shape["width"], shape["vocab"], DTYPES[dtype], args.device)
        if value in (values[0], values[-1]):
            gate, _ = run_gate(heads, ["opd", "vgs"], {})
            print(gate.describe(), flush=True)
            gates.append(gate)
            if not gate.passed:
                break
        timings = interleaved(
            calls(shape, heads), min_rounds=args.rounds, max_rounds=3 * args.rounds, budget_s=args.budget,
            device=args.device,
        )  # fmt: skip
        rows += rows_of(f"{axis} {value}", timings)
        print(f"  {axis} {value}: {seconds_text(rows[-1].median)}", flush=True)
    gate = Gate(tuple(check for gate in gates for check in gate.checks), HELD_TO)
    return Record(
        NAME, case_of(axis, base, values, dtype, args.threads), gate, rows if gate.passed else [],
        environment(args.device), sources=digest(),
        facts={
            "backend": backend.resolve("stream_kl", torch.device(args.device)),
            "memory": MEMORY_METHOD[args.device],
            "case_seconds": time.perf_counter() - start,
        },
    )  # fmt: skip


def case_of(axis: str, base: dict[str, int], values: Sequence[int], dtype: str, threads: int) -> dict[str, object]:
    fixed = {key: value for key, value in base.items() if key != axis}
    case = {"axis": axis, "from": values[0], "to": values[-1], **fixed, "dtype": dtype}
    return case | ({"threads": threads} if threads else {})


def digest() -> str:
    return source_digest(Path(__file__), Path(products.__file__), *linear_gate.SOURCES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", default=",".join(AXES), help="comma-separated: tokens, vocab, width")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="ignored on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--force", action="store_true", help="measure again what is on record")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    base, axes = (QUICK_BASE, QUICK_AXES) if args.quick else (BASE, AXES)
    if args.device == "cuda":
        args.threads = 0
    if args.here:
        if args.threads:
            torch.set_num_threads(args.threads)
        record = measure(args.axis, base, axes[args.axis], args.dtype, args)
        print(f"record: {write_record(record, args.records)}\n{describe_record(record)}", flush=True)
        return 0 if record.gate.passed else 1
    passed_on = [f"--{key}={getattr(args, key)}" for key in ("dtype", "device", "rounds", "budget", "threads")]
    passed_on += [f"--records={args.records.resolve()}", "--here", *(["--quick"] if args.quick else [])]
    cases = [
        Case(
            axis, [*passed_on, f"--axis={axis}"], args.threads, 5 if args.quick else 60,
            None if args.force else finished_record(
                NAME, case_of(axis, base, axes[axis], args.dtype, args.threads), digest(), args.device, args.records
            ),
        )
        for axis in args.axis.split(",")
    ]  # fmt: skip
    return run_cases("benchmarks.sweep", cases)


if __name__ == "__main__":
    sys.exit(main())
