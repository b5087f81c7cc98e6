"""How a linear call walks its tokens: how many rows have their logits in memory at a time, and where those lie.

Two lengths. The logits of a short run of rows are projected, looked at twice and turned into logit gradients. Where
gradients are of another dtype than logits, those of several short runs gather in a buffer of their own before they are
multiplied back: every product reads and writes the whole head gradient once, whatever its number of rows. Where the
dtypes agree, gradients lie over the logits, and both lengths are one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import use_huge_pages
from ..stream_kl.reference import Streams

Rows = slice | Tensor  # of the tokens: a slice, or indices

# Bytes of logits and logit gradients at a time. CPU: the benchmark's peak stays below 160 MiB; at a vocabulary of
# 151,936 these are 64 rows of two streams beside the 16-bit gradients of 256. GPU: every product of a run reads the
# head, so few rows would leave the processors waiting for memory; this value is reasoned, not measured.
DEFAULT_MAX_CHUNK_BYTES = {"cpu": 149 * 2**20, "cuda": 512 * 2**20}
# Part of them that gradients of another dtype get on a CPU.
_GRADIENT_SHARE = 0.5


@dataclass(frozen=True)
class Lengths:
    """Rows of a short run, and of a long one, which is a whole number of short ones."""

    logits: int
    gradients: int


def lengths(device_type: str, logit_bytes: int, gradient_bytes: int, max_bytes: int) -> Lengths:
    """The rows that fit `max_bytes`, at least one, of the bytes a row that all logits take, and that those gradients
    take which do not lie over logits."""
    if gradient_bytes == 0 or device_type != "cpu":
        rows = max(1, max_bytes // (logit_bytes + gradient_bytes))
        return Lengths(rows, rows)
    short = max(1, int(max_bytes * (1 - _GRADIENT_SHARE)) // logit_bytes)
    runs = max(1, int(max_bytes * _GRADIENT_SHARE) // (gradient_bytes * short))
    return Lengths(short, short * runs)


def runs(token_weights: Tensor, most: int) -> Iterator[Rows]:
    """Rows of every run, of nearly equal length: a product of few rows costs as much as the head's way through memory.

    On a CPU tokens of weight 0 are left out; on a GPU counting them would wait for it.
    """
    tokens = token_weights.shape[0]
    if not token_weights.is_cuda:
        active = token_weights.nonzero().squeeze(1)
        if active.shape[0] < tokens:
            yield from active.split(_equal(active.shape[0], most)) if active.numel() else ()
            return
    length = _equal(tokens, most)
    for start in range(0, tokens, length):
        yield slice(start, min(start + length, tokens))


def _equal(count: int, most: int) -> int:
    """The length of as few parts of a count as may be, at most `most` each."""
    return math.ceil(count / max(1, math.ceil(count / most))) or 1


def short_runs(rows: Rows, count: int, most: int) -> Iterator[tuple[Rows, slice]]:
    """Cut a run of `count` rows: the rows of every short one, and where they lie in the run."""
    length = _equal(count, most)
    for start in range(0, count, length):
        place = slice(start, min(start + length, count))
        if isinstance(rows, slice):
            yield slice(rows.start + place.start, rows.start + place.stop), place
        else:
            yield rows[place], place


def gather(hidden: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    """Those rows of hidden states, (n, width). Rows of weight 0 are 0: they may hold NaN, and 0 * NaN would reach the
    head gradient through the products."""
    if isinstance(rows, Tensor):  # of weight 0 there are none among them
        return hidden[rows]
    return hidden[rows].masked_fill((weights == 0)[:, None], 0)


class Logits:
    """Views of the logits of n tokens. The rows of one model are adjacent, the student's own first among its."""

    def __init__(self, teachers: Tensor, students: Tensor, n: int) -> None:
        self.teachers, self.students = teachers, students  # (n or 2 * n, vocab) each
        self.streams = Streams(
            students[:n],
            teachers[:n],
            teachers[n:] if teachers.shape[0] > n else None,
            students[n:] if students.shape[0] > n else None,
        )


class LogitBuffer:
    """The logits of one call, reused by every run: fresh memory costs as much as the pass that fills it."""

    def __init__(self, like: Tensor, dtype: torch.dtype, vocabs: tuple[int, int], streams: tuple[int, int]) -> None:
        """Vocabulary and number of streams, of (student, teacher)."""
        self._like, self._dtype = like, dtype
        self._vocabs, self._streams = vocabs, streams
        self._buffer: Tensor | None = None

    def of(self, n: int) -> Logits:
        (student_vocab, teacher_vocab), (students, teachers) = self._vocabs, self._streams
        split = n * teachers * teacher_vocab
        size = split + n * students * student_vocab
        if self._buffer is None:
            self._buffer = self._like.new_empty(size, dtype=self._dtype)
            use_huge_pages(self._buffer)
        return Logits(
            self._buffer[:split].view(n * teachers, teacher_vocab),
            self._buffer[split:size].view(n * students, student_vocab),
            n,
        )

    def overwritten(self, n: int, objectives: int) -> Tensor:
        """(objectives * n, vocab): the memory of the student's logits, and for two objectives that of the teacher's
        that lie before them; one matrix, so that one product takes both."""
        (vocab, teacher_vocab), (_, teachers) = self._vocabs, self._streams
        assert self._buffer is not None
        first = n * teachers * teacher_vocab
        return self._buffer[first - (objectives - 1) * n * vocab : first + n * vocab].view(objectives * n, vocab)


class GradientBuffer:
    """Where the logit gradients of a run lie: over the logits, or apart. Those of the objectives are stacked."""

    def __init__(self, logits: LogitBuffer, like: Tensor, dtype: torch.dtype, vocab: int, objectives: int, over: bool):
        self._logits, self._over = logits, over
        self._like, self._dtype = like, dtype
        self._vocab, self._objectives = vocab, objectives
        self._buffer: Tensor | None = None

    def of(self, n: int) -> Tensor:
        """(objectives * n, vocab)."""
        if self._over:
            return self._logits.overwritten(n, self._objectives)
        if self._buffer is None:
            self._buffer = self._like.new_empty(self._objectives * n * self._vocab, dtype=self._dtype)
            use_huge_pages(self._buffer)
        return self._buffer[: self._objectives * n * self._vocab].view(-1, self._vocab)


def can_overwrite(logits: torch.dtype, gradients: torch.dtype, vocabs: tuple[int, int], objectives: int) -> bool:
    """Whether logit gradients may lie over logits that are not needed after them."""
    return logits == gradients and (objectives == 1 or vocabs[0] == vocabs[1])
