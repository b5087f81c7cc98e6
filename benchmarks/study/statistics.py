"""Paired differences and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval, the bias-corrected and accelerated bootstrap; None from fewer than three values."""

    values: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def above(self, bound: float) -> bool:
        return self.low is not None and self.low > bound

    def below(self, bound: float) -> bool:
        return self.high is not None and self.high < bound


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` with its interval. The resampling is seeded: the same records give the same page."""
    values = tuple(float(value) for value in values)
    if not values:
        raise ValueError("an estimate needs at least one value")
    if len(values) < 3:
        return Estimate(values, None, None)
    if len(set(values)) == 1:
        return Estimate(values, values[0], values[0])
    interval = bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(values, float(interval.low), float(interval.high))


def verdict(holds: bool, fails: bool) -> str:
    """What an interval says of a claim."""
    return "holds" if holds else "does not hold" if fails else "undecided"
