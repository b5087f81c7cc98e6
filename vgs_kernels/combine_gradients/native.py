"""Native backend of `combine_gradients`: launches the compiled kernels of `csrc/*/combine_gradients.*`.

One pass: both gradients are read, their combination is written. The weights are read on the device, and a component of
weight 0 is not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C as _registers_the_operators  # type: ignore[attr-defined]  # noqa: F401

_ops = torch.ops.vgs_kernels_native
DEVICES = ("cpu", "cuda")  # device types with kernels


def combine(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """As `reference.combine`. Tensors that are not dense in memory in one common order go through a copy."""
    if not out:
        return
    nothing = out[0].new_empty(0)
    _ops.combine(
        [nothing if g is None else g for g in first],
        [nothing if g is None else g for g in second],
        weights.contiguous(),
        out,
    )


@torch.library.register_fake("vgs_kernels_native::combine")
def _(first, second, weights, out):  # type: ignore[no-untyped-def]
    return None
