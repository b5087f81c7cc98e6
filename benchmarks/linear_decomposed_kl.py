"""What every method costs from hidden states to gradients, beside the matrix products alone.

    python -m benchmarks.linear_decomposed_kl                 512 tokens, width 1024, vocabulary 151936; bf16 and fp32,
                                                              1 and 2 threads; one record a case
    python -m benchmarks.linear_decomposed_kl --quick         a few seconds, small shapes, for a look

The floor of a method is its products alone, with fp32 logits, from the same turns: 4 for OPD, 6 for VGS (7.2 with
language preservation on 30 % of the rows), 8 for `matched`. Plain torch, compiled and not, is beside VGS.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs, linear_gate, methods, peers, products, roofline
from benchmarks.harness.cases import DTYPES, case_of, drive, linear_arguments
from benchmarks.harness.gates import relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD, MIB
from benchmarks.harness.records import Record, Target
from benchmarks.inputs import Streams, peaked_streams, random_heads, random_streams
from benchmarks.linear_gate import run_gate
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.products import floor_name, floor_rows, product_calls
from vgs_kernels import backend

NAME = "linear_decomposed_kl"
# A logit gradient sums to 0 over the vocabulary, so hidden gradients cancel and feel a drop more than in proportion; in
# bf16, entries that were close to the middle of two numbers are rounded the other way on top of that.
GRADIENT_FILTER = 1.1e-4
FILTERED = "vgs"
COMPILE_LIMIT_S = 300.0
SOURCES = (Path(__file__), Path(products.__file__), Path(roofline.__file__), *linear_gate.SOURCES)


LABELS = {
    "plain_fp32": "plain torch, fp32 logits, VGS",
    "plain_16_bit": "plain torch, 16-bit logits, VGS",
    "compiled_fp32": "plain torch, fp32 logits, VGS, compiled",
    "compiled_16_bit": "plain torch, 16-bit logits, VGS, compiled",
}


def plain_ways(dtype: str, compile_peers: bool) -> dict[str, peers.Way]:
    """VGS in plain torch, by the names of `LABELS`."""
    objective, own = OBJECTIVES["vgs"], DTYPES[dtype]
    logits = {"fp32": torch.promote_types(own, torch.float32)} | ({"16_bit": own} if own.itemsize == 2 else {})
    found: dict[str, peers.Way] = {}
    for name, logits_dtype in logits.items():
        found[f"plain_{name}"] = lambda streams, d=logits_dtype: peers.plain(objective, streams, d)  # type: ignore[misc]
        if compile_peers:
            found[f"compiled_{name}"] = peers.compiled_plain(objective, logits_dtype)
    return found


def line_up(streams: Streams, peaked: Streams, plain: Mapping[str, peers.Way], device: str) -> Lineup:
    """The products, plain torch and our calls, in the order of the turns."""
    lineup = Lineup(device)
    for name, (label, call) in product_calls(streams).items():
        lineup.add(name, label, call)
    for name, way in plain.items():
        lineup.add(name, LABELS[name], lambda way=way: way(streams), ours="vgs")  # type: ignore[misc]
    for name, method in METHODS.items():
        lineup.add(name, f"ours, {method.label}", lambda m=method: m.ours(streams), floor=floor_name(name))  # type: ignore[misc]
    lineup.add(
        "filtered", f"ours, {METHODS[FILTERED].label}, gradient_filter={GRADIENT_FILTER:g}, peaked inputs",
        lambda: METHODS[FILTERED].ours(peaked, gradient_filter=GRADIENT_FILTER), floor="floor_projections",
    )  # fmt: skip
    lineup.add_copy(min(roofline.COPY_BYTES, 4 * streams.tokens * streams.student_head.shape[0]))
    return lineup


def filter_facts(peaked: Streams) -> dict[str, Any]:
    """What the filter changes at full size, relative to the norm of the unfiltered gradients, per gradient."""
    (whole,), (filtered,) = (METHODS[FILTERED].ours(peaked, gradient_filter=e) for e in (None, GRADIENT_FILTER))
    pairs = zip(("hidden", "head"), (*filtered.hidden, filtered.head), (*whole.hidden, whole.head), strict=True)
    return {
        "peaked_student_entropy": methods.student_entropy(peaked),
        "gradient_filter": GRADIENT_FILTER,
        "gradient_filter_change": {name: relative_error(ours, exact) for name, ours, exact in pairs},
    }


def targets(record: Record, dtype: str) -> list[Target]:
    """At `inputs.TARGET_SHAPE` on a CPU."""
    found = []
    for name, limit in products.limits(dtype).items():
        cost = METHODS[name].cost
        found.append(
            Target(f"{METHODS[name].label}: time over its {cost.products:g} products alone",
                   record.ratio(name, floor_name(name)), limit, "the rest is two looks at the logits in the cache")
        )  # fmt: skip
    peaks = [row.peak_bytes for name in METHODS if (row := record.row(name)) and row.peak_bytes is not None]
    change = max(record.facts["gradient_filter_change"].values())
    return [
        *found,
        Target("peak memory above inputs and gradients, the most of all methods, MiB",
               max(peaks) / MIB if peaks else None, 160, "one stream of fp32 logits would be 297"),
        Target("gradient_filter on peaked inputs: time over the projections alone",
               record.ratio("filtered", "floor_projections"), 1.5, "no value comes without the projections"),
        Target("gradient_filter: largest relative change of a gradient", change, 1e-3,
               "below a rounding of bf16, 2e-3"),
        Target("peaked inputs: mean student entropy, nats", record.facts["peaked_student_entropy"], 2.0,
               "the filter is for peaked students"),
    ]  # fmt: skip


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    device = args.device
    heads: tuple[Tensor, Tensor] = random_heads(
        shape["width"], shape["teacher_width"], shape["vocab"], DTYPES[dtype], device
    )
    plain = plain_ways(dtype, compile_peers=not args.no_compile)
    ways = {name: ("vgs", way) for name, way in plain.items()} | {"trl": ("standard", peers.trl_reverse_kl)}
    gate, worst = run_gate(heads, list(METHODS), ways)
    print(gate.describe(), flush=True)
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), sources=source_digest(*SOURCES),
        error_floor=max((check.floor for check in gate.checks), default=0.0),
        facts={
            "backend": backend.resolve("stream_kl", torch.device(device)),
            "memory": MEMORY_METHOD[device],
            "gate_seconds": time.perf_counter() - start,
        },
    )  # fmt: skip
    if not gate.passed:
        return record
    streams, peaked = random_streams(shape["tokens"], heads), peaked_streams(shape["tokens"], heads)
    lineup = line_up(streams, peaked, plain, device)
    for name in plain:
        record.facts[f"{name}_first_call_seconds"] = lineup.call_first(name, COMPILE_LIMIT_S)
    counts = roofline.count_head_products({name: lineup.calls[name] for name in METHODS})
    record.facts["head_products"] = counts
    timings = lineup.take_turns(
        args.rounds, 3 * args.rounds, args.budget, context=plain,
        warm_up=[name for name in lineup.calls if device == "cuda" or name not in plain],
    )  # fmt: skip
    for name, row in lineup.rows.items():
        row.errors = worst.get(name, {})
    floors = floor_rows(timings)
    if device == "cuda" or args.roofline:
        floors += roofline.add_rooflines(lineup.rows, floors, shape, DTYPES[dtype].itemsize, counts)
    record.rows = [*floors, *lineup.rows.values()]
    lineup.calls.clear()
    record.facts |= filter_facts(peaked)
    if shape == inputs.TARGET_SHAPE and device == "cpu" and dtype in ("bf16", "fp32"):
        record.targets = targets(record, dtype)
    record.facts["case_seconds"] = time.perf_counter() - start
    return record


def expected_seconds(shape: dict[str, int], dtype: str, threads: int) -> float:
    """Rough, for the estimate only."""
    size = shape["tokens"] * shape["width"] * shape["vocab"] / (512 * 1024 * 151936)
    return 90 + (170.0 if dtype in ("bf16", "fp16") else 330.0) * size / min(threads or 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    args, shape = linear_arguments(__doc__, arguments)
    return drive(
        "benchmarks.linear_decomposed_kl",
        args,
        shape,
        source_digest(*SOURCES),
        lambda dtype, threads: measure(shape, dtype, threads, args),
        lambda dtype, threads: expected_seconds(shape, dtype, threads),
    )


if __name__ == "__main__":
    sys.exit(main())
