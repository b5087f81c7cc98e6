"""New memory for head gradients: to be written whole, or zeros that cost nothing until they are written.

A filtered head gradient touches few of its rows. Layer: tensors in, tensors out. Called by `linear_decomposed_kl/op.py`
only.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory of the tensor's shape and device."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of the tensor's shape and device; on a CPU, pages that the system zeroes at first touch."""
    size = tensor.numel() * dtype.itemsize
    if tensor.device.type != "cpu" or size == 0 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # lives as long as the tensor
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape)
