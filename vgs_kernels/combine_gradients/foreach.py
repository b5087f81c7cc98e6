"""Backend of `combine_gradients` for installs without the extension: plain torch, many tensors at a time.

Batches as in `gradient_gramian/foreach.py`: gather, weigh, and scatter with one `_foreach_copy_`. Called by
`combine_gradients/api.py` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradient_gramian.foreach import batches, flattened, gathered


def combine(
    lang: Sequence[Tensor | None], vis: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """As `reference.combine`."""
    flat_lang, flat_vis = flattened(lang), flattened(vis)
    # `reshape` of a tensor that is not contiguous is a copy: it is copied back once everything has been read.
    targets = [result.reshape(-1) for result in out]
    for batch in batches([target.numel() for target in targets], weights.device):
        total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for weight, gradients in ((weights[0], flat_lang), (weights[1], flat_vis)):
            part = gathered(gradients, batch, weights.dtype, weights.device) * weight
            total = total + part.masked_fill_(weight == 0, 0.0)
        torch._foreach_copy_(
            [targets[index][begin:end] for index, begin, end in batch],
            total.split([end - begin for _, begin, end in batch]),
        )
    for result, target in zip(out, targets, strict=True):
        if not result.is_contiguous():
            result.copy_(target.view(result.shape))
