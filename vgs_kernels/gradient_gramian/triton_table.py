"""Lists of gradients as a table on the device: what the Triton kernels of both steering ops share.

Legend:
    tensors   of one parameter: its two gradients, and where their combination goes
    entry     one number of a tensor
    group     GROUP entries that begin at a multiple of 16 bytes in all tensors: loads are 128 bits wide
    part      a run of entries of one parameter, the work of one program, and a line of the table
    launch    the parts of one combination of dtypes, one after another in the table

A line holds the addresses of the part in the three tensors (0 where there is none), the number of its groups, and the
number of entries behind them. Kernels multiply the number of groups by GROUP themselves: the compiler has to see that a
mask changes only between groups, or it loads one entry at a time.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the annotations of kernels itself.)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stream_kl.triton_config import Device

LOAD_BYTES = 16
GROUP_ENTRIES = 8  # one 128-bit load of 16-bit numbers, two of float32, four of float64
COLUMNS = 5

# The sizes of csrc/gradient_pairs.h: a part depends on the sizes of the tensors alone, so that sums over parts, and the
# rounding of what they add up to, are the same on every run.
SMALLEST_PART = 65536  # entries
MOST_PARTS = 8192  # apart from one unfinished part per tensor

CACHED_TABLES = 32  # of 40 bytes a part: at most 0.4 MiB each, apart from what 10,000 tensors add

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

GROUP = tl.constexpr(GROUP_ENTRIES)
ALIGNMENT = tl.constexpr(LOAD_BYTES)
WIDTH = tl.constexpr(COLUMNS)

Tensors = tuple[Tensor | None, ...]  # first, second, and out where there is one
Dtypes = tuple[torch.dtype | None, ...]


class Launch(NamedTuple):
    """Lines `begin` to `begin + parts` of a table: tensors of these dtypes."""

    dtypes: Dtypes
    begin: int
    parts: int


class Table(NamedTuple):
    lines: Tensor  # (parts, COLUMNS) int64, on the device
    launches: tuple[Launch, ...]


_tables: dict[tuple[Any, ...], Table] = {}
_captured: list[Tensor] = []


def table_of(parameters: Sequence[Tensors], device: torch.device) -> Table:
    """The table of tensors that are flat in memory. Gradients mostly stay where they were, and with them the table: it
    is looked up by the addresses. Nothing here waits for the device.

    A table belongs to the stream that its copy was started on. A captured CUDA graph repeats the copy at every replay,
    long after this call: its table is made anew, and what it is copied from is kept for good.
    """
    on_gpu = device.type != "cpu"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    described = [tuple(None if t is None else (t.data_ptr(), t.dtype, t.numel()) for t in ts) for ts in parameters]
    key = (device, stream, *described)
    table = None if capturing else _tables.pop(key, None)
    if table is None:
        lines, launches = _built(parameters)
        host = torch.tensor(lines, dtype=torch.int64).reshape(-1, COLUMNS)
        if on_gpu:
            host = host.pin_memory()
        if capturing:
            _captured.append(host)
        table = Table(host.to(device, non_blocking=True), launches)
    if not capturing:
        _tables[key] = table  # the last one used is the last one to go
        while len(_tables) > CACHED_TABLES:
            del _tables[next(iter(_tables))]
    return table


def _built(parameters: Sequence[Tensors]) -> tuple[list[tuple[int, ...]], tuple[Launch, ...]]:
    by_dtypes: dict[Dtypes, list[Tensors]] = {}
    for tensors in parameters:
        if any(t is not None and t.numel() for t in tensors):
            by_dtypes.setdefault(tuple(None if t is None else t.dtype for t in tensors), []).append(tensors)
    part = part_size(sum(_entries(tensors) for tensors in parameters))
    lines: list[tuple[int, ...]] = []
    launches = []
    for dtypes, alike in by_dtypes.items():
        begin = len(lines)
        for tensors in alike:
            lines.extend(_lines(tensors, part))
        launches.append(Launch(dtypes, begin, len(lines) - begin))
    return lines, tuple(launches)


def part_size(entries: int) -> int:
    """Entries of a part, a power of two, where all tensors have so many."""
    part = SMALLEST_PART
    while entries // part > MOST_PARTS:
        part *= 2
    return part


def _entries(tensors: Tensors) -> int:
    return max((t.numel() for t in tensors if t is not None), default=0)


def _lines(tensors: Tensors, part: int) -> Iterator[tuple[int, ...]]:
    """Views may begin anywhere: a first line steps over entries until every tensor is at a multiple of 16 bytes. Where
    they never are at the same time, no entry is in a group."""
    size = _entries(tensors)
    places = [(0, 0) if t is None else (t.data_ptr(), t.element_size()) for t in (*tensors, None)[:3]]

    def line(begin: int, groups: int, rest: int) -> tuple[int, ...]:
        return (*(address + begin * width for address, width in places), groups, rest)

    aligned = [begin for begin in range(GROUP_ENTRIES) if all((a + begin * w) % LOAD_BYTES == 0 for a, w in places)]
    first = min(aligned[0], size) if aligned else 0
    if first:
        yield line(0, 0, first)
    for begin in range(first, size, part):
        count = min(part, size - begin)
        yield line(begin, *divmod(count, GROUP_ENTRIES)) if aligned else line(begin, 0, count)


def launch_options(launch: Launch, device: Device) -> dict[str, Any]:
    """Constants of a launch, and its number of warps. The widest dtype sets how many entries a load has, so that all
    tensors are read in one layout and no thread waits for another's entries: in a mixture the others are narrower."""
    names = ("FIRST", "SECOND", "OUT")
    vector = LOAD_BYTES // max(dtype.itemsize for dtype in launch.dtypes if dtype is not None)
    return {
        **{name: None if dtype is None else TYPES[dtype] for name, dtype in zip(names, launch.dtypes, strict=False)},
        "LOADS": GROUP_ENTRIES // vector,
        "LANES": device.heuristics.warps * device.warp_size,
        "VECTOR": vector,
        "num_warps": device.heuristics.warps,
    }


def flat(tensors: Tensors) -> tuple[Tensors, bool]:
    """The tensors in memory order, where that is the same for all and has no gaps, as it is for transposed or
    channels-last parameters; contiguous copies otherwise. And whether these are copies."""
    given = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in given) or (
        all(t.stride() == given[0].stride() for t in given) and _is_dense(given[0])
    ):
        return tensors, False
    return tuple(None if t is None else t.contiguous() for t in tensors), True


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@triton.jit
def tile(start, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Consecutive entries, [LOADS, LANES, VECTOR]: sums over the first and last axis stay in a thread."""
    load = tl.arange(0, LOADS)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return start + load + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def read(address, entries, inside, TYPE: tl.constexpr, SUM: tl.constexpr, BYTES: tl.constexpr):
    """Entries of the tensor at an address, which is a multiple of BYTES; 0 outside, and where there is no tensor."""
    if TYPE is None:
        values = tl.zeros(entries.shape, SUM)
    else:
        pointer = tl.multiple_of(address.to(tl.pointer_type(TYPE)), BYTES)
        values = tl.load(pointer + entries, mask=inside, other=0.0).to(SUM)
    return values


@triton.jit
def write(address, entries, inside, values, TYPE: tl.constexpr, BYTES: tl.constexpr):
    pointer = tl.multiple_of(address.to(tl.pointer_type(TYPE)), BYTES)
    if TYPE.primitive_bitwidth == 16:
        values = values.to(tl.float32)  # GPUs have no conversion of float64 to 16 bits
    tl.store(pointer + entries, values.to(TYPE), mask=inside)
