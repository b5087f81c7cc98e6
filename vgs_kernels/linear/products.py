"""The three matrix products of a chunk of tokens on a CPU: logits, hidden gradient, head gradient.

Axes: n rows (tokens of the chunk, of one or two streams), v vocabulary, w width.

All sums are float32, and what is 16-bit is rounded once. The rows are few, for which a general matrix product packs or
waits for the large matrix; and torch has no product of 16-bit matrices into float32 here. So the products are compiled
kernels that walk the head once (`csrc/cpu/products_kernels.h`): on pairs of bfloat16 where the CPU has
AVX512-BF16, in float32 elsewhere. Where it has a matrix unit (AMX), logits in bfloat16 come from it
(`csrc/cpu/products_amx.cpp`), and so do gradients of few columns: rows of the head are gathered on the way into the
unit, and added to on the way out. The other gradients are torch's there: it multiplies fastest when the large matrix is
the left operand, as it lies in memory, and packs only the small one: (v, n) @ (n, w) for the head. So a slice of the
logit gradients is transposed while it is in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOCAB_SLICE = 4096  # 4096 x 256 rows in bf16 are 2 MiB, the second-level cache of one core
HALF_DTYPES = (torch.bfloat16, torch.float16)
AVX512, AVX512_BF16, AMX = 2, 3, 4  # levels of csrc/cpu/kernels.h


class Products:
    """The products, with the scratch memory that they share over the runs of one call."""

    def __init__(self, device: torch.device, dtype: torch.dtype, native: bool) -> None:
        self.native = native and device.type == "cpu"
        level = torch.ops.vgs_kernels_native.cpu_level() if self.native else -1
        is_half = dtype in HALF_DTYPES
        self._on_matrix_unit = level == AMX and dtype == torch.bfloat16
        # Float32 was tried with AVX-512 only; below it the library's products stay.
        self._compiled = self.native and (is_half or (dtype == torch.float32 and level >= AVX512))
        self._scratch: Tensor | None = None
        multiplies_halves = level >= AVX512_BF16 and dtype == torch.bfloat16
        # Of the logit gradients that the products take. Where the arithmetic is float32 nothing is gained by rounding.
        self.gradient_dtype = torch.float32 if is_half and not multiplies_halves else dtype

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (n, v) = hidden (n, w) @ weight (v, w).T + bias (v,)."""
        if self._compiled and weight.stride(1) == 1:
            bias = None if bias is None else bias.to(torch.float32).contiguous()
            torch.ops.vgs_kernels_native.logits(hidden, weight, bias, out)
            return
        if out.dtype == hidden.dtype:
            if bias is None:
                torch.mm(hidden, weight.t(), out=out)
            else:
                torch.addmm(bias, hidden, weight.t(), out=out)
            return
        for part in _slices(weight.shape[0]):
            out[:, part] = hidden.to(out.dtype) @ weight[part].to(out.dtype).t()
        if bias is not None:
            out.add_(bias)

    def hidden_gradient(self, logit_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (n, w) = logit_gradient (n, v) @ weight (v, w)."""
        if self._compiled and not self._on_matrix_unit and weight.stride(1) == 1:
            torch.ops.vgs_kernels_native.hidden_gradient(logit_gradient, weight, out)
        elif logit_gradient.dtype == weight.dtype:
            torch.mm(logit_gradient, weight, out=out)
        else:
            sums = logit_gradient.new_zeros(out.shape)
            for part in _slices(weight.shape[0]):
                sums.addmm_(logit_gradient[:, part], weight[part].to(sums.dtype))
            out.copy_(sums)

    def remainder(self, out: Tensor) -> Tensor | None:
        """Zeros for what rounding leaves of the sums in a head gradient; None where nothing keeps it."""
        if out.dtype not in HALF_DTYPES or self._on_matrix_unit:
            return None
        found = torch.zeros_like(out)
        return found if found.stride() == out.stride() else None

    def head_gradient(
        self, logit_gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool, remainder: Tensor | None = None
    ) -> None:
        """out (v, w) = or += logit_gradient (n, v).T @ hidden (n, w), with the remainder of what is there, if any."""
        if self._compiles_head_gradient(out):
            torch.ops.vgs_kernels_native.head_gradient(logit_gradient, hidden, accumulate, out, remainder)
        else:
            for part in _slices(out.shape[0]):
                rest = None if remainder is None else remainder[part]
                self._head_gradient(self._transposed(logit_gradient[:, part]), hidden, out[part], accumulate, rest)

    def _compiles_head_gradient(self, out: Tensor) -> bool:
        return self._compiled and not self._on_matrix_unit and out.dtype != torch.float64 and out.stride(1) == 1

    @staticmethod
    def _head_gradient(
        gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool, remainder: Tensor | None
    ) -> None:
        """The same of a slice of the vocabulary, `gradient` (v, n)."""
        if gradient.dtype == hidden.dtype == out.dtype and remainder is None:
            if accumulate:
                out.addmm_(gradient, hidden)
            else:
                torch.mm(gradient, hidden, out=out)
        else:
            dtype = torch.promote_types(gradient.dtype, torch.promote_types(out.dtype, torch.float32))
            product = gradient.to(dtype) @ hidden.to(dtype)
            for part in (out, remainder) if accumulate else ():
                product += 0.0 if part is None else part
            out.copy_(product)
            if remainder is not None:
                remainder.copy_(product.sub_(out))

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
        elif kept.dtype in HALF_DTYPES:  # to be rounded once
            torch.mm(kept, weight.index_select(0, columns), out=out)
        else:
            sums = kept.new_zeros(out.shape)
            for start in range(0, columns.shape[0], VOCAB_SLICE):  # fresh memory for all costs more than the copy
                part = slice(start, start + VOCAB_SLICE)
                sums.addmm_(kept[:, part], weight.index_select(0, columns[part]).to(sums.dtype))
            out.copy_(sums)

    def gathered_head_gradient(self, kept: Tensor, hidden: Tensor, columns: Tensor, out: Tensor) -> None:
        """out[columns] += kept (n, k).T @ hidden (n, w), added before it is rounded."""
        if self._suits_matrix_unit(hidden) and self._suits_matrix_unit(out):
            torch.ops.vgs_kernels_native.matrix_unit_head_gradient(kept, hidden, columns, out)
        elif kept.dtype == hidden.dtype == out.dtype:
            out.index_copy_(0, columns, out.index_select(0, columns).addmm_(kept.t(), hidden))
        else:
            dtype = torch.promote_types(kept.dtype, out.dtype)
            sums = out.index_select(0, columns).to(dtype).addmm_(kept.t().to(dtype), hidden.to(dtype))
            out.index_copy_(0, columns, sums.to(out.dtype))

    def _suits_matrix_unit(self, matrix: Tensor) -> bool:
        bf16 = matrix.dtype == torch.bfloat16
        return self._on_matrix_unit and bf16 and matrix.stride(1) == 1 and matrix.shape[1] % 32 == 0

    def _transposed(self, part: Tensor) -> Tensor:  # (n, slice) -> (slice, n)
        if not self._on_matrix_unit:
            return part.t()
        rows = part.shape[0]
        if self._scratch is None or self._scratch.numel() < VOCAB_SLICE * rows:
            self._scratch = part.new_empty(VOCAB_SLICE * rows)
        transposed = self._scratch[: part.shape[1] * rows].view(-1, rows)
        torch.ops.vgs_kernels_native.transpose(part, transposed)
        return transposed


def _slices(vocab: int) -> list[slice]:
    return [slice(start, min(start + VOCAB_SLICE, vocab)) for start in range(0, vocab, VOCAB_SLICE)]
