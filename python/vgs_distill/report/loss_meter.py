"""Losses of a step as they are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import sum_over_processes

_NAMES = ("loss/full", "loss/lang", "loss/vis", "entropy")


class LossMeter:
    """Adds up `MicroBatchLoss.sums` over the micro-batches of a step, and reads them over all processes."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (6,)

    def add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, beside: Tensor) -> tuple[dict[str, float], bool, float]:
        """The means per token since the last call, whether one was not finite, and the number `beside`, ().

        One wait for the device brings all of them.
        """
        assert self._sums is not None
        sums = sum_over_processes(self._sums)
        self._sums = None
        *totals, tokens, bad_tokens, other = torch.cat([sums, beside.to(sums).reshape(1)]).tolist()
        means = {name: total / max(tokens, 1.0) for name, total in zip(_NAMES, totals, strict=True)}
        return means, bad_tokens > 0, other
