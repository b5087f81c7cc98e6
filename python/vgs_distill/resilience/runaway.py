"""Runaways: a student that drifts from its teacher instead of towards it, noticed early enough to act.

Steering can feed on itself: a language part that drifts has a growing gradient, which gives the visual one more
weight, which pushes the student further (docs/how_it_works.md). `RunawayMonitor` watches for that during a run, from
numbers that the trainer has on the host at every step anyway and that all processes share. `runaway_start` says
afterwards, from the whole history, when one began.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import TrainingStopped
from ..steering.step import Bounds

logger = logging.get_logger(__name__)

FALLBACK_GAMMA = 0.5
FALLBACK_WEIGHT_RATIO = 1.0
FALLBACK_PRESERVATION = 1.0

_LEVEL = 5  # steps; their median is the present level
_REFERENCE = 20  # steps; the lowest median of so many is what the level is compared with
_NOISE_STEPS = 100  # fewer would often see less noise than there is
_KEPT_SHARE = 0.25  # of the first level: the reference is at least this, below which a doubling is noise
_SMALLEST = 0.01  # nats or ratio: below, growth means nothing
_GROWTH = 2.0  # of the divergence, with a second sign
_GROWTH_ALONE = 4.0
_GROWTH_CUT_OFF = 1.5  # with a fifth of the completions losing their end
_WEIGHT_GROWTH = 2.0
_CUT_OFF_RISE = 0.1  # share of completions
_LARGE_CUT_OFF_RISE = 0.2
_AT_BEST = 1.2  # growth of the visual loss below which it still falls
_NOISE = 3.5  # median changes from step to step: six standard deviations of the level


class RunawayReadings(NamedTuple):
    """What the monitor knows after a step. Growth 1 and rise 0 are those of a run at its best."""

    divergence_growth: float  # present level of KL(student || teacher) over the lowest so far
    weight_growth: float  # the same of visual weight / language weight
    cut_off_rise: float  # share of completions that end at the length limit, less the lowest so far
    noise: float  # factor that the divergence grows by without meaning anything
    language_growth: float = 1.0  # present level of the language loss over the lowest so far
    vision_growth: float = 1.0  # the same of the visual loss
    language_noise: float = 1.0

    @property
    def unlearns(self) -> bool:
        """Whether the language is being lost while the visual loss is at its best."""
        return self.language_growth >= max(_GROWTH, self.language_noise) and self.vision_growth < _AT_BEST

    @property
    def alarm(self) -> bool:
        return self.unlearns or self._runs_away

    @property
    def _runs_away(self) -> bool:
        if self.weight_growth >= _WEIGHT_GROWTH or self.cut_off_rise >= _CUT_OFF_RISE:
            needed = _GROWTH_CUT_OFF if self.cut_off_rise >= _LARGE_CUT_OFF_RISE else _GROWTH
        else:
            needed = _GROWTH_ALONE
        return self.divergence_growth >= max(needed, self.noise)


class RunawayMonitor(TrainerCallback):
    r"""Watches a run and, at the first alarm, warns in one sentence and does what `action` says.

    The level of a series is the median of its last 5 steps: two outliers change nothing. Its growth is the level over
    the lowest median of 20 steps so far (at the start, of those there are, from the fifth on). That reference stays
    above a quarter of the first level, since close to the teacher a doubling is the noise of a few tokens, and above
    0.01.

    An alarm needs KL(student || teacher) at twice its reference, and a second sign: the weight ratio at twice its own,
    or 10 percent more completions cut off at the length limit than at best. With 20 percent more cut off, 1.5 times is
    enough: under a bound on the weight ratio a student may stay adrift at a level that never doubles. At four times it
    needs none. In a run that learns, even from a cold start, the divergence rises by less than that before it falls; a
    doubling along with the weight ratio is the feedback itself.

    Noise: with m the median size of the change of the logarithm in the last 100 steps, one step has standard
    deviation $1.48\,m / \sqrt 2$ and the median of five $1.25 / \sqrt 5$ of that, 0.59 m. The growth must exceed
    $e^{3.5\,m}$, six of them, which noise alone does not reach, however small the batch.

    Unlearning is the other alarm: the language loss at twice its reference (and beyond its own noise) while the visual
    loss is within a fifth of its own lowest level. The student then gives up language for vision, and the divergence
    follows later.

    There is one alarm in a run. ``"fallback"`` then bounds gamma by 0.5 and the weight ratio by 1 for the rest of it:
    no step is more visual than that of the plain sum lang + vis, which for ``"teacher_prior"`` is on-policy
    distillation; and λ is at least 1. ``"stop"`` has a checkpoint written at the end of the step and `stop_if_asked`
    raise.
    """

    def __init__(self, action: str, language: bool = True) -> None:
        """`language`: whether language and visual loss are divergences of their own, and no terms of a difference,
        which may be negative; where not, nothing is unlearned."""
        self.action = action
        self._watches_language = language
        self.alarm_step: int | None = None
        self._divergence = _Growth()
        self._weights = _Growth()
        self._language = _Growth()
        self._vision = _Growth()
        self._cut_off: deque[float] = deque(maxlen=_LEVEL)
        self._least_cut_off = 1.0

    def observe(self, step: int, losses: Mapping[str, float], weight_ratio: float, cut_off: float) -> dict[str, float]:
        """Take in one step and return what is logged of it. A value that is not finite is passed over.

        `losses`: means per token, in nats: ``loss/standard``, and ``loss/lang`` and ``loss/vis`` where the method has
        them. `weight_ratio`: of the step before. `cut_off`: share of the sampled completions without an end.
        """
        if self.action == "none":
            return {}
        self._divergence.add(losses["loss/standard"])
        if self._watches_language and {"loss/lang", "loss/vis"} <= losses.keys():
            self._language.add(losses["loss/lang"])
            self._vision.add(losses["loss/vis"])
        self._weights.add(weight_ratio)
        if math.isfinite(cut_off):
            self._cut_off.append(cut_off)
            if len(self._cut_off) == _LEVEL:
                self._least_cut_off = min(self._least_cut_off, median(self._cut_off))
        readings = self.readings()
        if readings.alarm and self.alarm_step is None:
            self.alarm_step = step
            self._warn(step, readings)
        return {
            "runaway/divergence_growth": readings.divergence_growth,
            "runaway/weight_growth": readings.weight_growth,
            "runaway/cut_off_rise": readings.cut_off_rise,
            "runaway/language_growth": readings.language_growth,
            "runaway/alarm": float(self.alarm_step is not None),
        }

    def readings(self) -> RunawayReadings:
        full = len(self._cut_off) == _LEVEL
        return RunawayReadings(
            self._divergence.value(),
            self._weights.value(),
            median(self._cut_off) - self._least_cut_off if full else 0.0,
            self._divergence.noise(),
            self._language.value(),
            self._vision.value(),
            self._language.noise(),
        )

    def bounded(self, bounds: Bounds) -> Bounds:
        """What the next step is steered with."""
        if self.action != "fallback" or self.alarm_step is None:
            return bounds
        return Bounds(
            min(bounds.gamma, FALLBACK_GAMMA),
            min(bounds.max_weight_ratio or math.inf, FALLBACK_WEIGHT_RATIO),
            max(bounds.preservation, FALLBACK_PRESERVATION),
        )

    def stop_if_asked(self) -> None:
        """TrainingStopped after an alarm, where the action is to stop."""
        if self.action == "stop" and self.alarm_step is not None:
            raise TrainingStopped(
                f"training stopped at step {self.alarm_step}: the student ran away from its teacher; the checkpoint of "
                "this step holds the run as it was; start again with a lower gamma, max_weight_ratio or learning_rate"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.action == "stop" and self.alarm_step is not None:
            control.should_save = control.should_training_stop = True

    def _warn(self, step: int, readings: RunawayReadings) -> None:
        consequence = {
            "warn": "lower gamma, raise language_preservation, or set runaway_action='fallback'",
            "fallback": f"from here on gamma is at most {FALLBACK_GAMMA}, the weight ratio at most "
            f"{FALLBACK_WEIGHT_RATIO} and language_preservation at least {FALLBACK_PRESERVATION}",
            "stop": "training stops after this step",
        }[self.action]
        if readings.unlearns:
            logger.warning(
                "step %d: the student unlearns its language: its loss without the image is %.1f times its lowest level "
                "while the visual loss falls; %s.",
                step, readings.language_growth, consequence,
            )  # fmt: skip
            return
        logger.warning(
            "step %d: the student runs away from its teacher: KL(student || teacher) is %.1f times its lowest level, "
            "the weight ratio %.1f times, and %.0f percent more completions are cut off; %s.",
            step, readings.divergence_growth, readings.weight_growth, 100 * readings.cut_off_rise, consequence,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "alarm_step": self.alarm_step,
            "divergence": self._divergence.state_dict(),
            "weights": self._weights.state_dict(),
            "language": self._language.state_dict(),
            "vision": self._vision.state_dict(),
            "cut_off": list(self._cut_off),
            "least_cut_off": self._least_cut_off,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alarm_step = state["alarm_step"]
        self._divergence.load_state_dict(state["divergence"])
        self._weights.load_state_dict(state["weights"])
        self._language.load_state_dict(state["language"])
        self._vision.load_state_dict(state["vision"])
        self._cut_off = deque(state["cut_off"], maxlen=_LEVEL)
        self._least_cut_off = state["least_cut_off"]


class _Growth:
    """The present level of a positive series over its reference."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_NOISE_STEPS)
        self._floor = _SMALLEST
        self._lowest: float | None = None

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._last.append(max(value, _SMALLEST))
        if len(self._last) < _LEVEL:
            return
        middle = self._median(_REFERENCE)
        if self._lowest is None:
            self._floor = max(_SMALLEST, _KEPT_SHARE * middle)
            self._lowest = middle
        self._lowest = max(self._floor, min(self._lowest, middle))

    def value(self) -> float:
        return 1.0 if self._lowest is None else self._median(_LEVEL) / self._lowest

    def _median(self, steps: int) -> float:
        return median(list(self._last)[-steps:])

    def noise(self) -> float:
        changes = [abs(math.log(after / before)) for before, after in pairwise(self._last)]
        return math.exp(_NOISE * median(changes)) if changes else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"last": list(self._last), "floor": self._floor, "lowest": self._lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = deque(state["last"], maxlen=_NOISE_STEPS)
        self._floor, self._lowest = state["floor"], state["lowest"]


def runaway_start(divergences: Sequence[float]) -> int | None:
    """The step, from 1, at which a runaway begins in a history of KL(student || teacher), one value per step, or None.

    A definition to judge monitors by, in hindsight: the first step from which the mean of the last 10 steps (at the
    start, of those there are) stays above 1.5 times the lowest such mean before for 30 steps; where the history ends
    before that, it counts if it has reached 2 times. Means below a quarter of the first 10 steps' count as that
    quarter.
    """
    floor = 0.25 * fmean(divergences[:10]) if divergences else 0.0
    means = [max(floor, fmean(divergences[max(0, step - 10) : step])) for step in range(1, len(divergences) + 1)]
    lowest, begun = math.inf, None
    for step, mean in enumerate(means, 1):
        if mean <= 1.5 * lowest:
            begun, lowest = None, min(lowest, mean)
        elif begun is None:
            begun = step
        elif step - begun + 1 >= 30:
            return begun
    return begun if begun is not None and max(means[begun - 1 :]) >= 2.0 * lowest else None
