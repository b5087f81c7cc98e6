"""What the study runs: regimes, arms, and the experiments that combine them over seeds.

Every run of one seed and regime starts from the same student and meets the same prompts in the same order, so runs are
compared in pairs. Learning rates are chosen on the validation split with seeds of their own, by the same grid for
on-policy distillation (OPD) and for steering; the test split is read once per run, after its learning rate is fixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vgs_distill.demo.methods import OPD, Method, at_equal_time, label_of
from vgs_distill.demo.recipes import METHOD_SETTINGS, DemoRecipe, demo_recipe

TASKS = ("digits", "shapes", "easyvqa")
SEEDS = tuple(range(8))
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
HALF_WARM, COLD = "half-warm", "cold"
TUNING_SEEDS = {HALF_WARM: (100,), COLD: (100, 101)}


@dataclass(frozen=True)
class Arm:
    """One row of the study: a method, and what part of the tuned learning rate it takes."""

    method: Method
    rate: float = 1.0

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def label(self) -> str:
        return self.method.label

    @property
    def steered(self) -> bool:
        return self.method.steered

    def at(self, rate: float, name: str, label: str) -> Arm:
        """The same at another part of the learning rate."""
        method = replace(self.method, name=f"{self.name}-{name}", label=f"{self.label}, {label}")
        return Arm(method, rate)


def _arm(method: str, gamma: float | str, short: str = "", eta: float | str | None = None, **settings: Any) -> Arm:
    """`short`: what its name says of its settings, which its label has in full.

    Runaways are watched and left alone, unless the arm is about what to do: a guard would make two arms of one.
    """
    name = "-".join([method.replace("_", "-"), f"{gamma}", *([short] if short else [])])
    words = [label_of(method), f"γ {gamma:g}" if isinstance(gamma, float) else f"γ {gamma}"]
    words += [] if eta is None else [f"η {eta}"]
    words += [f"{_WORDS.get(key, key.replace('_', ' '))} {value}" for key, value in settings.items()]
    return Arm(Method(name, ", ".join(words), method, gamma, eta, {"runaway_action": "warn", **settings}))


_WORDS = {
    "language_preservation": "λ",
    "ratio_floor": "floor",
    "ratio_bound": "ratio within ±",
    "max_weight_ratio": "ratio ≤",
    "token_steering": "γ_t by",
}


def _vgs(gamma: float = 2.0, short: str = "", eta: float | str | None = None, **settings: Any) -> Arm:
    return _arm("vgs", gamma, short, eta, **settings)


_LEAD = METHOD_SETTINGS["vgs"]  # λ 1 with a floor under the ratio
GAMMAS = (0.5, 1.0, 2.0, 4.0)
LEAD = _vgs(2.0, "lead", **_LEAD)
"""The best guess before the study, and what the demo runs: its γ and guards are what the study judges first."""
_PRESERVED = {number: _vgs(2.0, f"lp{number:g}", language_preservation=number) for number in (0.0, 0.01, 0.1, 1.0)}
PAPER = _PRESERVED[0.01]
MATCHED = _arm("matched", 0.8)
OPD_ARM = Arm(OPD)
OPD_EQUAL_TIME = Arm(at_equal_time(LEAD.method))
_TENTH = (0.1, "tenth", "a tenth of the learning rate")

_ARMS = (
    Arm(Method("start", "student start")),  # judged as it is
    OPD_ARM,
    OPD_EQUAL_TIME,
    LEAD,
    # Every step's gradient scaled to one norm, as those of matched and vgs_unit are.
    Arm(replace(OPD, name="opd-unit", label="OPD, unit gradients", settings={"max_grad_norm": 1e-3})),
    OPD_ARM.at(*_TENTH),
    LEAD.at(*_TENTH),
    *_PRESERVED.values(),
    *(arm.at(*_TENTH) for arm in _PRESERVED.values()),
    # Guards that need no λ of one's own.
    _vgs(2.0, "lp0.01-floor", language_preservation=0.01, ratio_floor=0.1),
    _vgs(2.0, "lp0.01-bound", language_preservation=0.01, ratio_bound=1.0),
    _vgs(2.0, "adaptive", language_preservation="adaptive"),
    _vgs(2.0, "adaptive-floor", language_preservation="adaptive", ratio_floor=0.1),
    _vgs(2.0, "lp0.01-fallback", language_preservation=0.01, runaway_action="fallback"),
    *(_vgs(gamma, "lead", **_LEAD) for gamma in GAMMAS if gamma != 2.0),
    _vgs(2.0, "lead-graded", **_LEAD, token_steering="dependency"),
    _vgs(2.0, "lead-measured", "measured", **_LEAD),
    _vgs(2.0, "lead-constant", 0.41, **_LEAD),
    *(_arm("matched", gamma) for gamma in (0.5, 0.7, 0.8, 0.9, 1.0)),
    _arm("vgs_unit", 0.7),
    _arm("language", 1.0),
    _arm("teacher_prior", 0.8, "cap4", max_weight_ratio=4.0),
    # Known to run away from a cold student.
    *(_arm(method, gamma, "warn") for method in ("teacher_prior", "vgs_unit") for gamma in (0.8, 0.9)),
    # The default at learning rates that nobody tuned.
    *(
        _vgs(gamma, "lead", **_LEAD).at(rate, name, label)
        for gamma in (1.0, 2.0, 4.0)
        for rate, name, label in ((1 / 3, "third", "a third of the learning rate"), (3.0, "triple", "three times it"))
    ),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ARMS}

PRESERVATION = tuple(_PRESERVED.values())
GUARDS = tuple(
    ARMS[f"vgs-2.0-{short}"] for short in ("lp0.01-floor", "lp0.01-bound", "adaptive", "adaptive-floor",
                                           "lp0.01-fallback")
)  # fmt: skip
LEADS = {gamma: ARMS[f"vgs-{gamma}-lead"] for gamma in GAMMAS}
VARIANTS = tuple(ARMS[f"vgs-2.0-lead-{short}"] for short in ("graded", "measured", "constant"))
RULES = tuple(
    ARMS[name]
    for name in ("matched-0.5", "matched-1.0", "vgs-unit-0.7", "language-1.0", "teacher-prior-0.8-cap4", "opd-unit")
)
PROVOKED = tuple(
    ARMS[f"{name}-warn"] for name in ("teacher-prior-0.8", "teacher-prior-0.9", "vgs-unit-0.8", "vgs-unit-0.9")
)


def _start(**changes: Any) -> Callable[[DemoRecipe], DemoRecipe]:
    return lambda recipe: replace(recipe, student_start=replace(recipe.student_start, **changes))


def _longer(steps: int) -> Callable[[DemoRecipe], DemoRecipe]:
    return lambda recipe: replace(recipe, distillation=recipe.distillation.lasting(steps))


def _cold(recipe: DemoRecipe) -> DemoRecipe:
    """Speaks perfectly and sees almost nothing; shapes are weak rather than cold: with fewer steps no student tells one
    from another, and distillation on its own guesses does not get it started."""
    supervised, steps = {"digits": (120, 300), "shapes": (150, 250), "easyvqa": (90, 250)}[recipe.task]
    recipe = _start(steps=supervised, questions=3_000, captions=3_000)(recipe)
    return _longer(steps)(replace(recipe, distillation=replace(recipe.distillation, warmup_steps=20)))


@dataclass(frozen=True)
class Regime:
    """Where a student stands when distillation begins."""

    label: str
    change: Callable[[DemoRecipe], DemoRecipe]


REGIMES: Mapping[str, Regime] = {
    HALF_WARM: Regime("half-warm: mature language, vision at half of the teacher's or more (the demo)", lambda r: r),
    "blind": Regime(
        "mature language, blind eyes: 400 supervised steps, the picture left out of 85 % of them",
        lambda recipe: _longer(120)(_start(steps=400, image_dropout=0.85, captions=3_000)(recipe)),
    ),
    COLD: Regime("cold: few supervised steps on 6,000 rows", _cold),
    "style": Regime(
        "another style: the student answers without reasoning",
        lambda recipe: _longer(120)(_start(style="terse")(recipe)),
    ),
    "verbose": Regime(
        "a verbose teacher: it opens with 18 words that the student never says",
        lambda recipe: replace(
            recipe,
            teacher=replace(recipe.teacher, style="verbose"),
            distillation=replace(recipe.distillation.lasting(120), max_completion_length=48),
            evaluation=replace(recipe.evaluation, max_new_tokens=48),
        ),
    ),
}


@dataclass(frozen=True)
class Run:
    """One student. Its key names its line in the records."""

    task: str
    regime: str
    arm: str
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.regime}/{self.arm}/{self.learning_rate:g}/seed{self.seed}/{self.split}"

    @property
    def label(self) -> str:
        return self.name

    def recipe(self) -> DemoRecipe:
        recipe = REGIMES[self.regime].change(demo_recipe(self.task))
        return replace(
            recipe,
            distillation=replace(recipe.distillation, learning_rate=self.learning_rate),
            evaluation=replace(recipe.evaluation, split=self.split),
        )

    def digest(self) -> str:
        """Changes when what the run does changes, so that a stale line is not taken for a finished run."""
        parts = {"recipe": asdict(self.recipe()), "method": _does(ARMS[self.arm].method), "seed": self.seed}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _does(method: Method) -> dict[str, Any]:
    """What a method does, without what it is called."""
    does = {name: getattr(method, name) for name in ("method", "gamma", "eta", "settings")}
    return does if method.as_long_as is None else does | {"as_long_as": _does(method.as_long_as)}


Records = Mapping[str, Mapping[str, Any]]  # by `Run.name`


def tuned_arms(regime: str) -> tuple[str, str]:
    """The arms with a grid of their own: of OPD, and of the steered ones, which take the rate of that one."""
    return OPD_ARM.name, MATCHED.name if regime == COLD else LEAD.name


def tuned_regime(task: str, regime: str) -> str:
    """Whose learning rates a regime takes. The cold one has its own where it had them before the others were there."""
    return COLD if regime == COLD and task != "easyvqa" else HALF_WARM


def grid(task: str, regime: str, arm: str) -> list[Run]:
    """The learning rates of an arm on the validation split."""
    return [
        Run(task, regime, arm, rate, seed, "validation") for seed in TUNING_SEEDS[regime] for rate in LEARNING_RATES
    ]


def tuning(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """Every grid of the demo's starts."""
    return [run for task in tasks for arm in tuned_arms(HALF_WARM) for run in grid(task, HALF_WARM, arm)]


def learning_rate(records: Records, task: str, regime: str, arm: str) -> float | None:
    """The rate with the best mean validation accuracy over the tuning seeds, times the arm's part of it; None while the
    grid is unfinished."""
    where = tuned_regime(task, regime)
    runs = grid(task, where, tuned_arms(where)[ARMS[arm].steered])

    def score(rate: float) -> float:
        own = [run.name for run in runs if run.learning_rate == rate]
        return sum(records[name]["accuracy"] for name in own) / len(own)

    try:
        return ARMS[arm].rate * max(LEARNING_RATES, key=score)
    except KeyError:
        return None


def _tests(
    records: Records, tasks: Sequence[str], regimes: Iterable[str], arms: Iterable[Arm], seeds: Sequence[int]
) -> list[Run]:
    """Runs judged on the test split, a seed after the other and all arms of a task together, so that an unfinished
    study is still paired."""
    return [
        Run(task, regime, arm.name, rate, seed, "test")
        for seed in seeds
        for regime in regimes
        for task in tasks
        for arm in arms
        if (rate := learning_rate(records, task, regime, arm.name)) is not None
    ]


_START = ARMS["start"]
COMPARED = (OPD_ARM, LEAD, PAPER, MATCHED, OPD_EQUAL_TIME)
OTHER_REGIMES = tuple(name for name in REGIMES if name != HALF_WARM)


def main_comparison(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """OPD, the lead, the paper's update and `matched`, and OPD for as long as the lead takes."""
    return _tests(records, tasks, [HALF_WARM], [_START, *COMPARED], SEEDS)


def regimes(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """Where steering helps and where it does not."""
    return _tests(records, tasks, OTHER_REGIMES, [_START, *COMPARED], SEEDS[:4])


def _in_half_warm(arms: Sequence[Arm], seeds: int = 4) -> Callable[[Records, Sequence[str]], list[Run]]:
    return lambda records, tasks: _tests(records, tasks, [HALF_WARM], arms, SEEDS[:seeds])


def safety(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """The lead at γ 1 to 4 and at a third and three times its learning rate: none of these may unlearn or collapse."""
    arms = [ARMS[f"vgs-{gamma}-lead{rate}"] for gamma in (1.0, 2.0, 4.0) for rate in ("", "-third", "-triple")]
    return _tests(records, tasks, [HALF_WARM, "blind", COLD], arms, SEEDS[:1])


def provoked(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """What is known to collapse, with a monitor that only warns."""
    return _tests(records, [task for task in tasks if task != "easyvqa"], [COLD], PROVOKED, SEEDS[:2])


EXPERIMENTS: Mapping[str, Callable[[Records, Sequence[str]], list[Run]]] = {
    "tuning": tuning,
    "main": main_comparison,
    "preservation": _in_half_warm(
        [*PRESERVATION, *(ARMS[f"{arm.name}-tenth"] for arm in (OPD_ARM, LEAD, *PRESERVATION))]
    ),
    "regimes": regimes,
    "guards": _in_half_warm(GUARDS),
    "gammas": _in_half_warm(tuple(LEADS.values())),
    "safety": safety,
    "variants": _in_half_warm(VARIANTS),
    "rules": _in_half_warm(RULES),
    "provoked": provoked,
}
"""In the order in which they are run."""
