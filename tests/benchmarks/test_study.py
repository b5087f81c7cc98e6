"""The study's machinery: pairing, tuning, records that survive a kill, intervals, the page, and one real run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from vgs_distill.demo.recipes import demo_recipe
from vgs_distill.diagnosis.measure import Diagnosis, from_plain
from vgs_distill.resilience.runaway import RunawayMonitor, runaway_start

from benchmarks.report import DOCS
from benchmarks.study import __main__ as command
from benchmarks.study import claims, plan, readings, report, runs, tables
from benchmarks.study.plan import ARMS, COLD, EXPERIMENTS, HALF_WARM, LEAD, LEARNING_RATES, REGIMES, SEEDS, TASKS, Run
from benchmarks.study.readings import Study
from benchmarks.study.statistics import estimate, verdict
from tests.diagnosis_record import diagnosis
from tests.small_run import small_recipe

RUN = Run("digits", HALF_WARM, LEAD.name, 1e-3, 0, "test")
GRIDS = [
    run
    for task, regime in (*((task, HALF_WARM) for task in TASKS), ("digits", COLD), ("shapes", COLD))
    for arm in plan.tuned_arms(regime)
    for run in plan.grid(task, regime, arm)
]


def record_of(run: Run, accuracy: float = 0.5, **changes) -> dict:
    series = {"standard": [0.5] * 30, "clipped": [0.0] * 30}
    if ARMS[run.arm].steered:
        series |= {"cosine": [0.2] * 30, "lang": [0.4] * 30, "vis": [0.4] * 30, "eta": [0.4] * 30}
    return {
        "run": run.__dict__,
        "digest": run.digest(),
        "accuracy": accuracy,
        "against_prior": accuracy,
        "with_prior": accuracy,
        "by_question_type": {},
        "well_formed": 1.0,
        "without_image": 0.1,
        "alarm_step": None,
        "seconds": 1.0,
        "step_seconds": 0.2,
        "commit": "0",
        "series": series,
        **changes,
    }


def tuned_records(best: float = 1e-3) -> dict:
    return {run.name: record_of(run, 0.9 if run.learning_rate == best else 0.4) for run in GRIDS}


def page_of(records: dict) -> dict[str, str]:
    """First cell -> line, of every table of the page."""
    lines = report.build(records, {}).splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


# ---------------------------------------------------------------------- plan


def test_tuning_gives_opd_and_steering_the_same_grid_and_no_seed_or_split_of_the_comparison():
    found: dict[tuple[str, str], set] = {}
    for run in plan.tuning({}):
        found.setdefault((run.task, run.arm), set()).add((run.learning_rate, run.seed))
        assert (run.split, run.regime) == ("validation", HALF_WARM)
    assert set(found) == {(task, arm) for task in TASKS for arm in plan.tuned_arms(HALF_WARM)}
    assert len({frozenset(each) for each in found.values()}) == 1
    assert not {seed for seeds in plan.TUNING_SEEDS.values() for seed in seeds} & set(SEEDS)


def test_nothing_is_tested_before_its_learning_rate_is_known():
    assert plan.learning_rate({}, "digits", HALF_WARM, "opd") is None
    assert all(EXPERIMENTS[name]({}, TASKS) == [] for name in EXPERIMENTS if name != "tuning")
    unfinished = tuned_records()
    del unfinished[Run("shapes", HALF_WARM, LEAD.name, 2e-3, 100, "validation").name]
    assert plan.main_comparison(unfinished, ["digits"])
    arms = {run.arm for run in plan.main_comparison(unfinished, ["shapes"])}
    assert arms == {"start", "opd", plan.OPD_EQUAL_TIME.name}


@pytest.mark.parametrize("best", LEARNING_RATES)
def test_each_arm_is_tested_at_its_part_of_the_best_validated_learning_rate(best):
    records = tuned_records(best)
    rates = {run.arm: run.learning_rate for name in EXPERIMENTS for run in EXPERIMENTS[name](records, TASKS)
             if run.split == "test"}  # fmt: skip
    assert rates["opd"] == rates[LEAD.name] == rates["matched-0.5"] == best
    assert rates["opd-tenth"] == rates["vgs-2.0-lp0.01-tenth"] == pytest.approx(best / 10)
    assert rates["vgs-4.0-lead-triple"] == pytest.approx(3 * best)


def test_the_cold_regime_keeps_the_learning_rates_that_it_was_tuned_with():
    records = tuned_records(1e-3)
    for run in plan.grid("digits", COLD, "opd"):
        records[run.name] = record_of(run, 0.9 if run.learning_rate == 2e-3 else 0.4)
    assert plan.learning_rate(records, "digits", COLD, "opd") == 2e-3
    assert plan.learning_rate(records, "digits", "blind", "opd") == 1e-3
    assert plan.learning_rate(records, "easyvqa", COLD, "opd") == 1e-3


def test_runs_of_one_seed_differ_in_their_method_alone():
    runs_ = plan.main_comparison(tuned_records())
    for run in runs_:
        assert run.recipe() == replace(run, arm="opd").recipe()
    assert len([run for run in runs_ if run.arm == "opd"]) == 8 * len(TASKS)


def test_an_unfinished_study_has_whole_pairs():
    """Between two arms of one seed and task no other seed or task comes."""
    for name in ("main", "regimes", "preservation"):
        places = [(run.seed, run.regime, run.task) for run in EXPERIMENTS[name](tuned_records(), TASKS)]
        changes = [place for at, place in enumerate(places) if at == 0 or places[at - 1] != place]
        assert len(changes) == len(set(places))
        assert [seed for seed, *_ in places] == sorted(seed for seed, *_ in places)


def test_opd_at_equal_time_is_opd_for_as_long_as_the_lead():
    method = plan.OPD_EQUAL_TIME.method
    assert (method.method, method.as_long_as) == ("opd", LEAD.method)
    assert replace(RUN, arm=method.name).digest() != replace(RUN, arm="opd").digest()


@pytest.mark.parametrize("name", [name for name in REGIMES if name != HALF_WARM])
def test_every_regime_changes_the_recipe_and_only_there(name):
    for task in TASKS:
        assert replace(RUN, task=task, regime=name).recipe() != replace(RUN, task=task).recipe()
        assert Run(task, HALF_WARM, "opd", 1e-3, 0, "test").recipe() == demo_recipe(task)


def test_the_digest_follows_what_a_run_does_and_not_what_it_is_called(monkeypatch):
    before = RUN.digest()
    renamed = replace(LEAD, method=replace(LEAD.method, label="another", note="words"))
    monkeypatch.setattr(plan, "ARMS", {**ARMS, LEAD.name: renamed})
    assert RUN.digest() == before
    changed = replace(LEAD, method=replace(LEAD.method, gamma=3.0))
    monkeypatch.setattr(plan, "ARMS", {**ARMS, LEAD.name: changed})
    assert RUN.digest() != before


def test_the_safety_runs_are_sixty_at_least_over_gammas_rates_and_regimes():
    found = plan.safety(tuned_records())
    assert len({run.name for run in found}) >= 60
    assert {run.task for run in found} == set(TASKS)
    assert len({run.regime for run in found}) == 3
    assert {ARMS[run.arm].method.gamma for run in found} == {1.0, 2.0, 4.0}
    assert {round(run.learning_rate / 1e-3, 3) for run in found} == {0.333, 1.0, 3.0}


# ---------------------------------------------------------------------- records


def test_records_survive_a_line_cut_off_by_a_kill(tmp_path):
    path = tmp_path / "study.jsonl"
    other = replace(RUN, seed=1)
    runs.append_record(path, record_of(RUN))
    with path.open("a") as file:
        file.write(json.dumps(record_of(other))[:40])
    assert set(runs.read_records(path)) == {RUN.name}
    runs.append_record(path, record_of(other, 0.75))
    read = runs.read_records(path)
    assert set(read) == {RUN.name, other.name}
    assert read[other.name]["accuracy"] == 0.75


def test_a_record_of_another_definition_is_not_taken(tmp_path):
    path = tmp_path / "study.jsonl"
    runs.append_record(path, record_of(RUN, digest="another"))
    runs.append_record(path, {**record_of(RUN), "run": {**RUN.__dict__, "arm": "forgotten"}})
    assert runs.read_records(path) == {}


def test_every_line_on_record_is_of_a_run_as_it_is_defined_today():
    assert len(runs.read_records(runs.RECORDS)) == len(runs.RECORDS.read_text().splitlines())


def test_the_command_lists_what_is_left_and_refuses_what_it_does_not_know(tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    done = plan.tuning({}, ["digits"])[0]
    runs.append_record(path, record_of(done))
    assert command.main(["tuning", "--tasks=digits", "--list", f"--records={path}"]) == 0
    listed = capsys.readouterr().out.split()
    assert done.name not in listed
    assert len(listed) == len(plan.tuning({}, ["digits"])) - 1
    for wrong in (["tunning"], ["--tasks=letters"], ["--jobs=0"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(wrong)
        assert stopped.value.code == 2


# ---------------------------------------------------------------------- statistics


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimate(generator.normal(1.0, 2.0, 12))
        assert found.low < found.mean < found.high
        covered += found.low <= 1.0 <= found.high
    assert 0.85 <= covered / 200 <= 0.99  # the bootstrap of a dozen values is a little narrow


def test_intervals_are_repeatable_and_need_three_values():
    values = [0.3, -0.1, 0.7, 0.2, 0.5]
    assert estimate(values) == estimate(values)
    assert estimate([1.0, 2.0]).low is None
    assert not estimate([1.0, 2.0]).above(0)
    assert (estimate([2.0] * 4).low, estimate([2.0] * 4).high) == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_verdicts():
    assert [verdict(True, False), verdict(False, True), verdict(False, False)] == [
        "holds",
        "does not hold",
        "undecided",
    ]


# ---------------------------------------------------------------------- readings


def test_unlearning_and_its_beginning_are_read_off_the_language_loss():
    def lang(values):
        return {"series": {"lang": values}}

    healthy = lang([0.4] * 20 + [0.1] * 40)
    rising = lang([0.1] * 20 + [0.1 * 1.1**step for step in range(40)])
    hump = lang([0.1] * 20 + [0.5] * 12 + [0.05] * 40)
    assert not readings.unlearned(healthy)
    assert readings.unlearned(rising)
    assert not readings.unlearned(hump)
    assert readings.doubling(healthy) is readings.doubling(hump) is None
    begun = readings.doubling(rising)
    assert sum(rising["series"]["lang"][begun - 10 : begun]) / 10 >= 0.2
    assert sum(rising["series"]["lang"][begun - 11 : begun - 1]) / 10 < 0.2
    assert readings.language_growth(lang([])) is None
    assert math.exp(readings.language_growth(healthy)) == pytest.approx(0.25)


# ---------------------------------------------------------------------- page


def test_a_diagnosis_on_record_reads_back_as_it_was():
    found = from_plain(json.loads(json.dumps(diagnosis())))
    assert isinstance(found, Diagnosis)
    assert found.step_ratio == pytest.approx(1.4)
    assert isinstance(found.dependency_quantiles, tuple)


def test_the_page_of_no_records_holds_no_figure(tmp_path):
    report.write({}, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert page.count(f"|  | {claims.NOT_RUN} |") == len(claims.claims())
    assert "| holds |" not in page
    assert not list(tmp_path.glob("*.svg"))


def judged_records(gains: dict[str, float], **changes) -> dict:
    records = tuned_records()
    for run in plan.main_comparison(records, ["digits"]):
        gain = gains.get(run.arm, -0.3) + (0.002 * run.seed if run.arm == LEAD.name else 0.0)
        records[run.name] = record_of(run, 0.6 + gain, **changes.get(run.arm, {}))
    return records


def test_the_page_says_what_the_records_hold(tmp_path):
    equal, paper = plan.OPD_EQUAL_TIME.name, plan.PAPER.name
    gains = {"opd": 0.0, LEAD.name: 0.05, equal: 0.02, plan.MATCHED.name: 0.0, paper: -0.2}
    rising = {"series": {"lang": [0.1] * 20 + [0.5] * 80, "standard": [0.5] * 100}, "alarm_step": 40}
    thirds = {"thirds": [{"step": step, "vis": [0.1, 0.2, 0.3], "lang": [0.1, 0.2, 0.3]} for step in (10, 20)]}
    starts = {"diagnosis": diagnosis(92.0), "series": {}}
    records = judged_records(gains, **{paper: rising, equal: {"step_ratio": 1.4}, LEAD.name: thirds, "start": starts})
    wrong_rate = Run("digits", HALF_WARM, "opd", 2e-3, 0, "test")
    records[wrong_rate.name] = record_of(wrong_rate, 0.0)  # not at the chosen rate: left out
    lines = page_of(records)
    lead = lines["VGS with λ 1 and a floor is above OPD, digits"]
    assert "+5.7 [" in lead
    assert "8 of 8 up" in lead
    assert lead.endswith("| holds |")
    assert lines["VGS with λ 1 and a floor is above OPD at equal time, digits"].endswith("| holds |")
    assert lines["VGS as published (γ 2, λ 0.01) is above OPD, digits"].endswith("| does not hold |")
    assert lines["VGS with λ 1 and a floor is above OPD, shapes"].endswith(f"| {claims.NOT_RUN} |")
    assert lines["matched, γ 0.8, is above OPD, all tasks"].endswith("| undecided |")
    assert lines["with λ 0.01 it does not (Figure 4)"].endswith("| does not hold |")
    assert lines["a step costs 1.375 times OPD's (Figure 9)"].endswith("| holds |")
    angle = next(line for text, line in lines.items() if text.startswith("lang and vis stand at 90°"))
    assert "+92.0 [+92.0, +92.0]" in angle
    assert angle.endswith("| holds |")
    page = report.build(records, {})
    assert "| OPD | 8 | 60.0 ± 0.0 |" in page
    assert "doubled and stayed there in 8 runs; the monitor raised its alarm within 30 steps of that in 8" in page
    assert "one in 0 of 16 healthy runs" in page
    assert "Of 8 runs of VGS with λ 1 and a floor" in page
    report.write(records, tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {report.ANGLES, report.LOSSES}
    again = tmp_path / "again"
    report.write(records, again)
    assert (again / report.LOSSES).read_bytes() == (tmp_path / report.LOSSES).read_bytes()


def test_the_page_says_how_many_lines_are_of_earlier_runs():
    records = judged_records({})
    assert f"{len(records)} runs are on record.\n" in report.build(records, {})
    del next(iter(records.values()))["step_seconds"]
    assert "1 of them, all from cold starts, are from before" in report.build(records, {})


@pytest.mark.parametrize(("gain", "agreed"), [(0.1, 1), (-0.1, 0)])
def test_the_advice_of_the_starts_is_held_against_the_best_arm(gain, agreed):
    records = judged_records({"opd": 0.0, LEAD.name: gain}, start={"diagnosis": diagnosis(), "series": {}})
    text = tables.advice(Study(records))
    assert f"agrees with the best arm in {agreed} of 1 cells" in text
    assert "| 8 | vgs | " in text
    assert tables.advice(Study({})) == claims.NOT_RUN


def test_a_late_alarm_is_told():
    late = {"series": {"lang": [0.1] * 20 + [0.5] * 80, "standard": [0.5] * 100}}
    for alarm, caught in ((50, 8), (60, 0), (None, 0)):
        records = judged_records({}, **{plan.PAPER.name: {**late, "alarm_step": alarm}})
        assert f"within 30 steps of that in {caught} of them" in tables.monitor(Study(records))


def test_the_page_judges_the_monitor_by_the_histories():
    records = tuned_records()
    runaway = [0.2] * 100 + [0.2 * 1.1**step for step in range(50)]
    begin = runaway_start(runaway)
    cases = [(runaway, begin + 20, 0.0), (runaway, begin + 21, 0.0), (runaway, None, 1.0), ([0.2] * 150, None, 1.0)]
    for seed, (full, alarm, well_formed) in enumerate(cases):
        run = Run("digits", COLD, "vgs-unit-0.9-warn", 1e-3, seed, "test")
        series = {"standard": full, "cosine": [0.0] * 150}
        records[run.name] = record_of(run, alarm_step=alarm, well_formed=well_formed, series=series)
    assert "in 1 of 3 runs that ran away or collapsed" in tables.monitor(Study(records))


def test_a_default_that_unlearns_or_collapses_is_counted_and_named():
    records = tuned_records()
    for run in plan.safety(records, ["digits"]):
        rising = {"series": {"lang": [0.1] * 20 + [0.2] * 20}} if run.arm == "vgs-4.0-lead-triple" else {}
        form = {"well_formed": 0.5} if (run.arm, run.regime) == ("vgs-1.0-lead", COLD) else {}
        records[run.name] = record_of(run, **rising, **form)
    text = tables.safety(Study(records))
    assert "Of 27 runs" in text
    assert "3 ended with KL(p₀‖r) above its start" in text
    assert "1 with fewer than nine in ten" in text
    assert text.count("\n| VGS, γ 4, ") == 3


def test_the_monitor_as_it_is_meets_every_provoked_collapse_and_no_healthy_run_on_record():
    """Replayed on what the lines hold: three digits of every step, the weight ratio one step late, as in training."""
    collapses = healthy = 0
    for record in runs.read_records(runs.RECORDS).values():
        run, series = Run(**record["run"]), record.get("series", {})
        provoked = ARMS[run.arm] in plan.PROVOKED and readings.collapsed(record)
        if not provoked and ARMS[run.arm].method.method != "matched":
            continue
        monitor = RunawayMonitor("warn")
        ratios = [math.nan, *series["weight_ratio"]]
        # Unlearning is told by lang and vis, and lines of `vgs_unit` hold no vis: its collapses are to be met without.
        told = {name for name in ("standard", "lang", "vis") if name in series}
        told = {"standard"} if "vis_less_log_z" in series else told
        losses = [{f"loss/{name}": series[name][step] for name in told} for step in range(len(series["standard"]))]
        for step, seen in enumerate(zip(losses, ratios, series["clipped"], strict=False), 1):
            monitor.observe(step, *seen)
        if provoked:
            collapses += 1
            assert monitor.alarm_step is not None, run.name
            assert monitor.alarm_step <= runaway_start(series["standard"]) + tables.IN_TIME, run.name
        else:
            healthy += 1
            assert monitor.alarm_step is None, run.name
    assert collapses >= 10
    assert healthy >= 20


def test_the_page_in_docs_is_that_of_the_records():
    records = runs.read_records(runs.RECORDS)
    plots = {name: (DOCS / name).exists() for name in (report.ANGLES, report.LOSSES)}
    assert (DOCS / "study.md").read_text() == report.build(records, plots)


# ---------------------------------------------------------------------- a real run


@pytest.fixture
def tiny_study(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(plan, "demo_recipe", lambda task: small_recipe(demo_recipe(task)))
    monkeypatch.setenv("VGS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("arm", ["start", "opd", LEAD.name, plan.OPD_EQUAL_TIME.name])
def test_a_run_gives_a_line_that_reads_back(tiny_study, tmp_path, arm):
    run = replace(RUN, arm=arm, split="validation", task="easyvqa")
    record = runs.run_job(run, lambda message: None)
    path = tmp_path / "study.jsonl"
    runs.append_record(path, record)
    assert runs.read_records(path)[run.name] == json.loads(json.dumps(record))
    assert 0 <= record["accuracy"] <= 1
    if arm == "start":
        assert 0 < from_plain(record["diagnosis"]).lang < math.inf
        return
    steps = 2 if arm != plan.OPD_EQUAL_TIME.name else round(2 * record["step_ratio"])
    assert abs(len(record["series"]["standard"]) - steps) <= (arm == plan.OPD_EQUAL_TIME.name)
    assert ("cosine" in record["series"]) == ARMS[arm].steered
    assert record["step_seconds"] > 0
