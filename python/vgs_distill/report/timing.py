"""Where the time of a training step goes.

On a GPU the spans are measured by CUDA events and read once per step, so that timing adds no synchronisation of its own
in the middle of a step; elsewhere by the wall clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepTimer:
    """Named spans, summed until `flush`. Spans may nest; an inner span's time is then part of the outer one's too."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._spans[name].append((start, self._now()))

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """As `span`, but the spans within it are not counted."""
        start, outer = self._now(), self._spans
        self._spans = defaultdict(list)
        try:
            yield
        finally:
            self._spans = outer
            self._spans[name].append((start, self._now()))

    def flush(self) -> dict[str, float]:
        """Seconds per name since the last flush."""
        if self._cuda and self._spans:
            torch.cuda.synchronize()
        totals = {name: sum(self._seconds(a, b) for a, b in pairs) for name, pairs in self._spans.items()}
        self._spans.clear()
        return totals

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000.0 if self._cuda else end - start
