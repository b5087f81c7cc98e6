"""The gate of the benchmarks from hidden states: loss and gradients against fp64, beside the most exact peer's.

On spread-out and on peaked inputs, and on students close to their teachers, where a divergence is a small difference of
large logits. Our calls go through several runs of tokens of unequal length, as at any size that matters: in one run no
partial sum of a head gradient is rounded, and nothing is added to what is there. That they did is a check of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import inputs, methods, peers, truth
from benchmarks.harness import runs
from benchmarks.harness.gates import Check, Gate, accumulation_dtype
from benchmarks.inputs import Streams, converging_streams, peaked_streams, random_streams, rotate_head
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.truth import Errors, Result, Truth

GATE_TOKENS = 11
ROWS = (4, 3, 2, 1)  # whose logits the gate lets a call hold at a time: the first that gives several runs
NEAR = ((4.0, 1e-3), (30.0, 1e-1))  # deviation of the logits, KL: the ends of what `accuracy` measures
HELD_TO = "the most exact peer in the same dtype"
FLOOR_LOGIT_ROUNDINGS = 4
FLOOR_GRADIENT_ROUNDINGS = 1 / 2  # of the largest entry: the peer's rounding is that large, or by chance less
# On a CPU a 16-bit head gradient is rounded in two of its runs; what rounding leaves of further ones is kept.
FLOOR_CPU_HEAD_ROUNDINGS = 1
SOURCES = (Path(__file__), *(Path(str(used.__file__)) for used in (inputs, methods, peers, runs, truth)))

Ours = Callable[..., Sequence[Result]]  # (name of the method, streams, options of the call)
WorstErrors = dict[str, dict[str, float]]  # name of the way -> number -> the worst of all inputs


def ours(method: str, streams: Streams, **options: object) -> Sequence[Result]:
    return METHODS[method].ours(streams, **options)


def in_runs(
    method: str, streams: Streams, rows: Sequence[int] = ROWS, ours: Ours = ours
) -> tuple[Sequence[Result], list[int]]:
    """The results of a call in several runs of unequal length, and the rows of its head products.

    The first of `rows` whose logits, as a limit of memory, make the call do that; else the last.
    """
    cost, width = METHODS[method].cost, accumulation_dtype(streams.student.dtype).itemsize
    logits = math.ceil(cost.student_projections + cost.teacher_projections) * streams.student_head.shape[0] * width
    for count in rows:
        with runs.head_products() as products:
            results = ours(method, streams, max_chunk_bytes=count * logits)
        if runs.several_and_uneven(products, len(METHODS[method].objectives)):
            break
    return results, products


def gate_inputs(heads: tuple[Tensor, Tensor], tokens: int) -> dict[str, Streams]:
    found = {"random": random_streams(tokens, heads), "peaked": peaked_streams(tokens, heads)}
    rotation = rotate_head(heads[0], heads[1].shape[1])
    for deviation, divergence in NEAR:
        name = f"logits ± {deviation:g}, KL {divergence:g},"
        found[name] = converging_streams(tokens, rotation, deviation, divergence)
    return found


def run_gate(
    heads: tuple[Tensor, Tensor],
    gated: Sequence[str],
    ways: Mapping[str, tuple[str, peers.Way]],
    tokens: int = GATE_TOKENS,
    ours: Ours = ours,
    rows: Sequence[int] = ROWS,
) -> tuple[Gate, WorstErrors]:
    """The gate of some of our methods, and the worst errors of these and of `ways`: name -> objective and call.

    Plain torch with fp32 logits is always among the peers. `ours` is gated in place of our calls: tests plant errors.
    `rows`: as in `in_runs`.
    """
    lines: list[Check] = []
    worst: WorstErrors = {}
    wide = accumulation_dtype(heads[0].dtype)
    for kind, streams in gate_inputs(heads, tokens).items():
        names = dict.fromkeys(objective for method in gated for objective in METHODS[method].objectives)
        exact = Truth(streams, {name: OBJECTIVES[name] for name in names})
        of_peers = {name: [exact.errors(name, peers.plain(OBJECTIVES[name], streams, wide))] for name in names}
        for way_name, (name, way) in ways.items():
            try:
                found = exact.errors(name, way(streams))
            except Exception as error:  # not installed, or out of memory: it is no peer here, and its row says so
                print(f"{way_name} takes no part in the gate: {type(error).__name__}: {error}".splitlines()[0])
                continue
            of_peers[name].append(found)
            _keep_worst(worst, way_name, found)
        for method in gated:
            results, products = in_runs(method, streams, rows, ours)
            several = runs.several_and_uneven(products, len(METHODS[method].objectives))
            lines.append(Check(f"{kind} {method} in {len(products)} runs", 0.0 if several else math.inf, 0.0, 0.0))
            for name, result in zip(METHODS[method].objectives, results, strict=True):
                found = exact.errors(name, result)
                allowed = floors(heads[0].dtype, exact, name)
                lines += checks(f"{kind} {method} {name}", found, of_peers[name], allowed)
                _keep_worst(worst, method, found)
    return Gate(tuple(lines), HELD_TO), worst


def floors(dtype: torch.dtype, exact: Truth, objective: str) -> Errors:
    """Log ratios err by roundings of the largest logit: relative to them the more, the closer the student is."""
    of_logits = FLOOR_LOGIT_ROUNDINGS * torch.finfo(accumulation_dtype(dtype)).eps * exact.largest_logit
    of_ratios = of_logits * max(1.0, exact.sensitivity[objective])
    of_gradients = of_ratios + FLOOR_GRADIENT_ROUNDINGS * torch.finfo(dtype).eps
    on_cpu = not exact.streams.student_head.is_cuda
    of_head = of_ratios + FLOOR_CPU_HEAD_ROUNDINGS * torch.finfo(dtype).eps if on_cpu else of_gradients
    return Errors(of_ratios, of_ratios, of_gradients, of_head)


def checks(name: str, found: Errors, of_peers: Sequence[Errors], floors: Errors) -> list[Check]:
    """At most twice the most exact peer's: gradients, and the tokens' losses, in whose sum errors cancel by chance."""
    lines = []
    for place, number in enumerate(Errors._fields):
        of_them = [peer[place] for peer in of_peers if peer[place] is not None]
        if number != "loss":
            lines.append(Check(f"{name} {number.replace('_', ' ')}", found[place], min(of_them), floors[place]))
    return lines


def _keep_worst(worst: WorstErrors, name: str, found: Errors) -> None:
    before = worst.get(name, {})
    numbers = {
        "loss": found.loss if found.losses is None else found.losses,
        "hidden_gradient": found.hidden_gradient,
        "head_gradient": found.head_gradient,
    }
    worst[name] = {  # `max` of Python would lose a NaN
        number: torch.tensor([error, before.get(number, 0.0)]).max().item() for number, error in numbers.items()
    }
