"""gamma over a run: constant, by a schedule, or by the progress of the two parts of the loss."""

from __future__ import annotations

import math
from typing import Any

ADAPTIVE = "adaptive"
GAMMA_SCHEDULES = ("constant", "linear", "cosine")

_START_STEPS = 10  # averaged into the level that progress is measured from
_AVERAGE_STEPS = 20  # of the exponential average that is the present level
_LARGEST_MOVE = 0.01  # of gamma, per step


class ScheduledGamma:
    """gamma by the number of the step: `end` throughout, or linear or along a cosine from `start` to `end`."""

    def __init__(self, schedule: str, start: float, end: float) -> None:
        self.schedule = schedule
        self.start = start
        self.end = end

    def at(self, step: int, total_steps: int) -> float:
        """gamma for the update number `step` (from 0) out of `total_steps`; the last has `end`."""
        if self.schedule == "constant" or total_steps <= 1:
            return self.end
        progress = min(step / (total_steps - 1), 1.0)
        if self.schedule == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.start + progress * (self.end - self.start)

    def observe(self, lang: float, vis: float) -> None:
        """A schedule does not depend on the losses."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: gamma follows from the step."""


class AdaptiveGamma:
    r"""Gives the part that has made less progress a larger share of the update, within bounds.

    With $\ell_t$ the language loss averaged over the last steps, as a share of its average over the first 10, and $v_t$
    the same of the visual loss,

    $$\gamma_t = \gamma_\text{min} + (\gamma_\text{max} - \gamma_\text{min})\,\frac{v_t}{v_t + \ell_t}$$

    and from one step to the next gamma moves by at most 0.01. Where both parts have made the same progress, and for the
    first 10 steps, gamma is the middle of its bounds.

    It is the rule of GradNorm (arXiv 1711.02257, with its exponent at 1), norms of gradients in proportion to what is
    left of their losses. There the weights that do it are learned; gradients of norm 1 need none. A loss below 0, as
    noise can make a visual one, counts as 0: nothing is left.
    """

    def __init__(self, lowest: float, highest: float) -> None:
        self.lowest = lowest
        self.highest = highest
        self.gamma = (lowest + highest) / 2  # for the next step
        self._steps = 0
        self._start = [0.0, 0.0]  # of lang and vis
        self._level = [0.0, 0.0]

    def at(self, step: int, total_steps: int) -> float:
        return self.gamma

    def observe(self, lang: float, vis: float) -> None:
        """Take in the losses of a step, the same on all processes; both must be finite."""
        losses = (lang, vis)
        self._steps += 1
        if self._steps <= _START_STEPS:
            self._start = [mean + (loss - mean) / self._steps for mean, loss in zip(self._start, losses, strict=True)]
            self._level = self._start
            return
        self._level = [mean + (loss - mean) / _AVERAGE_STEPS for mean, loss in zip(self._level, losses, strict=True)]
        lang_left, vis_left = (
            max(level, 0.0) / start if start > 0 else 0.0 for level, start in zip(self._level, self._start, strict=True)
        )
        left = lang_left + vis_left
        share = vis_left / left if left > 0 else 0.5
        target = self.lowest + (self.highest - self.lowest) * share
        self.gamma += min(max(target - self.gamma, -_LARGEST_MOVE), _LARGEST_MOVE)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"gamma": self.gamma, "steps": self._steps, "start": self._start, "level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # of a run whose gamma was a number there is nothing to go on from
            self.gamma, self._steps = state["gamma"], state["steps"]
            self._start, self._level = state["start"], state["level"]
