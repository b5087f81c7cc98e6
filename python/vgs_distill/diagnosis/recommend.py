"""From a diagnosis to what to train with: OPD, VGS and which λ, or the language first.

The thresholds are first guesses. The study holds what they say against its best arm, start by start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .measure import NEEDS_IMAGE, Diagnosis

OPD, VGS, LANGUAGE = "opd", "vgs", "language"
_FEW = 0.02  # share of tokens that need the image below which there is nothing to steer by
_CUT_OFF = 0.5  # share of completions without an end above which a student cannot write yet
_IMMATURE = 1.5  # KL(p₀ ‖ r) over KL(p ‖ q) above which language, not vision, is what the student lacks

_GUARDED = {"language_preservation": 1.0, "ratio_floor": 0.1}


@dataclass(frozen=True)
class Recommendation:
    """What to do, with its reason in one sentence."""

    take: str  # OPD, VGS or LANGUAGE
    settings: Mapping[str, Any]  # of `VGSConfig`
    reason: str

    @property
    def title(self) -> str:
        return {OPD: "plain on-policy distillation", VGS: "visual gradient steering", LANGUAGE: "the language first"}[
            self.take
        ]


def recommend(found: Diagnosis) -> Recommendation:
    """The first of these that applies: language where it is further from the teacher's than the whole is, or where half
    of the completions find no end; OPD where hardly a token needs the image; else VGS."""
    if found.cut_off > _CUT_OFF:
        return Recommendation(
            LANGUAGE,
            {"method": "opd"},
            f"{found.cut_off:.0%} of the completions find no end within max_completion_length: raise it, or train the "
            "student on texts of the teacher before anything is steered.",
        )
    if found.lang > _IMMATURE * found.standard:
        return Recommendation(
            LANGUAGE,
            {"method": "opd"},
            f"Without the image the student is {found.lang:.2f} nats a token from its teacher, with it "
            f"{found.standard:.2f}: it lacks language more than sight, and a visual target built on such language "
            "misleads it; distil by OPD, or on texts, until both are alike.",
        )
    if found.needs_image < _FEW:
        return Recommendation(
            OPD,
            {"method": "opd"},
            f"The image changes the teacher's prediction by more than {NEEDS_IMAGE} nats at {found.needs_image:.1%} of "
            f"the tokens only, so steering would spend {found.step_ratio:.2f} times the time on nothing.",
        )
    return Recommendation(
        VGS,
        {"method": "vgs", "gamma": 2.0, **_GUARDED},
        f"{found.needs_image:.0%} of the tokens need the image and the student's language ({found.lang:.2f} nats a "
        f"token from the teacher's) is no worse than the whole ({found.standard:.2f}), so sight is what it lacks; λ is "
        "1 with a floor under p₀ / r because 0.01 was chosen at a learning rate of 1e-6.",
    )
