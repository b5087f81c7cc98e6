"""The mean that the visual part of a step is divided by, so that the visual weights of its tokens have mean 1.

The mean is over the tokens of all micro-batches and processes, rows with an image: one per micro-batch would weigh
those up whose tokens hardly need the image. It is known after the last loss of a step only. So sums and gradients are
formed with the weights as they are, and what steers them takes the factor in (`scales`). Where one backward pass of the
weighted sum has to start before (amortized steering with accumulation), the mean of the steps before stands for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import sum_over_processes
from .averages import RunningAverage


class VisualTokenWeights:
    """`enabled`: whether weights can differ at all; if not, every factor is 1, and processes exchange nothing."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._average = RunningAverage(1, device)  # of the mean, over steps
        self._ones = torch.ones(2, device=device)
        self._sums = torch.zeros(2, device=device)  # of the weights and of their number, on this process
        self._over_processes: Tensor | None = None  # the same

    def begin_step(self) -> None:
        self._sums = torch.zeros_like(self._sums)
        self._over_processes = None

    def add(self, weights: Tensor) -> None:  # (tokens of rows with an image,)
        self._sums += torch.stack([weights.sum(), weights.new_full((), len(weights))])

    def mean(self) -> Tensor:
        """Of the step, (1,); asked for by all processes after its last loss. 1 where no token has a weight."""
        if self._over_processes is None:
            self._over_processes = sum_over_processes(self._sums.clone())
        total, number = self._over_processes.split(1)
        return torch.where(total > 0, total / number.clamp(min=1), 1.0)

    def scales(self) -> Tensor:
        """Factors of the language and of the visual part that give the step's weights mean 1, (2,)."""
        return self._scales(self.mean()) if self.enabled else self._ones

    def expected_scales(self) -> Tensor:
        """The same as expected from the steps before."""
        if not self.enabled:
            return self._ones
        return self._scales(torch.where(self._average.weight > 0, self._average.value, 1.0))

    def end_step(self) -> None:
        if self.enabled:
            mean = self.mean()
            assert self._over_processes is not None
            self._average.add(mean, self._over_processes[:1] > 0)

    def _scales(self, mean: Tensor) -> Tensor:
        return torch.cat([self._ones[:1], 1.0 / mean.to(self._ones)])

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)
