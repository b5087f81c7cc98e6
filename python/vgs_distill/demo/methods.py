"""The methods a demo compares: monolithic on-policy distillation, and one steered run per decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vgs_distill.demo.recipes import MAX_WEIGHT_RATIO, STEERING_GAMMA

DECOMPOSITIONS = tuple(STEERING_GAMMA)
STEERING = ("exact", "amortized")


@dataclass(frozen=True)
class Method:
    """How one student learns. The baseline has no decomposition and no gamma."""

    name: str
    """Used in file names and as key in `results.json`."""
    label: str
    decomposition: str | None = None
    gamma: float | str | None = None
    max_weight_ratio: float | None = None
    steering: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `VGSConfig`."""

    @property
    def steered(self) -> bool:
        return self.decomposition is not None


OPD = Method("opd", "OPD")


def methods_for(
    decompositions: Sequence[str], gamma: float | None, steering: Sequence[str] = ("exact",)
) -> tuple[Method, ...]:
    """The baseline and one steered method per decomposition and mode of steering.

    `gamma=None` takes each decomposition's recommended value.
    """
    steered = (
        Method(
            name=f"vgs-{name.replace('_', '-')}" + ("" if mode == "exact" else f"-{mode}"),
            label=f"VGS {name.replace('_', ' ')}" + ("" if mode == "exact" else f" ({mode})"),
            decomposition=name,
            gamma=STEERING_GAMMA[name] if gamma is None else gamma,
            max_weight_ratio=MAX_WEIGHT_RATIO[name],
            steering=mode,
        )
        for name in dict.fromkeys(decompositions)
        for mode in dict.fromkeys(steering)
    )
    return (OPD, *steered)
