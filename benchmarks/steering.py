"""Steering of two gradients that exist: Gramian, weights, and the clipped combination in place of the first.

    python -m benchmarks.steering            64 M parameters in 200 tensors; bf16 and fp32, 1 and 2 threads
    python -m benchmarks.steering --quick    3 M parameters

The Gramian reads both gradients, the combination reads both again and writes one: five times the bytes of a gradient.
Its floor is the time of a copy, which counts one read and one write, times 5/2, from the same turns. A copy also reads
the lines it is about to overwrite, and the combination in place does not, so that a ratio below 1 is possible on a CPU;
the facts of a record hold the ratio against the copy with that read counted, too.

`naive`, `foreach` and `foreach_dot` have no inner product of the two gradients and do not clip.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import DTYPES, case_of, case_parser, drive
from benchmarks.harness.gates import Check, Gate, accumulation_dtype, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD, MIB
from benchmarks.harness.records import Record, Row, Target
from benchmarks.harness.timing import copy_call
from vgs_kernels import UnitGradients, backend, combine_gradients, gradient_gramian

NAME = "steering"
TARGET_SHAPE = {"width": 462, "layers": 25}  # 64.1 M parameters in 200 tensors
GATE_WIDTH = 33
GAMMA = 0.8
MAX_NORM = 0.5

Gradients = list[Tensor]
Combine = Callable[[Gradients, Gradients], Any]  # (lang, vis): leaves the combination in lang


def shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """Of a transformer's layers: four square matrices, two of the feed-forward part, two vectors."""
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width), (width,), (width,)] * layers


def gradients(width: int, layers: int, dtype: torch.dtype, device: str) -> tuple[Gradients, Gradients]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(scale: float) -> Gradients:
        return [
            torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)
            for shape in shapes(width, layers)
        ]

    return draw(1e-2), draw(3e-3)


def ours(lang: Gradients, vis: Gradients, chosen: str | None = None, max_norm: float | None = MAX_NORM) -> Tensor:
    gramian = gradient_gramian(lang, vis, backend=chosen)
    weights = UnitGradients(GAMMA)(gramian)
    return combine_gradients(lang, vis, weights, out=lang, max_norm=max_norm, gramian=gramian, backend=chosen)


def naive(lang: Gradients, vis: Gradients) -> None:
    """Flatten, normalise, add, and bring the pieces back."""
    flat_lang = torch.cat([gradient.reshape(-1) for gradient in lang])
    flat_vis = torch.cat([gradient.reshape(-1) for gradient in vis])
    combined = (1 - GAMMA) * flat_lang / flat_lang.norm() + GAMMA * flat_vis / flat_vis.norm()
    for gradient, piece in zip(lang, combined.split([gradient.numel() for gradient in lang]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _combine_in_place(lang: Gradients, vis: Gradients, lang_norm: Tensor, vis_norm: Tensor) -> None:
    torch._foreach_mul_(lang, ((1 - GAMMA) / lang_norm).item())
    torch._foreach_add_(lang, vis, alpha=(GAMMA / vis_norm).item())


def foreach(lang: Gradients, vis: Gradients) -> None:
    norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list_)).float()) for list_ in (lang, vis)]
    _combine_in_place(lang, vis, *norms)


def foreach_dot(lang: Gradients, vis: Gradients) -> None:
    """Norms through the inner products of BLAS, where `_foreach_norm` is slow."""
    norms = [torch.stack([g.view(-1).dot(g.view(-1)) for g in list_]).float().sum().sqrt() for list_ in (lang, vis)]
    _combine_in_place(lang, vis, *norms)


def torchjd_call(lang: Gradients, vis: Gradients) -> Callable[[], list[Tensor]]:
    """TorchJD's combination of Jacobians that exist, with the weights of our policy, in its variant of least memory."""
    from torchjd.aggregation import GramianWeightedAggregator, Weighting
    from torchjd.autojac import jac_to_grad

    class Steering(Weighting):
        def forward(self, stat: Tensor, /) -> Tensor:
            return UnitGradients(GAMMA)(stat.float())

    parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in lang]
    for parameter, a, b in zip(parameters, lang, vis, strict=True):
        parameter.jac = torch.stack([a, b])  # type: ignore[attr-defined]
    rule = GramianWeightedAggregator(Steering())

    def combine() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        jac_to_grad(parameters, rule, retain_jac=True, optimize_gramian_computation=True)
        return [parameter.grad for parameter in parameters]  # type: ignore[misc]

    return combine


def flat(tensors: Gradients) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()


def run_gate(dtype: str, device: str, combine: Combine = ours) -> Gate:
    """Gramian, combination and clipping against fp64. `combine`: tests plant errors there."""
    lang, vis = gradients(GATE_WIDTH, 3, DTYPES[dtype], device)
    a, b = flat(lang), flat(vis)
    exact = (1 - GAMMA) * a / a.norm() + GAMMA * b / b.norm()
    clipped = exact * min(1.0, MAX_NORM / (exact.norm().item() + 1e-6))

    def after(call: Combine) -> Tensor:
        result = [gradient.clone() for gradient in lang]
        call(result, vis)
        return flat(result)

    def plain_clipped(lang: Gradients, vis: Gradients) -> None:
        naive(lang, vis)
        nn.utils.clip_grads_with_norm_(_holders(lang), MAX_NORM, flat(lang).norm().float())

    eps = torch.finfo(accumulation_dtype(DTYPES[dtype])).eps
    own = torch.finfo(DTYPES[dtype]).eps / 2  # one rounding of the result
    exact_gramian = torch.stack([a, b]) @ torch.stack([a, b]).T
    plain_error = relative_error(after(plain_clipped), clipped)
    ways: dict[str, tuple[str | None, Combine]] = {"": (None, combine)}
    for name in other_backends(device):
        ways[f", {name}"] = name, lambda a, b, name=name: ours(a, b, name)  # type: ignore[misc]
    checks = []
    plain_gramian = relative_error(gradient_gramian(lang, vis, backend="reference"), exact_gramian)
    for label, (chosen, way) in ways.items():
        gramian_error = relative_error(gradient_gramian(lang, vis, backend=chosen), exact_gramian)
        # The compiled kernels sum in fp64; what stands in for them adds 2^17 products at a time in fp32.
        roundings = 8 if backend.resolve("gradient_gramian", a.device, chosen) == "native" else 64
        checks.append(Check(f"Gramian{label}", gramian_error, plain_gramian, roundings * eps))
        checks.append(
            Check(f"clipped combination{label}", relative_error(after(way), clipped), plain_error, 8 * eps + own)
        )
    for name, peer in (("naive", naive), ("foreach", foreach), ("foreach_dot", foreach_dot)):
        error = relative_error(after(peer), exact)
        checks.append(Check(f"{name} computes the same", error, 0.0, 8 * torch.finfo(DTYPES[dtype]).eps))
    return Gate(tuple(checks))


def _holders(gradients: Gradients) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def other_backends(device: str) -> list[str]:
    """Those that run here and stand in where the first of the device's list is not to be had."""
    found = backend.available("combine_gradients", device)
    return [name for name in found[1:] if name in backend.available("gradient_gramian", device) and name != "reference"]


def line_up(lang: Gradients, vis: Gradients, size: int, device: str) -> Lineup:
    policy = UnitGradients(GAMMA)
    gramian = gradient_gramian(lang, vis)
    against = {"floor": "floor", "ours": "ours"}
    lineup = Lineup(device)
    lineup.add("copy", "a copy of one gradient", copy_call(size, device), bytes_moved=2 * size)
    lineup.add("gramian", "gradient_gramian", lambda: gradient_gramian(lang, vis), bytes_moved=2 * size)
    lineup.add(
        "combine", "combine_gradients, in place, clipped",
        lambda: combine_gradients(lang, vis, policy(gramian), out=lang, max_norm=MAX_NORM, gramian=gramian),
        bytes_moved=3 * size,
    )  # fmt: skip
    lineup.add("ours", "steering, clipped", lambda: ours(lang, vis), bytes_moved=5 * size, floor="floor")
    for name in other_backends(device):
        lineup.add(f"by_{name}", f"the same by {name}", lambda name=name: ours(lang, vis, name), **against)  # type: ignore[misc]
    lineup.add("foreach", "_foreach_, in place, without the inner product", lambda: foreach(lang, vis), **against)
    lineup.add("foreach_dot", "the same with norms by dot", lambda: foreach_dot(lang, vis), **against)
    lineup.add("naive", "flatten, combine, bring back", lambda: naive(lang, vis), ours="ours")
    try:
        lineup.add("torchjd", "TorchJD, Jacobians to gradients", torchjd_call(lang, vis), **against)
    except ImportError as error:
        lineup.rows["torchjd"] = Row("torchjd", "TorchJD, Jacobians to gradients", note=f"skipped: {error}")
    return lineup


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    device = args.device
    gate = run_gate(dtype, device)
    print(gate.describe(), flush=True)
    facts: dict[str, Any] = {
        "backend": backend.resolve("combine_gradients", torch.device(device)),
        "memory": MEMORY_METHOD[device],
        "bytes": "2 reads for the Gramian, 2 reads and 1 write for the combination; a copy counts 1 read and 1 write",
    }
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), facts=facts,
        sources=digest(),
    )  # fmt: skip
    if not gate.passed:
        return record
    lang, vis = gradients(**shape, dtype=DTYPES[dtype], device=device)
    size = sum(gradient.numel() for gradient in lang) * lang[0].element_size()
    facts["parameters"], facts["tensors"] = size // lang[0].element_size(), len(lang)
    lineup = line_up(lang, vis, size, device)
    lineup.take_turns(args.rounds, 5 * args.rounds, args.budget)
    rows = lineup.rows
    floor = [seconds * 5 / 2 for seconds in rows["copy"].seconds]
    record.rows = [Row("floor", "the floor: 5/2 copies", floor, bytes_moved=5 * size), *rows.values()]
    copied = rows["copy"].median
    assert copied is not None
    facts["copy_bandwidth"] = 2 * size / copied
    over_floor = record.ratio("ours", "floor")
    # With the read before a write counted, a copy moves three times the bytes, not twice.
    facts["over_floor_of_a_copy_of_three_streams"] = None if over_floor is None else over_floor * 3 / 2
    in_place = [ratio for name in ("foreach", "foreach_dot") if (ratio := record.ratio(name, "ours")) is not None]
    if shape == TARGET_SHAPE and device == "cpu":
        peak = rows["ours"].peak_bytes
        record.targets = [
            Target("naive flatten over ours", record.ratio("naive", "ours"), 6.0,
                   "19 passes over a gradient instead of 5", at_least=True),
            Target("best in-place foreach over ours", min(in_place, default=None), 1.25,
                   "7 passes over a gradient instead of 5", at_least=True),
            Target("ours over the floor", over_floor, 1.3, "five passes over a gradient at the speed of a copy"),
            Target("temporaries of ours, MiB", None if peak is None else peak / MIB, 1.0, "it works in place"),
        ]  # fmt: skip
    facts["case_seconds"] = time.perf_counter() - start
    return record


def digest() -> str:
    return source_digest(Path(__file__))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--width", type=int, default=TARGET_SHAPE["width"])
    parser.add_argument("--layers", type=int, default=TARGET_SHAPE["layers"])
    args = parser.parse_args(arguments)
    if args.quick:
        args.width, args.budget = 96, 0.2
    shape = {"width": args.width, "layers": args.layers}
    return drive(
        "benchmarks.steering",
        args,
        shape,
        digest(),
        lambda dtype, threads: measure(shape, dtype, threads, args),
        lambda _dtype, _threads: 5 + 30 * (args.width / TARGET_SHAPE["width"]) ** 2,
    )


if __name__ == "__main__":
    sys.exit(main())
