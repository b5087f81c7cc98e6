"""Backend of `combine_gradients` for installs without other kernels: plain torch, many tensors at a time.

Batches as in `gradient_gramian/foreach.py`: gather, weigh, and scatter with one `_foreach_copy_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradient_gramian.foreach import batch_buffers, batches, flattened, gathered


def combine(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """As `reference.combine`."""
    flat_first, flat_second = flattened(first), flattened(second)
    # `reshape` of a tensor that is not contiguous is a copy: it is copied back once everything has been read.
    targets = [result.reshape(-1) for result in out]
    sizes = [target.numel() for target in targets]
    buffers = batch_buffers(2, sizes, weights.dtype, weights.device)
    for batch in batches(sizes, weights.device):
        parts = []
        for weight, gradients, buffer in zip(weights, (flat_first, flat_second), buffers, strict=True):
            part = gathered(gradients, batch, buffer)
            parts.append(part.mul_(weight).masked_fill_(weight == 0, 0.0))
        total = parts[0].add_(parts[1])
        torch._foreach_copy_(
            [targets[index][begin:end] for index, begin, end in batch],
            total.split([end - begin for _, begin, end in batch]),
        )
    for result, target in zip(out, targets, strict=True):
        if not result.is_contiguous():
            result.copy_(target.view(result.shape))
