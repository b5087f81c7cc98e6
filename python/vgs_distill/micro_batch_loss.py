"""The numbers of one micro-batch, token by token: what a log and a record are made from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatchLoss(NamedTuple):
    """What is logged and recorded of a micro-batch."""

    per_token: dict[str, Tensor]  # name -> (valid tokens,), in nats, detached; those with an image first
    positions: Tensor  # (valid tokens, 2): row and completion position of each
    bad: Tensor  # (valid tokens,), whether a loss that is trained on is not finite there
    contribution: Tensor | None  # (rows, completion), log q - log r of what was sampled; 0 for rows without an image
    vis_weights: Tensor  # (tokens with an image,), what the visual part weighed each by

    def sums(self) -> dict[str, Tensor]:
        """Name -> sum over the tokens, and how many there are and how many are not finite."""
        counts = {"tokens": torch.ones_like(self.per_token["standard"]), "bad": self.bad.to(torch.float32)}
        return {name: values.sum() for name, values in (self.per_token | counts).items()}

    def dependency(self) -> Tensor | None:
        """VDS of what was sampled, (rows, completion); 0 where no image takes part, None where it is not computed."""
        if self.contribution is None or "dependency" not in self.per_token:
            return None
        grid = torch.zeros_like(self.contribution)
        grid[self.positions[:, 0], self.positions[:, 1]] = self.per_token["dependency"].to(grid)
        return grid

    def non_finite(self) -> Tensor:
        """Row and completion position of every token whose loss is not finite, (count, 2)."""
        return self.positions[self.bad]
