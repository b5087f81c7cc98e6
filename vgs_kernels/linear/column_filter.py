"""`gradient_filter`: which columns of a chunk's logit gradient are worth multiplying."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of the logit gradient sums to 0, so the hidden gradient, a sum over its columns, cancels and feels a drop more
# than in proportion. A row of the head gradient has one column to itself.
HEAD_MULTIPLE = 6


class ColumnFilter:
    """Drops the smallest columns of a matrix G, so that norm(dropped) <= tolerance * norm(G) in the Frobenius norm for
    the hidden gradient, and at most HEAD_MULTIPLE times that for the head gradient."""

    def __init__(self, tolerance: float, native: bool) -> None:
        self.tolerances = tolerance, HEAD_MULTIPLE * tolerance
        self.native = native
        self._columns: Tensor | None = None

    def columns(self, squares: Tensor) -> tuple[Tensor, Tensor]:  # (vocab,) -> (columns,), (fewer,)
        """Indices of the columns that are kept for the hidden gradient, by the squares of the norms of G's columns, and
        positions among them of those that are kept for the head gradient too; ascending. Valid until the next call."""
        if self.native:
            if self._columns is None:
                self._columns = squares.new_empty((2, squares.shape[0]), dtype=torch.int64)
            kept = torch.ops.vgs_kernels_native.select_columns(squares, *self.tolerances, self._columns)
            return self._columns[0, : kept[0]], self._columns[1, : kept[1]]
        ordered, order = squares.double().sort()
        sums, total = ordered.cumsum(0), ordered.sum()
        # Beside NaN and inf nothing is small. How many are kept is known to the device only: the host waits for it.
        small = [(sums <= tolerance**2 * total) & total.isfinite() for tolerance in self.tolerances]
        hidden, head = (order[~dropped].sort().values for dropped in small)
        return hidden, torch.searchsorted(hidden, head)
