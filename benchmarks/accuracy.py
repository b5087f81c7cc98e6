"""How many digits survive from hidden states to gradients: reverse KL by every way, against fp64 on the very inputs.

    python -m benchmarks.accuracy            256 tokens, width 1024, vocabulary 151936; bf16 and fp16
    python -m benchmarks.accuracy --quick    small shapes

A divergence lives on differences of logits, so the student is put close to its teacher: KL of 0.1, 0.01 and 0.001 nats
a token, at logits of standard deviation 4 and 30. The loss's error is relative, a gradient's is its largest error over
its largest entry. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import linear_gate, peers
from benchmarks.harness.cases import DTYPES, case_of, case_parser, drive
from benchmarks.harness.gates import Gate, accumulation_dtype
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.records import Record, Row, Target
from benchmarks.harness.tables import error_text
from benchmarks.inputs import converging_streams, random_heads, rotate_head
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.peers import Way
from benchmarks.truth import Errors, Truth
from vgs_kernels import backend

NAME = "accuracy"
STANDARD = OBJECTIVES["standard"]
NUMBERS = ("loss", "hidden_gradient", "head_gradient")
DEVIATIONS = (4.0, 30.0)
DIVERGENCES = (1e-1, 1e-2, 1e-3)
LABELS = {
    "ours": "ours",
    "plain_fp32": "plain torch, fp32 logits",
    "plain_16_bit": "plain torch, 16-bit logits",
    "trl": "TRL",
    "liger": "Liger, chunked",
    "liger_compiled": "Liger, chunked, compiled",
    "liger_fused": "Liger, fused",
}
GRADIENT_LIMIT, LOSS_LIMIT = 1e-2, 1e-5


def ways(dtype: str, device: str, compile_peers: bool) -> dict[str, Way]:
    """What is compared, by the names of `LABELS`."""
    found: dict[str, Way] = {
        "ours": lambda streams: METHODS["opd"].ours(streams)[0],
        "plain_fp32": lambda streams: peers.plain(STANDARD, streams, accumulation_dtype(DTYPES[dtype])),
        "trl": peers.trl_reverse_kl,
        "liger": lambda streams: peers.liger_reverse_kl(streams, compiled=False),
    }
    if DTYPES[dtype].itemsize == 2:
        found["plain_16_bit"] = lambda streams: peers.plain(STANDARD, streams)
    if compile_peers:
        found["liger_compiled"] = peers.liger_reverse_kl
    if device == "cuda":
        found["liger_fused"] = peers.liger_fused_reverse_kl
    return {name: found[name] for name in LABELS if name in found}


def cases() -> Iterator[tuple[float, float]]:
    """Deviation of the logits, KL in nats."""
    for deviation in DEVIATIONS:
        for divergence in DIVERGENCES:
            yield deviation, divergence


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    start = time.perf_counter()
    head, _ = random_heads(shape["width"], shape["teacher_width"], shape["vocab"], DTYPES[dtype], args.device)
    rotation = rotate_head(head, shape["teacher_width"])
    compared = ways(dtype, args.device, compile_peers=not args.no_compile)
    rows, checks, reached = [], [], {}
    for deviation, divergence in cases():
        where = f"{deviation:g},{divergence:g}"
        streams = converging_streams(shape["tokens"], rotation, deviation, divergence)
        exact = Truth(streams, {"standard": STANDARD})
        reached[where] = exact.losses["standard"].mean().item()
        errors: dict[str, Errors] = {}
        for name, way in compared.items():
            row = Row(f"{name}@{where}", f"{LABELS[name]}, logits ± {deviation:g}, KL {divergence:g}")
            try:
                errors[name] = exact.errors("standard", way(streams))
                row.errors = {number: getattr(errors[name], number) for number in NUMBERS}
            except Exception as error:
                row.note = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            print(f"  {row.label}: {row.note or ', '.join(map(error_text, row.errors.values()))}", flush=True)
        others = [found for name, found in errors.items() if name != "ours"]
        floors = linear_gate.floors(DTYPES[dtype], exact, "standard")
        checks += linear_gate.checks(where, errors["ours"], others, floors)
    gate = Gate(tuple(checks), linear_gate.HELD_TO)
    facts = {
        "backend": backend.resolve("stream_kl", torch.device(args.device)),
        "reached_kl": reached,
        "case_seconds": time.perf_counter() - start,
    }
    return Record(
        NAME, case_of(shape, dtype, threads), gate, rows, environment(args.device), targets(rows), facts,
        sources=digest(),
    )  # fmt: skip


def targets(rows: Sequence[Row]) -> list[Target]:
    own = [row.errors for row in rows if row.name.startswith("ours@") and row.errors]
    if not own:
        return []
    gradients = max(max(errors["hidden_gradient"], errors["head_gradient"]) for errors in own)
    return [
        Target("gradients: largest error over the largest entry", gradients, GRADIENT_LIMIT,
               "a 16-bit gradient is itself rounded by 0.2 to 0.4 %"),
        Target("loss: relative error", max(errors["loss"] for errors in own), LOSS_LIMIT,
               "logits and sums in fp32"),
    ]  # fmt: skip


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """A line for every deviation and KL, a column for every way: errors of loss, hidden and head gradient."""
    names = [name for name in LABELS if any(row.name.startswith(f"{name}@") for row in record.rows)]
    lines = []
    for where in dict.fromkeys(row.name.partition("@")[2] for row in record.rows):
        deviation, divergence = where.split(",")
        line = [f"± {deviation}, KL {divergence}"]
        for name in names:
            row = record.row(f"{name}@{where}")
            assert row is not None
            line.append(row.note or " / ".join(error_text(error) for error in row.errors.values()))
        lines.append(line)
    return ["logits", *(LABELS[name] for name in names)], lines


def digest() -> str:
    return source_digest(Path(__file__), *linear_gate.SOURCES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = case_parser(__doc__)
    parser.set_defaults(dtype="bf16,fp16", threads="2")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.width, args.vocab, args.no_compile = 16, 256, 8192, True
    shape = {"tokens": args.tokens, "width": args.width, "teacher_width": args.width, "vocab": args.vocab}
    size = args.tokens * args.width * args.vocab / (256 * 1024 * 151936)
    return drive(
        "benchmarks.accuracy",
        args,
        {key: shape[key] for key in ("tokens", "width", "vocab")},
        digest(),
        lambda dtype, threads: measure(shape, dtype, threads, args),
        lambda _dtype, threads: 30 + 900 * size / min(threads or 1, 2),
    )


if __name__ == "__main__":
    sys.exit(main())
