"""Peak memory of a call: the allocator's on a GPU, the resident set's on Linux; what autograd keeps for backward."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
MEMORY_METHOD = {
    "cuda": "peak of torch.cuda.max_memory_allocated, minus before the call, minus its results",
    "cpu": "peak of the resident set (VmHWM, reset before the call), minus VmRSS before it, minus its results",
}


class PeakMemory:
    """Peak memory of a block above what was held before it, minus the tensors assigned to `results`.

    On a GPU: the caching allocator's peak. On Linux: the resident peak (VmHWM), reset through /proc/self/clear_refs
    after handing free heap pages back (`malloc_trim`), so that memory the heap kept from earlier calls counts again.
    Large tensors are mapped and unmapped by glibc one by one, so the resident size follows them. `above` is None where
    neither is possible.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.results: Any = None
        self.above: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif (before := _reset_resident_peak()) is not None:
            self._before = before
        else:
            self._before = -1
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before >= 0:
            peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status_bytes("VmHWM")
            self.above = max(0, peak - self._before - tensor_bytes(self.results))
        self.results = None


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; a storage that several share counts once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(values)
    return sum(storages.values())


class SavedForBackward:
    """Bytes that autograd keeps for backward within a block, `peak` the most at once; exact on any device.

    Counts every tensor that a forward pass saves, from its saving until its graph is freed. Storages that several share
    count once, those of `without` (parameters, which are there anyway) not at all.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        self.peak = self._bytes = 0
        self._holders: dict[int, int] = {}  # address of a storage -> how many saved tensors lie in it
        self._without = [tensor.untyped_storage() for tensor in without]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> SavedForBackward:
        self._left_out = {storage.data_ptr() for storage in self._without}
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor.detach(), self)  # a tensor with its graph would keep itself alive

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._left_out:
            return
        before = self._holders.get(address, 0)
        self._holders[address] = before + change
        if before == 0 or before + change == 0:
            self._bytes += change * storage.nbytes()
            self.peak = max(self.peak, self._bytes)
        if before + change == 0:
            del self._holders[address]


class _Saved:
    """One saved tensor, for as long as its graph lives."""

    def __init__(self, tensor: Tensor, book: SavedForBackward) -> None:
        self.tensor, self._book = tensor, book
        book.count(tensor, 1)

    def __del__(self) -> None:
        self._book.count(self.tensor, -1)


def _reset_resident_peak() -> int | None:
    """Hand free heap pages back, set VmHWM to the resident size, and return that; None where it cannot be done."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024
