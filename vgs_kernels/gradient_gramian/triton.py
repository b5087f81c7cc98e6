"""Triton backend of `gradient_gramian`, where the compiled kernels are not: NVIDIA GPUs without a toolkit, and AMD.

One pass over both lists for all three numbers, one launch for each combination of dtypes. Two stages, no atomics: every
program writes the sums of its part, and torch adds those up. A thread sums in the dtype of accumulation over the few
hundred entries that it sees of a part; sums over threads and parts are float64. The legend is in `triton_table.py`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the annotations of kernels itself.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stream_kl.triton_config import describe_device
from .triton_table import ALIGNMENT, GROUP, TYPES, WIDTH, flat, launch_options, read, table_of, tile


@triton.jit
def _added(aa, ab, bb, x, y, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The sums with the products of one more tile. What is 0 because a gradient is None takes no registers."""
    if FIRST is not None:
        aa += x * x
    if SECOND is not None:
        bb += y * y
        if FIRST is not None:
            ab += x * y
    return aa, ab, bb


@triton.jit
def _of_lanes(tile_sums, rest_sums):
    return tl.sum(tl.sum(tl.sum(tile_sums, 2), 0).to(tl.float64) + rest_sums.to(tl.float64), 0)


@triton.jit(do_not_specialize=["begin"])
def products_kernel(
    LINES, PARTS, begin,
    FIRST: tl.constexpr, SECOND: tl.constexpr, SUM: tl.constexpr,
    LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    part = begin + tl.program_id(0)
    line = LINES + part * WIDTH
    first, second = tl.load(line), tl.load(line + 1)
    length = tl.load(line + 3).to(tl.int32) * GROUP
    end = length + tl.load(line + 4).to(tl.int32)

    aa = tl.zeros((LOADS, LANES, VECTOR), SUM)
    ab, bb = aa, aa
    for start in range(0, length, LOADS * LANES * VECTOR):
        entries = tile(start, LOADS, LANES, VECTOR)
        x = read(first, entries, entries < length, FIRST, SUM, ALIGNMENT)
        y = read(second, entries, entries < length, SECOND, SUM, ALIGNMENT)
        aa, ab, bb = _added(aa, ab, bb, x, y, FIRST, SECOND)

    rest_aa = tl.zeros((LANES,), SUM)
    rest_ab, rest_bb = rest_aa, rest_aa
    for start in range(length, end, LANES):
        entries = start + tl.arange(0, LANES)
        x = read(first, entries, entries < end, FIRST, SUM, 1)
        y = read(second, entries, entries < end, SECOND, SUM, 1)
        rest_aa, rest_ab, rest_bb = _added(rest_aa, rest_ab, rest_bb, x, y, FIRST, SECOND)

    sums = PARTS + part * 3
    tl.store(sums, _of_lanes(aa, rest_aa))
    tl.store(sums + 1, _of_lanes(ab, rest_ab))
    tl.store(sums + 2, _of_lanes(bb, rest_bb))


def inner_products(first: Sequence[Tensor | None], second: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """As `reference.inner_products`. Tensors that are not dense in memory in one common order are copied first."""
    pairs = [flat(pair)[0] for pair in zip(first, second, strict=True)]
    some = next(g for pair in pairs for g in pair if g is not None)
    with torch.cuda.device_of(some):
        table = table_of(pairs, some.device)
        parts = table.lines.new_empty((table.lines.shape[0], 3), dtype=torch.float64)
        for launch in table.launches:
            options = launch_options(launch, describe_device(some.device))
            products_kernel[(launch.parts,)](table.lines, parts, launch.begin, SUM=TYPES[dtype], **options)
        return parts.sum(0).to(dtype)
