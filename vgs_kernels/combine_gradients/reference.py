"""Reference backend of `combine_gradients`: plain torch, one tensor at a time.

A backend module offers one function, `combine`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def combine(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """out = weights[0] * first + weights[1] * second, tensor by tensor; None counts as zero.

    `out` may be the tensors of `first` or `second`. A weight of 0 removes its component even where it holds inf or NaN.
    """
    for a, b, result in zip(first, second, out, strict=True):
        total = None
        for weight, gradient in ((weights[0], a), (weights[1], b)):
            if gradient is None:
                continue
            # In the dtype of the weights: bf16 gradients are weighted in fp32 and rounded once.
            part = (gradient.to(weight.dtype) * weight).masked_fill(weight == 0, 0.0)
            total = part if total is None else total + part
        if total is None:
            result.zero_()
        else:
            result.copy_(total)
