"""Corrections and a bounds guard for Triton's interpreter (checked with Triton 3.6 and 3.8); call `install` first.

Why each is needed:
* bf16: the interpreter keeps bf16 as uint16 and rounds float32 to it by dropping bits. Here it rounds to nearest even,
  as GPUs do, and arithmetic on bf16 values, which would add the bit patterns, raises instead of returning nonsense.
* comparisons: their handles keep the operands' type, so a scalar comparison of floats is broadcast as floats.
* bounds of loops: Triton 3.6 makes numbers of arrays with one entry by int(), which numpy 2.5 refuses.
* speed: every call of a device function patches the whole language module anew, four fifths of the time. The launch has
  patched `triton.language` already; `triton.language.core`, which the standard library uses, stays patched once it is.
* bounds: `guard` checks that every unmasked lane of every load and store lies inside a registered tensor. On a GPU such
  a lane reads a neighbour or faults, in the interpreter it usually goes unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_builder: Any = interpreter.InterpreterBuilder
_ranges: list[tuple[int, int]] | None = None


class OutOfBounds(IndexError):
    """An unmasked lane touches memory that belongs to no registered tensor."""


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _cast(original: Any) -> Any:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bf16(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_from_bf16(source.data), tl.float32)
        return original(self, source, target)

    return cast_impl


def _arithmetic(original: Any) -> Any:
    def operate(self: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, interpreter.TensorHandle) and operand.dtype.scalar == tl.bfloat16:
                raise TypeError("arithmetic on bf16 values: cast to float32 right after the load")
        with np.errstate(all="ignore"):  # infinities are part of the arithmetic, as they are on a GPU
            return original(self, *operands)

    return operate


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    """As the interpreter's, but a comparison's result is int1, not the operands' type."""
    output = operation(left.data, right.data)
    if output.dtype == np.bool_:
        return interpreter.TensorHandle(output, tl.int1)
    kind = left.dtype.scalar
    return interpreter.TensorHandle(output.astype(interpreter._get_np_dtype(kind), copy=False), kind)


_original_binary = _builder.binary_op
_original_load = _builder.create_masked_load
_original_store = _builder.create_masked_store


def _check(pointers: Any, mask: Any, what: str) -> None:
    if _ranges is None:
        return
    size = pointers.get_element_ty().primitive_bitwidth // 8
    addresses = pointers.data.astype(np.int64).ravel()
    addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
    outside = np.ones(addresses.shape, bool)
    for low, high in _ranges:
        outside &= ~((addresses >= low) & (addresses + size <= high))
    if outside.any():
        raise OutOfBounds(f"{what}: {int(outside.sum())} of {addresses.size} unmasked lanes lie outside every tensor")


def _load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
    _check(pointers, mask, "tl.load")
    return _original_load(self, pointers, mask, *others)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
    _check(pointers, mask, "tl.store")
    return _original_store(self, pointers, value, mask, *others)


def _tensor(original: Any) -> Any:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


_core_patched = False


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    global _core_patched
    if not _core_patched and any(value is tl.core for value in self.fn.__globals__.values()):
        interpreter._patch_lang(self.fn)
        _core_patched = True
    return self.rewrite()(*arguments, **named)


def install() -> None:
    """Apply the corrections; once per process."""
    if _builder.binary_op is not _original_binary:
        return
    interpreter._patch_lang_tensor = _tensor(interpreter._patch_lang_tensor)
    _builder.cast_impl = _cast(_builder.cast_impl)
    _builder.create_fp_to_fp = _conversion(_builder.create_fp_to_fp)
    _builder.binary_op = _arithmetic(_binary)
    _builder.unary_op = _arithmetic(_builder.unary_op)
    _builder.ternary_op = _arithmetic(_builder.ternary_op)
    _builder.create_masked_load = _load
    _builder.create_masked_store = _store
    interpreter.InterpretedFunction.__call__ = _call


def _conversion(original: Any) -> Any:
    cast = _cast(None)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.float32, tl.bfloat16}:
            return cast(self, source, target)
        return original(self, source, target, rounding_mode)

    return create_fp_to_fp


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses between the tensor's first and last element; a strided view's gaps count as inside."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _rows(tensor: Tensor) -> list[tuple[int, int]]:
    """One range per row of a 2-D tensor: the gap between rows is outside."""
    if tensor.dim() != 2 or tensor.is_contiguous() or math.prod(tensor.shape) == 0:
        return [_span(tensor)]
    return [_span(row) for row in tensor]


@contextmanager
def guard(*tensors: Tensor | None) -> Iterator[list[tuple[int, int]]]:
    """Within this block every unmasked lane must lie inside one of `tensors` or of those registered later."""
    global _ranges
    _ranges = [span for tensor in tensors if tensor is not None for span in _rows(tensor)]
    try:
        yield _ranges
    finally:
        _ranges = None


def register(tensor: Tensor) -> Tensor:
    """Add a tensor that the launcher made to the current guard; returns it."""
    if _ranges is not None:
        _ranges.append(_span(tensor))
    return tensor
