"""The monitor of runaways: on series, on runs that collapse, and what it leaves in checkpoints."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.errors import TrainingStopped
from vgs_distill.resilience.checkpoints import read_state
from vgs_distill.resilience.runaway import RunawayMonitor, runaway_start
from vgs_distill.steering.step import Bounds

RUNAWAY: dict[str, Any] = {
    "method": "teacher_prior",
    "gamma": 0.95,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
}


def watch(divergences: Sequence[float], ratios: Sequence[float], cut_off: Sequence[float] | None = None) -> int | None:
    """The step of the alarm over a whole history."""
    monitor = RunawayMonitor("warn")
    for step, (divergence, ratio) in enumerate(zip(divergences, ratios, strict=True), 1):
        monitor.observe(step, {"loss/standard": divergence}, ratio, 0.0 if cut_off is None else cut_off[step - 1])
    return monitor.alarm_step


def series(levels: Sequence[float], spread: float, seed: int = 0) -> list[float]:
    """The levels with noise whose logarithm has this standard deviation."""
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0.0, spread)) for level in levels]


def learning(steps: int) -> list[float]:
    """A cold start: the divergence rises by half for twenty steps, then falls to a fiftieth."""
    return [1.2 * (1.5 if step < 20 else 1.5 * math.exp(-step / 60)) for step in range(steps)]


def running_away(before: int, steps: int) -> list[float]:
    """`before` steps that learn, then growth by 8 percent a step up to eight times."""
    fine = learning(before)
    return fine + [fine[-1] * min(8.0, 1.08**step) for step in range(steps - before)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5])
def test_a_run_that_learns_raises_no_alarm(spread: float, seed: int) -> None:
    divergences = series(learning(400), spread, seed)
    assert watch(divergences, series([4.0] * 400, 1.0, seed + 100)) is None


def test_noise_alone_raises_no_alarm() -> None:
    assert watch(series([0.3] * 2000, 0.8), series([4.0] * 2000, 1.0, 1)) is None


@pytest.mark.parametrize("before", [1, 30, 150])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.15])
def test_the_alarm_comes_within_20_steps_of_the_start(before: int, spread: float) -> None:
    divergences = series(running_away(before, before + 80), spread, before)
    ratios = [4.0] * before + [4.0 * min(10.0, 1.1**step) for step in range(80)]
    start = runaway_start(divergences)
    assert start is not None
    assert before < start
    alarm = watch(divergences, ratios)
    assert alarm is not None
    assert before < alarm <= start + 20


def test_a_doubled_divergence_needs_a_second_sign() -> None:
    divergences = [1.0] * 30 + [2.5] * 30
    steady = [4.0] * 60
    assert watch(divergences, steady) is None
    assert watch(divergences, [4.0] * 30 + [9.0] * 30) == 33  # the third of five steps moves the median
    assert watch(divergences, steady, [0.05] * 30 + [0.2] * 30) == 33
    assert watch([1.0] * 30 + [4.5] * 30, steady) == 33
    assert watch([1.0] * 30 + [1.7] * 30, steady, [0.05] * 30 + [0.2] * 30) is None
    assert watch([1.0] * 30 + [1.7] * 30, steady, [0.05] * 30 + [0.3] * 30) == 33
    assert watch([1.0] * 30 + [1.4] * 30, steady, [0.05] * 30 + [0.9] * 30) is None
    assert watch([1.0] * 60, [4.0] * 30 + [400.0] * 30) is None


def unlearning(lang: Sequence[float], vis: Sequence[float]) -> int | None:
    """The step of the alarm while the divergence itself stays where it is."""
    monitor = RunawayMonitor("fallback")
    for step, (language, vision) in enumerate(zip(lang, vis, strict=True), 1):
        monitor.observe(step, {"loss/standard": 1.0, "loss/lang": language, "loss/vis": vision}, 2.0, 0.0)
    return monitor.alarm_step


def test_language_that_doubles_while_the_visual_loss_is_at_its_best_is_unlearned() -> None:
    falling = [2.0 * 0.98**step for step in range(90)]
    assert unlearning([0.2] * 30 + [0.5] * 60, falling) == 33  # the third of five steps moves the median
    assert unlearning([0.2] * 30 + [0.5] * 60, [1.0] * 30 + [2.0] * 60) is None, "both rise: no sign of its own"
    assert unlearning([0.2] * 30 + [0.3] * 60, falling) is None
    assert unlearning([2.0 * 0.9**step for step in range(90)], falling) is None
    noisy = series([0.2] * 400, 0.6)
    assert unlearning(noisy, [2.0 * 0.98**step for step in range(400)]) is None


def test_a_student_that_unlearns_is_held_to_its_language(
    make_trainer: Callable[..., VGSTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_steps=12)
    observe, shown = trainer._runaway.observe, []

    def with_another_history(step: int, losses: dict[str, float], *more: float) -> dict[str, float]:
        shown.append(losses)
        return observe(step, losses | {"loss/standard": 1.0, "loss/lang": 0.2 if step < 6 else 0.6}, *more)

    trainer._runaway.observe = with_another_history  # type: ignore[method-assign]
    trainer.train()
    alarm = trainer._runaway.alarm_step
    assert alarm == 8
    assert caplog.text.count("step 8: the student unlearns its language") == 1
    assert logged(trainer, "steering/language_preservation") == [0.01] * alarm + [1.0] * (12 - alarm)
    assert logged(trainer, "steering/gamma") == [2.0] * alarm + [0.5] * (12 - alarm)


def test_two_outliers_and_values_that_are_not_finite_change_nothing() -> None:
    divergences = [1.0] * 20 + [50.0, 60.0, math.inf, math.nan] + [1.0] * 20
    assert watch(divergences, [4.0] * 20 + [90.0, math.inf, math.nan, 90.0] + [4.0] * 20) is None


def test_close_to_the_teacher_a_doubling_is_no_alarm() -> None:
    assert watch([1.0] * 20 + [0.02] * 30 + [0.05] * 30, [4.0] * 50 + [10.0] * 30) is None
    assert watch([1e-7] * 20 + [1e-5] * 30, [4.0] * 20 + [10.0] * 30) is None


def test_the_definition_of_a_start() -> None:
    assert runaway_start([]) is None
    assert runaway_start(learning(400)) is None
    assert runaway_start([1.0] * 30 + [1.4] * 40) is None
    assert runaway_start([1.0] * 30 + [3.0] * 10 + [1.0] * 40) is None  # comes back
    assert runaway_start([1.0] * 30 + [1.8] * 35) is None  # has not lasted
    assert runaway_start([1.0] * 30 + [1.8] * 40) == 37
    assert runaway_start([1.0] * 30 + [3.0] * 40) == 33  # 3 of 10 steps at 3 make a mean of 1.6
    assert runaway_start([1.0] * 30 + [3.0] * 10) == 33  # the history ends in it


def test_the_state_survives_json_to_the_bit() -> None:
    divergences, ratios = series(running_away(40, 90), 0.3), series([4.0] * 90, 0.5, 1)
    losses = [{"loss/standard": d, "loss/lang": 2 * d, "loss/vis": 1 / d} for d in divergences]
    straight, first, second = (RunawayMonitor("fallback") for _ in range(3))
    resumed = []
    for step in range(90):
        if step == 35:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        monitor = first if step < 35 else second
        resumed.append(monitor.observe(step, losses[step], ratios[step], 0.1))
    assert resumed == [straight.observe(step, losses[step], ratios[step], 0.1) for step in range(90)]
    assert second.alarm_step == straight.alarm_step is not None
    assert second.bounded(Bounds(0.9, None, 0.01)) == (0.5, 1.0, 1.0)
    assert second.bounded(Bounds(0.3, 0.7, 2.0)) == (0.3, 0.7, 2.0)


def logged(trainer: VGSTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("eta", [{"eta": "measured"}, {"eta": "amortized", "refresh_every": 3}])
def test_a_run_that_collapses_falls_back(
    make_trainer: Callable[..., VGSTrainer], caplog: pytest.LogCaptureFixture, eta: dict[str, Any]
) -> None:
    trainer = make_trainer(**RUNAWAY, **eta)
    trainer.train()
    alarm = trainer._runaway.alarm_step
    assert alarm is not None
    assert caplog.text.count("the student runs away from its teacher") == 1
    assert f"step {alarm}: " in caplog.text
    # The step of the alarm was planned before it.
    assert logged(trainer, "steering/gamma") == [0.95] * alarm + [0.5] * (12 - alarm)
    assert max(logged(trainer, "steering/weight_ratio")[alarm:]) <= 1.0 + 1e-6
    assert logged(trainer, "runaway/alarm") == [0.0] * (alarm - 1) + [1.0] * (13 - alarm)


def test_a_run_that_collapses_is_only_warned_of(
    make_trainer: Callable[..., VGSTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(**RUNAWAY, runaway_action="warn")
    trainer.train()
    assert "the student runs away" in caplog.text
    assert set(logged(trainer, "steering/gamma")) == {0.95}


def test_nothing_watches_where_none_is_asked_for(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(**{**RUNAWAY, "max_steps": 1}, runaway_action="none")
    trainer.train()
    assert not logged(trainer, "runaway/divergence_growth")


def test_a_run_that_collapses_stops_and_is_kept(make_trainer: Callable[..., VGSTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(**RUNAWAY, runaway_action="stop")
    with pytest.raises(TrainingStopped, match=r"stopped at step \d+: the student ran away .*start again with a lower"):
        trainer.train()
    alarm = trainer._runaway.alarm_step
    assert trainer.state.global_step == alarm
    checkpoint = tmp_path / "run" / f"checkpoint-{alarm}"
    assert read_state(checkpoint)["state"]["runaway"]["alarm_step"] == alarm
    resumed = make_trainer(**{**RUNAWAY, "max_steps": alarm + 1}, runaway_action="fallback")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "steering/gamma")[-1] == 0.5


def test_a_resumed_run_reads_what_it_would_have(make_trainer: Callable[..., VGSTrainer], tmp_path: Path) -> None:
    names = ("runaway/divergence_growth", "runaway/weight_growth", "runaway/cut_off_rise", "steering/gamma")
    straight = make_trainer(**RUNAWAY, save_strategy="steps", save_steps=7)
    straight.train()
    resumed = make_trainer(**RUNAWAY)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    for name in names:
        assert logged(resumed, name) == logged(straight, name)
    parameters = dict(straight.model.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in resumed.model.named_parameters())


def test_healthy_small_runs_raise_none(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_steps=12)
    trainer.train()
    assert set(logged(trainer, "runaway/alarm")) == {0.0}


def test_an_unknown_action_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown runaway_action 'fall'; choose one of fallback, warn, stop, none"):
        VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, runaway_action="fall")
