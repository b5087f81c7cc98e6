"""What the study runs: regimes, methods, and the experiments that combine them over seeds.

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

from vgs_distill.demo.methods import OPD, Method, label_of
from vgs_distill.demo.recipes import METHOD_SETTINGS, DemoRecipe, demo_recipe

TASKS = ("digits", "shapes")
SEEDS = tuple(range(8))
TUNING_SEEDS = (100, 101)
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
TUNED = ("opd", "matched-0.8")
"""What has its own learning rate; every other steered method takes that of `matched-0.8`."""
PROVOKED = ("teacher-prior-0.8-warn", "teacher-prior-0.9-warn", "vgs-unit-0.8-warn", "vgs-unit-0.9-warn")
GUARDED = (
    "teacher-prior-0.8-fallback",
    "vgs-unit-0.8-fallback",
    "teacher-prior-0.8-plausibility-warn",
    "teacher-prior-0.8-teacher-smoothing-warn",
)
PAPER = ("vgs-2.0", "vgs-2.0-language-preservation-ratio-floor", "language-1.0")
SAFETY_GAMMAS = (0.5, 0.7, 0.9)

# What "equal compute" means for OPD: a little more than a step of `matched` that measures costs in steps of OPD, by the
# times of the study's own runs.
STEERED_STEP_COST = 1.25


def _steered(method: str, gamma: float | str, cap: float | None = None, **settings: Any) -> Method:
    extra = "".join(f"-{value if isinstance(value, str) else key.replace('_', '-')}" for key, value in settings.items())
    name = f"{method.replace('_', '-')}-{gamma}" + ("" if cap is None else f"-cap{cap:g}") + extra
    words = [label_of(method), f"γ {gamma}"]
    words += [] if cap is None else [f"ratio ≤ {cap:g}"]
    words += [f"{key.replace('_', ' ')} {value}" for key, value in settings.items()]
    settings |= {} if cap is None else {"max_weight_ratio": cap}
    return Method(name, ", ".join(words), method, gamma, "measured", settings)


_METHODS = (
    Method("start", "student start"),  # judged as it is
    OPD,
    replace(OPD, name="opd-compute", label="OPD, equal compute"),
    # Every step's gradient scaled to one norm, as steering's is: tells the split's part of a gain from the scaling's.
    replace(OPD, name="opd-unit", label="OPD, unit gradients", settings={"max_grad_norm": 1e-3}),
    *(_steered("matched", gamma) for gamma in (0.5, 0.7, 0.8, 0.9)),
    _steered("vgs_unit", 0.7),
    _steered("teacher_prior", 0.8, 4.0),
    _steered("vgs_unit", 0.7, token_steering=1.0),
    _steered("matched", "adaptive"),
    # The paper's update and its negative control, and the update as the demo has it.
    _steered("vgs", 2.0),
    _steered("vgs", 2.0, **METHOD_SETTINGS["vgs"]),
    _steered("language", 1.0),
    # Known to run away from a cold student; then what is to keep them from it.
    *(_steered("teacher_prior", gamma, runaway_action="warn") for gamma in (0.8, 0.9)),
    *(_steered("vgs_unit", gamma, runaway_action="warn") for gamma in (0.8, 0.9)),
    _steered("teacher_prior", 0.8, runaway_action="fallback"),
    _steered("vgs_unit", 0.8, runaway_action="fallback"),
    _steered("teacher_prior", 0.8, plausibility=0.1, runaway_action="warn"),
    _steered("teacher_prior", 0.8, teacher_smoothing=0.05, runaway_action="warn"),
)
METHODS = {method.name: method for method in _METHODS}


def _start(**changes: Any) -> Callable[[DemoRecipe], DemoRecipe]:
    return lambda recipe: replace(recipe, student_start=replace(recipe.student_start, **changes))


def _steps(factor: float) -> Callable[[DemoRecipe], DemoRecipe]:
    return lambda recipe: demo_recipe(recipe.task, steps=round(recipe.distillation.steps * factor))


@dataclass(frozen=True)
class Regime:
    """One way to vary what the demo's recipe fixes."""

    label: str
    change: Callable[[DemoRecipe], DemoRecipe]


REGIMES: Mapping[str, Regime] = {
    "base": Regime("the demo's recipe: cold or weak vision", lambda recipe: recipe),
    "warm": Regime(
        "warm vision: the start has had 300 supervised steps on 20,000 rows",
        _start(steps=300, questions=10_000, captions=10_000),
    ),
    "prior": Regime(
        "strong prior: 90 % of the student's and the prompts' answers follow it",
        lambda recipe: replace(_start(prior=0.9)(recipe), distillation=replace(recipe.distillation, prior=0.9)),
    ),
    "style": Regime("the student's style is not the teacher's: it answers without reasoning", _start(style="terse")),
    "verbose": Regime(
        "long reasoning: the teacher opens with 18 words that the student never says",
        lambda recipe: replace(
            recipe,
            teacher=replace(recipe.teacher, style="verbose"),
            distillation=replace(recipe.distillation, max_completion_length=48),
            evaluation=replace(recipe.evaluation, max_new_tokens=48),
        ),
    ),
    "teacher": Regime(
        "weak teacher: 250 supervised steps",
        lambda recipe: replace(recipe, teacher=replace(recipe.teacher, steps=250)),
    ),
    "short": Regime("half the steps", _steps(0.5)),
    "long": Regime("twice the steps", _steps(2.0)),
    "batch": Regime(
        "batches of 16",
        lambda recipe: replace(recipe, distillation=replace(recipe.distillation, batch_size=16)),
    ),
    "small": Regime(
        "student of width 48",
        lambda recipe: replace(recipe, student_size=replace(recipe.student_size, text_width=48)),
    ),
}


@dataclass(frozen=True)
class Run:
    """One student. Its key names its line in the records."""

    task: str
    regime: str
    method: str
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.regime}/{self.method}/{self.learning_rate:g}/seed{self.seed}/{self.split}"

    @property
    def label(self) -> str:
        return self.name

    def recipe(self) -> DemoRecipe:
        recipe = REGIMES[self.regime].change(demo_recipe(self.task))
        if self.method == "opd-compute":
            recipe = _steps(STEERED_STEP_COST)(recipe)
        return replace(
            recipe,
            distillation=replace(recipe.distillation, learning_rate=self.learning_rate),
            evaluation=replace(recipe.evaluation, split=self.split),
        )

    def digest(self) -> str:
        """Changes when what the run does changes, so that a stale line is not taken for a finished run."""
        parts = {"recipe": asdict(self.recipe()), "method": asdict(METHODS[self.method]), "seed": self.seed}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


Records = Mapping[str, Mapping[str, Any]]  # by `Run.name`


def tuning(tasks: Sequence[str] = TASKS) -> list[Run]:
    """The grid of learning rates on the validation split."""
    return [
        Run(task, "base", method, rate, seed, "validation")
        for seed in TUNING_SEEDS
        for rate in LEARNING_RATES
        for task in tasks
        for method in TUNED
    ]


def learning_rate(records: Records, task: str, method: str) -> float | None:
    """The rate with the best mean validation accuracy over the tuning seeds; None while the grid is unfinished."""
    tuned = "matched-0.8" if METHODS[method].steered else "opd"

    def score(rate: float) -> float:
        own = [Run(task, "base", tuned, rate, seed, "validation").name for seed in TUNING_SEEDS]
        return sum(records[name]["accuracy"] for name in own) / len(own)

    try:
        return max(LEARNING_RATES, key=score)
    except KeyError:
        return None


def _tests(
    records: Records, tasks: Sequence[str], regimes: Iterable[str], methods: Iterable[str], seeds: Sequence[int]
) -> list[Run]:
    """Runs judged on the test split, a seed after the other, so that an unfinished study is still paired."""
    return [
        Run(task, regime, method, rate, seed, "test")
        for seed in seeds
        for regime in regimes
        for task in tasks
        for method in methods
        if (rate := learning_rate(records, task, method)) is not None
    ]


def main_comparison(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """OPD against `matched`, at the same steps."""
    return _tests(records, tasks, ["base"], ["opd", "matched-0.8", "start"], SEEDS)


def equal_compute(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """OPD with as many more steps as pay for what steering costs."""
    return _tests(records, tasks, ["base"], ["opd-compute"], SEEDS)


def readings(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """The other two rules of unit gradients, each at its recommended gamma and guard."""
    return _tests(records, tasks, ["base"], ["vgs-unit-0.7", "teacher-prior-0.8-cap4"], SEEDS[:3])


def paper(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """The paper's update, the same with the demo's guards, and the paper's negative control."""
    return _tests(records, tasks, ["base"], PAPER, SEEDS[:3])


def ablations(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """What part of a gain is that of gradients of one norm."""
    return _tests(records, tasks, ["base"], ["opd-unit"], SEEDS)


def safety(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """`matched` at other gammas; with the main comparison's runs these must never collapse."""
    return _tests(records, tasks, ["base"], [f"matched-{gamma}" for gamma in SAFETY_GAMMAS], SEEDS[:4])


def provoked(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """Settings that are known to collapse, with a monitor that only warns."""
    return _tests(records, tasks, ["base"], PROVOKED, SEEDS[:2])


def guards(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """The same with what is to keep them from it."""
    return _tests(records, tasks, ["base"], GUARDED, SEEDS[:2])


def variants(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """`vgs_unit` with token steering, and `matched` with adaptive gamma."""
    return _tests(records, tasks, ["base"], ["vgs-unit-0.7-token-steering", "matched-adaptive"], SEEDS[:4])


def regimes(records: Records, tasks: Sequence[str] = TASKS) -> list[Run]:
    """Where steering helps and where it does not; of the first seed, the other methods' cosines too."""
    others = [name for name in REGIMES if name != "base"]
    methods = ["opd", "matched-0.8", "start"]
    first = _tests(records, tasks, others, [*methods, "vgs-unit-0.7", "teacher-prior-0.8-cap4"], SEEDS[:1])
    return first + _tests(records, tasks, others, methods, SEEDS[1:3])


EXPERIMENTS: Mapping[str, Callable[[Records, Sequence[str]], list[Run]]] = {
    "tuning": lambda records, tasks: tuning(tasks),
    "main": main_comparison,
    "compute": equal_compute,
    "provoked": provoked,
    "safety": safety,
    "readings": readings,
    "regimes": regimes,
    "ablations": ablations,
    "variants": variants,
    "guards": guards,
    "paper": paper,
}
"""In the order in which they are run."""
