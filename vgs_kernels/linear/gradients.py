"""The gradients of one linear call: hidden states, head weight and head bias, filled chunk by chunk.

One or two objectives of the same rows. Logit gradients of both are stacked, (objectives * n, vocab), so that one
product makes the hidden gradients of both; the head gradients take one product each.

On a GPU everything adds up in float32 and leaves in it: what a gradient is scaled by is known in `backward` only, and
there it is rounded, once. On a CPU, where a head-sized matrix more costs time, the head gradient has the head's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import zeros_like
from ..types import accumulation_dtype
from .chunks import Rows
from .column_filter import ColumnFilter
from .gpu_products import GpuProducts
from .products import HALF_DTYPES, Products

# Gathering rows of the head costs more than multiplying all of them where a larger part of the columns is kept.
_WORTH_GATHERING = 0.2
# Products that a 16-bit head gradient takes before what rounding leaves of further ones is kept: rounded twice it is
# good enough, and a remainder takes as much memory as the gradient.
_ROUNDED = 2
_OF_ALL_ROWS = 1024  # rows of the head that stand for all of them


@dataclass(frozen=True)
class Wanted:
    """Which gradients are formed, and what those of the head are added to instead of being returned."""

    objectives: int
    hidden: bool
    weight: bool
    bias: bool
    weight_grad: Tensor | None = None  # (>= vocab, width)
    bias_grad: Tensor | None = None  # (>= vocab,)

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


class Gradients:
    """The buffers of one call. Lists have an entry per objective; what is not wanted is an empty tensor."""

    def __init__(
        self,
        wanted: Wanted,
        hidden: Tensor,  # (tokens, width)
        weight: Tensor,  # (>= vocab, width)
        bias: Tensor | None,  # (>= vocab,)
        products: Products | GpuProducts,
        tolerance: float,  # of the column filter, 0 for none
        unit: Tensor | None,  # (): what the logit gradients are given in; None for 1
        chunks: int,
    ) -> None:
        self.wanted, self.products = wanted, products
        self._weight, self._bias, self._unit = weight, bias, unit
        self._filter = ColumnFilter(tolerance, products.native) if tolerance else None
        self._wide = isinstance(products, GpuProducts)
        self._added_to = self._is_added_to(chunks)
        self._accumulates = self._added_to or self._filter is not None
        dtype = gradient_dtype(hidden.dtype, self._wide)
        shape = hidden.shape if wanted.hidden else (0,)
        self.hidden = [hidden.new_zeros(shape, dtype=dtype) for _ in range(wanted.objectives)]
        self.weight = [self._of_weight() for _ in range(wanted.objectives)]
        self._shared: Tensor | None = None
        self._products = 0  # that each of them has taken
        self._remainders: list[Tensor | None] = [None] * wanted.objectives
        self.bias = [self._of_bias() for _ in range(wanted.objectives)]

    def _is_added_to(self, chunks: int) -> bool:
        """Whether products add to the gradient that was given. Not where it would be rounded in every one of several
        chunks, or is of another unit: then it is added to once, at the end."""
        given = self.wanted.weight_grad
        if given is None or not self._wide:
            return given is not None
        once = chunks == 1 and given.dtype == self._weight.dtype
        return self._unit is None and (once or given.dtype == gradient_dtype(self._weight.dtype, True))

    def _of_weight(self) -> Tensor:
        if not self.wanted.weight:
            return self._weight.new_empty(0)
        if self._added_to and self.wanted.weight_grad is not None:
            return self.wanted.weight_grad
        dtype = gradient_dtype(self._weight.dtype, self._wide)
        if self._filter is not None:  # few of its rows are written
            return zeros_like(self._weight, dtype)
        # The first chunk writes into it; zeros would cost a pass of their own.
        return torch.empty_like(self._weight, dtype=dtype, memory_format=torch.contiguous_format)

    def _of_bias(self) -> Tensor:
        if not self.wanted.bias or self._bias is None:
            return self._weight.new_empty(0)
        return torch.zeros_like(self._bias, dtype=accumulation_dtype(self._bias.dtype))

    def squares(self, vocab: int) -> Tensor | None:
        """Zeros, (objectives, vocab), for the squares of the columns of a chunk; None where no filter asks for them."""
        if self._filter is None:
            return None
        return self._weight.new_zeros((self.wanted.objectives, vocab), dtype=torch.float32)

    def add(
        self,
        rows: Rows,
        logit_gradients: Tensor,  # (objectives * n, >= vocab)
        hidden: Tensor,  # (n, width)
        squares: Tensor | None,  # (objectives, vocab)
    ) -> None:
        """Add what a chunk gives."""
        if self.wanted.weight and self._products == _ROUNDED:
            self._remainders = [self.products.remainder(weight) for weight in self.weight]
        of_objectives = logit_gradients.split(hidden.shape[0])
        if self._filter is None or squares is None:
            for objective, gradient in enumerate(of_objectives):
                self._add_head(objective, gradient, hidden)
            if self.wanted.hidden:
                for objective, product in enumerate(self._hidden_product(logit_gradients).split(hidden.shape[0])):
                    self.hidden[objective][rows] = product
        else:
            for objective, gradient in enumerate(of_objectives):
                self._add_filtered(objective, rows, gradient, hidden, self._filter.columns(squares[objective]))
        self._accumulates = True
        self._products += 1

    def finish(self) -> list[Tensor]:
        """Hidden, weight, bias of two objectives; empty where absent, or where they were added to a given gradient."""
        found: list[Tensor] = []
        for hidden, weight, bias in zip(self.hidden, self.weight, self.bias, strict=True):
            if not self._accumulates:  # no chunk (no tokens, or all of weight 0): nothing was written yet
                weight.zero_()
            if self._unit is not None:
                for gradient in (hidden, weight, bias):
                    gradient.mul_(self._unit)
            if self.wanted.weight_grad is not None:
                if not self._added_to:
                    self.wanted.weight_grad.add_(weight)
                weight = weight.new_empty(0)
            if self.wanted.bias_grad is not None:
                self.wanted.bias_grad.add_(bias)
                bias = bias.new_empty(0)
            found += [hidden, weight, bias]
        return found + [self._weight.new_empty(0) for _ in range(6 - len(found))]

    def _add_filtered(
        self, objective: int, rows: Rows, gradient: Tensor, hidden: Tensor, columns: tuple[Tensor, Tensor]
    ) -> None:
        for_hidden, among_them = columns
        for_head = for_hidden[among_them]
        worth_gathering = _WORTH_GATHERING * gradient.shape[1]
        if for_head.shape[0] > worth_gathering:  # and so has for_hidden
            self._add_head(objective, gradient, hidden)
        elif not self.wanted.hidden or for_hidden.shape[0] > worth_gathering:
            self._add_head_columns(objective, self.products.gather(gradient, for_head), hidden, for_head)
        else:
            kept = self.products.gather(gradient, for_hidden)
            self._add_head_columns(objective, self.products.gather(kept, among_them), hidden, for_head)
            out = self._hidden_rows(kept)
            self.products.gathered_hidden_gradient(kept, self._weight, for_hidden, out)
            self.hidden[objective][rows] = out
            return
        if self.wanted.hidden:
            self.hidden[objective][rows] = self._hidden_product(gradient)

    def _hidden_product(self, logit_gradients: Tensor) -> Tensor:
        out = self._hidden_rows(logit_gradients)
        self.products.hidden_gradient(logit_gradients, self._weight, out)
        if logit_gradients.dtype in HALF_DTYPES and not self._wide:
            # Summed in float32 and rounded once, as torch does by itself; asked for float32 it takes 60 times as long.
            out -= torch.outer(logit_gradients.sum(dim=1).float(), self._shared_direction())
        return out

    def _shared_direction(self) -> Tensor:
        """About what the rows of the head have in common, (width,) float32: the mean of some of them.

        A logit gradient sums to 0 over the vocabulary. Rounded to 16 bits it does not, and its sum, times what all rows
        of the head have in common, would be in the hidden gradient: five times the other errors for a head whose rows
        share a direction of 16 times their own length. On a GPU the sums would take a read of all logit gradients, by
        the arithmetic of `tests/gpu_loop.py` 1.5 % of a call, and are not taken.
        """
        if self._shared is None:
            self._shared = self._weight[:: max(1, self._weight.shape[0] // _OF_ALL_ROWS)].mean(0, dtype=torch.float32)
        return self._shared

    def _hidden_rows(self, logit_gradients: Tensor) -> Tensor:
        dtype = self.hidden[0].dtype if self._wide else logit_gradients.dtype
        return logit_gradients.new_empty((logit_gradients.shape[0], self._weight.shape[1]), dtype=dtype)

    def _add_head(self, objective: int, gradient: Tensor, hidden: Tensor) -> None:
        if self.wanted.weight:
            self.products.head_gradient(
                gradient, hidden, self.weight[objective], self._accumulates, self._remainders[objective]
            )
        if self.bias[objective].numel():
            self.bias[objective].add_(gradient.sum(0, dtype=accumulation_dtype(gradient.dtype)))

    def _add_head_columns(self, objective: int, kept: Tensor, hidden: Tensor, columns: Tensor) -> None:
        """`kept` (rows, columns): those columns of the logit gradient."""
        if self.wanted.weight:
            self.products.gathered_head_gradient(kept, hidden, columns, self.weight[objective])
        bias = self.bias[objective]
        if bias.numel():
            bias.index_add_(0, columns, kept.sum(0, dtype=bias.dtype))


def gradient_dtype(dtype: torch.dtype, wide: bool) -> torch.dtype:
    """In which gradients of hidden states and heads of a dtype add up over chunks, and leave."""
    return accumulation_dtype(dtype) if wide else dtype
