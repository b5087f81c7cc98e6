"""SIGTERM and SIGINT end training after a checkpoint: at the end of the running step, on all processes alike.

transformers' own `enable_jit_checkpoint` saves in the middle of a step, from where a run cannot go on as it would have.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import sum_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A launcher passes on a signal that its processes also got directly: within this many seconds it is the same one.
SAME_SIGNAL = 1.0

_NOTICE = "a checkpoint follows at the end of this step, then training stops; a second signal stops at once."


class Interruption(TrainerCallback):
    """While entered, the first signal asks for a checkpoint and the end; a second one ends the process at once.

    Leaving it after a signal raises `SystemExit` with 128 + the signal's number, 143 or 130: the run is whole but not
    finished, which the caller must not take for finished. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self._received is not None:
            raise SystemExit(128 + self._received)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        highest = self._received or 0
        if args.world_size > 1:
            # The signal may have reached one process only, or two of them on different sides of a step's end.
            received = torch.zeros(args.world_size, dtype=torch.int64, device=args.device)
            received[args.process_index] = highest
            highest = int(sum_over_processes(received).max())
        if highest:
            self._received = highest
            control.should_save = control.should_training_stop = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
            # Not by logging: the signal may have come in the middle of a write to the same stream, which cannot nest.
            os.write(2, f"\n{signal.Signals(number).name}: {_NOTICE}\n".encode())
        elif now - self._received_at > SAME_SIGNAL:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
