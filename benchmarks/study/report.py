"""docs/study.md and its plot, from the records.

Prints what the records hold and nothing else: a figure that no record holds is 'not measured'.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vgs_distill.resilience.runaway import runaway_start

from benchmarks.harness.plots import plot_lines
from benchmarks.harness.tables import markdown_table
from benchmarks.report import NOT_MEASURED
from benchmarks.study.plan import (
    LEARNING_RATES,
    METHODS,
    REGIMES,
    SAFETY_GAMMAS,
    STEERED_STEP_COST,
    TASKS,
    TUNED,
    TUNING_SEEDS,
    learning_rate,
)
from benchmarks.study.statistics import Estimate, estimate, verdict

PLOT = "study-cosine.svg"
JUDGED = "matched-0.8"  # what the comparisons are of
ORTHOGONAL = 0.1  # a mean cosine within this of 0 counts as "nearly orthogonal": 84 to 96 degrees
IN_TIME = 20  # steps from the beginning of a runaway to the alarm
WINDOW = 10  # steps that a plotted point is the mean of

Record = Mapping[str, Any]
Reading = Callable[[Record], float | None]


class Study:
    """The records of judged runs, found by what they are."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = records
        self._runs: dict[tuple[str, str, str], dict[int, Record]] = {}
        for record in records.values():
            run = record["run"]
            rate = learning_rate(records, run["task"], run["method"])
            if run["split"] == "test" and run["learning_rate"] == rate:
                self._runs.setdefault((run["task"], run["regime"], run["method"]), {})[run["seed"]] = record

    def of_seeds(self, seeds: Collection[int]) -> Study:
        """The same with the runs of these seeds only, for tables whose rows are to be compared."""
        return Study(
            {n: r for n, r in self.records.items() if r["run"]["split"] != "test" or r["run"]["seed"] in seeds}
        )

    def runs(self, task: str, method: str, regime: str = "base") -> dict[int, Record]:
        """Judged on the test split, by seed."""
        return self._runs.get((task, regime, method), {})

    def steered(self) -> Iterator[tuple[tuple[str, str, str], dict[int, Record]]]:
        """Every group of steered runs: its task, regime and method, and its runs by seed."""
        for key, runs in sorted(self._runs.items(), key=lambda group: group[0]):
            if METHODS[key[2]].steered:
                yield key, runs

    def values(self, read: Reading, task: str, method: str, regime: str = "base") -> list[float]:
        found = (read(record) for _, record in sorted(self.runs(task, method, regime).items()))
        return [value for value in found if value is not None]

    def gain(self, task: str, method: str, over: str = "opd", regime: str = "base") -> Estimate | None:
        """Accuracy of `method` less that of `over`, paired by seed, in points."""
        own, other = self.runs(task, method, regime), self.runs(task, over, regime)
        shared = sorted(own.keys() & other.keys())
        return estimate([100 * (own[s]["accuracy"] - other[s]["accuracy"]) for s in shared]) if shared else None

    def pooled_gain(self, method: str, over: str = "opd") -> Estimate | None:
        """The same over the pairs of both tasks."""
        values = [v for task in TASKS if (gain := self.gain(task, method, over)) for v in gain.values]
        return estimate(values) if values else None


def accuracy(record: Record) -> float:
    return 100 * float(record["accuracy"])


def collapsed(record: Record) -> bool:
    """Worse than guessing fluently: fewer than nine in ten completions have the form of an answer."""
    return float(record["well_formed"]) < 0.9


def mean_cosine(record: Record) -> float | None:
    return _mean(record, "cosine")


def mean_absolute_cosine(record: Record) -> float | None:
    values = _series(record, "cosine")
    return statistics.fmean(map(abs, values)) if values else None


def norm_ratio(record: Record) -> float | None:
    """|g_lang| over the norm of the gradient that it is weighed with, the geometric mean over the run."""
    series = record["series"]
    pairs = zip(series.get("norm_lang", []), series.get("norm_standard") or series.get("norm_vis", []), strict=True)
    logs = [math.log(lang / other) for lang, other in pairs if lang and other]
    return math.exp(statistics.fmean(logs)) if logs else None


def _series(record: Record, name: str) -> list[float]:
    return [value for value in record["series"].get(name, []) if value is not None]


def _mean(record: Record, name: str) -> float | None:
    values = _series(record, name)
    return statistics.fmean(values) if values else None


# ---------------------------------------------------------------------- text


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def interval(found: Estimate | None, digits: int = 1) -> str:
    """Mean [low, high], signed."""
    if found is None:
        return NOT_MEASURED
    mean = number(found.mean, digits, signed=True)
    if found.low is None:
        return f"{mean} (no interval from {len(found.values)})"
    return f"{mean} [{number(found.low, digits, signed=True)}, {number(found.high, digits, signed=True)}]"


def spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return NOT_MEASURED
    mean = number(statistics.fmean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), digits)}"


INTRODUCTION = """# Study

Generated by `python -m benchmarks.study` from `benchmarks/records/study.jsonl`; do not edit. The command runs what is
not on record yet; it can be interrupted at any time.

The tasks, models and recipes are those of [the demo](index.md): half a million parameters, synthetic pictures, one
teacher per task. Accuracy is that of greedy free generation on 768 balanced held-out questions, in percent. Runs of one
seed start from the same student and meet the same prompts; differences are paired by seed, with 95 % intervals of the
bias-corrected bootstrap over seeds. "Equal compute" gives OPD {cost:g} times the steps, for what a step of
steering costs more: runs of {judged} took {times} times as long as OPD's of the same seed beside them.
"""


CLAIMS = """None of these rows is of the paper's update ([how it works](how_it_works.md)): `vgs_unit` is the rule that
a summary of the paper gives, `matched` and `teacher_prior` are this project's, and in the paper's words `matched` adds
language to OPD. The paper says that its own update is above OPD, by 2.4 and 1.6 points on average over seven
benchmarks, and that the gradients of lang and vis stand at 60° on the tenth of tokens that needs the image least and at
92° on the tenth that needs it most; here the cosine is that of the sums over all tokens. That language outweighs vision
is not in the paper."""


def build(records: Mapping[str, Record], plot: str | None) -> str:
    """The whole page. `plot` is the link to the picture of the cosines, None without one."""
    study = Study(records)
    parts = [
        INTRODUCTION.format(cost=STEERED_STEP_COST, times=_times(study), judged=METHODS[JUDGED].label),
        f"## Claims\n\n{CLAIMS}\n\n{_claims(study)}",
        f"## Main comparison\n\n{_main(study)}",
        f"## γ, and whether `matched` collapses\n\n{_safety(study)}",
        f"## Regimes\n\n{_regimes(study)}",
        f"## Cosine of the two gradients\n\n{_cosines(study)}",
        f"![cosine of the language and the visual gradient over training]({plot})" if plot else NOT_MEASURED,
        f"## Runaways and the monitor\n\n{_runaways(study)}",
        f"## Tuning\n\n{_tuning(study)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _times(study: Study) -> str:
    """Time of its runs over that of OPD's, the median over pairs."""
    pairs = [(study.runs(task, JUDGED), study.runs(task, "opd")) for task in TASKS]
    ratios = [own[seed]["seconds"] / opd[seed]["seconds"] for own, opd in pairs for seed in own.keys() & opd.keys()]
    return f"{statistics.median(ratios):.2f}" if ratios else NOT_MEASURED


def _claims(study: Study) -> str:
    rows = []
    for method in ("vgs-unit-0.7", JUDGED, "teacher-prior-0.8-cap4"):
        for task in TASKS:
            values = study.values(mean_cosine, task, method)
            found = estimate(values) if values else None
            near = found is not None and found.above(-ORTHOGONAL) and found.below(ORTHOGONAL)
            far = found is not None and (found.above(ORTHOGONAL) or found.below(-ORTHOGONAL))
            what = f"the gradients are nearly orthogonal: {METHODS[method].label}, {task}"
            rows.append([what, f"mean cosine {interval(found, 2)}", verdict(near, far)])
    for over, label in (("opd", "OPD"), ("opd-compute", "OPD at equal compute"), ("matched-0.5", "γ 0.5")):
        for task in (*TASKS, None):
            gain = study.pooled_gain(JUDGED, over) if task is None else study.gain(task, JUDGED, over)
            what = f"steering beats {label}: {METHODS[JUDGED].label}, {task or 'both tasks'}"
            seeds = "" if gain is None else f", {sum(v > 0 for v in gain.values)} of {len(gain.values)} up"
            said = verdict(gain is not None and gain.above(0), gain is not None and gain.below(0))
            rows.append([what, f"{interval(gain)} points{seeds}" if gain else NOT_MEASURED, said])
    for task in TASKS:
        values = study.values(norm_ratio, task, JUDGED)
        found = estimate([math.log(value) for value in values]) if values else None
        text = NOT_MEASURED
        if found is not None and found.low is not None and found.high is not None:
            low, mean, high = (math.exp(x) for x in (found.low, found.mean, found.high))
            text = f"norm ratio {mean:.2f} [{low:.2f}, {high:.2f}]"
        said = verdict(found is not None and found.above(0), found is not None and found.below(0))
        rows.append([f"the language gradient outweighs the other: {METHODS[JUDGED].label}, {task}", text, said])
    return markdown_table(["claim", "here", "verdict"], rows) + (
        f'\n\n"Nearly orthogonal" is taken as a mean cosine within ±{ORTHOGONAL:g}.'
    )


def _main(study: Study) -> str:
    tables = []
    for task in TASKS:
        rows = []
        for name, method in METHODS.items():
            values = study.values(accuracy, task, name)
            if not values:
                continue
            gain = None if name == "opd" else study.gain(task, name)
            up = "" if gain is None else f"{sum(v > 0 for v in gain.values)} of {len(gain.values)}"
            runs = study.runs(task, name).values()
            rows.append(
                [
                    method.label,
                    str(len(values)),
                    spread(values),
                    "" if gain is None else interval(gain),
                    up,
                    number(100 * statistics.fmean(r["against_prior"] for r in runs)),
                    number(100 * statistics.fmean(r["without_image"] for r in runs)),
                    str(sum(map(collapsed, runs))),
                ]
            )
        header = ["method", "seeds", "accuracy", "over OPD", "up", "against prior", "no image", "collapsed"]
        tables.append(f"### {task.capitalize()}\n\n" + (markdown_table(header, rows) if rows else NOT_MEASURED))
    return "\n\n".join(tables)


def _safety(study: Study) -> str:
    names = {gamma: f"matched-{gamma}" for gamma in sorted({*SAFETY_GAMMAS, 0.8})}
    groups = [study.runs(task, name) for name in names.values() for task in TASKS]
    runs = [record for group in groups for record in group.values()]
    seeds = set[int].intersection(*(set(group) for group in groups))
    shared = study.of_seeds(seeds)
    rows = []
    for gamma, name in names.items():
        cells = [f"{gamma:g}"]
        for task in TASKS:
            gain = shared.gain(task, name)
            cells += [spread(shared.values(accuracy, task, name)), interval(gain) if gain else ""]
        rows.append(cells)
    header = ["γ of `matched`", *(text for task in TASKS for text in (task, f"{task}, over OPD"))]
    return (
        f"Collapsed: {sum(map(collapsed, runs))} of {len(runs)} runs of `matched` with γ from 0.5 to 0.9 (fewer than "
        f"nine in ten completions well formed at the end). Accuracy over the {len(seeds)} seeds that every γ has:\n\n"
        + markdown_table(header, rows)
    )


def _regimes(study: Study) -> str:
    rows = []
    for name, regime in REGIMES.items():
        for task in TASKS:
            opd, own = study.values(accuracy, task, "opd", name), study.values(accuracy, task, JUDGED, name)
            if not own:
                continue
            ratios = study.values(norm_ratio, task, JUDGED, name)
            start = study.values(accuracy, task, "start", name)
            rows.append(
                [
                    f"{regime.label}; {task}",
                    str(len(own)),
                    spread(start) if start else "–",
                    spread(opd),
                    spread(own),
                    interval(study.gain(task, JUDGED, regime=name)),
                    number(statistics.fmean(ratios), 2) if ratios else "–",
                ]
            )
    header = ["regime", "seeds", "start", "OPD", METHODS[JUDGED].label, "gain", "\\|g_lang\\| / \\|g_standard\\|"]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def _runaways(study: Study) -> str:
    """What the monitor said in every steered run that was judged, against where its history says a runaway began."""
    rows = []
    collapses, runaways = [], []  # whether the monitor, where it only warned, was in time
    quiet = []  # whether it said nothing, in runs of `matched` that need no help
    missed = 0  # other collapses without an alarm
    for (task, regime, name), runs in study.steered():
        for seed, record in sorted(runs.items()):
            start, alarm = runaway_start(_series(record, "standard")), record["alarm_step"]
            if METHODS[name].settings.get("runaway_action") == "warn":
                in_time = alarm is not None and (start is None or alarm <= start + IN_TIME)
                runaways += [in_time] if start is not None else []
                collapses += [in_time] if collapsed(record) else []
            elif METHODS[name].method == "matched" and start is None and not collapsed(record):
                quiet.append(alarm is None)
            else:
                missed += collapsed(record) and alarm is None
            if start is not None or alarm is not None or collapsed(record):
                cells = [METHODS[name].label, task, regime, str(seed), *(str(x or "none") for x in (start, alarm))]
                rows.append([*cells, number(accuracy(record)), number(100 * record["well_formed"])])
    header = ["method", "task", "regime", "seed", "runaway from step", "alarm at step", "accuracy", "well formed"]
    return (
        "A runaway begins where the history of KL(student ‖ teacher) says so in hindsight "
        "(`vgs_distill.resilience.runaway.runaway_start`); the monitor sees only what came before. Where it only "
        f"warned, it did so within {IN_TIME} steps of the beginning in {sum(collapses)} of {len(collapses)} runs that "
        f"collapsed, and in {sum(runaways)} of {len(runaways)} that ran away, collapse or not. It raised an alarm in "
        f"{len(quiet) - sum(quiet)} of {len(quiet)} healthy runs of `matched`. {missed} other runs collapsed without "
        "one: the monitor sees a run get worse than it was, not one that starts badly and stays bad. Every run with a "
        "runaway, an alarm or a collapse is listed; where the label says nothing of a runaway action, the alarm made "
        "the run fall back.\n\n" + (markdown_table(header, rows) if rows else "")
    )


def _cosines(study: Study) -> str:
    rows = []
    for regime in REGIMES:
        for name, method in METHODS.items():
            for task in TASKS:
                means = study.values(mean_cosine, task, name, regime)
                if means:
                    absolute = study.values(mean_absolute_cosine, task, name, regime)
                    rows.append([method.label, regime, task, spread(means, 2), number(statistics.fmean(absolute), 2)])
    header = ["method", "regime", "task", "mean cosine", "mean of its absolute value"]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def _tuning(study: Study) -> str:
    rows = []
    for task in TASKS:
        for method in TUNED:
            chosen = learning_rate(study.records, task, method)
            cells = []
            for rate in LEARNING_RATES:
                names = [f"{task}/base/{method}/{rate:g}/seed{seed}/validation" for seed in TUNING_SEEDS]
                values = [accuracy(study.records[name]) for name in names if name in study.records]
                text = spread(values)
                cells.append(f"**{text}**" if rate == chosen else text)
            rows.append([f"{METHODS[method].label}, {task}", *cells])
    header = ["validation accuracy at learning rate", *(f"{rate:g}" for rate in LEARNING_RATES)]
    return (
        f"Accuracy on the validation split, seeds {', '.join(map(str, TUNING_SEEDS))}, which no comparison uses. The "
        "best rate of each row is the one that its method is judged with; every steered method takes that of "
        f"{METHODS[JUDGED].label}, every OPD that of OPD.\n\n" + markdown_table(header, rows)
    )


def plot_cosines(study: Study, path: Path) -> bool:
    """One panel per task and regime, one line per method: the mean over seeds of windows of steps."""
    panels = []
    for regime in REGIMES:
        for task in TASKS:
            lines = {}
            for name in ("vgs-unit-0.7", JUDGED, "teacher-prior-0.8-cap4"):
                if runs := study.runs(task, name, regime).values():
                    lines[METHODS[name].label] = _windows([_series(record, "cosine") for record in runs])
            if lines:
                panels.append((f"step ({task}, {regime})", "cosine", lines))
    if panels:
        plot_lines(path, panels, columns=min(4, len(panels)), scale="linear")
    return bool(panels)


def _windows(runs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    shortest = min(map(len, runs))
    return [
        (start + WINDOW / 2, statistics.fmean(value for run in runs for value in run[start : start + WINDOW]))
        for start in range(0, shortest - WINDOW + 1, WINDOW)
    ]


def write(records: Mapping[str, Record], docs: Path) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    study = Study(records)
    drawn = plot_cosines(study, docs / PLOT)
    page = docs / "study.md"
    page.write_text(build(records, PLOT if drawn else None))
    print(f"{page}: {len(records)} runs")
