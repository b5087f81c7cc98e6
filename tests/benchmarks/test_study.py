"""The study's machinery: pairing, tuning, records that survive a kill, intervals, the page, and one real run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from vgs_distill.demo.recipes import demo_recipe
from vgs_distill.resilience.runaway import RunawayMonitor, runaway_start

from benchmarks.report import DOCS
from benchmarks.study import __main__ as command
from benchmarks.study import plan, report, runs
from benchmarks.study.plan import EXPERIMENTS, LEARNING_RATES, METHODS, REGIMES, SEEDS, TASKS, TUNED, TUNING_SEEDS, Run
from benchmarks.study.statistics import estimate, verdict
from tests.small_run import small_recipe

RUN = Run("digits", "base", "matched-0.8", 1e-3, 0, "test")


def record_of(run: Run, accuracy: float = 0.5, **changes) -> dict:
    steered = METHODS[run.method].steered
    series = {"standard": [0.5] * 30, "clipped": [0.0] * 30}
    if steered:
        series |= {"cosine": [0.2] * 30, "norm_lang": [2.0] * 30, "norm_standard": [4.0] * 30}
    return {
        "run": run.__dict__,
        "digest": run.digest(),
        "accuracy": accuracy,
        "against_prior": accuracy,
        "by_question_type": {},
        "well_formed": 1.0,
        "without_image": 0.1,
        "alarm_step": None,
        "seconds": 1.0,
        "commit": "0",
        "series": series,
        **changes,
    }


def tuned_records(best: float = 1e-3) -> dict:
    return {run.name: record_of(run, 0.9 if run.learning_rate == best else 0.4) for run in plan.tuning()}


# ---------------------------------------------------------------------- plan


def test_tuning_gives_every_method_the_same_grid_and_no_seed_or_split_of_the_comparison():
    grids = {(run.task, run.method): set() for run in plan.tuning()}
    for run in plan.tuning():
        grids[run.task, run.method].add((run.learning_rate, run.seed))
        assert run.split == "validation"
    assert set(grids) == {(task, method) for task in TASKS for method in TUNED}
    assert len({frozenset(grid) for grid in grids.values()}) == 1
    assert not set(TUNING_SEEDS) & set(SEEDS)


def test_nothing_is_tested_before_its_learning_rate_is_known():
    assert plan.learning_rate({}, "digits", "opd") is None
    assert all(EXPERIMENTS[name]({}, TASKS) == [] for name in EXPERIMENTS if name != "tuning")
    unfinished = tuned_records()
    del unfinished[plan.tuning()[-1].name]
    assert plan.main_comparison(unfinished, ["digits"])
    assert [run.method for run in plan.main_comparison(unfinished, ["shapes"])].count("matched-0.8") == 0


@pytest.mark.parametrize("best", LEARNING_RATES)
def test_each_method_is_tested_at_its_best_validated_learning_rate(best):
    records = tuned_records(best)
    for name in EXPERIMENTS:
        for run in EXPERIMENTS[name](records, TASKS):
            assert run.split == "validation" or run.learning_rate == best


def test_runs_of_one_seed_differ_in_their_method_alone():
    for run in plan.main_comparison(tuned_records()):
        other = replace(run, method="opd").recipe()
        recipe = run.recipe()
        assert recipe.student_start == other.student_start
        assert recipe.teacher == other.teacher
        same = run.method != "opd-compute"
        assert (recipe.distillation.steps == other.distillation.steps) == same
    assert len([run for run in plan.main_comparison(tuned_records()) if run.method == "opd"]) == 8 * len(TASKS)


def test_equal_compute_gives_opd_more_steps():
    steps = {m: replace(RUN, method=m).recipe().distillation.steps for m in ("opd", "opd-compute", "matched-0.8")}
    assert steps["opd"] == steps["matched-0.8"]
    assert steps["opd-compute"] == round(plan.STEERED_STEP_COST * steps["opd"])


@pytest.mark.parametrize("name", [name for name in REGIMES if name != "base"])
def test_every_regime_changes_the_recipe_and_only_there(name):
    for task in TASKS:
        assert replace(RUN, task=task, regime=name).recipe() != replace(RUN, task=task).recipe()
        assert Run(task, "base", "opd", 1e-3, 0, "test").recipe() == demo_recipe(task)


def test_every_method_and_experiment_is_known_by_name():
    for name in EXPERIMENTS:
        for run in EXPERIMENTS[name](tuned_records(), TASKS):
            assert METHODS[run.method].name == run.method
            assert run.regime in REGIMES


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
    runs.append_record(path, {**record_of(RUN), "run": {**RUN.__dict__, "method": "forgotten"}})
    assert runs.read_records(path) == {}


def test_the_command_lists_what_is_left_and_refuses_what_it_does_not_know(tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    done = plan.tuning(["digits"])[0]
    runs.append_record(path, record_of(done))
    assert command.main(["tuning", "--tasks=digits", "--list", f"--records={path}"]) == 0
    listed = capsys.readouterr().out.split()
    assert done.name not in listed
    assert len(listed) == len(plan.tuning(["digits"])) - 1
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


# ---------------------------------------------------------------------- page


def test_the_page_of_no_records_holds_no_figure(tmp_path):
    report.write({}, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert report.NOT_MEASURED in page
    assert "| holds |" not in page
    assert not (tmp_path / report.PLOT).exists()


def test_the_page_says_what_the_records_hold(tmp_path):
    records = tuned_records()
    for run in plan.main_comparison(records, ["digits"]):
        gain = {"opd": 0.0, "matched-0.8": 0.05 + 0.002 * run.seed, "opd-compute": 0.02}.get(run.method, -0.3)
        records[run.name] = record_of(run, 0.6 + gain)
    wrong_rate = Run("digits", "base", "opd", 2e-3, 0, "test")
    records[wrong_rate.name] = record_of(wrong_rate, 0.0)  # not at the chosen rate: left out
    report.write(records, tmp_path)
    page = (tmp_path / "study.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    claim = lines["steering beats OPD: matched, γ 0.8, digits"]
    assert "+5.7 [" in claim
    assert "8 of 8 up" in claim
    assert "| holds |" in claim
    assert "not measured" in lines["steering beats OPD: matched, γ 0.8, shapes"]
    assert "does not hold" in lines["the language gradient outweighs the other: matched, γ 0.8, digits"]
    assert "norm ratio 0.50" in lines["the language gradient outweighs the other: matched, γ 0.8, digits"]
    assert "60.0 ± 0.0" in lines["OPD"]
    assert "0 of 8 runs" in page
    assert "<svg" in (tmp_path / report.PLOT).read_text()
    again = tmp_path / "again"
    report.write(records, again)
    assert (again / report.PLOT).read_bytes() == (tmp_path / report.PLOT).read_bytes()


def test_the_page_judges_the_monitor_by_the_histories(tmp_path):
    records = tuned_records()
    runaway = [0.2] * 100 + [0.2 * 1.1**step for step in range(50)]
    begin = runaway_start(runaway)
    cases = [(runaway, begin + 20, 0.0), (runaway, begin + 21, 0.0), (runaway, None, 1.0), ([0.2] * 150, None, 1.0)]
    for seed, (full, alarm, well_formed) in enumerate(cases):
        run = Run("digits", "base", "vgs-unit-0.9-warn", 1e-3, seed, "test")
        series = {"standard": full, "cosine": [0.0] * 150}
        records[run.name] = record_of(run, alarm_step=alarm, well_formed=well_formed, series=series)
    for task, alarm in (("shapes", 7), ("digits", None)):
        healthy = Run(task, "base", "matched-0.8", 1e-3, 0, "test")
        records[healthy.name] = record_of(healthy, alarm_step=alarm)
    page = report.build(records, None)
    assert "in 1 of 2 runs that collapsed, and in 1 of 3 that ran away" in page
    assert "an alarm in 1 of 2 healthy runs" in page


def test_the_monitor_as_it_is_meets_every_provoked_collapse_and_no_healthy_run_on_record():
    """Replayed on what the lines hold: three digits of every step, the weight ratio one step late, as in training."""
    collapses = healthy = 0
    for record in runs.read_records(runs.RECORDS).values():
        run, series = Run(**record["run"]), record["series"]
        provoked = run.method in plan.PROVOKED and report.collapsed(record)
        if not provoked and METHODS[run.method].method != "matched":
            continue
        monitor = RunawayMonitor("warn")
        ratios = [math.nan, *series["weight_ratio"]]
        # Unlearning is told by lang and vis, and lines of `vgs_unit` hold no vis: its collapses are to be met without.
        told = {name for name in ("standard", "lang", "vis") if name in series}
        told = {"standard"} if "vis_less_log_z" in series else told
        losses = [{f"loss/{name}": series[name][step] for name in told} for step in range(len(series["standard"]))]
        for step, readings in enumerate(zip(losses, ratios, series["clipped"], strict=False), 1):
            monitor.observe(step, *readings)
        if provoked:
            collapses += 1
            assert monitor.alarm_step is not None, run.name
            assert monitor.alarm_step <= runaway_start(series["standard"]) + report.IN_TIME, run.name
        else:
            healthy += 1
            assert monitor.alarm_step is None, run.name
    assert collapses >= 10
    assert healthy >= 20


def test_gammas_are_compared_over_the_seeds_that_all_have():
    records = tuned_records()
    for run in [*plan.main_comparison(records, TASKS), *plan.safety(records, TASKS)]:
        records[run.name] = record_of(run, 0.5 if run.seed < 4 else 0.9)
    page = report.build(records, None)
    assert "Accuracy over the 4 seeds that every γ has" in page
    assert "| 0.8 | 50.0 ± 0.0 | +0.0 [+0.0, +0.0] | 50.0 ± 0.0 | +0.0 [+0.0, +0.0] |" in page


def test_the_page_in_docs_is_that_of_the_records():
    records = runs.read_records(runs.RECORDS)
    assert (DOCS / "study.md").read_text() == report.build(records, report.PLOT)


# ---------------------------------------------------------------------- a real run


@pytest.fixture
def tiny_study(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(plan, "demo_recipe", lambda task: small_recipe(demo_recipe(task)))
    monkeypatch.setenv("VGS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["start", "opd", "matched-0.8"])
def test_a_run_gives_a_line_that_reads_back(tiny_study, tmp_path, method):
    run = replace(RUN, method=method, split="validation")
    record = runs.run_job(run, lambda message: None)
    path = tmp_path / "study.jsonl"
    runs.append_record(path, record)
    assert runs.read_records(path)[run.name] == json.loads(json.dumps(record))
    assert 0 <= record["accuracy"] <= 1
    steps = 0 if method == "start" else 2
    assert all(len(series) == steps for series in record["series"].values())
    assert ("cosine" in record["series"]) == METHODS[method].steered
    if method == "matched-0.8":
        assert report.norm_ratio(record) > 0
        assert math.isfinite(report.mean_cosine(record))
