"""The parts of the loss by how much tokens depend on the image, over training."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..distributed import sum_over_processes
from ..micro_batch_loss import MicroBatchLoss

THIRDS = 3
_PARTS = ("standard", "vis", "lang")


class DependencyLosses:
    """Sums the parts of the loss over the tokens with an image, by thirds of VDS among those of a micro-batch.

    From numbers that a step has anyway; they stay on the device until they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(THIRDS, len(_PARTS) + 1, device=device)  # the last column counts tokens

    def add(self, result: MicroBatchLoss) -> None:
        tokens = len(result.vis_weights)  # those with an image come first
        scores = result.per_token["dependency"][:tokens]
        values = torch.stack([*(result.per_token[part][:tokens] for part in _PARTS), torch.ones_like(scores)], dim=1)
        for third, chosen in enumerate(scores.argsort().tensor_split(THIRDS)):
            self._sums[third] += values[chosen].sum(dim=0)

    def read(self) -> dict[str, Any] | None:
        """Means over the tokens of all steps and processes since the last reading, from the third that depends least
        to the one that depends most; None where there was no token. On all processes at once."""
        sums = sum_over_processes(self._sums.clone())
        self._sums.zero_()
        counts = sums[:, -1]
        if not counts.all():  # fewer than three tokens
            return None
        means = [
            [mean if math.isfinite(mean) else None for mean in of_part]
            for of_part in (sums[:, :-1] / counts[:, None]).T.tolist()
        ]
        return {"tokens": counts.to(torch.int64).tolist(), **dict(zip(_PARTS, means, strict=True))}
