"""Timing: calls in turns, with a limit where a call may never end."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness.memory import PeakMemory

CONTEXT_SECONDS = 5.0


@dataclass
class Timing:
    """The seconds of every timed call, in order, and the largest peak memory of any of them."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # above what was there before the call, results of the call excluded
    problem: str | None = None  # why there is no figure

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    min_rounds: int = 3,
    max_rounds: int = 9,
    budget_s: float = 2.0,
    device: str = "cpu",
    warm_up: Iterable[str] | None = None,
    context: Collection[str] = (),
    on_call: Callable[[str, float], None] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turns, A B C A B C, so that a slow spell of the machine meets all of them.

    Every call takes part in `min_rounds` rounds and then in more, up to `max_rounds`, while its own total is below
    `budget_s`: slow peers cost what they must, fast ones get a better median. Those in `context` stop after two rounds
    if they take more than `CONTEXT_SECONDS`: no verdict hangs on them. Those in `warm_up` (default: all) run
    once before. Peak memory is measured on the same calls. A call that raises is reported with its message, not timed.
    """
    timings = {name: Timing() for name in calls}
    for name in calls if warm_up is None else warm_up:
        _attempt(calls[name], timings[name], device, None)
    for round_number in range(max_rounds):
        for name, call in calls.items():
            timing = timings[name]
            rounds = min_rounds
            if name in context and timing.seconds and timing.seconds[0] > CONTEXT_SECONDS:
                rounds = min(2, min_rounds)
            enough = round_number >= rounds and sum(timing.seconds) >= budget_s
            if timing.problem is None and not enough:
                seconds = _attempt(call, timing, device, timing.seconds)
                if on_call is not None and seconds is not None:
                    on_call(name, seconds)
    return timings


def _attempt(call: Callable[[], Any], timing: Timing, device: str, seconds: list[float] | None) -> float | None:
    try:
        with PeakMemory(device) as peak:
            synchronize(device)
            start = time.perf_counter()
            result = call()
            synchronize(device)
            elapsed = time.perf_counter() - start
            peak.results = result
    except Exception as error:
        timing.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return None
    del result
    if seconds is not None:
        seconds.append(elapsed)
        if peak.above is not None:
            timing.peak_bytes = max(peak.above, timing.peak_bytes or 0)
    return elapsed


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_call(nbytes: int, device: str = "cpu") -> Callable[[], None]:
    """The copy that `copy_bandwidth` times, for benchmarks that interleave it with their own calls."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    destination = torch.zeros_like(source)

    def copy() -> None:
        destination.copy_(source)

    return copy


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after that long (main thread, not on Windows)."""

    def expire(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
