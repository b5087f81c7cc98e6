"""How many rows of a linear call have their logits in memory at a time, and how many are multiplied back at once.

Every product with the head reads the whole head, and a head gradient is read and written once by each product that adds
to it, whatever the number of rows. So rows are few where memory decides, and many where that traffic does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """What the rule needs to know of a device. `facts_of` reads it; a test writes it down."""

    is_gpu: bool
    free_bytes: int | None = None  # what a call may still allocate; None: not known, no bound


def is_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def facts_of(device: torch.device) -> DeviceFacts:
    """Nothing here waits for the device. Memory is not asked for while a graph is captured, which might fail."""
    if not is_gpu(device):
        return DeviceFacts(is_gpu=False)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return DeviceFacts(is_gpu=True)
    free, _total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_stats(device)  # what the allocator holds and has not given out is free, too
    cached = held.get("reserved_bytes.all.current", 0) - held.get("allocated_bytes.all.current", 0)
    return DeviceFacts(is_gpu=True, free_bytes=free + cached)


@dataclass(frozen=True)
class Bytes:
    """What a row takes, and what the call does beside its rows."""

    logits: int  # of all streams
    gradients: int  # of all objectives, where they do not lie over logits; 0 where they do, or none are formed
    head_gradients: int = 0  # of all objectives, of the whole call: what it allocates besides


@dataclass(frozen=True)
class Plan:
    """Rows of a chunk, which is multiplied back at once, and of a slice of it, whose logits are in memory together."""

    chunk: int  # at most
    slice: int  # at most; the chunk itself where memory allows
    tokens: int | None  # wanted in a chunk, where they fit
    multiple: int

    def chunks(self, count: int) -> list[int]:
        """Lengths of the chunks of `count` rows."""
        return _parts(count, self.chunk, self.multiple, self.tokens)

    def slices(self, count: int) -> list[int]:
        """Lengths of the slices of a chunk of `count` rows."""
        return _parts(count, self.slice, self.multiple, None)


@dataclass(frozen=True)
class ChunkRule:
    """The free numbers of the rule; one instance per kind of device, each number with its reason."""

    tokens: int | None  # wanted in a chunk; None: as many as fit
    multiple: int  # of rows
    max_bytes: int | None  # of logits and logit gradients; None: what the memory allows
    memory_share: float  # of the free memory that they may take
    gradient_share: float  # of the bytes that gradients beside the logits get; 0: the logits go first

    def plan(self, facts: DeviceFacts, a_row: Bytes, max_bytes: int | None, tokens: int | None) -> Plan:
        """`max_bytes` and `tokens` are the caller's, None for those of the rule."""
        wanted = tokens or self.tokens
        given = max_bytes if max_bytes is not None else self.max_bytes
        bounds = [given] if given is not None else []
        if facts.free_bytes is not None:
            bounds.append(int(max(0, facts.free_bytes - a_row.head_gradients) * self.memory_share))
        budget = min(bounds) if bounds else None
        if budget is None:  # nothing is known of the memory: the rows that are wanted, however many
            return Plan(2**31, 2**31, wanted, self.multiple)
        rows = self._whole(budget // (a_row.logits + a_row.gradients))
        if a_row.gradients and (self.gradient_share or rows < (wanted or 0)):
            chunk, part = self._sliced(a_row, budget, wanted)
            if chunk > rows:
                return Plan(chunk, part, wanted, self.multiple)
        return Plan(rows, rows, wanted, self.multiple)

    def _sliced(self, a_row: Bytes, budget: int, wanted: int | None) -> tuple[int, int]:
        """Rows of a chunk and of its slices, where the gradients of a chunk wait for those of its later slices."""
        if self.gradient_share:
            part = max(1, int(budget * (1 - self.gradient_share)) // a_row.logits)
            return part * max(1, int(budget * self.gradient_share) // (a_row.gradients * part)), part
        # The shortest slices; the memory that a chunk of the wanted rows then leaves makes them longer again.
        chunk = max(0, budget - self.multiple * a_row.logits) // a_row.gradients // self.multiple * self.multiple
        chunk = chunk if wanted is None else min(chunk, math.ceil(wanted / self.multiple) * self.multiple)
        part = self._whole((budget - chunk * a_row.gradients) // a_row.logits)
        return chunk, part

    def _whole(self, rows: int) -> int:
        """Whole multiples, where there is one; at least one row."""
        return max(1, rows // self.multiple * self.multiple or rows)


# tokens: at 176 to 220 rows, which 512 MiB were, the float32 head gradient is read and written 40 times for 8,192
#   tokens, 2.4 times the time of the products (modelled). Its product takes as long as its way through memory at
#   4 * FLOP rate / bandwidth rows, whatever width and vocabulary: data sheets and usual rates give about 1,000 on H100,
#   970 on B200, 560 on A100, 650 on RTX 4090. One number serves them all, the largest, rounded up.
# multiple: tiles of matrix products have 128 or 256 rows; a part of one costs as much as a whole.
# max_bytes: none. 1,024 rows of four float32 streams and a 16-bit gradient are 2.6 GiB at a vocabulary of 151,936.
# memory_share: free memory is in pieces, and some of it is of other streams and processes.
# gradient_share: a slice of all wanted rows reads the heads once a chunk; it is cut only where memory is short.
GPU = ChunkRule(tokens=1024, multiple=256, max_bytes=None, memory_share=0.5, gradient_share=0.0)
# max_bytes: the benchmark's peak stays below 160 MiB. At a vocabulary of 151,936 these are 64 rows of two streams
#   beside the 16-bit gradients of 256: every product of a chunk walks the head once, from memory.
CPU = ChunkRule(tokens=None, multiple=1, max_bytes=149 * 2**20, memory_share=1.0, gradient_share=0.5)


def rule_of(facts: DeviceFacts) -> ChunkRule:
    return GPU if facts.is_gpu else CPU


def _parts(count: int, most: int, multiple: int, wanted: int | None) -> list[int]:
    """Cut `count` into parts of nearly equal length, multiples all but the last: as few as `most` allows, or as many as
    have at least `wanted` each."""
    units = math.ceil(count / multiple)  # the last may be a part of one
    fewest = math.ceil(units / max(1, most // multiple)) if most >= multiple else math.ceil(count / most)
    if most < multiple:
        multiple, units = 1, count
    parts = max(1, fewest, min(units, count // wanted) if wanted else 0)
    ends = [min(count, units * index // parts * multiple) for index in range(parts + 1)]
    return [end - begin for begin, end in pairwise(ends) if end > begin]
