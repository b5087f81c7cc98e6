"""Hidden gradients beside heads whose rows share a direction.

A logit gradient sums to 0 over the vocabulary. Rounded to 16 bits it no longer does, and what it sums to multiplies
the direction that all rows of the head have in common.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.linear_problem import gradients
from tests.places import here
from vgs_kernels import LMHead, linear_decomposed_kl, linear_reverse_kl
from vgs_kernels.linear import reference

TOKENS, WIDTH, VOCAB = 24, 64, 2003


def by_textbook(tensors: list[Tensor], teacher_head: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    losses = reference.linear_reverse_kl(*leaves, teacher.to(dtype), teacher_head.to(dtype))
    return gradients(losses.sum(), leaves)[0]


@pytest.mark.parametrize("size", [1.0, 16.0])
def test_a_direction_that_all_rows_share_costs_no_digits(size: float, chosen: str) -> None:
    generator = torch.Generator().manual_seed(5)
    rows, shared, hidden, moved = (
        torch.randn(shape, generator=generator, device="cpu").to(here().device)
        for shape in ((VOCAB, WIDTH), (WIDTH,), (TOKENS, WIDTH), (TOKENS, WIDTH))
    )
    weight = ((rows + size * shared) / WIDTH**0.5).bfloat16().requires_grad_()
    hidden, teacher = (3 * hidden).bfloat16().requires_grad_(), (3 * hidden + 0.3 * moved).bfloat16()
    head, frozen = LMHead(weight), LMHead(weight.detach())
    exact = by_textbook([hidden, weight], weight.detach(), teacher, torch.float64)
    plain = by_textbook([hidden, weight], weight.detach(), teacher, torch.float32).bfloat16()
    allowed = 2 * (plain.double() - exact).square().mean().sqrt() + 2**-8 * exact.square().mean().sqrt()
    parts = linear_decomposed_kl(
        hidden, head, teacher, frozen, teacher, hidden.detach(), decomposition="vgs", backend=chosen
    )
    for loss in (linear_reverse_kl(hidden, head, teacher, frozen, backend=chosen).kl, parts.standard):
        (found,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
        error = (found.double() - exact).square().mean().sqrt()
        assert error <= allowed, (float(error), float(allowed))
