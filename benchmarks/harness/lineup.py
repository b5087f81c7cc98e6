"""What takes part in the turns of a case: every call, and the row for its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness.records import Row
from benchmarks.harness.tables import seconds_text
from benchmarks.harness.timing import Timing, copy_call, interleaved, synchronize, time_limit


@dataclass
class Lineup:
    """Calls in the order of the turns. A row without a call has no figure, and its note says why."""

    device: str
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, name: str, label: str, call: Callable[[], Any], **row: Any) -> None:
        """`row`: further fields of `Row`."""
        self.calls[name] = call
        self.rows[name] = Row(name, label, **row)

    def add_copy(self, nbytes: int) -> None:
        """A copy, whose speed is that of all that only moves."""
        self.add("copy", "a copy", copy_call(nbytes, self.device), bytes_moved=2 * nbytes)

    def drop(self, name: str, why: str) -> None:
        self.calls.pop(name, None)
        self.rows[name].note = why

    def call_first(self, name: str, limit_s: float) -> float:
        """Call once what compiles, for its seconds; what fails or takes longer than the limit is dropped."""
        start = time.perf_counter()
        try:
            with time_limit(limit_s):
                self.calls[name]()
                synchronize(self.device)
        except Exception as error:
            self.drop(name, f"skipped: {type(error).__name__}: {error}".splitlines()[0])
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return time.perf_counter() - start

    def take_turns(
        self,
        rounds: int,
        most_rounds: int,
        budget_s: float,
        warm_up: Iterable[str] | None = None,
        context: Collection[str] = (),
    ) -> dict[str, Timing]:
        """Time the calls as `interleaved` does, and fill the rows."""
        timings = interleaved(
            self.calls,
            min_rounds=rounds,
            max_rounds=most_rounds,
            budget_s=budget_s,
            device=self.device,
            warm_up=warm_up,
            context=context,
            on_call=lambda name, seconds: print(f"  {name}: {seconds_text(seconds)}", flush=True),
        )
        for name, timing in timings.items():
            row = self.rows[name]
            row.seconds, row.peak_bytes, row.note = timing.seconds, timing.peak_bytes, timing.problem or row.note
        return timings
