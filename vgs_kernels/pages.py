"""Large new tensors of a CPU: how the system puts memory under them.

A page is zeroed at its first touch, and huge pages are touched less often. They are for scratch that is written again
and again, not for results: on a virtual machine whose host takes free memory back, the host has to find a whole huge
page at its first touch.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Allocators map a tensor of this size by itself, unless they have as much free, and what the system was told goes when
# the tensor does. Smaller ones may share their pages with others.
_MAPPED_ALONE = 32 * 2**20


def use_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a tensor that nothing has written to yet; nothing happens where there are none."""
    if tensor.device.type != "cpu" or tensor.nbytes < _MAPPED_ALONE:
        return
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)  # of the whole pages
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    # Advice: a refusal changes the time and nothing else.
    _madvise()(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of the tensor's shape and device; on a CPU, what is never written costs nothing."""
    size = tensor.numel() * dtype.itemsize
    if tensor.device.type != "cpu" or size == 0 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # lives as long as the tensor
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape)
