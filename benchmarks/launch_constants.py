"""Which launch constants a GPU would choose: each constant of the Triton kernels varied alone, and tokens a run.

    python -m benchmarks.launch_constants            on a GPU: fp32 logits, 16-bit gradients, a vocabulary of 151936
    python -m benchmarks.launch_constants --quick    small shapes; on a CPU in Triton's interpreter, whose times say
                                                     nothing (--device=cpu, TRITON_INTERPRET=1)

The shipped constants were reasoned (`vgs_kernels/stream_kl/triton_config.py`, `vgs_kernels/linear/rule.py`). The
table at the end is a proposal: a constant stays unless another is faster by more than `WORTHWHILE`, and one that gives
other numbers than the shipped one turns the gate red.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.decomposed_kl import KINDS, logits
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.gates import Check, Gate, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.records import RECORDS, Record, Row, write_record
from benchmarks.harness.runs import head_products
from benchmarks.harness.tables import describe_record, seconds_text, text_table
from benchmarks.inputs import random_heads, random_streams
from benchmarks.methods import METHODS
from vgs_kernels import backend
from vgs_kernels.stream_kl import triton_config
from vgs_kernels.stream_kl.reference import Streams
from vgs_kernels.stream_kl.transform import LogitTransform

NAME = "launch_constants"
VALUES: dict[str, tuple[int, ...]] = {
    "warps": (1, 2, 4, 8),
    "elements_per_lane": (4, 8, 16),
    "programs_per_processor": (3, 6, 12),
}
QUICK_VALUES: dict[str, tuple[int, ...]] = {"warps": (2,), "elements_per_lane": (4,)}
RUNS = (256, 512, 1024, 2048, 4096)  # tokens whose logits are in memory at a time
METHODS_IN_RUNS = ("opd", "vgs")
WORTHWHILE = 0.03
SAME = 1e-4  # of the norm: other sums, and 16-bit gradients rounded the other way
SHAPE = {"tokens": 1024, "vocab": 151936, "run_tokens": 8192, "width": 2048}
QUICK_SHAPE = {"tokens": 2, "vocab": 640, "run_tokens": 600, "width": 16}


class Proposal(NamedTuple):
    """What the table says of one constant in one place."""

    where: str
    constant: str
    shipped: int
    fastest: int
    shipped_seconds: float
    fastest_seconds: float

    @property
    def gain(self) -> float:
        return 1 - self.fastest_seconds / self.shipped_seconds

    @property
    def verdict(self) -> str:
        changes = self.fastest != self.shipped and self.gain > WORTHWHILE
        return f"{self.constant} = {self.fastest}" if changes else "keep"


@contextmanager
def heuristics(device: torch.device, **changes: int) -> Iterator[None]:
    """The kernels launched with some constants changed."""
    shipped = triton_config.describe_device
    described = shipped(device)
    changed = replace(described, heuristics=replace(described.heuristics, **changes))
    triton_config.describe_device = lambda _device: changed  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_config.describe_device = shipped


def kernels_of(kind: str, shape: Mapping[str, int], device: str) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """The two launches of a kind, fp32 logits to bf16 gradients, as a linear call makes them."""
    module = backend.load("stream_kl", "triton")
    count, coefficients = KINDS[kind].streams, KINDS[kind].coefficients
    everything = logits(shape["tokens"], shape["vocab"], torch.float32, device)
    streams = Streams(*everything[:count], *[None] * (4 - count))
    transform = LogitTransform(shape["vocab"])
    weights = torch.tensor(coefficients, device=device).repeat(shape["tokens"], 1)
    out = torch.empty_like(everything[0], dtype=torch.bfloat16)
    values, statistics = module.divergences(streams, transform)

    def gradients() -> Sequence[Tensor]:
        module.logit_gradients(streams, values, statistics, weights, transform, out=out)
        return [out]

    return {"numbers": lambda: module.divergences(streams, transform)[:1], "gradient": gradients}


def vary_kernels(kind: str, shape: Mapping[str, int], args: argparse.Namespace) -> tuple[list[Row], list[Check]]:
    """Rows `kind|kernel|constant=value` of one kind, and whether every variant gives the shipped one's numbers."""
    device = torch.device(args.device)
    shipped = triton_config.describe_device(device).heuristics
    lineup, checks = Lineup(args.device), []
    for kernel, call in kernels_of(kind, shape, args.device).items():
        expected = [tensor.clone() for tensor in call()]
        for constant, values in (QUICK_VALUES if args.quick else VALUES).items():
            for value in sorted({*values, getattr(shipped, constant)}):

                def launch(call: Any = call, changes: dict[str, int] = {constant: value}) -> Any:  # noqa: B006
                    with heuristics(device, **changes):
                        return call()

                name = f"{kind}|{kernel}|{constant}={value}"
                lineup.add(name, name.replace("|", ", "), launch)
                lineup.call_first(name, limit_s=60.0)
                if name in lineup.calls:
                    pairs = zip(launch(), expected, strict=True)
                    worst = max(relative_error(found, exact) for found, exact in pairs)
                    checks.append(Check(name, worst, 0.0, SAME))
    lineup.take_turns(args.rounds, 3 * args.rounds, args.budget)
    return list(lineup.rows.values()), checks


def vary_runs(shape: Mapping[str, int], args: argparse.Namespace) -> list[Row]:
    """Rows `method|run|tokens=value`; the shipped rule's has `shipped` in its note, and its tokens a run."""
    heads = random_heads(shape["width"], shape["width"], shape["vocab"], DTYPES["bf16"], args.device)
    streams = random_streams(shape["run_tokens"], heads)
    lineup = Lineup(args.device)
    for name in METHODS_IN_RUNS:
        method = METHODS[name]
        tried: set[int] = set()  # tokens of the longest run
        for tokens in (None, *RUNS):
            with head_products() as products:
                method.ours(streams, chunk_tokens=tokens)
            longest = max(products)
            if longest in tried:
                continue
            tried.add(longest)
            row = f"{name}|run|tokens={longest}"
            lineup.add(
                row, f"{name}, runs of {longest} tokens", lambda m=method, n=tokens: m.ours(streams, chunk_tokens=n)
            )  # type: ignore[misc]
            lineup.rows[row].note = "shipped" if tokens is None else ""
    lineup.take_turns(args.rounds, 3 * args.rounds, args.budget)
    return list(lineup.rows.values())


def proposals(rows: Sequence[Row], shipped: Mapping[str, int]) -> list[Proposal]:
    """The fastest value of every constant in every place where the shipped one has a time, too."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        *place, assignment = row.name.split("|")
        constant, _, value = assignment.partition("=")
        groups.setdefault((", ".join(place), constant), {})[int(value)] = row
    found = []
    for (where, constant), by_value in groups.items():
        ours = shipped.get(constant) or next((v for v, row in by_value.items() if row.note == "shipped"), None)
        timed = {value: row.median for value, row in by_value.items() if row.median is not None}
        if ours in timed:
            fastest = min(timed, key=timed.__getitem__)
            found.append(Proposal(where, constant, ours, fastest, timed[ours], timed[fastest]))
    return found


def proposal_table(found: Sequence[Proposal]) -> tuple[list[str], list[list[str]]]:
    header = ["launch", "constant", "shipped", "fastest", "shipped takes", "fastest takes", "gain", "proposal"]
    lines = [
        [p.where, p.constant, str(p.shipped), str(p.fastest), seconds_text(p.shipped_seconds),
         seconds_text(p.fastest_seconds), f"{p.gain:.1%}", p.verdict]
        for p in found
    ]  # fmt: skip
    return header, lines


def measure(shape: dict[str, int], args: argparse.Namespace) -> Record:
    rows, checks = [], []
    for kind in KINDS:
        print(f"{KINDS[kind].label}", flush=True)
        some, same = vary_kernels(kind, shape, args)
        rows, checks = rows + some, checks + same
    rows += vary_runs(shape, args)
    shipped = {
        name: getattr(triton_config.describe_device(torch.device(args.device)).heuristics, name) for name in VALUES
    }
    found = proposals(rows, shipped)
    return Record(
        NAME, dict(shape), Gate(tuple(checks), "the shipped constants"), rows, environment(args.device),
        facts={"proposals": [proposal._asdict() for proposal in found], "shipped": shipped},
        sources=source_digest(Path(__file__)),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print(
            "launch_constants: set TRITON_INTERPRET=1 to run on a CPU; there is nothing to time there", file=sys.stderr
        )
        return 2
    if args.device == "cpu":
        from tests.triton_support import interpreter

        interpreter.install()
    record = measure(QUICK_SHAPE if args.quick else SHAPE, args)
    print(f"record: {write_record(record, args.records)}\n{describe_record(record)}")
    found = [Proposal(**proposal) for proposal in record.facts["proposals"]]
    print(text_table(*proposal_table(found)))
    return 0 if record.gate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
