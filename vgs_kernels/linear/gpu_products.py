"""The three matrix products of a chunk on a GPU: the library's, of 16-bit matrices into float32.

Axes: n rows (tokens of the chunk, of one or two streams), v vocabulary, w width.

Nothing leaves a product in 16 bits. A sum over the vocabulary is cut into parts by the library, which adds them up in
the dtype of the result; rows of a logit gradient sum to 0, so what survives is far smaller than the parts, and bfloat16
would lose its digits. Float32 results cost nothing: hidden gradients are small, and those of heads add up over chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GpuProducts:
    """The counterpart of `products.Products`."""

    native = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.gradient_dtype = dtype  # of the logit gradients that the products take

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (n, v) = hidden (n, w) @ weight (v, w).T + bias (v,)."""
        if bias is not None and out.dtype == hidden.dtype:
            torch.addmm(bias, hidden, weight.t(), out=out)
            return
        _multiply(hidden, weight.t(), out)
        if bias is not None:
            out.add_(bias)

    def hidden_gradient(self, logit_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (n, w) = logit_gradient (n, v) @ weight (v, w)."""
        _multiply(logit_gradient, weight, out)

    def remainder(self, _out: Tensor) -> Tensor | None:
        """Nothing is left of sums in float32."""
        return None

    def head_gradient(
        self, logit_gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool, _remainder: Tensor | None = None
    ) -> None:
        """out (v, w) = or += logit_gradient (n, v).T @ hidden (n, w)."""
        _multiply(logit_gradient.t(), hidden, out, accumulate)

    def gather(self, matrix: Tensor, columns: Tensor) -> Tensor:  # (n, v), (k,) -> (n, k)
        """matrix[:, columns]."""
        return matrix.index_select(1, columns)

    def gathered_hidden_gradient(self, kept: Tensor, weight: Tensor, columns: Tensor, out: Tensor) -> None:
        """out (n, w) = kept (n, k) @ weight[columns]."""
        _multiply(kept, weight.index_select(0, columns), out)

    def gathered_head_gradient(self, kept: Tensor, hidden: Tensor, columns: Tensor, out: Tensor) -> None:
        """out[columns] += kept (n, k).T @ hidden (n, w), added in the dtype of out."""
        sums = out.index_select(0, columns)
        _multiply(kept.t(), hidden, sums, accumulate=True)
        out.index_copy_(0, columns, sums)


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = or += a @ b; sums are float32 inside, and rounded once where `out` is 16-bit."""
    options = {"out": out} if out.dtype == a.dtype else {"out": out, "out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **options)
    else:
        torch.mm(a, b, **options)
