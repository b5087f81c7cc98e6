"""`gradient_filter`: which columns of a chunk's logit gradient are worth multiplying.

Layer: tensors in, tensors out. Called by `linear_decomposed_kl/op.py` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import accumulation_dtype

# A row of the logit gradient sums to 0, so the hidden gradient, a sum over its columns, cancels and feels a drop more
# than in proportion. A row of the head gradient has one column to itself.
HEAD_MULTIPLE = 6


class ColumnFilter:
    """Drops the smallest columns of a matrix G, so that norm(dropped) <= tolerance * norm(G) in the Frobenius norm for
    the hidden gradient, and at most HEAD_MULTIPLE times that for the head gradient."""

    def __init__(self, tolerance: float, native: bool) -> None:
        self.tolerances = tolerance, HEAD_MULTIPLE * tolerance
        self.native = native
        self._buffers: tuple[Tensor, Tensor] | None = None

    def columns(self, gradient: Tensor) -> tuple[Tensor, Tensor]:  # (n, vocab) -> (columns,), (fewer columns,)
        """Indices of the columns that are kept for the hidden gradient, and for the head gradient, ascending. Valid
        until the next call."""
        if self.native:
            if self._buffers is None:
                vocab = gradient.shape[1]
                self._buffers = (
                    gradient.new_empty(vocab, dtype=torch.float32),
                    gradient.new_empty((2, vocab), dtype=torch.int64),
                )
            squares, columns = self._buffers
            kept = torch.ops.vgs_kernels_native.select_columns(gradient, *self.tolerances, -1, squares, columns)
            return columns[0, : kept[0]], columns[1, : kept[1]]
        wide = gradient.to(accumulation_dtype(gradient.dtype))
        squares = wide.square().sum(0)
        ordered, order = squares.sort()
        sums, total = ordered.cumsum(0), squares.sum()
        # How many are kept is known to the device only: the host waits for it.
        hidden, head = (order[~(sums <= tolerance**2 * total)].sort().values for tolerance in self.tolerances)
        return hidden, head
