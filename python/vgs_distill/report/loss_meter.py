"""Losses of a step as they are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import sum_over_processes

_NAMES = {"standard": "loss/standard", "vis": "loss/vis", "lang": "loss/lang"}


class LossMeter:
    """Adds up `MicroBatchLoss.sums` over the micro-batches of a step, and reads them over all processes.

    `names`: of the sums, in one order on all processes: a batch without images has not all of them.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = (*names, "tokens", "bad")
        self._sums: Tensor | None = None  # (names,)

    def add(self, sums: dict[str, Tensor]) -> None:
        some = next(iter(sums.values()))
        row = torch.stack([sums.get(name, torch.zeros_like(some)).to(torch.float64) for name in self._names])
        self._sums = row if self._sums is None else self._sums + row

    def read(self, beside: Tensor) -> tuple[dict[str, float], bool, float]:
        """The means per token since the last call, whether one was not finite, and the number `beside`, ().

        One wait for the device brings all of them.
        """
        assert self._sums is not None
        sums = sum_over_processes(self._sums)
        self._sums = None
        *totals, tokens, bad_tokens, other = torch.cat([sums, beside.to(sums).reshape(1)]).tolist()
        means = {
            _NAMES.get(name, name): total / max(tokens, 1.0) for name, total in zip(self._names, totals, strict=False)
        }
        return means, bad_tokens > 0, other
