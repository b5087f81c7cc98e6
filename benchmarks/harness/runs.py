"""In how many runs of tokens a linear call went through its products, as counted while it ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from vgs_kernels.linear.gpu_products import GpuProducts
from vgs_kernels.linear.products import Products

SEVERAL = 3


@contextmanager
def head_products() -> Iterator[list[int]]:
    """Rows of every head-gradient product of the block, in order: one a run of tokens and objective."""
    rows: list[int] = []

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def head_gradient(self: Any, logit_gradient: Tensor, *arguments: Any, **options: Any) -> None:
            rows.append(logit_gradient.shape[0])
            original(self, logit_gradient, *arguments, **options)

        return head_gradient

    with ExitStack() as patches:
        for products in (Products, GpuProducts):
            patches.enter_context(mock.patch.object(products, "head_gradient", counted(products.head_gradient)))
        yield rows


def several_and_uneven(rows: Sequence[int], objectives: int = 1) -> bool:
    """What a gate must have run: one run shows no sum over runs, and equal ones show no last run that is shorter."""
    runs = rows[::objectives]
    return len(runs) >= SEVERAL and len(set(runs)) > 1
