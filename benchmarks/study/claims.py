"""What the paper claims, one row a claim, and what the records say of it here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.study.plan import LEAD, LEADS, MATCHED, OPD_EQUAL_TIME, PAPER, TASKS
from benchmarks.study.readings import (
    Study,
    against_prior,
    eta_spread,
    language_growth,
    with_prior,
)
from benchmarks.study.statistics import Estimate, estimate, verdict

NOT_RUN = "not yet run"
PAPER_STEP_RATIO = 1.375


@dataclass(frozen=True)
class Claim:
    """`holds` and `fails` read the interval; an estimate of fewer than three values decides nothing."""

    text: str
    found: Callable[[Study], Estimate | None]
    holds: Callable[[Estimate], bool]
    fails: Callable[[Estimate], bool]
    unit: str = "points"
    digits: int = 1

    def row(self, study: Study) -> list[str]:
        found = self.found(study)
        if found is None:
            return [self.text, "", NOT_RUN]
        told = f"{interval(found, self.digits)} {self.unit}".strip()
        if self.unit == "points":
            told += f", {sum(value > 0 for value in found.values)} of {len(found.values)} up"
        return [self.text, told, verdict(self.holds(found), self.fails(found))]


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def interval(found: Estimate | None, digits: int = 1) -> str:
    """Mean [low, high], signed."""
    if found is None:
        return NOT_RUN
    mean = number(found.mean, digits, signed=True)
    if found.low is None:
        return f"{mean} (no interval from {len(found.values)})"
    return f"{mean} [{number(found.low, digits, signed=True)}, {number(found.high, digits, signed=True)}]"


def _above(arm: str, over: str, text: str, task: str | None = None) -> Claim:
    return Claim(
        text + (f", {task}" if task else ", all tasks"),
        lambda study: study.gain(task, arm, over),
        lambda found: found.above(0),
        lambda found: found.below(0),
    )


def _below(arm: str, over: str, text: str) -> Claim:
    return Claim(
        text,
        lambda study: study.gain(None, arm, over),
        lambda found: found.below(0),
        lambda found: found.above(0),
    )


def _pooled(read: Callable[..., float | None], arm: str) -> Callable[[Study], Estimate | None]:
    """Of the runs of all tasks."""

    def found(study: Study) -> Estimate | None:
        values = [value for task in TASKS for value in study.values(read, task, arm)]
        return estimate(values) if values else None

    return found


def _angles(study: Study, pair: str, tenth: int) -> list[float]:
    """Degrees at the starts of the half-warm regime, in one tenth of the tokens by dependency."""
    found = [d.angles["angles"][pair] for task in TASKS for _, d in study.starts(task, "half-warm")]
    return [angles[tenth] for angles in found if len(angles) == 10 and angles[tenth] is not None]


def _highest_angle(study: Study) -> Estimate | None:
    values = _angles(study, "lang_vis", -1)
    return estimate(values) if values else None


def _rise_of_angle(study: Study) -> Estimate | None:
    low, high = _angles(study, "lang_vis", 0), _angles(study, "lang_vis", -1)
    return estimate([b - a for a, b in zip(low, high, strict=False)]) if low and len(low) == len(high) else None


def _eta_spread(study: Study) -> Estimate | None:
    return _pooled(eta_spread, PAPER.name)(study)


def _step_ratio(study: Study) -> Estimate | None:
    return _pooled(lambda record: record.get("step_ratio"), OPD_EQUAL_TIME.name)(study)


def _need(study: Study) -> Estimate | None:
    """Gain on questions that only looking answers, less that on those that guessing gets right."""
    need, rest = (study.gain(None, LEAD.name, read=read) for read in (against_prior, with_prior))
    if need is None or rest is None or len(need.values) != len(rest.values):
        return None
    return estimate([a - b for a, b in zip(need.values, rest.values, strict=True)])


def _growth(arm: str, text: str, *, grows: bool) -> Claim:
    found = _pooled(language_growth, arm)
    up, down = (lambda e: e.above(0)), (lambda e: e.below(0))
    unit = "log of lang at the end over its start"
    return Claim(text, found, up if grows else down, down if grows else up, unit, 2)


def claims() -> list[Claim]:
    """In the order of the page."""
    lead, paper = LEAD.name, PAPER.name
    return [
        *(_above(paper, "opd", "VGS as published (γ 2, λ 0.01) is above OPD", task) for task in (*TASKS, None)),
        *(_above(lead, "opd", "VGS with λ 1 and a floor is above OPD", task) for task in (*TASKS, None)),
        *(
            _above(lead, OPD_EQUAL_TIME.name, "VGS with λ 1 and a floor is above OPD at equal time", task)
            for task in (*TASKS, None)
        ),
        _above(MATCHED.name, "opd", "matched, γ 0.8, is above OPD"),
        _below("language-1.0", "opd", "language steering is below OPD (Figure 5)"),
        Claim(
            "lang and vis stand at 90° on the tenth of tokens that needs the image most (Figure 3: 92°)",
            _highest_angle,
            lambda found: found.above(84) and found.below(96),
            lambda found: found.below(84) or found.above(96),
            "degrees, within 6 of 90",
        ),
        Claim(
            "that angle is larger than on the tenth that needs it least (Figure 3: 92° against 60°)",
            _rise_of_angle,
            lambda found: found.above(0),
            lambda found: found.below(0),
            "degrees",
        ),
        _growth("vgs-2.0-lp0", "without language preservation lang rises (Figure 4)", grows=True),
        _growth(paper, "with λ 0.01 it does not (Figure 4)", grows=False),
        _growth(lead, "with λ 1 and a floor it does not", grows=False),
        Claim(
            "η is nearly constant over a run (Figure 7)",
            _eta_spread,
            lambda found: found.below(1.5),
            lambda found: found.above(1.5),
            "times from its tenth percentile to its ninetieth; below 1.5",
            2,
        ),
        _above(LEADS[2.0].name, LEADS[1.0].name, "γ 2 is above γ 1 (Figure 8)"),
        _above(LEADS[4.0].name, LEADS[2.0].name, "γ 4 is above γ 2 (Figure 8: equal)"),
        _above(paper, "vgs-2.0-lp0", "λ 0.01 is above λ 0 (Figure 8)"),
        _above(paper, "vgs-2.0-lp0.1", "λ 0.01 is above λ 0.1 (Figure 8)"),
        _above("vgs-2.0-lp0.01-tenth", "opd-tenth", "VGS as published is above OPD, both at a tenth of the rate"),
        _above("vgs-2.0-lead-graded", lead, "γ_t by dependency is above a constant γ (table 5)"),
        Claim(
            "the gain is larger on questions that need the image (Figure 10)",
            _need,
            lambda found: found.above(0),
            lambda found: found.below(0),
        ),
        Claim(
            f"a step costs {PAPER_STEP_RATIO} times OPD's (Figure 9)",
            _step_ratio,
            lambda found: found.above(PAPER_STEP_RATIO - 0.1) and found.below(PAPER_STEP_RATIO + 0.1),
            lambda found: found.above(PAPER_STEP_RATIO + 0.1) or found.below(PAPER_STEP_RATIO - 0.1),
            "times, within 0.1",
            2,
        ),
    ]


def rows(study: Study) -> list[list[str]]:
    return [claim.row(study) for claim in claims()]


def spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return NOT_RUN
    mean = number(statistics.fmean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), digits)}"


def growth_text(values: Sequence[float]) -> str:
    """Geometric mean of factors given as logarithms."""
    return f"× {math.exp(statistics.fmean(values)):.2f}" if values else ""
