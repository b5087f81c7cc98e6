"""A loss or a gradient that is not finite: no update, a message with step and rows, and an end to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from vgs_distill import VGSTrainer
from vgs_distill.errors import TrainingStopped

METHODS = [
    {"eta": "measured"},
    {"eta": "amortized", "refresh_every": 2},
    {"eta": 0.4},
    {"method": "matched"},
    {"method": "opd"},
]


@pytest.fixture
def broken_teacher(make_model: Callable[..., Any]) -> Any:
    teacher = make_model(2, width=48).eval()
    with torch.no_grad():
        teacher.lm_head.weight[3, 0] = math.nan
    return teacher


class Parameters(TrainerCallback):
    """The parameters before the first step and after every one."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters()})

    on_step_end = on_train_begin

    def moved(self, step: int) -> bool:
        return any(not torch.equal(p, self.after[step - 1][n]) for n, p in self.after[step].items())


def break_gradient(trainer: VGSTrainer, steps: range) -> None:
    """One entry of one gradient is infinite in these steps, as where a backward pass overflows."""

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step + 1 not in steps:
            return gradient
        return gradient.index_fill(0, torch.tensor([0]), math.inf)

    trainer.model.model.language_model.norm.weight.register_hook(overflow)


@pytest.mark.parametrize("settings", METHODS)
def test_a_loss_that_is_not_finite_skips_the_update(
    make_trainer: Callable[..., VGSTrainer],
    broken_teacher: Any,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
) -> None:
    trainer = make_trainer(teacher=broken_teacher, max_steps=1, weight_decay=0.1, **settings)
    parameters = Parameters()
    trainer.add_callback(parameters)
    trainer.train()
    assert not parameters.moved(1)
    assert "step 1" in caplog.text
    assert "row 0 ('" in caplog.text
    assert "completion position" in caplog.text


@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_a_teacher_that_bans_a_token_needs_smoothing(
    make_trainer: Callable[..., VGSTrainer], make_model: Callable[..., Any], smoothing: float
) -> None:
    teacher = make_model(2, width=48).eval()
    bias = torch.zeros(teacher.lm_head.weight.size(0))
    bias[3] = -math.inf
    teacher.lm_head.bias = torch.nn.Parameter(bias)
    trainer = make_trainer(teacher=teacher, max_steps=1, teacher_smoothing=smoothing)
    parameters = Parameters()
    trainer.add_callback(parameters)
    trainer.train()
    assert parameters.moved(1) == bool(smoothing)


@pytest.mark.parametrize("settings", METHODS)
def test_a_gradient_that_is_not_finite_skips_the_update(
    make_trainer: Callable[..., VGSTrainer], caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(max_steps=5, max_skipped_steps=3, gradient_accumulation_steps=2, **settings)
    break_gradient(trainer, range(2, 4))
    parameters = Parameters()
    trainer.add_callback(parameters)
    trainer.train()
    assert [parameters.moved(step) for step in range(1, 6)] == [True, False, False, True, True]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert caplog.text.count("the gradient is not finite, of") == 2
    assert "step 3: " in caplog.text
    assert "micro-batch 1: row 0 ('" in caplog.text


def test_training_stops_after_so_many_skipped_updates_in_a_row(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Any
) -> None:
    trainer = make_trainer(max_steps=9, max_skipped_steps=3, save_strategy="steps", save_steps=2)
    break_gradient(trainer, range(3, 10))
    with pytest.raises(TrainingStopped, match=r"stopped at step 5: 3 updates in a row .* row 0 \(.*resume from the"):
        trainer.train()
    resumed = make_trainer(max_steps=9, max_skipped_steps=3)
    break_gradient(resumed, range(3, 10))
    with pytest.raises(TrainingStopped, match="stopped at step 5: 3 updates in a row"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))  # one skipped then
