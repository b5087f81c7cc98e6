"""The three matrix products of a chunk of `linear_decomposed_kl`: logits, hidden gradient, head gradient.

Axes: n rows (tokens of the chunk, of one or two streams), v vocabulary, w width.

On a CPU in bf16, torch multiplies fastest when the large matrix is the left operand, as it lies in memory: it then
packs only the small one: logits as (v, w) @ (w, n), head gradient as (v, n) @ (n, w). So a slice of the vocabulary is
multiplied that way round, and transposed while it is in the cache. Where the CPU has a matrix unit (AMX), the logits
come from a compiled kernel that does the same in registers, `csrc/cpu/products_amx.cpp`. So do gradients of
few columns: rows of the head are gathered on the way into the unit, and added to on the way out.

In fp32 a chunk has about 64 rows, for which a general matrix product packs the head and waits for memory. There all
three are compiled kernels that walk the head once; `csrc/cpu/products_kernels.h` says what that saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOCAB_SLICE = 4096  # 4096 x 256 rows in bf16 are 2 MiB, the second-level cache of one core
HALF_DTYPES = (torch.bfloat16, torch.float16)


def projection_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of projected logits of the call that `linear` replaces."""
    return head_gradient_dtype(hidden)


def head_gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a head gradient adds up over runs: GPUs multiply bf16 and fp16 into fp32 at no extra cost."""
    if weight.is_cuda and weight.dtype in HALF_DTYPES:
        return torch.float32
    return weight.dtype


class Products:
    """The products, with the scratch memory that they share over the chunks of one call."""

    def __init__(self, device: torch.device, dtype: torch.dtype, native: bool) -> None:
        self.native = native and device.type == "cpu"
        self._transposed = self.native and dtype == torch.bfloat16
        # Tried with AVX-512 only; below it the library's products stay.
        self._streamed = self.native and dtype == torch.float32 and torch.ops.vgs_kernels_native.cpu_level() == 2
        self._has_matrix_unit = self._transposed and torch.ops.vgs_kernels_native.has_matrix_unit()
        self._scratch: Tensor | None = None
        self.gradient_dtype = dtype  # of the logit gradients that the products take

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (n, v) = hidden (n, w) @ weight (v, w).T + bias (v,)."""
        if hidden.shape[1] == 0:
            out.zero_()
        elif out.dtype != hidden.dtype and not out.is_cuda:  # a CPU has no such product
            for part in _slices(weight.shape[0]):
                torch.mm(hidden.to(out.dtype), weight[part].to(out.dtype).t(), out=out[:, part])
        elif self._suits_matrix_unit(weight):
            torch.ops.vgs_kernels_native.matrix_unit_logits(hidden, weight, out)
        elif self._transposed:
            for part in _slices(weight.shape[0]):
                logits = self._slice(part, hidden)
                torch.mm(weight[part], hidden.t(), out=logits)
                torch.ops.vgs_kernels_native.transpose(logits, out[:, part])
        elif self._streamed and weight.stride(1) == 1:
            torch.ops.vgs_kernels_native.logits(hidden, weight, out)
        elif out.dtype != hidden.dtype:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        else:
            torch.mm(hidden, weight.t(), out=out)
        if bias is not None:
            out.add_(bias)

    def hidden_gradient(self, logit_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (n, w) = logit_gradient (n, v) @ weight (v, w)."""
        if self._streamed and weight.stride(1) == 1:
            torch.ops.vgs_kernels_native.hidden_gradient(logit_gradient, weight, out)
        else:
            torch.mm(logit_gradient, weight, out=out)

    def gather(self, matrix: Tensor, columns: Tensor) -> Tensor:  # (n, v), (k,) -> (n, k)
        """matrix[:, columns]."""
        if not self.native:
            return matrix.index_select(1, columns)
        kept = matrix.new_empty(matrix.shape[0], columns.shape[0])
        torch.ops.vgs_kernels_native.gather_columns(matrix, columns, kept)
        return kept

    def gathered_hidden_gradient(self, kept: Tensor, weight: Tensor, columns: Tensor, out: Tensor) -> None:
        """out (n, w) = kept (n, k) @ weight[columns]."""
        if self._suits_matrix_unit(weight):
            torch.ops.vgs_kernels_native.matrix_unit_hidden_gradient(kept, weight, columns, out)
        elif out.dtype in HALF_DTYPES:  # to be rounded once
            torch.mm(kept, weight.index_select(0, columns), out=out)
        else:
            out.zero_()
            for start in range(0, columns.shape[0], VOCAB_SLICE):  # fresh memory for all costs more than the copy
                part = slice(start, start + VOCAB_SLICE)
                out.addmm_(kept[:, part], weight.index_select(0, columns[part]))

    def gathered_head_gradient(self, kept: Tensor, hidden: Tensor, columns: Tensor, out: Tensor) -> None:
        """out[columns] += kept (n, k).T @ hidden (n, w), added before it is rounded."""
        if self._suits_matrix_unit(hidden) and self._suits_matrix_unit(out):
            torch.ops.vgs_kernels_native.matrix_unit_head_gradient(kept, hidden, columns, out)
        elif out.dtype == hidden.dtype:
            out.index_copy_(0, columns, out.index_select(0, columns).addmm_(kept.t(), hidden))
        else:
            out.index_add_(0, columns, (kept.t() @ hidden).to(out.dtype))

    def head_gradient(self, logit_gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """out (v, w) = or += logit_gradient (n, v).T @ hidden (n, w)."""
        if self._streamed and out.dtype == torch.float32 and out.stride(1) == 1:
            torch.ops.vgs_kernels_native.head_gradient(logit_gradient, hidden, accumulate, out)
            return
        if out.is_cuda and out.dtype != hidden.dtype:
            if accumulate:
                torch.addmm(out, logit_gradient.t(), hidden, out_dtype=out.dtype, out=out)
            else:
                torch.mm(logit_gradient.t(), hidden, out_dtype=out.dtype, out=out)
            return
        whole = out.dtype == hidden.dtype and not self._transposed
        for part in [slice(0, out.shape[0])] if whole else _slices(out.shape[0]):
            gradient = logit_gradient[:, part].t()
            if self._transposed:
                gradient = self._slice(part, hidden)
                torch.ops.vgs_kernels_native.transpose(logit_gradient[:, part], gradient)
            if out.dtype == hidden.dtype:
                if accumulate:
                    out[part].addmm_(gradient, hidden)
                else:
                    torch.mm(gradient, hidden, out=out[part])
            else:
                product = gradient @ hidden
                out[part].add_(product) if accumulate else out[part].copy_(product)

    def _suits_matrix_unit(self, matrix: Tensor) -> bool:
        bf16 = matrix.dtype == torch.bfloat16
        return self._has_matrix_unit and bf16 and matrix.stride(1) == 1 and matrix.shape[1] % 32 == 0

    def _slice(self, part: slice, hidden: Tensor) -> Tensor:
        """Scratch of shape (slice, n)."""
        rows = hidden.shape[0]
        if self._scratch is None or self._scratch.numel() < VOCAB_SLICE * rows:
            self._scratch = hidden.new_empty(VOCAB_SLICE * rows)
        return self._scratch[: (part.stop - part.start) * rows].view(-1, rows)


def _slices(vocab: int) -> list[slice]:
    return [slice(start, min(start + VOCAB_SLICE, vocab)) for start in range(0, vocab, VOCAB_SLICE)]
