"""The gradient pair, the Gramian predictor, and amortized steering in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import DistillationConfig
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.resilience.checkpoints import STATE_FILE
from vgs_distill.steering.gradient_pair import GradientPair, direction_cosine, no_gradient, weight_ratio
from vgs_distill.steering.predictor import GramianPredictor, RunningAverage, hedged
from vgs_distill.steering.step import LossParts, SteeringSettings, SteeringStep

from tests.engine.test_trainer import step_logs
from vgs_kernels import UnitGradients

CPU = torch.device("cpu")


def gramian(lang: float, vis: float, cosine: float = 0.0) -> torch.Tensor:
    cross = cosine * (lang * vis) ** 0.5
    return torch.tensor([[lang, cross], [cross, vis]])


def test_the_pair_combines_accumulated_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    pair = GradientPair([*layer.parameters(), *frozen.parameters()])
    lang_total, vis_total = (
        [torch.zeros_like(p) for p in layer.parameters()],
        [torch.zeros_like(p) for p in layer.parameters()],
    )
    for _ in range(3):
        x = torch.randn(4, 5)
        lang, vis = layer(x).square().sum(), layer(x).sum()
        for total, loss in ((lang_total, lang), (vis_total, vis)):
            for sum_, g in zip(
                total, torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True), strict=True
            ):
                sum_ += g
        pair.accumulate_lang()
        lang.backward()
        pair.accumulate_vis()
        vis.backward()
        pair.end_micro_batch()
        assert all(p.grad is None for p in layer.parameters())
    record = pair.combine(UnitGradients(0.6), replicated=False)
    assert record is not None

    def norm(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([p.flatten() for p in parts]).norm()

    for p, a, b in zip(layer.parameters(), lang_total, vis_total, strict=True):
        torch.testing.assert_close(p.grad, 0.4 * a / norm(lang_total) + 0.6 * b / norm(vis_total))
    assert frozen.weight.grad is None


def test_a_pair_without_any_gradient_leaves_none() -> None:
    layer = nn.Linear(2, 2)
    pair = GradientPair(layer.parameters())
    pair.accumulate_lang()
    no_gradient(CPU).backward()
    pair.accumulate_vis()
    no_gradient(CPU).backward()
    pair.end_micro_batch()
    assert pair.combine(UnitGradients(), replicated=False) is None
    assert layer.weight.grad is None


def pair(lang: float, vis: float) -> torch.Tensor:
    return torch.tensor([lang, vis])


def test_the_predictor_scales_the_proxy() -> None:
    predictor = GramianPredictor(refresh_every=4, drift=3.0, device=CPU)
    assert predictor.refresh_due()
    predictor.refresh(gramian(8.0, 18.0, 0.5), pair(2.0, 2.0))
    torch.testing.assert_close(predictor.predict(), gramian(8.0, 18.0, 0.5))
    torch.testing.assert_close(predictor.predict(pair(1.0, 4.0)), gramian(4.0, 36.0, 0.5))
    # A second refresh is averaged in, in logarithms, and so are the proxies that go before a step.
    new = 1.0 / (1.0 + RunningAverage.DECAY)
    predictor.refresh(gramian(16.0, 9.0, -0.5), pair(2.0, 2.0))
    cosine = 0.5 * (1 - new) - 0.5 * new
    torch.testing.assert_close(predictor.predict(pair(1.0, 1.0)), gramian(4 * 2**new, 9 * 2**-new, cosine))
    predictor.observe(pair(4.0, 2.0))
    share = 1.0 / (1.0 + RunningAverage.DECAY + RunningAverage.DECAY**2)
    torch.testing.assert_close(predictor.predict()[0, 0], predictor.predict(pair(2.0 * 2**share, 2.0))[0, 0])


def test_a_refresh_is_due_on_schedule_and_on_drift() -> None:
    predictor = GramianPredictor(refresh_every=3, drift=2.0, device=CPU)
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0))
    due = []
    for _ in range(3):
        due.append(predictor.refresh_due())
        predictor.observe(pair(1.0, 1.0))
    assert due == [False, False, True]
    predictor = GramianPredictor(refresh_every=100, drift=2.0, device=CPU)
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0))
    predictor.observe(pair(1.0, 4.0 * 1.5))  # one step beyond; the average of steps is not
    assert not predictor.refresh_due()
    for _ in range(20):
        predictor.observe(pair(1.0, 3.9))  # norms apart by less than 2
    assert not predictor.refresh_due()
    for _ in range(20):
        predictor.observe(pair(1.0, 4.2))
    assert predictor.refresh_due()


def test_a_component_that_appears_is_measured_at_once() -> None:
    predictor = GramianPredictor(refresh_every=100, drift=2.0, device=CPU)
    predictor.refresh(gramian(1.0, 0.0), pair(1.0, 0.0))
    assert torch.equal(predictor.predict(), gramian(1.0, 0.0))
    predictor.observe(pair(1.0, 0.0))
    assert not predictor.refresh_due()
    predictor.observe(pair(1.0, 0.5))
    assert predictor.refresh_due()
    predictor.refresh(gramian(1.0, 2.0), pair(1.0, 0.5))
    torch.testing.assert_close(predictor.predict(pair(1.0, 0.25)), gramian(1.0, 1.0))
    predictor.observe(pair(1.0, 0.0))  # one step without it asks for nothing
    assert not predictor.refresh_due()


def test_without_measuring_the_proxy_stands_for_the_gramian() -> None:
    predictor = GramianPredictor(refresh_every=0, drift=2.0, device=CPU)
    torch.testing.assert_close(predictor.predict(), torch.eye(2))
    torch.testing.assert_close(predictor.predict(pair(3.0, 5.0)), gramian(3.0, 5.0))
    predictor.observe(pair(4.0, 100.0))
    assert not predictor.refresh_due()
    torch.testing.assert_close(predictor.predict(), gramian(4.0, 100.0))


def test_deepspeed_is_refused_with_the_remedy_and_taken_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure(**settings: Any) -> VGSConfig:
        # DeepSpeed itself is not installed here: only the checks of the config are at stake.
        monkeypatch.setattr(DistillationConfig, "__post_init__", lambda self: None)
        return VGSConfig(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}}, **settings)

    for settings in ({"steering": "exact"}, {"steering": "amortized"}):
        with pytest.raises(ValueError, match=r"steps inside backward; .* refresh_every=0"):
            configure(**settings)
    assert configure(steering="amortized", refresh_every=0).refresh_every == 0
    assert configure(steering="none").deepspeed is not None


def test_a_run_that_never_measures_trains(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(steering="amortized", refresh_every=0, max_steps=3)
    trainer.train()
    rows = step_logs(trainer)
    assert all("steering/refreshed" not in row for row in rows)
    assert all(row["steering/weight_ratio"] > 0 for row in rows)


def test_the_state_survives_json() -> None:
    predictor = GramianPredictor(refresh_every=5, drift=2.0, device=CPU)
    predictor.refresh(gramian(0.3, 0.7, -0.2), pair(0.11, 0.13))
    predictor.observe(pair(0.17, 0.19))
    copy = GramianPredictor(refresh_every=5, drift=2.0, device=CPU)
    copy.load_state_dict(json.loads(json.dumps(predictor.state_dict())))
    assert torch.equal(copy.predict(), predictor.predict())
    assert copy.state_dict() == predictor.state_dict()


def test_direction_cosine_is_that_of_the_combined_gradients() -> None:
    torch.manual_seed(1)
    lang, vis = torch.randn(2, 50).unbind()
    stacked = torch.stack([lang, vis])
    first, second = torch.tensor([0.2, 0.9]), torch.tensor([1.3, 0.4])
    expected = torch.cosine_similarity(first @ stacked, second @ stacked, 0)
    torch.testing.assert_close(direction_cosine(stacked @ stacked.T, first, second), expected)


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.8, 0.95])
def test_an_error_of_two_deviations_costs_a_hedged_update_the_same_both_ways(gamma: float) -> None:
    policy, spread = UnitGradients(gamma), torch.tensor(0.35, dtype=torch.float64)
    predicted = gramian(3.0, 0.02).double()

    def cosines(weights: torch.Tensor) -> torch.Tensor:
        errors = torch.tensor([-2.0, 2.0]) * spread
        actual = [gramian(3.0, 0.02 * math.exp(2 * error)).double() for error in errors]
        return torch.stack([direction_cosine(truth, policy(truth), weights) for truth in actual])

    plain, weights = policy(predicted), hedged(policy, predicted, spread)
    torch.testing.assert_close(*cosines(weights))
    assert cosines(weights).min() >= cosines(plain).min() - 1e-12
    assert (weight_ratio(weights) / weight_ratio(plain)).log() * (gamma - 0.5) >= -1e-12
    lengths = (torch.stack([plain, weights]) * predicted.diagonal().sqrt()).norm(dim=1)
    torch.testing.assert_close(*lengths)
    torch.testing.assert_close(hedged(policy, predicted, 0 * spread), plain)


@pytest.mark.parametrize("scale", ["unit", "preserve"])
def test_a_hedge_keeps_the_bounds_of_the_policy(scale: str) -> None:
    policy, spread = UnitGradients(0.8, max_weight_ratio=5.0, scale=scale), torch.tensor(0.35)
    torch.testing.assert_close(weight_ratio(hedged(policy, gramian(4.0, 0.1), spread)), torch.tensor(5.0))
    for lang, vis in ((0.0, 2.0), (2.0, 0.0), (0.0, 0.0), (float("inf"), 1.0), (1.0, float("nan"))):
        one_missing = torch.diag(torch.tensor([lang, vis]))
        torch.testing.assert_close(hedged(policy, one_missing, spread), policy(one_missing))


def test_the_hedge_grows_with_the_errors_of_predictions() -> None:
    predictor, policy = GramianPredictor(refresh_every=4, drift=3.0, device=CPU), UnitGradients(0.8)
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0))
    torch.testing.assert_close(predictor.weights(policy), policy(predictor.predict()))
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0), gramian(2.0, 2.0))  # the ratio was right
    torch.testing.assert_close(predictor.weights(policy), policy(predictor.predict()))
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0), gramian(1.0, 0.0))  # of a component not met yet: no error
    torch.testing.assert_close(predictor.weights(policy), policy(predictor.predict()))
    predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0), gramian(1.0, 4.0))  # twice the norm
    spread = torch.tensor(math.log(2.0) / (1.0 + RunningAverage.DECAY) ** 0.5)
    torch.testing.assert_close(predictor.weights(policy), hedged(policy, predictor.predict(), spread))
    assert weight_ratio(predictor.weights(policy)) > 1.1 * weight_ratio(policy(predictor.predict()))
    weights = []
    for error in (math.e, 3e18):  # the second counts as the first
        predictor = GramianPredictor(refresh_every=4, drift=3.0, device=CPU)
        predictor.refresh(gramian(1.0, 1.0), pair(1.0, 1.0), gramian(1.0, error**2))
        weights.append(predictor.weights(policy))
    torch.testing.assert_close(*weights)


def test_amortized_steering_refreshes_and_follows_the_exact_direction(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(steering="amortized", refresh_every=3, refresh_drift=100.0, max_steps=7)
    trainer.train()
    rows = step_logs(trainer)
    assert [row.get("steering/refreshed") for row in rows] == [1.0, None, None, 1.0, None, None, 1.0]
    for row in rows:
        assert ("gradient/cosine" in row) == ("steering/refreshed" in row)
        assert row["steering/weight_ratio"] > 0
    for row in (rows[3], rows[6]):
        assert row["steering/direction_cosine"] > 0.95
        assert row["steering/predicted_weight_ratio"] == pytest.approx(row["steering/weight_ratio"], rel=0.5)


def test_amortized_with_a_refresh_every_step_is_exact(make_trainer: Callable[..., VGSTrainer]) -> None:
    parameters = []
    for settings in ({"steering": "exact"}, {"steering": "amortized", "refresh_every": 1}):
        trainer = make_trainer(max_steps=3, **settings)
        trainer.train()
        parameters.append([p.detach().clone() for p in trainer.model.parameters()])
    for a, b in zip(*parameters, strict=True):
        assert torch.equal(a, b)


def test_a_resumed_amortized_run_ends_with_the_same_parameters(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path
) -> None:
    settings = {"steering": "amortized", "refresh_every": 4, "max_steps": 6}
    straight = make_trainer(**settings)
    straight.train()
    stopped = make_trainer(**settings, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "stopped"))
    stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert (checkpoint / STATE_FILE).exists()
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_is_planned_on_the_device_of_the_run(tmp_path: Path) -> None:
    """The meta device stands for a GPU: before the first step, too, nothing may lie elsewhere."""
    config = VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, steering="amortized", refresh_every=0)
    meta = torch.device("meta")
    layer = nn.Linear(3, 2, device=meta)
    step = SteeringStep(config.select(SteeringSettings), meta)
    step.plan(layer, step=0, total_steps=1, micro_batches=2)
    lang, vis = layer(torch.empty(4, 3, device=meta)).square().sum(0)
    with step.micro_batch():
        objective = step.run_back(LossParts(lang, vis, torch.ones(4, device=meta), None), backward=Tensor.backward)
        assert objective.device == meta
        objective.backward()
    assert layer.weight.grad is not None
