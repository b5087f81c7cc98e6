"""Timing: calls in turns, with a limit where a call may never end.

On a GPU a call is timed by events around it, after memory has been written that is twice the second-level cache: no
call finds there what an earlier one left. A turn in which the allocator had to give its cache back and ask again counts
for nothing, because most of it was waiting.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from benchmarks.harness.memory import PeakMemory

CONTEXT_SECONDS = 5.0
WARM_UP_CALLS = {"cpu": 1, "cuda": 3}  # a GPU's clock rises for a while, and its allocator grows


@dataclass
class Timing:
    """The seconds of every timed call, in order, and the largest peak memory of any of them."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # above what was there before the call, results of the call excluded
    problem: str | None = None  # why there is no figure
    discarded: int = 0  # turns in which the allocator retried

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
    `WARM_UP_CALLS` times before. Peak memory is measured on the same calls. A call that raises, for want of memory or
    for anything else, is reported with its message, not timed, and the others go on.
    """
    timings = {name: Timing() for name in calls}
    for name in calls if warm_up is None else warm_up:
        for _ in range(WARM_UP_CALLS[device]):
            if timings[name].problem is None:
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
    for timing in timings.values():
        if timing.discarded and not timing.seconds and timing.problem is None:
            timing.problem = "no figure: memory is so short that the allocator retried in every turn"
    return timings


def _attempt(call: Callable[[], Any], timing: Timing, device: str, seconds: list[float] | None) -> float | None:
    retries = allocator_retries(device)
    try:
        with PeakMemory(device) as peak:
            result, elapsed = _timed(call, device)
            peak.results = result
    except Exception as error:
        timing.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if timing.problem is not None:
        if device == "cuda":  # what the call held when it ran out of memory, for the calls after it
            torch.cuda.empty_cache()
        return None
    del result
    if seconds is None:
        return elapsed
    if allocator_retries(device) > retries:
        timing.discarded += 1
        return None
    seconds.append(elapsed)
    if peak.above is not None:
        timing.peak_bytes = max(peak.above, timing.peak_bytes or 0)
    return elapsed


def _timed(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    if device != "cuda":
        start = time.perf_counter()
        return call(), time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()  # also keeps the GPU busy while the first launch is on its way
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return result, begin.elapsed_time(end) / 1e3


@cache
def _cache_filler() -> torch.Tensor:
    size = 2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def allocator_retries(device: str) -> int:
    """How often the allocator gave its cache back because memory was short, so far."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device == "cuda" else 0


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
