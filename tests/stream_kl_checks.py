"""What every backend of `stream_kl` is held to: the numbers and gradients of one problem, against float64.

Tolerance: error against float64 at most twice that of plain torch in the same dtype (`tests/textbook.py`), plus FLOOR
times the magnitude, and for 16-bit gradients one rounding. Infinities must be where the float64 reference has them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import textbook
from tests.places import here
from vgs_kernels.linear.sampled import log_probs
from vgs_kernels.stream_kl import reference
from vgs_kernels.stream_kl.reference import COEFFICIENTS, Streams
from vgs_kernels.stream_kl.transform import LogitTransform

FLOOR = 4e-6  # of the result's magnitude: a few float32 roundings of sums of up to 5000 terms


def coefficients(tokens: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens, COEFFICIENTS, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(here().device)


def by_kernels(
    module: Any, streams: list[Tensor], transform: LogitTransform, out_dtype: torch.dtype, **buffers: Any
) -> list[Tensor]:
    """Values, gradients of two objectives, and log-probabilities of sampled tokens that follow from the statistics."""
    tokens, device = streams[0].shape[0], streams[0].device
    accumulated = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    first, second = (coefficients(tokens, seed).to(device, accumulated) for seed in (5, 6))
    outs = buffers.get("outs") or [
        torch.full(streams[0].shape, math.nan, dtype=out_dtype, device=device) for _ in range(2)
    ]
    given = Streams(*streams)
    values, statistics = module.divergences(given, transform)
    module.logit_gradients(
        given, values, statistics, first, transform, out=outs[0], second_coefficients=second, out_second=outs[1]
    )
    sampled = log_probs(torch.arange(tokens, device=device) * 7 % transform.vocab_size, given, statistics, transform)
    return [values, *outs, sampled]


def by_textbook(streams: list[Tensor], transform: LogitTransform, dtype: torch.dtype) -> list[Tensor]:
    """The same in plain torch, on finite logits in `dtype`; gradients are those of the raw logits."""
    leaf = streams[0].to(dtype).requires_grad_()
    given = [leaf, *(stream.to(dtype) for stream in streams[1:])]
    found = textbook.numbers(given, **transform._asdict())
    tokens = leaf.shape[0]
    weights = [coefficients(tokens, seed).to(found) for seed in (5, 6)]
    gradients = [torch.autograd.grad((found[:, :COEFFICIENTS] * w).sum(), leaf, retain_graph=True)[0] for w in weights]
    index = (torch.arange(tokens, device=leaf.device) * 7 % transform.vocab_size)[:, None]
    shared = transform.temperature, transform.vocab_size
    of_teacher = transform.teacher_scale, transform.teacher_softcap, *shared, transform.teacher_smoothing
    of_student = transform.student_scale, transform.student_softcap, *shared
    log = [textbook.log_probs(given[0], *of_student)] + [textbook.log_probs(t, *of_teacher) for t in given[1:3]]
    sampled = [x.gather(1, index)[:, 0] for x in log] + [torch.zeros(tokens).to(found)] * (3 - len(log))
    return [found.detach(), *gradients, torch.stack(sampled, 1).detach()]


NAMES = ("values", "first gradient", "second gradient", "log-probabilities of the sampled tokens")


def check(
    module: Any,
    streams: list[Tensor],
    transform: LogitTransform,
    out_dtype: torch.dtype | None = None,
    holes: bool = False,
) -> None:
    """Hold one problem to the tolerance of this file."""
    out_dtype = out_dtype or streams[0].dtype
    ours = by_kernels(module, streams, transform, out_dtype)
    accumulated = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    double = [stream.double() for stream in streams]
    if holes:  # where the textbook has NaN
        exact = by_kernels(reference, double, transform, torch.float64)
        plain = by_kernels(reference, [stream.to(accumulated) for stream in streams], transform, accumulated)
    else:
        exact = by_textbook(double, transform, torch.float64)
        plain = by_textbook(streams, transform, accumulated)
    for name, got, near, truth in zip(NAMES, ours, plain, exact, strict=True):
        rounding = torch.finfo(got.dtype).eps if got.dtype != accumulated else 0.0
        assert_close(got, near, truth, rounding, name)


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor, rounding: float, what: str) -> None:
    if exact.numel() == 0:
        return
    ours, plain, exact = ours.double(), plain.double(), exact.double()
    assert torch.equal(ours.isfinite(), exact.isfinite()), f"{what}: {ours} against {exact}"
    finite = exact.isfinite() & plain.isfinite()
    ours, plain, exact = (torch.where(finite, x, 0.0) for x in (ours, plain, exact))
    magnitude = exact.abs().amax(-1, keepdim=True).clamp_min(1.0 if what == NAMES[0] else 1e-30)
    error, allowed = (ours - exact).abs(), 2 * (plain - exact).abs().amax() + FLOOR * magnitude + rounding * exact.abs()
    assert (error <= allowed).all(), f"{what}: error {(error / allowed).max():.3g} times what is allowed"
