"""λ, the weight of language preservation: a number, or one that follows the language loss."""

from __future__ import annotations

from typing import Any

ADAPTIVE = "adaptive"

_START_STEPS = 10  # averaged into the level that is to be kept
_AVERAGE_STEPS = 10  # of the exponential average that is the present level
_LOWEST, _HIGHEST = 0.01, 10.0  # the lowest is the paper's constant
_FACTOR = 1.2  # of λ, per step: from the lowest to 1 within 26 steps


class ConstantPreservation:
    """λ as it is set."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def observe(self, lang: float) -> None:
        """A constant does not depend on the loss."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class AdaptivePreservation:
    r"""Keeps the language loss where it started: a constraint, KL(p₀ ‖ r) ≤ its start, in the place of a weight.

    With $\ell$ the language loss averaged over the last steps and $\ell_0$ its average over the first 10, λ is
    multiplied by 1.2 at every step with $\ell > \ell_0$ and divided by it at every other, between 0.01 and 10: what
    gradient ascent on the logarithm of a Lagrange multiplier does with the sign of the violation. It begins at 0.01.
    """

    def __init__(self) -> None:
        self.weight = _LOWEST  # for the next step
        self._steps = 0
        self._start = 0.0
        self._level = 0.0

    def observe(self, lang: float) -> None:
        """Take in the language loss of a step, the same on all processes; it must be finite."""
        self._steps += 1
        if self._steps <= _START_STEPS:
            self._start += (lang - self._start) / self._steps
            self._level = self._start
            return
        self._level += (lang - self._level) / _AVERAGE_STEPS
        factor = _FACTOR if self._level > self._start else 1.0 / _FACTOR
        self.weight = min(max(self.weight * factor, _LOWEST), _HIGHEST)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"weight": self.weight, "steps": self._steps, "start": self._start, "level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # of a run whose λ was a number there is nothing to go on from
            self.weight, self._steps = state["weight"], state["steps"]
            self._start, self._level = state["start"], state["level"]
