"""What a step that measures its gradients leaves to the steps that do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RunningAverage:
    """Exponential average of each component, over the entries in which it is present.

    An entry weighs 0.8 of the next one, so that about the last five decide: one batch is too noisy, and gradients
    change while a student learns.
    """

    DECAY = 0.8

    def __init__(self, size: int, device: torch.device) -> None:
        self.value = torch.zeros(size, device=device)
        self.weight = torch.zeros(size, device=device)  # of all entries together; 0: never present

    def add(self, entry: Tensor, present: Tensor) -> None:
        value, weight = self.value.to(entry), self.weight.to(entry)
        self.weight = torch.where(present, self.DECAY * weight + 1.0, weight)
        self.value = torch.where(present, value + (entry - value) / self.weight.clamp(min=1.0), value)

    def state_dict(self) -> dict[str, list[float]]:
        return {"value": self.value.tolist(), "weight": self.weight.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.value = self.value.new_tensor(state["value"])
        self.weight = self.weight.new_tensor(state["weight"])


class GramianAverage:
    """The Gramian of the two parameter gradients, averaged over refreshes: norms by their logarithms, and the cosine.

    A refresh is due every `refresh_every` steps. A gradient that no refresh has met counts as 0.
    """

    def __init__(self, refresh_every: int, device: torch.device) -> None:
        self.refresh_every = refresh_every
        self._squares = RunningAverage(2, device)  # logarithms
        self._cosine = RunningAverage(1, device)
        self._since_refresh: int | None = None  # steps; None before the first refresh

    @property
    def refresh_due(self) -> bool:
        return self._since_refresh is None or self._since_refresh >= self.refresh_every - 1

    @property
    def known(self) -> bool:
        """Whether there has been a refresh."""
        return self._since_refresh is not None

    def skip(self) -> None:
        """A step that did not measure has been made."""
        assert self._since_refresh is not None
        self._since_refresh += 1

    def refresh(self, gramian: Tensor) -> None:  # (2, 2)
        squares = gramian.diagonal()
        usable = (squares > 0) & torch.isfinite(squares)
        logarithms = torch.where(usable, squares, 1.0).log()
        self._squares.add(logarithms, usable)
        cosine = gramian[0, 1] * (-logarithms.sum() / 2).exp()
        self._cosine.add(cosine.clamp(-1.0, 1.0).reshape(1), usable.all().reshape(1))
        self._since_refresh = 0

    def gramian(self) -> Tensor:
        """(2, 2), as far as refreshes have shown."""
        norms = torch.where(self._squares.weight > 0, (self._squares.value / 2).exp(), 0.0)
        cosine = self._cosine.value[0]
        cosines = torch.stack([torch.ones_like(cosine), cosine, cosine, torch.ones_like(cosine)]).reshape(2, 2)
        return norms[:, None] * cosines * norms

    def state_dict(self) -> dict[str, Any]:
        return {
            "squares": self._squares.state_dict(),
            "cosine": self._cosine.state_dict(),
            "since_refresh": self._since_refresh,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._squares.load_state_dict(state["squares"])
        self._cosine.load_state_dict(state["cosine"])
        self._since_refresh = state["since_refresh"]
