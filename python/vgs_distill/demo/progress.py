"""What a person sees while the demo runs: live bars in a terminal, sparse plain lines everywhere else.

A pipe or a CI log cannot redraw a line, so a bar there becomes thousands of lines; the plain display writes a job's
start, its quarters and its end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display(ABC):
    """Follows named jobs. Jobs unknown so far appear with their first call."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def begin(self, job: str, label: str) -> None:
        """The job has been handed to a worker."""

    @abstractmethod
    def advance(self, job: str, done: int, total: int, note: str) -> None:
        """`done` of `total` steps are behind it."""

    @abstractmethod
    def end(self, job: str, summary: str) -> None:
        """The job is done; `summary` is its result in a few words."""

    @abstractmethod
    def say(self, message: str) -> None:
        """A line that is about no single step."""

    def close(self) -> None:
        """Nothing more will come."""
        return


class LiveDisplay(Display):
    """One bar per running job; finished jobs leave one line behind."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._labels: dict[str, str] = {}
        self._progress.start()

    def begin(self, job: str, label: str) -> None:
        self._labels[job] = label
        self._tasks[job] = self._progress.add_task(label, total=None, note="starting")

    def advance(self, job: str, done: int, total: int, note: str) -> None:
        shown = "evaluating" if done == total else note
        self._progress.update(self._tasks[job], completed=done, total=total, note=shown)

    def end(self, job: str, summary: str) -> None:
        self._progress.remove_task(self._tasks.pop(job))
        self._progress.console.print(f"[green]✓[/green] {self._labels[job]}: {summary}", highlight=False)

    def say(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class PlainDisplay(Display):
    """Whole lines only, each stamped with the seconds since the start."""

    _MARKS = (0.25, 0.5, 0.75)

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._labels: dict[str, str] = {}
        self._next_mark: dict[str, int] = {}

    def begin(self, job: str, label: str) -> None:
        self._labels[job] = label
        self._next_mark[job] = 0
        self.say(f"{label}: started")

    def advance(self, job: str, done: int, total: int, note: str) -> None:
        mark = self._next_mark[job]
        passed = sum(done >= share * total for share in self._MARKS)
        if passed > mark:
            self._next_mark[job] = passed
            self.say(f"{self._labels[job]}: step {done} of {total}, {note}")

    def end(self, job: str, summary: str) -> None:
        self.say(f"{self._labels[job]}: {summary}")

    def say(self, message: str) -> None:
        seconds = time.monotonic() - self._began
        # soft_wrap: a log line must not be broken at the 80 columns rich assumes for a pipe.
        self._console.print(f"[{seconds:5.0f} s] {message}", markup=False, highlight=False, soft_wrap=True)


def make_display(console: Console) -> Display:
    """Live bars where `console` is an interactive terminal, plain lines elsewhere."""
    return LiveDisplay(console) if console.is_interactive else PlainDisplay(console)
