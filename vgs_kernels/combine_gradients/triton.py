"""Triton backend of `combine_gradients`, where the compiled kernels are not: NVIDIA GPUs without a toolkit, and AMD.

One pass, one launch for each combination of dtypes: both gradients are read, their combination is written. The weights
are read on the device, and a component of weight 0 is not read at all. `out` may be a tensor of `first` or `second`: a
program reads all of a tile before it writes it, and no other touches it. The legend is in
`../gradient_gramian/triton_table.py`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the annotations of kernels itself.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradient_gramian.triton_table import ALIGNMENT, GROUP, WIDTH, flat, launch_options, read, table_of, tile, write
from ..stream_kl.triton_config import describe_device


@triton.jit(do_not_specialize=["begin"])
def combine_kernel(
    LINES, WEIGHTS, begin,
    FIRST: tl.constexpr, SECOND: tl.constexpr, OUT: tl.constexpr,
    LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = WEIGHTS.dtype.element_ty
    line = LINES + (begin + tl.program_id(0)) * WIDTH
    first, second, out = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    length = tl.load(line + 3).to(tl.int32) * GROUP
    end = length + tl.load(line + 4).to(tl.int32)
    u, v = tl.load(WEIGHTS), tl.load(WEIGHTS + 1)  # read here: the host never waits for them

    for start in range(0, length, LOADS * LANES * VECTOR):
        entries = tile(start, LOADS, LANES, VECTOR)
        inside = entries < length
        x = read(first, entries, inside & (u != 0), FIRST, SUM, ALIGNMENT)
        y = read(second, entries, inside & (v != 0), SECOND, SUM, ALIGNMENT)
        write(out, entries, inside, u * x + v * y, OUT, ALIGNMENT)

    for start in range(length, end, LANES):
        entries = start + tl.arange(0, LANES)
        inside = entries < end
        x = read(first, entries, inside & (u != 0), FIRST, SUM, 1)
        y = read(second, entries, inside & (v != 0), SECOND, SUM, 1)
        write(out, entries, inside, u * x + v * y, OUT, 1)


def combine(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """As `reference.combine`. Tensors that are not dense in memory in one common order go through a copy."""
    flattened = [flat(tensors) for tensors in zip(first, second, out, strict=True)]
    device = weights.device
    with torch.cuda.device_of(weights):
        table = table_of([tensors for tensors, _ in flattened], device)
        weights = weights.contiguous()
        for launch in table.launches:
            options = launch_options(launch, describe_device(device))
            combine_kernel[(launch.parts,)](table.lines, weights, launch.begin, **options)
    for result, ((*_, written), copied) in zip(out, flattened, strict=True):
        if copied and written is not None:
            result.copy_(written)
