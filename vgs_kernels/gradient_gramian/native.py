"""Native backend of `gradient_gramian`: launches the compiled kernels of `csrc/*/gradient_gramian.*`.

One pass over both lists for all three numbers. Sums are formed per chunk of a tensor and then over the chunks, in an
order that depends on the sizes of the tensors alone: the result is the same on every run and for every number of
threads. Entries are multiplied in float32 (float64 for float64 gradients); the sums over chunks are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C as _registers_the_operators  # type: ignore[attr-defined]  # noqa: F401

_ops = torch.ops.vgs_kernels_native
DEVICES = ("cpu", "cuda")  # device types with kernels


def inner_products(first: Sequence[Tensor | None], second: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """As `reference.inner_products`. Tensors that are not dense in memory in one common order are copied first."""
    nothing = next(g for g in (*first, *second) if g is not None).new_empty(0)
    return _ops.inner_products(
        [nothing if g is None else g for g in first],
        [nothing if g is None else g for g in second],
        dtype == torch.float64,
    )


@torch.library.register_fake("vgs_kernels_native::inner_products")
def _(first, second, float64):  # type: ignore[no-untyped-def]
    return first[0].new_empty(3, dtype=torch.float64 if float64 else torch.float32)
