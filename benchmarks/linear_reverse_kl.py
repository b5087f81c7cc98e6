"""`linear_reverse_kl`, the loss of on-policy distillation, against the products alone, plain torch, TRL and Liger.

    python -m benchmarks.linear_reverse_kl            512 tokens, width 1024, vocabulary 151936; bf16 and fp32, 1 and 2
                                                      threads; one record a case
    python -m benchmarks.linear_reverse_kl --quick    a few seconds, small shapes, for a look

Forward and backward, from hidden states and heads to both gradients, on the same inputs. Every peer runs in the fastest
of its configurations, which a trial finds: compiled or not, in chunks of its default size or smaller ones. Beside its
time stand its errors against fp64, the worst of the gate's inputs: over a peer that is more exact there is no speedup.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs, linear_gate, methods, peers, products, roofline
from benchmarks.harness.cases import DTYPES, case_of, drive, linear_arguments
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD, MIB
from benchmarks.harness.records import Record, Row, Target
from benchmarks.inputs import Streams, random_heads, random_streams
from benchmarks.linear_gate import run_gate
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.peers import Way
from benchmarks.products import floor_name, floor_rows, product_calls
from vgs_kernels import backend

NAME = "linear_reverse_kl"
COMPILE_LIMIT_S = 300.0
LIGER_CHUNKS = (1024, 128)  # tokens: its default, and one whose logits are a few times smaller
LABELS = {
    "plain_fp32": "plain torch, fp32 logits",
    "plain_16_bit": "plain torch, 16-bit logits",
    "trl": "TRL chunked divergence",
    "liger": "Liger chunked JSD",
    "liger_fused": "Liger fused JSD",
}
CROSS_ENTROPY = methods.Cost(1, 0, 1)  # three of our four products, and no teacher
SOURCES = (Path(__file__), Path(products.__file__), Path(roofline.__file__), *linear_gate.SOURCES)


def configurations(dtype: str, device: str, compile_peers: bool) -> dict[str, dict[str, Way]]:
    """Peer, by the names of `LABELS` -> configuration -> how it is called."""
    standard, wide = OBJECTIVES["standard"], torch.promote_types(DTYPES[dtype], torch.float32)
    found: dict[str, dict[str, Way]] = {"plain_fp32": {"eager": lambda streams: peers.plain(standard, streams, wide)}}
    if wide != DTYPES[dtype]:
        found["plain_16_bit"] = {"eager": lambda streams: peers.plain(standard, streams)}
    found["trl"] = {"eager": peers.trl_reverse_kl}
    found["liger"] = {
        f"eager, chunks of {size}": lambda streams, n=size: peers.liger_reverse_kl(streams, False, n)  # type: ignore[misc]
        for size in LIGER_CHUNKS
    }
    if device == "cuda":
        found["liger_fused"] = {"eager": peers.liger_fused_reverse_kl}
    if compile_peers:
        found["plain_fp32"]["compiled"] = peers.compiled_plain(standard, wide)
        if "plain_16_bit" in found:
            found["plain_16_bit"]["compiled"] = peers.compiled_plain(standard)
        found["trl"]["compiled"] = peers.compiled_trl_reverse_kl()
        found["liger"] |= {
            f"compiled, chunks of {size}": lambda streams, n=size: peers.liger_reverse_kl(streams, True, n)  # type: ignore[misc]
            for size in LIGER_CHUNKS
        }
    return found


def best_of(
    found: Mapping[str, Mapping[str, Way]], streams: Streams, device: str
) -> tuple[dict[str, tuple[str, Way]], dict[str, dict[str, float | str]]]:
    """Every peer's fastest configuration, by its second call, and what the trial saw: seconds, or what was raised."""
    best: dict[str, tuple[str, Way]] = {}
    trials: dict[str, dict[str, float | str]] = {}
    for peer, ways in found.items():
        print(f"trials of {LABELS[peer]}", flush=True)
        trial = Lineup(device)
        for configuration, way in ways.items():
            trial.add(configuration, configuration, lambda way=way: way(streams))  # type: ignore[misc]
            trial.call_first(configuration, COMPILE_LIMIT_S)
        trial.take_turns(1, 1, 0.0, warm_up=())
        trials[peer] = {name: row.note or row.seconds[0] for name, row in trial.rows.items()}
        timed = {name: row.seconds[0] for name, row in trial.rows.items() if row.seconds}
        if timed:
            fastest = min(timed, key=timed.__getitem__)
            best[peer] = fastest, ways[fastest]
    return best, trials


def line_up(streams: Streams, best: Mapping[str, tuple[str, Way]], trials: Mapping[str, Any], device: str) -> Lineup:
    """The products, the peers and our call, in the order of the turns."""
    lineup = Lineup(device)
    for name, (label, call) in product_calls(streams).items():
        lineup.add(name, label, call)
    for name in trials:
        configuration, way = best.get(name, ("", None))
        lineup.add(
            name, ", ".join(filter(None, (LABELS[name], configuration))), lambda way=way: way(streams), ours="opd"
        )  # type: ignore[misc]
        if way is None:
            lineup.drop(name, f"not run: {'; '.join(map(str, trials[name].values()))}")
    if "liger_fused" not in trials:
        lineup.rows["liger_fused"] = Row("liger_fused", LABELS["liger_fused"], note="not run: its kernel needs a GPU")
    if device == "cuda":
        for name, (label, call) in peers.cross_entropies(streams).items():
            lineup.add(name, label, call, floor=floor_name(CROSS_ENTROPY))
    lineup.add("opd", "ours", lambda: METHODS["opd"].ours(streams), floor=floor_name("opd"))
    lineup.add_copy(min(roofline.COPY_BYTES, 4 * streams.tokens * streams.student_head.shape[0]))
    return lineup


def targets(record: Record, dtype: str) -> list[Target]:
    """At `inputs.TARGET_SHAPE` on a CPU."""
    ours = record.row("opd")
    peak = None if ours is None or ours.peak_bytes is None else ours.peak_bytes / MIB
    found = [
        Target("time over the 4 products alone", record.ratio("opd", floor_name("opd")), products.limits(dtype)["opd"],
               "two looks at two streams of logits and one gradient, beside the products"),
        Target("peak memory above inputs and gradients, MiB", peak, 160, "one stream of fp32 logits would be 297"),
    ]  # fmt: skip
    if dtype == "bf16":
        for name, limit, reason in (
            ("trl", 6.0, "on a CPU it multiplies in fp32, and projects twice"),
            ("liger", 1.6, "it holds whole logits and what autograd keeps of them"),
        ):
            peer = record.row(name)
            ratio = None if peer is None or record.more_exact(peer) else record.ratio(name, "opd")
            found.append(Target(f"times faster than {LABELS[name]}", ratio, limit, reason, at_least=True))
    return found


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    """Trials, gate, turns. A red gate ends it before any figure."""
    start = time.perf_counter()
    device = args.device
    heads = random_heads(shape["width"], shape["teacher_width"], shape["vocab"], DTYPES[dtype], device)
    streams = random_streams(shape["tokens"], heads)
    best, trials = best_of(configurations(dtype, device, not args.no_compile), streams, device)
    ways = {name: ("standard", way) for name, (_, way) in best.items()}
    gate, worst = run_gate(heads, ["opd"], ways)
    print(gate.describe(), flush=True)
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), sources=source_digest(*SOURCES),
        error_floor=max((check.floor for check in gate.checks), default=0.0),
        facts={
            "backend": backend.resolve("stream_kl", torch.device(device)),
            "memory": MEMORY_METHOD[device],
            "trials": trials,
        },
    )  # fmt: skip
    if not gate.passed:
        return record
    lineup = line_up(streams, best, trials, device)
    counts = roofline.count_head_products({"opd": lineup.calls["opd"]})
    record.facts["head_products"] = counts
    timings = lineup.take_turns(
        args.rounds, 3 * args.rounds, args.budget, context=("plain_fp32", "plain_16_bit"),
        warm_up=[name for name in lineup.calls if device == "cuda" or name not in LABELS],
    )  # fmt: skip
    for name, errors in worst.items():
        lineup.rows[name].errors = errors
    floors = floor_rows(timings, ("opd",), (CROSS_ENTROPY,) if device == "cuda" else ())
    if device == "cuda" or args.roofline:
        floors += roofline.add_rooflines(lineup.rows, floors, shape, DTYPES[dtype].itemsize, counts)
    record.rows = [*floors, *lineup.rows.values()]
    if shape == inputs.TARGET_SHAPE and device == "cpu" and dtype in ("bf16", "fp32"):
        record.targets = targets(record, dtype)
    record.facts["case_seconds"] = time.perf_counter() - start
    return record


def expected_seconds(shape: dict[str, int], dtype: str, threads: int) -> float:
    """Rough, for the estimate only."""
    size = shape["tokens"] * shape["width"] * shape["vocab"] / (512 * 1024 * 151936)
    return 90 + (240.0 if dtype in ("bf16", "fp16") else 360.0) * size / min(threads or 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    args, shape = linear_arguments(__doc__, arguments)
    return drive(
        "benchmarks.linear_reverse_kl",
        args,
        shape,
        source_digest(*SOURCES),
        lambda dtype, threads: measure(shape, dtype, threads, args),
        lambda dtype, threads: expected_seconds(shape, dtype, threads),
    )


if __name__ == "__main__":
    sys.exit(main())
