"""How a linear call walks its tokens, and where logits and logit gradients lie; `rule.py` says how many at a time.

The logits of a slice of rows are projected, looked at twice and turned into logit gradients. Where gradients are of
another dtype than logits, those of all slices of a chunk gather in a buffer of their own before they are multiplied
back. Where the dtypes agree, gradients lie over the logits, and a chunk is one slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import use_huge_pages
from ..stream_kl.reference import Streams
from .rule import DeviceFacts, Plan

Rows = slice | Tensor  # of the tokens: a slice, or indices

# Rows of matrices on a GPU begin at whole cache lines: unaligned ones are loaded an entry at a time, by our kernels and
# by those of matrix products. Real vocabularies are multiples of 64 as they are.
_GPU_ALIGNMENT = 128  # bytes


def chunks(token_weights: Tensor, plan: Plan, facts: DeviceFacts) -> Iterator[tuple[Rows, int]]:
    """Rows of every chunk, and how many they are.

    On a CPU tokens of weight 0 are left out; on a GPU counting them would wait for it.
    """
    tokens = token_weights.shape[0]
    if not facts.is_gpu:
        active = token_weights.nonzero().squeeze(1)
        if active.shape[0] < tokens:
            for rows in active.split(plan.chunks(active.shape[0])):
                yield rows, rows.shape[0]
            return
    for rows in _places(plan.chunks(tokens)):
        yield rows, rows.stop - rows.start


def slices(rows: Rows, count: int, plan: Plan) -> Iterator[tuple[Rows, slice]]:
    """Cut a chunk of `count` rows: the rows of every slice, and where they lie in the chunk."""
    for place in _places(plan.slices(count)):
        if isinstance(rows, slice):
            yield slice(rows.start + place.start, rows.start + place.stop), place
        else:
            yield rows[place], place


def _places(lengths: list[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of the same memory in one shape."""
    places = (
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (first, second)
    )  # fmt: skip
    return next(places) == next(places)


def gather(hidden: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    """Those rows of hidden states, (n, width). Rows of weight 0 are 0: they may hold NaN, and 0 * NaN would reach the
    head gradient through the products."""
    if isinstance(rows, Tensor):  # of weight 0 there are none among them
        return hidden[rows]
    return hidden[rows].masked_fill((weights == 0)[:, None], 0)


class Logits:
    """Views of the logits of n tokens. The rows of one model are adjacent, the student's own first among its."""

    def __init__(self, teachers: Tensor, students: Tensor, n: int, masks_teacher: bool) -> None:
        self.teachers, self.students = teachers, students  # (n or 2 * n, vocab) each
        self.streams = Streams(
            students[:n],
            teachers[:n],
            teachers[-n:] if masks_teacher else None,  # those of the teacher itself, where they are the same
            students[n:] if students.shape[0] > n else None,
        )


@dataclass(frozen=True)
class Layout:
    """The shape of one model's matrices: entries of its vocabulary, and from one row to the next."""

    vocab: int
    stride: int

    @classmethod
    def of(cls, vocab: int, dtype: torch.dtype, facts: DeviceFacts) -> Layout:
        entries = _GPU_ALIGNMENT // dtype.itemsize if facts.is_gpu else 1
        return cls(vocab, -(-vocab // entries) * entries)

    def matrix(self, buffer: Tensor, rows: int) -> Tensor:
        """(rows, vocab), from the start of a flat buffer."""
        return buffer[: rows * self.stride].view(rows, self.stride)[:, : self.vocab]


class LogitBuffer:
    """The logits of one call, reused by every slice: fresh memory costs as much as the pass that fills it."""

    def __init__(
        self, like: Tensor, dtype: torch.dtype, layouts: tuple[Layout, Layout], streams: tuple[int, int], rows: int
    ) -> None:
        """Layout and number of streams, of (student, teacher). `rows`: of the longest slice."""
        self._layouts, self._streams = layouts, streams
        self._buffer = like.new_empty(rows * bytes_of_row(layouts, streams, 1), dtype=dtype)
        use_huge_pages(self._buffer)

    def of(self, n: int, masks_teacher: bool) -> Logits:
        (student, teacher), (students, teachers) = self._layouts, self._streams
        split = n * teachers * teacher.stride
        of_teachers, of_students = teacher.matrix(self._buffer, n * teachers), self._buffer[split:]
        return Logits(of_teachers, student.matrix(of_students, n * students), n, masks_teacher)

    def overwritten(self, n: int, objectives: int) -> Tensor:
        """(objectives * n, vocab): the memory of the student's logits, and for two objectives that of the teacher's
        that lie before them; one matrix, so that one product takes both."""
        (student, teacher), (_, teachers) = self._layouts, self._streams
        first = n * teachers * teacher.stride - (objectives - 1) * n * student.stride
        return student.matrix(self._buffer[first:], objectives * n)


class GradientBuffer:
    """Where the logit gradients of a chunk lie: over the logits, or apart. Those of the objectives are stacked."""

    def __init__(
        self, logits: LogitBuffer, like: Tensor, dtype: torch.dtype, layout: Layout, objectives: int, rows: int
    ) -> None:
        """`rows`: of the longest chunk whose gradients lie apart; 0 for over the logits."""
        self._logits, self._layout, self._objectives = logits, layout, objectives
        self._buffer = like.new_empty(objectives * rows * layout.stride, dtype=dtype) if rows else None
        if self._buffer is not None:
            use_huge_pages(self._buffer)

    def of(self, n: int) -> Tensor:
        """(objectives * n, vocab)."""
        if self._buffer is None:
            return self._logits.overwritten(n, self._objectives)
        return self._layout.matrix(self._buffer, self._objectives * n)


def bytes_of_row(layouts: tuple[Layout, Layout], streams: tuple[int, int], itemsize: int) -> int:
    """Of the logits of all streams of (student, teacher)."""
    return sum(layout.stride * count for layout, count in zip(layouts, streams, strict=True)) * itemsize


def can_overwrite(logits: torch.dtype, gradients: torch.dtype, vocabs: tuple[int, int], objectives: int) -> bool:
    """Whether logit gradients may lie over logits that are not needed after them.

    Not 16-bit ones over float32: a program would write where its neighbours have not read yet, and a GPU's rows are
    split over programs wherever the rows of a chunk do not fill it.
    """
    return logits == gradients and (objectives == 1 or vocabs[0] == vocabs[1])
