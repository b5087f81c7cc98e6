"""The gradients of parts, the averaged Gramian, lambda, choices by dependency, and amortized steering in a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import DistillationConfig
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.resilience.checkpoints import STATE_FILE
from vgs_distill.steering.averages import GramianAverage
from vgs_distill.steering.dependency import graded, most_dependent
from vgs_distill.steering.gradients import PartGradients, direction_cosine, no_gradient
from vgs_distill.steering.preservation import AdaptivePreservation
from vgs_distill.steering.step import SteeringSettings, SteeringStep, ViewLoss

from tests.engine.test_trainer import step_logs
from vgs_kernels import UnitGradients, VisualGradientSteering

CPU = torch.device("cpu")


def gramian(first: float, second: float, cosine: float = 0.0) -> Tensor:
    cross = cosine * (first * second) ** 0.5
    return torch.tensor([[first, cross], [cross, second]])


# ---------------------------------------------------------------------- gradients of parts


@pytest.mark.parametrize("preservation", [0.0, 0.3])
@pytest.mark.parametrize("policy", [UnitGradients(0.6), VisualGradientSteering(1.7)], ids=["unit", "vgs"])
def test_accumulated_gradients_of_three_parts_are_combined(policy: Any, preservation: float) -> None:
    torch.manual_seed(0)
    layer, only_third = nn.Linear(5, 3), nn.Linear(5, 1, bias=False)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    parameters = [*layer.parameters(), *only_third.parameters()]
    parts = PartGradients([*parameters, *frozen.parameters()], 3)
    totals = [[torch.zeros_like(p) for p in parameters] for _ in range(3)]
    for _ in range(3):
        x = torch.randn(4, 5)
        out = layer(x)
        losses = (out.square().sum(), out.sum(), (out * only_third(x)).sum())
        for total, loss in zip(totals, losses, strict=True):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for sum_, g in zip(total, found, strict=True):
                sum_ += 0 if g is None else g
        for part, loss in enumerate(losses):
            parts.into(part)
            loss.backward(retain_graph=part < 2)
        parts.end_micro_batch()
        assert all(p.grad is None for p in parameters)
    record = parts.combine(policy, replicated=False, preservation=preservation)
    assert record is not None
    a, b, c = (torch.cat([p.flatten() for p in total]) for total in totals)
    if isinstance(policy, UnitGradients):
        first, second = 0.4 / a.norm(), 0.6 / b.norm()
    else:
        first = a.norm() / (a + 1.7 * b).norm()
        second = 1.7 * first
    torch.testing.assert_close(record.norms(), torch.stack([a.norm(), b.norm()]))
    torch.testing.assert_close(record.cosine(), torch.cosine_similarity(a, b, 0))
    applied = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    torch.testing.assert_close(applied, first * a + second * b + first * preservation * c)
    assert frozen.weight.grad is None


def test_parts_without_any_gradient_leave_none() -> None:
    layer = nn.Linear(2, 2)
    parts = PartGradients(layer.parameters(), 2)
    for part in range(2):
        parts.into(part)
        no_gradient(CPU).backward()
    parts.end_micro_batch()
    assert parts.combine(UnitGradients(), replicated=False) is None
    assert layer.weight.grad is None


def test_direction_cosine_is_that_of_the_combined_gradients() -> None:
    torch.manual_seed(1)
    lang, vis = torch.randn(2, 50).unbind()
    stacked = torch.stack([lang, vis])
    first, second = torch.tensor([0.2, 0.9]), torch.tensor([1.3, 0.4])
    expected = torch.cosine_similarity(first @ stacked, second @ stacked, 0)
    torch.testing.assert_close(direction_cosine(stacked @ stacked.T, first, second), expected)


# ---------------------------------------------------------------------- averages, choices, lambda


def test_norms_are_averaged_by_their_logarithms_and_the_cosine_as_it_is() -> None:
    average = GramianAverage(4, CPU)
    assert not average.known
    average.refresh(gramian(8.0, 18.0, 0.5))
    torch.testing.assert_close(average.gramian(), gramian(8.0, 18.0, 0.5))
    average.refresh(gramian(16.0, 9.0, -0.5))
    new = 1.0 / 1.8  # an entry weighs 0.8 of the next one
    expected = gramian(8.0 * 2**new, 18.0 * 2**-new, 0.5 * (1 - new) - 0.5 * new)
    torch.testing.assert_close(average.gramian(), expected)


def test_a_refresh_is_due_on_schedule() -> None:
    average, due = GramianAverage(3, CPU), []
    for _ in range(7):
        due.append(average.refresh_due)
        if average.refresh_due:
            average.refresh(gramian(1.0, 1.0))
        else:
            average.skip()
    assert due == [True, False, False, True, False, False, True]


def test_a_gradient_that_no_refresh_has_met_counts_as_zero_and_leaves_no_trace() -> None:
    average = GramianAverage(3, CPU)
    average.refresh(gramian(4.0, 0.0))
    torch.testing.assert_close(average.gramian(), gramian(4.0, 0.0))
    average.refresh(gramian(float("inf"), 2.0))
    average.refresh(gramian(4.0, 2.0, 0.25))
    torch.testing.assert_close(average.gramian(), gramian(4.0, 2.0, 0.25))


def test_the_average_survives_json_to_the_bit_and_stays_on_its_device() -> None:
    first, second = GramianAverage(5, CPU), GramianAverage(5, CPU)
    first.refresh(gramian(0.3, 0.7, -0.2))
    first.skip()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(second.gramian(), first.gramian())
    assert second.state_dict() == first.state_dict()
    meta = GramianAverage(5, torch.device("meta"))
    meta.refresh(gramian(1.0, 1.0).to("meta"))
    assert meta.gramian().device.type == "meta"


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 10, 101])
@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.7, 1.0])
def test_as_many_tokens_are_chosen_as_the_quantile_says(tokens: int, quantile: float) -> None:
    scores = torch.randn(tokens, generator=torch.Generator().manual_seed(tokens))
    chosen = most_dependent(scores, quantile)
    assert len(chosen) == round((1 - quantile) * tokens)
    rest = torch.ones(tokens, dtype=torch.bool).index_fill(0, chosen, False)
    if len(chosen) and rest.any():
        assert scores[chosen].min() >= scores[rest].max()


def test_gamma_is_graded_at_the_40th_percentile_and_at_the_quantile() -> None:
    scores = torch.tensor([0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    expected = torch.where(scores >= 7, 1.0, torch.where(scores >= 4, 0.5, 0.0))
    assert torch.equal(graded(scores, 0.7), expected)
    assert graded(torch.ones(10), 0.7).sum() == 3 + 0.5 * 3, "counts stay where all scores are equal"


def weights_of(levels: list[float]) -> list[float]:
    preservation, found = AdaptivePreservation(), []
    for level in levels:
        preservation.observe(level)
        found.append(preservation.weight)
    return found


def test_lambda_rises_while_the_language_loss_is_above_its_start_and_falls_back() -> None:
    found = weights_of([0.2] * 10 + [0.6] * 20 + [0.05] * 60)
    assert found[:10] == [0.01] * 10, "the first ten steps say what the start is"
    assert found[10:30] == pytest.approx([0.01 * 1.2**step for step in range(1, 21)])
    peak = max(found)
    after = found.index(peak)
    assert found[after:] == sorted(found[after:], reverse=True)
    assert found[-1] == 0.01


def test_lambda_stays_between_the_papers_and_ten() -> None:
    assert weights_of([0.2] * 10 + [50.0] * 200)[-1] == 10.0
    assert set(weights_of([1.0 - step / 1000 for step in range(200)])) == {0.01}


def test_lambda_survives_json_to_the_bit() -> None:
    levels = [0.2 + (step * 37 % 11) / 50 for step in range(60)]
    for cut in (0, 4, 10, 37):
        first, second = AdaptivePreservation(), AdaptivePreservation()
        for level in levels[:cut]:
            first.observe(level)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for level in levels[cut:]:
            second.observe(level)
        assert second.weight == weights_of(levels)[-1]


# ---------------------------------------------------------------------- runs


def test_deepspeed_is_refused_with_the_remedy_and_taken_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure(**settings: Any) -> VGSConfig:
        # DeepSpeed itself is not installed here: only the checks of the config are at stake.
        monkeypatch.setattr(DistillationConfig, "__post_init__", lambda self: None)
        return VGSConfig(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}}, **settings)

    for settings in ({}, {"eta": "measured"}, {"eta": 0.41}, {"method": "matched"}):
        with pytest.raises(ValueError, match=r"steps inside backward.* a number for eta and language_preservation=0"):
            configure(**settings)
    assert configure(eta=0.41, language_preservation=0.0).eta == 0.41
    assert configure(method="opd").deepspeed is not None


@pytest.mark.parametrize("method", ["vgs", "vgs_unit"])
def test_amortized_steering_refreshes_and_keeps_the_direction(
    make_trainer: Callable[..., VGSTrainer], method: str
) -> None:
    trainer = make_trainer(method=method, eta="amortized", refresh_every=3, max_steps=7)
    trainer.train()
    rows = step_logs(trainer)
    assert [row.get("steering/refreshed") for row in rows] == [1.0, None, None, 1.0, None, None, 1.0]
    for row in rows:
        assert ("gradient/cosine" in row) == ("steering/refreshed" in row)
        assert ("steering/eta" in row) == (method == "vgs")
        assert row["steering/weight_ratio"] > 0
    assert [row["steering/direction_cosine"] > 0.95 for row in (rows[3], rows[6])] == [True, True]
    if method == "vgs":
        etas = [row["steering/eta"] for row in rows]
        assert [etas[1], etas[4]] == [etas[2], etas[5]], "a constant between two refreshes"
        assert etas[0] == pytest.approx(etas[1], rel=1e-4)


def test_amortized_with_a_refresh_every_step_is_measured(make_trainer: Callable[..., VGSTrainer]) -> None:
    parameters = []
    for settings in ({"eta": "measured"}, {"eta": "amortized", "refresh_every": 1}):
        trainer = make_trainer(max_steps=3, **settings)
        trainer.train()
        parameters.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(itertools.starmap(torch.equal, zip(*parameters, strict=True)))


def test_a_resumed_amortized_run_ends_with_the_same_parameters(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path
) -> None:
    settings = {"eta": "amortized", "refresh_every": 4, "max_steps": 6, "language_preservation": "adaptive"}
    straight = make_trainer(**settings)
    straight.train()
    stopped = make_trainer(**settings, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "stopped"))
    stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert (checkpoint / STATE_FILE).exists()
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(itertools.starmap(torch.equal, pairs))


def test_a_step_is_planned_on_the_device_of_the_run(tmp_path: Path) -> None:
    """The meta device stands for a GPU: before the first step, too, nothing may lie elsewhere."""
    config = VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, eta=0.41)
    meta = torch.device("meta")
    layer = nn.Linear(3, 2, device=meta)
    step = SteeringStep(config.select(SteeringSettings), meta)
    step.plan(layer, step=0, total_steps=1)
    assert step.weights is not None
    assert step.weights.device == meta
    loss = layer(torch.empty(4, 3, device=meta)).square().sum()
    with step.micro_batch():
        left = step.run_back(ViewLoss({0: step.weights[0] * loss}, last=True), lambda loss, keep: loss.backward())
        assert left is not None
        left.backward()
    assert layer.weight.grad is not None
    assert step.finish().finite
