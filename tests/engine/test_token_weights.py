"""Weights of tokens in the visual part of a step: what the trainer does with them. The weights themselves:
`tests/test_visual_weights.py`; the whole gradient against the textbook: `test_trainer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from vgs_distill import VGSTrainer, loss
from vgs_distill.steering.token_weights import VisualTokenWeights

from tests.engine.test_trainer import step_logs, with_images_removed
from vgs_kernels import linear_decomposed_kl

CPU = torch.device("cpu")


def test_the_scaled_weights_of_a_step_have_mean_one() -> None:
    weights = VisualTokenWeights(True, CPU)
    micro_batches = [torch.tensor([1.0, 4.0, 0.0]), torch.empty(0), torch.tensor([2.5])]
    for _ in range(2):  # a step does not see the one before
        weights.begin_step()
        for micro_batch in micro_batches:
            weights.add(micro_batch)
        assert weights.scales()[0] == 1
        torch.testing.assert_close((torch.cat(micro_batches) * weights.scales()[1]).mean(), torch.tensor(1.0))
        weights.end_step()
    restored = VisualTokenWeights(True, CPU)
    assert torch.equal(restored.expected_scales(), torch.ones(2))
    restored.load_state_dict(weights.state_dict())
    torch.testing.assert_close(restored.expected_scales(), weights.scales())


def test_a_step_without_visual_tokens_scales_nothing() -> None:
    weights = VisualTokenWeights(True, CPU)
    weights.begin_step()
    for none in (torch.empty(0), torch.zeros(3)):
        weights.add(none)
        assert torch.equal(weights.scales(), torch.ones(2))
    weights.end_step()
    assert torch.equal(weights.expected_scales(), torch.ones(2))


def first_step(make_trainer: Callable[..., VGSTrainer], **settings: Any) -> dict[str, float]:
    trainer = make_trainer(max_steps=1, method="vgs_unit", **settings)
    trainer.train()
    return step_logs(trainer)[0]


def test_token_steering_turns_the_visual_gradient_alone(make_trainer: Callable[..., VGSTrainer]) -> None:
    plain, steered = (first_step(make_trainer, token_steering=s) for s in (0.0, 8.0))
    assert steered["gradient/norm_lang"] == plain["gradient/norm_lang"]
    assert abs(steered["gradient/cosine"] - plain["gradient/cosine"]) > 1e-3
    assert steered["loss/vis"] == plain["loss/vis"]  # a mean over tokens, unweighted
    assert 1.0 < steered["steering/visual_token_weight"] < 9.0
    assert "steering/visual_token_weight" not in plain


def five_fold(student_hidden: Tensor, *arguments: Any, **options: Any) -> Any:
    if "sampled_tokens" in options:
        options["vis_weights"] = torch.full_like(student_hidden[:, 0], 5.0).detach()
    return linear_decomposed_kl(student_hidden, *arguments, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("settings", [{"steering_scale": "preserve"}, {"max_weight_ratio": 2.0}], ids=" ".join)
@pytest.mark.parametrize("eta", ["measured", "amortized"])
def test_a_factor_of_all_weights_changes_nothing(
    make_trainer: Callable[..., VGSTrainer],
    monkeypatch: pytest.MonkeyPatch,
    eta: str,
    settings: dict[str, Any],
    accumulation: int,
) -> None:
    """Where the scale of the visual part matters: in the norm that is preserved, and in the bound on the weights."""
    parameters, logs = [], []
    # Too little to change a weight, enough for weights to be normalised.
    for token_steering in (0.0, 1e-12):
        trainer = make_trainer(
            method="vgs_unit", eta=eta, refresh_every=3, max_steps=5, token_steering=token_steering, optim="sgd",
            learning_rate=0.05, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
            **settings,
        )  # fmt: skip
        trainer.train()
        parameters.append([p.detach().clone() for p in trainer.model.parameters()])
        logs.append([row["steering/weight_ratio"] for row in step_logs(trainer)])
        monkeypatch.setattr(loss, "linear_decomposed_kl", five_fold)
    assert step_logs(trainer)[-1]["steering/visual_token_weight"] == pytest.approx(5.0)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    for plain, scaled in zip(*parameters, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)


def test_rows_without_an_image_have_no_weight(make_trainer: Callable[..., VGSTrainer], prompts: Dataset) -> None:
    row = first_step(lambda **s: make_trainer(with_images_removed(prompts, lambda _: False), **s), token_steering=8.0)
    assert row["steering/visual_token_weight"] == 1.0
    assert row["gradient/norm_vis"] == 0.0
