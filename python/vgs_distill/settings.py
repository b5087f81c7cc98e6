"""`MethodSettings`: which update a step makes, with all defaults; plain, for every engine.

`VGSConfig` extends it with the settings of a run under TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from vgs_kernels import UnitGradients

from .docstrings import attribute_texts
from .renamed import OLD_NAMES, renamed
from .steering.dependency import BY_DEPENDENCY
from .steering.gamma import ADAPTIVE, GAMMA_SCHEDULES
from .steering.methods import METHODS, Method
from .steering.preservation import ADAPTIVE as ADAPTIVE_PRESERVATION
from .steering.step import AMORTIZED, MEASURED

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")

# Names, what their numbers may be, and the words for it. NaN is in no range.
Range = tuple[tuple[str, ...], Callable[[float], bool], str]
_RANGES: tuple[Range, ...] = (
    (("refresh_every",), lambda value: value >= 1, "1 or more"),
    (
        ("plausibility", "teacher_smoothing", "ratio_floor"),
        lambda value: 0 <= value < 1,
        "at least 0 (off) and below 1",
    ),
    (("max_weight_ratio", "ratio_bound"), lambda value: value > 0, "positive or None"),
    (("dependency_quantile",), lambda value: 0 <= value <= 1, "in [0, 1]"),
)


def refuses_old_names(kind: type[Kind]) -> type[Kind]:
    filled = kind.__init__

    @wraps(filled)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        for name in OLD_NAMES.keys() & settings.keys():
            raise ValueError(renamed(name, settings[name]))
        filled(self, *args, **settings)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


def described_by_docstring(kind: type[Kind]) -> type[Kind]:
    """Every field's help on a command line is what the docstring of its dataclass says of it."""
    for name, text in attribute_texts(kind.__doc__).items():
        item = kind.__dataclass_fields__[name]
        item.metadata = MappingProxyType({**item.metadata, "help": text.replace("%", "%%")})
    return kind


@refuses_old_names
@described_by_docstring
@dataclass
class MethodSettings:
    """Which update a step makes. It needs no trainer: `VGSConfig` adds what a run under TRL has beside it.

    Attributes:
        method: What a step follows: ``"vgs"``, ``"opd"``, ``"vgs_unit"``, ``"matched"``, ``"teacher_prior"`` or
            ``"language"``. With p the student, q the teacher, p0 and r both with the image masked, q* ∝ p0 q / r and ĝ
            a gradient over its norm: ``"vgs"`` is the paper's η [KL(p‖q) + γ KL(p‖q*) + λ KL(p0‖r)], the last term on
            the tokens that depend most on the image; ``"opd"`` is on-policy distillation, KL(p‖q); ``"vgs_unit"``
            follows (1 - γ) ĝ(KL(p0‖r)) + γ ĝ(KL(p‖q*)), the rule of a summary of the paper; ``"matched"`` (1 - γ)
            ĝ(KL(p0‖r)) + γ ĝ(KL(p‖q)), ours; ``"teacher_prior"`` (1 - γ) ĝ(KL(p‖r)) + γ ĝ(KL(p‖q) - KL(p‖r));
            ``"language"`` η [KL(p‖q) + γ KL(p0‖r) + λ KL(p‖q*)], the paper's negative control.
        eta: How the weights of the two gradients are found: ``"measured"``, ``"amortized"``, a number or None.
            ``"measured"`` takes the norms of both gradients over the whole accumulated batch at every step, which
            costs ``"vgs"`` and ``"teacher_prior"`` a second backward pass; ``"amortized"`` at one step in
            `refresh_every`, and their average in between; a number is η itself, for ``"vgs"`` and ``"language"``:
            nothing is measured (the paper has 0.41 and 0.36). None: ``"amortized"`` for ``"vgs"`` and ``"language"``,
            ``"measured"`` for the others, which need no pass more for it.
        gamma: Weight of the second part: γ ≥ 0 for ``"vgs"`` and ``"language"``, a share in [0, 1] for the others, or
            ``"adaptive"``. It is the value a schedule ends at; None for the method's own, 2 for ``"vgs"``, 1 for
            ``"language"`` and 0.8 for the others. ``"adaptive"``, for shares, gives the part of the loss that has made
            less progress the larger one (`vgs_distill.steering.gamma`).
        language_preservation: λ ≥ 0 of the third term of ``"vgs"`` and ``"language"``, or ``"adaptive"``. The paper has
            0.01. ``"adaptive"`` raises it while KL(p0‖r) is above where it started
            (`vgs_distill.steering.preservation`).
        dependency_quantile: Quantile of KL(q‖r) above which tokens depend on the image, for the third term and
            ``token_steering="dependency"``; of the tokens of a micro-batch that have an image. The paper has 0.7.
        ratio_bound: Largest absolute value of log p0 - log r in q*, in nats, or None: beyond, it is clamped.
        ratio_floor: p0 / r counts in q* only where q is at least this share of its largest entry; 0 for everywhere.
        gamma_min, gamma_max: Bounds of an adaptive gamma; it starts in their middle.
        gamma_schedule: ``"constant"``, or ``"linear"`` / ``"cosine"`` from `gamma_start` at the first step to `gamma`
            at the last.
        gamma_start: Where a schedule starts, in [0, 1].
        max_weight_ratio: Upper bound on (weight of the visual gradient) / (weight of the language gradient), or None.
            It slows a language part that drifts; alone it does not keep ``teacher_prior`` from running away.
        steering_scale: Length of the update of ``"vgs_unit"``, ``"matched"`` and ``"teacher_prior"``: ``"unit"`` for at
            most 1, ``"preserve"`` for that of the sum of the two gradients, for optimizers whose step follows the size
            of the gradient.
        token_steering: How much more tokens that hinge on the image weigh in the visual part: s ≥ 0, 0 for none, or
            ``"dependency"``. With q and r the probabilities that the teacher gives a sampled token with and without the
            image, it weighs 1 + s (1 - min(q, r) / max(q, r)), between 1 and 1 + s, and the visual part of a step is
            divided by the mean weight of its tokens (all micro-batches and processes, rows with an image), after arXiv
            2605.21924. ``"dependency"`` is the paper's γ_t: 0 up to the 40th percentile of KL(q‖r) over the vocabulary,
            γ / 2 up to `dependency_quantile`, γ above; it costs two more products with the teacher's head.
        plausibility: Leaves tokens implausible to the teacher out of the visual part: α in [0, 1), 0 for none. Such is
            a sampled token with q < α max q and r < α max r. After arXiv 2210.15097.
        teacher_smoothing: Share of the uniform distribution in both teachers: ε in [0, 1), 0 for none. They become
            (1 - ε) q + ε / V over the V tokens of the vocabulary, so that no divergence from them is infinite and no
            log-ratio beyond log(V / ε).
        refresh_every: Steps from one measurement to the next, with ``eta="amortized"``.
    """

    method: str = "vgs"
    eta: float | str | None = field(default=None, metadata={"metavar": "measured|amortized|FLOAT"})
    gamma: float | str | None = field(default=None, metadata={"metavar": "FLOAT|adaptive"})
    gamma_min: float = 0.5
    gamma_max: float = 0.9
    gamma_schedule: str = "constant"
    gamma_start: float = 0.5
    language_preservation: float | str = field(default=0.01, metadata={"metavar": "FLOAT|adaptive"})
    dependency_quantile: float = 0.7
    ratio_bound: float | None = None
    ratio_floor: float = 0.0
    max_weight_ratio: float | None = None
    steering_scale: str = "unit"
    token_steering: float | str = field(default=0.0, metadata={"metavar": "FLOAT|dependency"})
    plausibility: float = 0.0
    teacher_smoothing: float = 0.0
    refresh_every: int = 16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        if self.gamma is None:
            self.gamma = method.gamma
        if self.eta is None:
            self.eta = MEASURED if method.unit else AMORTIZED
        check_choices(self, gamma_schedule=GAMMA_SCHEDULES, steering_scale=UnitGradients.SCALES)
        self._check_gamma(method)
        self._check_numbers()
        self._check_method(method)

    def select(self, kind: type[Kind], **more: Any) -> Kind:
        """What one part of the engine needs: its dataclass `kind` filled by name, and with `more`."""
        names = [item.name for item in fields(kind) if hasattr(self, item.name)]
        return kind(**{**{name: getattr(self, name) for name in names}, **more})

    @property
    def weighs_tokens(self) -> bool:
        """Whether the tokens of a step may have unequal weights in the visual part."""
        return self.plausibility > 0 or (not isinstance(self.token_steering, str) and self.token_steering > 0)

    @property
    def measures(self) -> bool:
        """Whether some steps measure two gradients."""
        return METHODS[self.method].second is not None and isinstance(self.eta, str)

    def _check_gamma(self, method: Method) -> None:
        for name in ("gamma", "gamma_start"):
            value = getattr(self, name)
            if name == "gamma" and value == ADAPTIVE:
                continue
            if isinstance(value, str) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0{_or_adaptive(name)}, got {value!r}")
            if method.unit and not value <= 1.0:
                raise ValueError(
                    f"{name} is a share in [0, 1] with method={method.name!r}{_or_adaptive(name)}, got {value!r}"
                )
        if self.gamma != ADAPTIVE:
            return
        if not 0.0 <= self.gamma_min < self.gamma_max <= 1.0:
            raise ValueError(
                f"gamma_min must be below gamma_max, both in [0, 1], got {self.gamma_min} and {self.gamma_max}"
            )
        if self.gamma_schedule != "constant":
            raise ValueError(
                f"gamma='adaptive' moves gamma itself, but gamma_schedule is {self.gamma_schedule!r}; "
                "leave it at 'constant'"
            )
        if method.name not in ("vgs_unit", "matched"):
            raise ValueError(
                "gamma='adaptive' compares how far the two parts of the loss have fallen, by shares, which those of "
                f"method={method.name!r} do not allow; use 'matched' or 'vgs_unit', or a number"
            )

    def _check_numbers(self) -> None:
        check_ranges(self, _RANGES)
        for name, word in (("token_steering", BY_DEPENDENCY), ("language_preservation", ADAPTIVE_PRESERVATION)):
            value = getattr(self, name)
            if value != word and (isinstance(value, str) or not 0.0 <= value < math.inf):
                raise ValueError(f"{name} must be 0 (off), a positive finite number or {word!r}, got {value!r}")

    def _check_method(self, method: Method) -> None:
        """What a method does not go with."""
        if isinstance(self.eta, str):
            if self.eta not in (MEASURED, AMORTIZED):
                raise ValueError(f"eta must be {MEASURED!r}, {AMORTIZED!r} or a positive number, got {self.eta!r}")
        elif self.eta is None or not 0.0 < self.eta < math.inf:
            raise ValueError(f"eta must be {MEASURED!r}, {AMORTIZED!r} or a positive number, got {self.eta!r}")
        elif method.unit:
            raise ValueError(
                f"method={method.name!r} has a weight for each of two gradients, which no single number is; use "
                f"eta={MEASURED!r} or {AMORTIZED!r}"
            )
        if not {"vis", "evidence"} & {method.first, method.second}:
            for name in ("token_steering", "plausibility"):
                if getattr(self, name):
                    raise ValueError(f"method={method.name!r} has no visual part that {name} could weigh; set it to 0")


def check_choices(settings: Any, **choices: Sequence[str]) -> None:
    """ValueError for a setting that is none of its choices."""
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")


def check_ranges(settings: Any, ranges: Sequence[Range]) -> None:
    """ValueError for a number outside its range."""
    for names, in_range, words in ranges:
        for name in names:
            value = getattr(settings, name)
            if isinstance(value, int | float) and not in_range(value):
                raise ValueError(f"{name} must be {words}, got {value}")


def _or_adaptive(name: str) -> str:
    return f" or {ADAPTIVE!r}" if name == "gamma" else ""
