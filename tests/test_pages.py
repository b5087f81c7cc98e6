"""Memory of large new tensors: huge pages where the system has them, and given back with the tensor."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from vgs_kernels.pages import use_huge_pages, zeros_like

SMAPS = Path("/proc/self/smaps")


def flags(address: int) -> list[str] | None:
    """The kernel's flags of the mapping that holds an address; None where nothing is mapped."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not SMAPS.exists(), reason="Linux with huge pages only"
)
def test_huge_pages_live_as_long_as_the_tensor() -> None:
    """In a new process: one with free memory of that size takes the tensor from there instead of mapping it."""
    process = multiprocessing.get_context("spawn").Process(target=look_at_the_pages)
    process.start()
    process.join()
    assert process.exitcode == 0


def look_at_the_pages() -> None:
    tensor = torch.empty(48 * 2**20, dtype=torch.uint8)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert "hg" not in (flags(middle) or [])
    use_huge_pages(tensor)
    assert "hg" in (flags(middle) or [])
    tensor.fill_(1)
    del tensor
    assert flags(middle) is None
    small = torch.empty(2**20, dtype=torch.uint8)
    use_huge_pages(small)
    assert "hg" not in (flags(small.data_ptr() + small.nbytes // 2) or [])


def test_zeros_are_zeros_of_the_shape() -> None:
    like = torch.randn(3, 5).t()
    zeros = zeros_like(like, torch.float64)
    assert (zeros.shape, zeros.dtype) == ((5, 3), torch.float64)
    assert zeros.is_contiguous()
    assert not zeros.any()
    zeros += 1
    assert zeros.sum() == 15
    assert zeros_like(like[:0], torch.float32).numel() == 0
