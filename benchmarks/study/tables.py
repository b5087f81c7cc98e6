"""The tables of docs/study.md, each a function of the records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vgs_distill.diagnosis.recommend import recommend
from vgs_distill.resilience.runaway import runaway_start

from benchmarks.harness.tables import markdown_table
from benchmarks.study.claims import NOT_RUN, growth_text, interval, number, spread
from benchmarks.study.plan import (
    ARMS,
    COLD,
    COMPARED,
    HALF_WARM,
    LEAD,
    LEARNING_RATES,
    MATCHED,
    OPD_ARM,
    OPD_EQUAL_TIME,
    PAPER,
    PRESERVATION,
    REGIMES,
    TASKS,
    grid,
    learning_rate,
    tuned_arms,
    tuned_regime,
)
from benchmarks.study.readings import (
    Record,
    Study,
    accuracy,
    collapsed,
    doubling,
    language_growth,
    mean_cosine,
    series,
    unlearned,
)

IN_TIME = 20  # steps from the beginning of a runaway to the alarm
UNLEARNING_IN_TIME = 30  # steps from the doubling of the language loss to the alarm


def plane(study: Study) -> str:
    """Where the starts stand: accuracy beside the divergences that `vgs diagnose` measures."""
    rows = []
    for name, regime in REGIMES.items():
        for task in TASKS:
            starts = study.starts(task, name)
            if not starts:
                continue
            records, found = zip(*starts, strict=True)
            cells = [f"{regime.label}; {task}", str(len(starts)), spread([accuracy(r) for r in records])]
            cells += [spread([getattr(d, part) for d in found], 3) for part in ("standard", "lang", "vis")]
            cells += [spread([100 * d.needs_image for d in found], 0), spread([d.eta["2"] for d in found], 2)]
            rows.append(cells)
    header = ["start", "seeds", "accuracy", "KL(p‖q)", "KL(p₀‖r)", "vis", "need the image, %", "η at γ 2"]
    return markdown_table(header, rows) if rows else NOT_RUN


def comparison(study: Study) -> str:
    """Every arm that ran from the demo's starts, a table a task."""
    tables = []
    for task in TASKS:
        rows = []
        for name, arm in ARMS.items():
            runs = list(study.runs(task, name).values())
            if not runs:
                continue
            over = [
                ""
                if name in (other, "start") or not study.runs(task, other)
                else interval(study.gain(task, name, other))
                for other in ("opd", OPD_EQUAL_TIME.name)
            ]
            growths = [value for r in runs if (value := language_growth(r)) is not None]
            cells = [arm.label, str(len(runs)), spread([accuracy(r) for r in runs]), *over]
            cells += [growth_text(growths), f"{sum(map(unlearned, runs))}" if growths else ""]
            rows.append([*cells, str(sum(map(collapsed, runs)))])
        header = ["arm", "seeds", "accuracy", "over OPD", "over OPD at equal time", "lang, end over start"]
        header += ["unlearned", "collapsed"]
        tables.append(f"### {task}\n\n" + (markdown_table(header, rows) if rows else NOT_RUN))
    return "\n\n".join(tables)


def regimes(study: Study) -> str:
    """Gains over OPD of the compared arms, wherever there are pairs."""
    arms = [arm for arm in COMPARED if arm is not OPD_ARM]
    rows = []
    for name, regime in REGIMES.items():
        for task in TASKS:
            opd = study.values(accuracy, task, "opd", name)
            gains = [study.gain(task, arm.name, regime=name) for arm in arms]
            if not any(gains):
                continue
            start = study.values(accuracy, task, "start", name)
            cells = [f"{regime.label}; {task}", str(len(opd)), spread(start) if start else "–", spread(opd)]
            rows.append([*cells, *("–" if gain is None else interval(gain) for gain in gains)])
    header = ["regime", "seeds", "start", "OPD", *(f"{arm.label}: over OPD" for arm in arms)]
    return markdown_table(header, rows) if rows else NOT_RUN


def advice(study: Study) -> str:
    """What `vgs diagnose` would have said of the starts, against the arm that was best."""
    rows, agreed = [], []
    for name, regime in REGIMES.items():
        for task in TASKS:
            starts = [recommend(d) for _, d in study.starts(task, name)]
            runs = {arm.name: study.runs(task, arm.name, name) for arm in (OPD_ARM, LEAD, PAPER)}
            seeds = sorted(set[int].intersection(*map(set, runs.values())))
            if not starts or not seeds:
                continue
            means = {arm: statistics.fmean(accuracy(own[seed]) for seed in seeds) for arm, own in runs.items()}
            best = ARMS[max(means, key=lambda arm: means[arm])]
            takes = [one.take for one in starts]
            said = max(sorted(set(takes)), key=takes.count)
            agreed.append((said == "vgs") == best.steered)
            cells = [f"{regime.label}; {task}", str(len(seeds)), said, best.label]
            rows.append([*cells, ", ".join(number(mean) for mean in means.values()), "yes" if agreed[-1] else "no"])
    if not rows:
        return NOT_RUN
    header = ["start", "seeds", "advice", "best arm", f"accuracy of {OPD_ARM.label}, {LEAD.label}, {PAPER.label}", ""]
    return f"The advice agrees with the best arm in {sum(agreed)} of {len(agreed)} cells.\n\n" + markdown_table(
        header, rows
    )


def _is_lead(arm: str) -> bool:
    return arm.startswith("vgs-") and "-lead" in arm


def safety(study: Study) -> str:
    """How many runs with λ 1 and a floor ended with more language loss than they began with, or without form."""
    runs = list(study.all(_is_lead))
    if not runs:
        return NOT_RUN
    lost = [(*where, record) for *where, record in runs if unlearned(record) or collapsed(record)]
    text = (
        f"Of {len(runs)} runs of VGS with λ 1 and a floor, over tasks, regimes, γ and learning rates, "
        f"{sum(unlearned(record) for *_, record in runs)} ended with KL(p₀‖r) above its start (unlearned) and "
        f"{sum(collapsed(record) for *_, record in runs)} with fewer than nine in ten completions well formed."
    )
    table = [
        [ARMS[arm].label, task, regime, str(seed), growth_text([language_growth(record) or 0.0]),
         number(accuracy(record)), number(100 * record["well_formed"])]
        for task, regime, arm, seed, record in lost
    ]  # fmt: skip
    header = ["arm", "task", "regime", "seed", "lang, end over start", "accuracy", "well formed"]
    return text + ("\n\n" + markdown_table(header, table) if table else "")


def monitor(study: Study) -> str:
    """What the monitor said in runs whose guard it was not, against what their histories say in hindsight."""
    unlearning = _unlearning(study)
    runaways, rows = [], []
    for task, regime, name, seed, record in study.all(lambda arm: ARMS[arm].steered):
        start, alarm = runaway_start(series(record, "standard")), record.get("alarm_step")
        if start is None and not collapsed(record):
            continue
        runaways.append(alarm is not None and (start is None or alarm <= start + IN_TIME))
        cells = [ARMS[name].label, task, regime, str(seed), *(str(x or "none") for x in (start, alarm))]
        rows.append([*cells, number(accuracy(record)), number(100 * record["well_formed"])])
    header = ["arm", "task", "regime", "seed", "runaway from step", "alarm at step", "accuracy", "well formed"]
    return unlearning + (
        "\n\nA runaway begins where the history of KL(p‖q) says so in hindsight "
        "(`vgs_distill.resilience.runaway.runaway_start`). The monitor raised its alarm within "
        f"{IN_TIME} steps of the beginning in {sum(runaways)} of {len(runaways)} runs that ran away or collapsed."
        + ("\n\n" + markdown_table(header, rows) if rows else "")
    )


def _unlearning(study: Study) -> str:
    watched = {arm.name for arm in PRESERVATION[:2]}
    in_time, quiet = [], []
    for *_, name, _seed, record in study.all(lambda arm: ARMS[arm].method.method in ("vgs", "matched")):
        begun, alarm = doubling(record), record.get("alarm_step")
        if begun is not None and name in watched:
            in_time.append(alarm is not None and alarm <= begun + UNLEARNING_IN_TIME)
        elif begun is None and _healthy(record):
            quiet.append(alarm is None)
    return (
        f"The language loss of VGS at λ 0 and 0.01 doubled and stayed there in {len(in_time)} runs; the monitor raised "
        f"its alarm within {UNLEARNING_IN_TIME} steps of that in {sum(in_time)} of them. It raised one in "
        f"{len(quiet) - sum(quiet)} of {len(quiet)} healthy runs of VGS and `matched`."
    )


def _healthy(record: Record) -> bool:
    return not unlearned(record) and not collapsed(record) and runaway_start(series(record, "standard")) is None


def costs(study: Study) -> str:
    """The processor's time of a step: medians over the runs, and the ratio that was measured side by side."""
    rows = []
    for task in TASKS:
        for arm in (OPD_ARM, LEAD, PAPER, MATCHED):
            times = study.values(lambda r: r.get("step_seconds"), task, arm.name)
            if times:
                rows.append([f"{arm.label}; {task}", str(len(times)), number(statistics.median(times), 3)])
    ratios = [v for task in TASKS for v in study.values(lambda r: r.get("step_ratio"), task, OPD_EQUAL_TIME.name)]
    text = (
        f"Side by side, before each run at equal time, a step of {LEAD.label} took "
        f"{number(statistics.fmean(ratios), 2)} times as long as one of OPD ({number(min(ratios), 2)} to "
        f"{number(max(ratios), 2)} over {len(ratios)} runs).\n\n"
        if ratios
        else ""
    )
    return text + markdown_table(["arm", "runs", "median step, processor seconds"], rows) if rows else NOT_RUN


def cosines(study: Study) -> str:
    """Between the two gradients that a method weighs, where it measured them."""
    rows = []
    for regime in REGIMES:
        for name, arm in ARMS.items():
            for task in TASKS:
                values = study.values(mean_cosine, task, name, regime)
                if values:
                    rows.append([arm.label, regime, task, str(len(values)), spread(values, 2)])
    return markdown_table(["arm", "regime", "task", "seeds", "mean cosine"], rows) if rows else NOT_RUN


def tuning(study: Study) -> str:
    """Accuracy on the validation split; the best rate in bold."""
    rows = []
    for regime in (HALF_WARM, COLD):
        for task in TASKS:
            if tuned_regime(task, regime) == regime:
                rows += [_tuned_row(study, task, regime, arm) for arm in tuned_arms(regime)]
    return markdown_table(["validation accuracy at learning rate", *(f"{rate:g}" for rate in LEARNING_RATES)], rows)


def _tuned_row(study: Study, task: str, regime: str, arm: str) -> list[str]:
    chosen = learning_rate(study.records, task, regime, arm)
    cells = []
    for rate in LEARNING_RATES:
        names = [run.name for run in grid(task, regime, arm) if run.learning_rate == rate]
        text = spread([accuracy(study.records[name]) for name in names if name in study.records])
        cells.append(f"**{text}**" if rate == chosen else text)
    return [f"{ARMS[arm].label}, {task}, {regime}", *cells]


def windows(records: Sequence[Record], part: str, third: int) -> list[tuple[float, float]]:
    """A part of the loss on a third of the tokens by dependency, means over runs."""
    at: dict[float, list[float]] = {}
    for record in records:
        for window in record.get("thirds", []):
            if part in window:
                at.setdefault(window["step"], []).append(window[part][third])
    return [(step, statistics.fmean(values)) for step, values in sorted(at.items())]
