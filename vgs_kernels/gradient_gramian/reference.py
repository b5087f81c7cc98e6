"""Reference backend of `gradient_gramian`: plain torch, one pair of tensors at a time.

A backend module offers one function, `inner_products`. Called by `gradient_gramian/api.py` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inner_products(lang: Sequence[Tensor | None], vis: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Return <lang, lang>, <lang, vis>, <vis, vis>, shape (3,), summed over the pairs; None counts as zero."""
    device = next(g.device for g in (*lang, *vis) if g is not None)
    total = torch.zeros(3, dtype=dtype, device=device)
    for a, b in zip(lang, vis, strict=True):
        flat_a = None if a is None else a.reshape(-1).to(dtype)
        flat_b = None if b is None else b.reshape(-1).to(dtype)
        if flat_a is not None:
            total[0] += flat_a.dot(flat_a)
        if flat_b is not None:
            total[2] += flat_b.dot(flat_b)
        if flat_a is not None and flat_b is not None:
            total[1] += flat_a.dot(flat_b)
    return total
