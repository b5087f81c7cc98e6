"""Backend of `gradient_gramian` for installs without other kernels: plain torch, many tensors at a time.

The tensors of a batch are gathered into one buffer (`torch.cat`, a few launches for any number of tensors) and
multiplied there: the number of launches follows the number of entries, not of tensors, and a CPU still has a batch in
its cache when it multiplies it. torch's own `_foreach` functions have no inner product. This is a module of its own and
not the reference, which stays a loop over pairs that anyone can check, and that this one is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Entries of a batch. On a CPU two float32 buffers are 1 MiB, which stays in a second-level cache (measured on one core:
# with 2^14 entries everything takes 1.5 times as long, with 2^18 1.1 times); a GPU gains little beyond its own.
CPU_BATCH = 2**17
GPU_BATCH = 2**22

Piece = tuple[int, int, int]  # (index of the tensor, first entry, last entry + 1)


def inner_products(first: Sequence[Tensor | None], second: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """As `reference.inner_products`."""
    device = next(g.device for g in (*first, *second) if g is not None)
    total = torch.zeros(3, dtype=dtype, device=device)
    sizes = [max(0 if g is None else g.numel() for g in pair) for pair in zip(first, second, strict=True)]
    flat_first, flat_second = flattened(first), flattened(second)
    buffers = batch_buffers(2, sizes, dtype, device)
    for batch in batches(sizes, device):
        a, b = gathered(flat_first, batch, buffers[0]), gathered(flat_second, batch, buffers[1])
        total += torch.stack([a.dot(a), a.dot(b), b.dot(b)])
    return total


def batches(sizes: Sequence[int], device: torch.device) -> Iterator[list[Piece]]:
    """Cut tensors of these sizes into batches of one length, the last one shorter. Large tensors are cut, too."""
    limit = batch_limit(device)
    batch: list[Piece] = []
    room = limit
    for index, size in enumerate(sizes):
        begin = 0
        while begin < size:
            end = min(size, begin + room)
            batch.append((index, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def batch_limit(device: torch.device) -> int:
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


def batch_buffers(count: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of the length of a batch. Made once: fresh memory costs a CPU more than the pass that fills it."""
    return torch.empty(count, min(sum(sizes), batch_limit(device)), dtype=dtype, device=device)


def flattened(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.reshape(-1) for gradient in gradients]


def gathered(flat: Sequence[Tensor | None], batch: list[Piece], buffer: Tensor) -> Tensor:
    """The entries of a batch, in the buffer and its dtype; None counts as zeros."""
    pieces = []
    for index, begin, end in batch:
        gradient = flat[index]
        pieces.append(buffer.new_zeros(end - begin) if gradient is None else gradient[begin:end])
    total = buffer[: sum(end - begin for _, begin, end in batch)]
    torch.cat(pieces, out=total)
    return total
