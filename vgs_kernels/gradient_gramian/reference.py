"""Reference backend of `gradient_gramian`: plain torch, one pair of tensors at a time.

A backend module offers one function, `inner_products`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inner_products(first: Sequence[Tensor | None], second: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Return <first, first>, <first, second>, <second, second>, summed over the pairs, (3,); None counts as zero."""
    device = next(g.device for g in (*first, *second) if g is not None)
    total = torch.zeros(3, dtype=dtype, device=device)
    for a, b in zip(first, second, strict=True):
        flat_a = None if a is None else a.reshape(-1).to(dtype)
        flat_b = None if b is None else b.reshape(-1).to(dtype)
        if flat_a is not None:
            total[0] += flat_a.dot(flat_a)
        if flat_b is not None:
            total[2] += flat_b.dot(flat_b)
        if flat_a is not None and flat_b is not None:
            total[1] += flat_a.dot(flat_b)
    return total
