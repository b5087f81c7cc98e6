"""Peak memory of a call: the allocator's on a GPU, the resident set's on Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Mapping
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
