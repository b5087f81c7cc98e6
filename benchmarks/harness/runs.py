"""In how many runs of tokens a linear call went through its products, as counted while it ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vgs_kernels.linear.products import Products

SEVERAL = 3


@contextmanager
def head_products() -> Iterator[list[int]]:
    """Rows of every head-gradient product of the block, in order: one a run of tokens and objective."""
    rows: list[int] = []
    original = Products.head_gradient

    def counted(self: Products, logit_gradient: Tensor, *arguments: Any, **options: Any) -> None:
        rows.append(logit_gradient.shape[0])
        original(self, logit_gradient, *arguments, **options)

    Products.head_gradient = counted  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        Products.head_gradient = original  # type: ignore[method-assign]


def several_and_uneven(rows: Sequence[int], objectives: int = 1) -> bool:
    """What a gate must have run: one run shows no sum over runs, and equal ones show no last run that is shorter."""
    runs = rows[::objectives]
    return len(runs) >= SEVERAL and len(set(runs)) > 1
