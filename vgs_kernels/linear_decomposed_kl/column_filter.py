"""`gradient_filter`: which columns of a chunk's logit gradient are worth multiplying.

Layer: tensors in, tensors out. Called by `linear_decomposed_kl/op.py` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import accumulation_dtype


class ColumnFilter:
    """Drops the smallest columns of a matrix G, so that norm(dropped) <= tolerance * norm(G) in the Frobenius norm."""

    def __init__(self, tolerance: float, native: bool) -> None:
        self.tolerance = tolerance
        self.native = native
        self._buffers: tuple[Tensor, Tensor] | None = None

    def columns(self, gradient: Tensor) -> Tensor:  # (n, vocab) -> (columns,)
        """Indices of the columns that are kept, ascending. Valid until the next call."""
        if self.native:
            if self._buffers is None:
                vocab = gradient.shape[1]
                self._buffers = (
                    gradient.new_empty(vocab, dtype=torch.float32),
                    gradient.new_empty(vocab, dtype=torch.int64),
                )
            squares, columns = self._buffers
            return columns[
                : torch.ops.vgs_kernels_native.select_columns(gradient, self.tolerance, -1, squares, columns)
            ]
        wide = gradient.to(accumulation_dtype(gradient.dtype))
        squares = wide.square().sum(0)
        ordered, order = squares.sort()
        dropped = ordered.cumsum(0) <= self.tolerance**2 * squares.sum()
        return order[~dropped].sort().values  # its length is known to the device only: the host waits for it
