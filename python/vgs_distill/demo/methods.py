"""The methods a demo compares: on-policy distillation, and steered runs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vgs_distill.demo.recipes import METHOD_GAMMA, METHOD_NOTES, METHOD_SETTINGS
from vgs_distill.steering.methods import METHODS

LABELS = {"opd": "OPD", "vgs": "VGS"}


@dataclass(frozen=True)
class Method:
    """How one student learns. `method`, `gamma` and `eta` are those of `VGSConfig`; the baseline has no gamma."""

    name: str
    """Used in file names and as key in `results.json`."""
    label: str
    method: str = "opd"
    gamma: float | str | None = None
    eta: float | str | None = None
    """None: the method's own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `VGSConfig`."""
    note: str = ""
    """What a reader of its results has to know, in plain words."""
    as_long_as: Method | None = None
    """Gets as many steps as fit into the time that this method's take: `distillation.step_ratio`."""

    @property
    def steered(self) -> bool:
        return self.method != "opd"


OPD = Method("opd", LABELS["opd"])


def at_equal_time(method: Method) -> Method:
    """The baseline for as long as the steps of `method` take."""
    return replace(OPD, name=f"opd-as-long-as-{method.name}", label=f"OPD, time of {method.label}", as_long_as=method)


def methods_for(
    names: Sequence[str], gamma: float | None, etas: Sequence[float | str | None] = (None,)
) -> tuple[Method, ...]:
    """The baseline, one steered run for each further method and eta, and the baseline at the time of the first of them.

    `gamma=None` takes each method's recommended value, an eta of None each method's own.
    """
    steered = tuple(
        Method(
            name=name if eta is None else f"{name}-{eta}",
            label=label_of(name) + ("" if eta is None else f" ({eta if isinstance(eta, str) else f'η {eta:g}'})"),
            method=name,
            gamma=METHOD_GAMMA.get(name, METHODS[name].gamma) if gamma is None else gamma,
            eta=eta,
            settings=METHOD_SETTINGS.get(name, {}),
            note=METHOD_NOTES.get(name, ""),
        )
        for name in dict.fromkeys(names)
        for eta in dict.fromkeys(etas)
        if name != OPD.method
    )
    return (OPD, *steered, *map(at_equal_time, steered[:1]))


def label_of(name: str) -> str:
    return LABELS.get(name, name)
