"""`linear_decomposed_kl` against the products alone, plain torch, torch.compile, TRL and Liger.

    python -m benchmarks.linear_decomposed_kl                 512 tokens, width 1024, vocabulary 151936; bf16 and fp32,
                                                              1 and 2 threads; one record a case
    python -m benchmarks.linear_decomposed_kl --quick         a few seconds, small shapes, for a look

Each case runs in a fresh process and is skipped when a record of the same code, machine and case is there. The gate
comes first: errors of values, hidden gradients and head gradients against fp64, at most twice plain torch's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs, linear_gate, oracle, peers, products
from benchmarks.harness.cases import DTYPES, case_of, case_parser, drive
from benchmarks.harness.gates import Gate, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD, MIB
from benchmarks.harness.records import Record, Target
from benchmarks.inputs import DECOMPOSITIONS, USES_MASKED_STUDENT, Streams, peaked_streams, random_heads, random_streams
from benchmarks.linear_gate import GATE_TOKENS, STEERING_WEIGHTS, narrow_gate, run_gate
from benchmarks.products import PRODUCTS, floor_rows, product_calls
from vgs_kernels import backend
from vgs_kernels.old_linear.api import DEFAULT_MAX_CHUNK_BYTES

NAME = "linear_decomposed_kl"
TARGET_SHAPE = {"tokens": 512, "width": 1024, "teacher_width": 1024, "vocab": 151936}
# A logit gradient sums to 0 over the vocabulary, so hidden gradients cancel and feel a drop more than in proportion; in
# bf16, entries that were close to the middle of two numbers are rounded the other way on top of that.
GRADIENT_FILTER = 1.1e-4
COMPILE_LIMIT_S = 150.0
# What no target uses.
_CONTEXT = ("compiled_decomposed", "liger", "bayes_both", "bayes_objective", "matched_both", "matched_objective")
CONTEXT = {"bf16": _CONTEXT, "fp16": _CONTEXT, "fp32": (*_CONTEXT, "trl"), "fp64": (*_CONTEXT, "trl")}
# Seconds of a case at the targets' shape on one core, for the estimate only.
EXPECTED_SECONDS = {"bf16": 170.0, "fp16": 170.0, "fp32": 330.0}
SOURCES = [Path(__file__), *(Path(str(used.__file__)) for used in (inputs, linear_gate, oracle, peers, products))]


def line_up(
    shape: dict[str, int], dtype: str, heads: tuple[Tensor, Tensor], device: str, compile_peers: bool
) -> Lineup:
    """The products, the peers and our calls, in the order of the turns."""
    lineup = Lineup(device)
    streams = random_streams(shape["tokens"], heads)
    for name, call in product_calls(streams).items():
        lineup.add(name, PRODUCTS[name], call)
    _add_peers(lineup, streams, dtype, compile_peers)
    _add_ours(lineup, streams, shape, dtype)
    _add_filtered(lineup, peaked_streams(shape["tokens"], heads))
    return lineup


def _add_peers(lineup: Lineup, streams: Streams, dtype: str, compile_peers: bool) -> None:
    other_teacher = Streams(
        streams.student, streams.masked_student, streams.masked_teacher, streams.teacher, *streams.heads
    )
    teachers = itertools.cycle([streams, other_teacher])
    lineup.add(
        "naive_decomposed", "plain torch, both components (teacher_prior)",
        lambda: peers.naive_decomposed("teacher_prior", streams), ours="teacher_prior_both",
    )  # fmt: skip
    lineup.add(
        "naive_monolithic",
        "plain torch, monolithic reverse KL",
        lambda: peers.naive_monolithic(streams),
        ours="teacher_prior_objective",
    )
    if dtype in ("bf16", "fp16"):
        lineup.add(
            "naive_decomposed_narrow", f"the same, softmax in {dtype}",
            lambda: peers.naive_decomposed("teacher_prior", streams, widen=False), ours="teacher_prior_both",
        )  # fmt: skip
        lineup.add(
            "naive_monolithic_narrow", f"plain torch, monolithic, softmax in {dtype}",
            lambda: peers.naive_monolithic(streams, widen=False), ours="teacher_prior_objective",
        )  # fmt: skip
    if compile_peers:
        compiled = peers.compiled_decomposed("teacher_prior")
        lineup.add(
            "compiled_decomposed",
            "plain torch under torch.compile, both components",
            lambda: compiled(streams),
            ours="teacher_prior_both",
        )
    lineup.add(
        "trl",
        "TRL chunked divergence, once per teacher",
        lambda: peers.trl_reverse_kl(next(teachers)),
        calls=2,
        ours="teacher_prior_both",
    )
    lineup.add(
        "liger", f"Liger chunked distillation, once per teacher{' (compiled)' if compile_peers else ''}",
        lambda: peers.liger_reverse_kl(next(teachers), compile_peers), calls=2, ours="teacher_prior_both",
    )  # fmt: skip


def _add_ours(lineup: Lineup, streams: Streams, shape: dict[str, int], dtype: str) -> None:
    weights = torch.tensor(STEERING_WEIGHTS, device=lineup.device)
    for decomposition in DECOMPOSITIONS:
        four = decomposition in USES_MASKED_STUDENT
        lineup.add(
            f"{decomposition}_both", f"ours, {decomposition}, both components",
            lambda d=decomposition: peers.ours_decomposed(d, streams),  # type: ignore[misc]
            floor="floor_8" if four else "floor_7",
            bytes_moved=traffic(shape, dtype, lineup.device, decomposition, combined=False),
        )  # fmt: skip
        lineup.add(
            f"{decomposition}_objective", f"ours, {decomposition}, objective",
            lambda d=decomposition: peers.ours_objective(d, streams, weights),  # type: ignore[misc]
            floor="floor_8" if four else "floor_5",
            bytes_moved=traffic(shape, dtype, lineup.device, decomposition, combined=True),
        )  # fmt: skip


def _add_filtered(lineup: Lineup, peaked: Streams) -> None:
    weights = torch.tensor(STEERING_WEIGHTS, device=lineup.device)
    label = f"ours, teacher_prior, {{}}, gradient_filter={GRADIENT_FILTER:g}, peaked inputs"
    lineup.add(
        "filtered_both", label.format("both components"),
        lambda: peers.ours_decomposed("teacher_prior", peaked, gradient_filter=GRADIENT_FILTER), floor="floor_3",
    )  # fmt: skip
    lineup.add(
        "filtered_objective", label.format("objective"),
        lambda: peers.ours_objective("teacher_prior", peaked, weights, gradient_filter=GRADIENT_FILTER),
        floor="floor_3",
    )  # fmt: skip


BYTE_MODEL = (
    "ours: logits written once and read twice (values, gradients) per stream, logit gradients written once and read "
    "by two products; per chunk of tokens both heads read once and, per component product, the student head read once "
    "and its gradient read and written"
)


def traffic(shape: dict[str, int], dtype: str, device: str, decomposition: str, combined: bool) -> int:
    """Bytes that our call moves through memory by `BYTE_MODEL`."""
    itemsize = DTYPES[dtype].itemsize
    logit_itemsize = max(4, itemsize) if device == "cuda" else itemsize  # GPUs project 16-bit operands into fp32
    streams = 4 if decomposition in USES_MASKED_STUDENT else 3
    gradients = 1 if combined and streams == 3 else 2
    products = 1 if combined else 2
    entries = shape["tokens"] * shape["vocab"]
    logits = entries * (3 * streams * logit_itemsize + 3 * gradients * itemsize)
    student_head, teacher_head = (shape["vocab"] * shape[width] * itemsize for width in ("width", "teacher_width"))
    chunk_tokens = max(1, DEFAULT_MAX_CHUNK_BYTES[device] // (streams * shape["vocab"] * logit_itemsize))
    chunks = math.ceil(shape["tokens"] / chunk_tokens)
    return logits + chunks * (student_head + teacher_head + 3 * products * student_head)


def filter_facts(shape: dict[str, int], heads: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What the filter changes at full size, relative to the norm of the unfiltered gradients, per gradient."""
    peaked = peaked_streams(shape["tokens"], heads)
    with torch.no_grad():
        entropy = peers.ours("teacher_prior", peaked).tokens.entropy.mean().item()
    whole = peers.ours_decomposed("teacher_prior", peaked)
    filtered = peers.ours_decomposed("teacher_prior", peaked, gradient_filter=GRADIENT_FILTER)
    names = ("lang hidden", "lang head", "vis hidden", "vis head")
    return {
        "peaked_student_entropy": entropy,
        "gradient_filter": GRADIENT_FILTER,
        "gradient_filter_change": {
            name: relative_error(a, b) for name, a, b in zip(names, filtered, whole, strict=True)
        },
    }


TARGETS = {  # times faster than plain torch in both components; time of the objective over plain torch's monolithic KL
    "bf16": (4.0, 0.6),
    "fp32": (2.0, 0.95),
}


def targets(record: Record, dtype: str) -> list[Target]:
    """At `TARGET_SHAPE`, against the faster spelling of plain torch."""
    both_limit, objective_limit = TARGETS[dtype]
    naive, monolithic = (fastest(record, name) for name in ("naive_decomposed", "naive_monolithic"))
    peaks = [
        row.peak_bytes for name in ("both", "objective")
        if (row := record.row(f"teacher_prior_{name}")) is not None and row.peak_bytes is not None
    ]  # fmt: skip
    found = [
        Target(
            "teacher_prior, both components: times faster than plain torch, both components",
            record.ratio(naive, "teacher_prior_both"), both_limit,
            "the 7 products alone are 8 times faster in bf16, 2.5 times in fp32", at_least=True,
        ),
        Target(
            "teacher_prior, objective: time over plain torch's monolithic reverse KL",
            record.ratio("teacher_prior_objective", monolithic), objective_limit,
            "steering costs less than the loss that it replaces",
        ),
        Target(
            "teacher_prior: peak memory above inputs and gradients, MiB",
            max(peaks) / MIB if peaks else None, 128, "one stream of fp32 logits would be 297",
        ),
    ]  # fmt: skip
    if dtype == "bf16":
        text = "teacher_prior, both components: times faster than TRL called twice"
        trl = record.row("trl")
        ratio = None if trl is None or record.more_exact(trl) else record.ratio("trl", "teacher_prior_both")
        found.append(Target(text, ratio, 8.0, "what the trainer below the engine would call", at_least=True))
    for name, what in (("filtered_both", "both components"), ("filtered_objective", "objective")):
        text = f"gradient_filter on peaked inputs, {what}: time over the 3 projections alone"
        found.append(Target(text, record.ratio(name, "floor_3"), 1.5, "no value comes without the projections"))
    return found + filter_targets(record.facts)


def filter_targets(facts: dict[str, Any]) -> list[Target]:
    change = facts.get("gradient_filter_change")
    largest = max(change.values()) if change else None
    return [
        Target(
            "gradient_filter: largest relative change of a gradient", largest, 1e-3,
            "below a rounding of bf16, 2e-3",
        ),
        Target(
            "peaked inputs: mean student entropy, nats", facts["peaked_student_entropy"], 2.0,
            "the filter is for peaked students",
        ),
    ]  # fmt: skip


def fastest(record: Record, name: str) -> str:
    """The faster of a plain-torch peer's spellings that pass the gate: softmax in fp32, or in the inputs' 16 bits."""
    rows = [row for row in (record.row(name), record.row(f"{name}_narrow")) if row is not None and row.median]
    return min(rows, key=lambda row: row.median or math.inf).name if rows else name


def measure(shape: dict[str, int], dtype: str, threads: int, device: str, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    heads = random_heads(shape["width"], shape["teacher_width"], shape["vocab"], DTYPES[dtype], device)
    gate, errors_at_kl = run_gate(heads, min(GATE_TOKENS, shape["tokens"]))
    print(gate.describe(), flush=True)
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), sources=digest(),
        error_floor=max((check.floor for check in gate.checks), default=0.0),
        facts={
            "backend": backend.resolve("decomposed_kl", torch.device(device)),
            "memory": MEMORY_METHOD[device],
            "bytes": BYTE_MODEL,
            "gate_seconds": time.perf_counter() - start,
        },
    )  # fmt: skip
    if not gate.passed:
        return record
    lineup = line_up(shape, dtype, heads, device, compile_peers=not args.no_compile)
    if dtype in ("bf16", "fp16"):
        drop_narrow(lineup, narrow_gate(heads, min(GATE_TOKENS, shape["tokens"])))
    for name in ("compiled_decomposed", "liger"):
        if name in lineup.calls:
            record.facts[f"{name}_first_call_seconds"] = lineup.call_first(name, COMPILE_LIMIT_S)
    timings = lineup.take_turns(
        args.rounds, 3 * args.rounds, args.budget, context=CONTEXT[dtype],
        warm_up=[name for name in lineup.calls if device == "cuda" or name in PRODUCTS],
    )  # fmt: skip
    for name, errors in errors_at_kl.items():
        lineup.rows[name].errors = errors
    record.rows = [*floor_rows(timings), *lineup.rows.values()]
    lineup.calls.clear()
    record.facts |= filter_facts(shape, heads)
    if shape == TARGET_SHAPE and device == "cpu" and dtype in TARGETS:
        record.targets = targets(record, dtype)
    record.facts["case_seconds"] = time.perf_counter() - start
    return record


def drop_narrow(lineup: Lineup, gate: Gate) -> None:
    """Take the 16-bit softmax out of the turns where it fails the gate, and say by how much."""
    if not gate.passed:
        worst = max(check.error / check.allowed for check in gate.checks)
        for name in ("naive_decomposed_narrow", "naive_monolithic_narrow"):
            lineup.drop(name, f"not timed: fails the gate, values off by {worst:.0f}× what is allowed")


def digest() -> str:
    return source_digest(*SOURCES)


def expected_seconds(shape: dict[str, int], dtype: str, threads: int) -> float:
    size = shape["tokens"] * shape["width"] * shape["vocab"] / (512 * 1024 * 151936)
    return 30 + EXPECTED_SECONDS.get(dtype, 600.0) * size / min(threads, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--teacher-width", type=int, help="default: the student's")
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.width, args.vocab, args.no_compile, args.budget = 64, 256, 8192, True, 0.2
    shape = {
        "tokens": args.tokens,
        "width": args.width,
        "teacher_width": args.teacher_width or args.width,
        "vocab": args.vocab,
    }
    return drive(
        "benchmarks.linear_decomposed_kl",
        args,
        shape,
        digest(),
        lambda dtype, threads: measure(shape, dtype, threads, args.device, args),
        lambda dtype, threads: expected_seconds(shape, dtype, threads),
    )


if __name__ == "__main__":
    sys.exit(main())
