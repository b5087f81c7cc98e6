"""The trainer: checkpointing, rows without an image, sampling, saving, logging, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
from trl import DistillationConfig
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.steering.methods import METHODS


class GradientTap(TrainerCallback):
    """Copies the gradients that the optimizer is about to apply."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class BatchTap:
    """Keeps the micro-batches that a trainer computed its loss on."""

    def __init__(self, trainer: VGSTrainer) -> None:
        self.batches: list[dict[str, Any]] = []
        original = trainer.compute_loss

        def tapped(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append(inputs)
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = tapped  # type: ignore[method-assign]


def step_logs(trainer: VGSTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("settings", [{}, {"eta": "measured", "language_preservation": 1.0}], ids=["default", "all"])
def test_gradient_checkpointing_gives_the_same_update(
    make_trainer: Callable[..., VGSTrainer], settings: dict[str, Any]
) -> None:
    updates = []
    for checkpointing in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        trainer = make_trainer(max_steps=1, **settings, **checkpointing)
        trainer.train()
        updates.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    for name, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][name], atol=1e-6, rtol=0)


def with_images_removed(dataset: Dataset, keep: Callable[[int], bool]) -> Dataset:
    images = [image if keep(row) else None for row, image in enumerate(dataset["image"])]
    return Dataset.from_dict({"prompt": list(dataset["prompt"]), "image": images}, features=dataset.features)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_an_image_follow_the_first_part(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, method: str
) -> None:
    """KL(student || teacher), at the length that the method gives its first part alone."""
    dataset = with_images_removed(prompts, lambda row: False)
    trainer = make_trainer(dataset, method=method, max_grad_norm=0.0)
    trainer.train()
    steered = METHODS[method]
    for row in step_logs(trainer):
        assert row["loss/standard"] > 0.0
        if "loss/lang" in row and steered.unit:
            assert row["loss/lang"] == row["loss/standard"]  # the masked view is the row itself
        if steered.unit:
            assert row["grad_norm"] == pytest.approx(0.2, rel=1e-3)  # 1 - gamma: what is missing is not made up for
    plain = make_trainer(dataset, method="opd", max_grad_norm=0.0)
    plain.train()
    if not steered.unit:
        assert [row["grad_norm"] for row in step_logs(trainer)] == pytest.approx(
            [row["grad_norm"] for row in step_logs(plain)], rel=1e-5
        )


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches_train(make_trainer: Callable[..., VGSTrainer], prompts: Dataset, method: str) -> None:
    dataset = with_images_removed(prompts, lambda row: row % 2 == 0)
    trainer = make_trainer(dataset, method=method, language_preservation=1.0)
    trainer.train()
    for row in step_logs(trainer):
        assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("method", ["vgs", "matched", "opd"])
def test_micro_batches_without_any_image_train(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, method: str
) -> None:
    dataset = with_images_removed(prompts, lambda row: row % 4 == 0)
    trainer = make_trainer(dataset, method=method, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    tap = BatchTap(trainer)
    trainer.train()
    pictures = [len(batch.get("pixel_values", ())) for batch in tap.batches]
    assert 0 in pictures
    assert max(pictures) > 0
    assert all(math.isfinite(row["loss"]) for row in step_logs(trainer))


def test_image_tokens_are_never_sampled(
    make_trainer: Callable[..., VGSTrainer], make_model: Callable[..., Any]
) -> None:
    student = make_model(1)
    config = student.config
    fence = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    with torch.no_grad():  # a student that wants nothing else
        student.lm_head.weight.zero_()
        student.model.language_model.norm.weight.fill_(1.0)
        student.lm_head.weight[fence] = 0.0
        student.lm_head.weight[[i for i in range(student.lm_head.weight.size(0)) if i not in fence]] = 1e-3
    trainer = make_trainer(student=student, max_steps=1, per_device_train_batch_size=8, max_completion_length=12)
    tap = BatchTap(trainer)
    trainer.train()
    sampled = torch.cat([batch["completion_ids"].flatten() for batch in tap.batches])
    assert not torch.isin(sampled, torch.tensor(fence)).any()


def test_the_saved_student_loads_and_answers_the_same(
    make_trainer: Callable[..., VGSTrainer], processor: Any, world: Any, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "model.safetensors").exists()
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path / "student")
    example = world.balanced("test", 1, seed=3)[0]
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}],
        }
    ]
    answers = []
    for model, proc in ((trainer.model.eval(), processor), (loaded, loaded_processor)):
        inputs = proc.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=8))
    assert torch.equal(*answers)


def test_metrics_reach_tensorboard(make_trainer: Callable[..., VGSTrainer], tmp_path: Path, monkeypatch: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(report_to="tensorboard").train()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for key in ("loss/lang", "gradient/cosine", "steering/eta", "time/rollout"):
        assert f"train/{key}" in tags


def test_evaluation_reports_the_parts(make_trainer: Callable[..., VGSTrainer], prompts: Dataset) -> None:
    trainer = make_trainer(per_device_eval_batch_size=4)
    metrics = trainer.evaluate(prompts.select(range(8)))
    assert metrics["eval_loss"] > 0
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"eval_loss/standard", "eval_loss/lang", "eval_loss/vis", "eval_dependency"} <= logged


def test_gamma_schedule_is_followed(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_steps=3, gamma=0.9, gamma_schedule="linear", gamma_start=0.5)
    trainer.train()
    assert [row["steering/gamma"] for row in step_logs(trainer)] == pytest.approx([0.5, 0.7, 0.9])


def test_weight_ratio_is_bounded(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(method="matched", max_weight_ratio=0.25)
    trainer.train()
    for row in step_logs(trainer):
        assert row["steering/weight_ratio"] <= 0.25 * (1 + 1e-5)


def test_a_plain_distillation_config_is_refused(
    tmp_path: Path, make_model: Callable[..., Any], prompts: Dataset
) -> None:
    with pytest.raises(ValueError, match="must be a VGSConfig"):
        VGSTrainer(
            make_model(1),
            make_model(2),
            DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            prompts,
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "vsg"}, "unknown method 'vsg'; choose one of vgs, opd, vgs_unit, matched, teacher_prior, language"),
        ({"steering": "none"}, "steering is no setting any more; write method='opd'"),
        ({"steering": "exact"}, "steering is no setting any more; write eta='measured'"),
        ({"decomposition": "bayes"}, "decomposition is no setting any more; write method='vgs_unit'"),
        ({"refresh_drift": 2.0}, "refresh_drift is no setting any more; leave it out"),
        ({"image_mask": "crop"}, "unknown image_mask 'crop'; choose one of drop, blank, attention"),
        ({"eta": "cheap"}, "eta must be 'measured', 'amortized' or a positive number, got 'cheap'"),
        ({"eta": 0.0}, "eta must be 'measured', 'amortized' or a positive number, got 0.0"),
        ({"eta": math.nan}, "eta must be"),
        ({"method": "matched", "eta": 0.4}, "has a weight for each of two gradients, which no single number is"),
        ({"steering_scale": "big"}, "unknown steering_scale .big.; choose one of unit, preserve"),
        ({"refresh_every": 0}, "refresh_every must be 1 or more"),
        (
            {"method": "matched", "gamma": 1.2},
            r"gamma is a share in \[0, 1\] with method='matched'",
        ),
        ({"gamma": -0.5}, "gamma must be a number of at least 0 or 'adaptive', got -0.5"),
        ({"gamma_start": -0.1}, "gamma_start must be a number of at least 0"),
        ({"gamma": "adaptive"}, "gamma='adaptive' compares how far the two parts of the loss have fallen, by shares"),
        (
            {"language_preservation": -1.0},
            "language_preservation must be 0 .off., a positive finite number or",
        ),
        ({"dependency_quantile": 1.5}, r"dependency_quantile must be in \[0, 1\]"),
        ({"ratio_bound": 0.0}, "ratio_bound must be positive or None"),
        ({"ratio_floor": 1.0}, "ratio_floor must be at least 0 .off. and below 1"),
        ({"max_weight_ratio": 0.0}, "max_weight_ratio must be positive"),
        (
            {"token_steering": -1.0},
            "token_steering must be 0 .off., a positive finite number or",
        ),
        ({"method": "opd", "token_steering": 1.0}, "method='opd' has no visual part that token_steering could weigh"),
        ({"plausibility": 1.0}, "plausibility must be at least 0 .off. and below 1, got 1.0"),
        ({"teacher_smoothing": -0.1}, "teacher_smoothing must be at least 0 .off. and below 1, got -0.1"),
        ({"fp16": True}, "which the loss scaling of fp16 changes"),
        ({"beta": 0.5}, "beta=1.0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be 1 or more"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
