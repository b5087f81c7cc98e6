"""The trainer: its steered gradient against textbook formulas, accumulation, masks, logging, and what it refuses."""

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
from vgs_distill.masking import Batch

from tests.reference_formulas import visual_weights
from vgs_kernels import OLD_DECOMPOSITIONS as DECOMPOSITIONS

STEERED_KEYS = {
    "loss", "loss/full", "loss/lang", "loss/vis", "entropy", "gradient/norm_lang", "gradient/norm_vis",
    "gradient/cosine", "steering/gamma", "steering/weight_ratio",
    "time/rollout", "time/teacher", "time/student", "time/steering",
}  # fmt: skip


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


@pytest.mark.parametrize("image_mask", ["drop", "blank", "attention"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_every_decomposition_trains_with_every_mask(
    make_trainer: Callable[..., VGSTrainer], decomposition: str, image_mask: str
) -> None:
    trainer = make_trainer(decomposition=decomposition, image_mask=image_mask)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 2
    for row in logs:
        assert set(row) >= STEERED_KEYS
        assert all(math.isfinite(row[key]) for key in STEERED_KEYS)
        assert -1.0 <= row["gradient/cosine"] <= 1.0
        expected = (0.8 / row["gradient/norm_vis"]) / (0.2 / row["gradient/norm_lang"])
        assert row["steering/weight_ratio"] == pytest.approx(expected, rel=1e-4)
        if decomposition == "teacher_prior":
            assert row["loss/full"] == pytest.approx(row["loss/lang"] + row["loss/vis"], abs=1e-5)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_monolithic_distillation_is_trl_and_logs_its_times(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(steering="none")
    trainer.train()
    for row in step_logs(trainer):
        assert {"loss", "loss/full", "entropy", "grad_norm", "time/rollout", "time/teacher", "time/student"} <= set(row)
        assert row["loss"] == pytest.approx(row["loss/full"], rel=1e-5)
        assert "gradient/cosine" not in row


def textbook_gradients(
    student: Any,
    teacher: Any,
    inputs: dict[str, Any],
    decomposition: str,
    token_steering: float = 0.0,
    plausibility: float = 0.0,
    teacher_smoothing: float = 0.0,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Both parameter gradients by autograd through log_softmax, with the prompts masked by hand."""
    batch = Batch.of(inputs)
    config = student.config
    fence = [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]

    def log_probs(model: Any, ids: Tensor, mask: Tensor, **extra: Any) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, **extra).logits
        return logits[:, :-1][:, -batch.completion_ids.size(1) :].log_softmax(-1)

    def masked_log_probs(model: Any) -> Tensor:
        rows = []
        for row in range(batch.prompt_ids.size(0)):
            kept = [
                token
                for token, real in zip(batch.prompt_ids[row].tolist(), batch.prompt_mask[row].tolist(), strict=True)
                if real and token not in fence
            ]
            ids = torch.cat([torch.tensor(kept), batch.completion_ids[row]])[None]
            mask = torch.cat([torch.ones(len(kept), dtype=torch.long), batch.completion_mask[row]])[None]
            rows.append(log_probs(model, ids, mask))
        return torch.cat(rows)

    lp = log_probs(student, batch.input_ids, batch.attention_mask, **batch.multimodal)
    l0 = masked_log_probs(student)
    with torch.no_grad():
        lq = log_probs(teacher, batch.input_ids, batch.attention_mask, **batch.multimodal)
        lr = masked_log_probs(teacher)
    if teacher_smoothing:
        lq, lr = (((1 - teacher_smoothing) * t.exp() + teacher_smoothing / t.size(-1)).log() for t in (lq, lr))
    p, p0 = lp.exp(), l0.exp()
    if decomposition == "teacher_prior":
        lang, vis = (p * (lp - lr)).sum(-1), (p * (lr - lq)).sum(-1)
    elif decomposition == "bayes":
        lang, vis = (p0 * (l0 - lr)).sum(-1), (p * ((lp - l0.detach()) - (lq - lr))).sum(-1)
    else:
        lang, vis = (p0 * (l0 - lr)).sum(-1), (p * (lp - lq)).sum(-1)
    weights = batch.completion_mask / batch.completion_mask.sum()
    by_token = visual_weights(
        lq.flatten(0, 1), lr.flatten(0, 1), batch.completion_ids.flatten(), token_steering, plausibility
    ).view_as(weights)
    vis = vis * by_token / (by_token * weights).sum()
    parameters = list(student.parameters())
    g_lang = torch.autograd.grad((lang * weights).sum(), parameters, allow_unused=True, retain_graph=True)
    g_vis = torch.autograd.grad((vis * weights).sum(), parameters, allow_unused=True)
    return list(g_lang), list(g_vis)


WEIGHTED = {"token_steering": 4.0, "plausibility": 0.2, "teacher_smoothing": 0.05}


@pytest.mark.parametrize("settings", [{}, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_the_steered_gradient_is_the_textbook_one(
    make_trainer: Callable[..., VGSTrainer], decomposition: str, settings: dict[str, float]
) -> None:
    gamma = 0.7
    trainer = make_trainer(decomposition=decomposition, gamma=gamma, max_steps=1, max_grad_norm=0.0, **settings)
    student = trainer.model
    initial = {n: p.detach().clone() for n, p in student.named_parameters()}
    gradients, batches = GradientTap(), BatchTap(trainer)
    trainer.add_callback(gradients)
    trainer.train()

    student.load_state_dict(initial, strict=False)
    lang, vis = textbook_gradients(student, trainer.teacher_model, batches.batches[0], decomposition, **settings)

    def norm(parts: list[Tensor | None]) -> Tensor:
        return torch.stack([g.square().sum() for g in parts if g is not None]).sum().sqrt()

    row = step_logs(trainer)[0]
    assert row["gradient/norm_lang"] == pytest.approx(norm(lang).item(), rel=1e-4)
    assert row["gradient/norm_vis"] == pytest.approx(norm(vis).item(), rel=1e-4)
    for (name, parameter), a, b in zip(student.named_parameters(), lang, vis, strict=True):
        expected = torch.zeros_like(parameter)
        if a is not None:
            expected = expected + (1 - gamma) * a / norm(lang)
        if b is not None:
            expected = expected + gamma * b / norm(vis)
        steered = gradients.gradients[0].get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(steered, expected, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", [{}, {**WEIGHTED, "steering_scale": "preserve"}], ids=["plain", "weighted"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_accumulation_does_not_change_the_steered_gradient(
    make_trainer: Callable[..., VGSTrainer], decomposition: str, settings: dict[str, Any]
) -> None:
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            decomposition=decomposition,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        tap = GradientTap()
        trainer.add_callback(tap)
        trainer.train()
        results.append((tap.gradients, step_logs(trainer)[0]))
    (one, log_one), (four, log_four) = results
    assert len(one) == len(four) == 1
    assert one[0].keys() == four[0].keys()
    for name in one[0]:
        torch.testing.assert_close(one[0][name], four[0][name], atol=1e-5, rtol=0)
    keys = ["loss", "loss/full", "loss/lang", "loss/vis", "entropy"]
    keys += ["gradient/norm_lang", "gradient/norm_vis", "gradient/cosine"]
    keys += ["steering/visual_token_weight"] if settings else []
    for key in keys:
        assert log_one[key] == pytest.approx(log_four[key], rel=1e-4, abs=1e-5)


def test_gradient_checkpointing_gives_the_same_update(make_trainer: Callable[..., VGSTrainer]) -> None:
    updates = []
    for settings in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        trainer = make_trainer(max_steps=1, **settings)
        trainer.train()
        updates.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    for name, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][name], atol=1e-6, rtol=0)


def with_images_removed(dataset: Dataset, keep: Callable[[int], bool]) -> Dataset:
    images = [image if keep(row) else None for row, image in enumerate(dataset["image"])]
    return Dataset.from_dict({"prompt": list(dataset["prompt"]), "image": images}, features=dataset.features)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_rows_without_an_image_are_all_language(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, decomposition: str
) -> None:
    trainer = make_trainer(with_images_removed(prompts, lambda row: False), decomposition=decomposition)
    trainer.train()
    for row in step_logs(trainer):
        assert row["loss/lang"] == pytest.approx(row["loss/full"], rel=1e-5)
        assert row["loss/vis"] == pytest.approx(0.0, abs=1e-6)
        assert row["gradient/norm_vis"] == 0.0
        assert row["gradient/norm_lang"] > 0.0
        assert row["grad_norm"] == pytest.approx(0.2, rel=1e-3)  # 1 - gamma: what is missing is not made up for


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_mixed_batches_train(make_trainer: Callable[..., VGSTrainer], prompts: Dataset, decomposition: str) -> None:
    trainer = make_trainer(with_images_removed(prompts, lambda row: row % 2 == 0), decomposition=decomposition)
    trainer.train()
    for row in step_logs(trainer):
        assert all(math.isfinite(row[key]) for key in STEERED_KEYS)


@pytest.mark.parametrize("steering", ["exact", "none"])
def test_micro_batches_without_any_image_train(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, steering: str
) -> None:
    dataset = with_images_removed(prompts, lambda row: row % 4 == 0)
    trainer = make_trainer(dataset, steering=steering, per_device_train_batch_size=1, gradient_accumulation_steps=4)
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
    for key in ("loss/lang", "gradient/cosine", "steering/weight_ratio", "time/rollout"):
        assert f"train/{key}" in tags


def test_evaluation_reports_the_parts(make_trainer: Callable[..., VGSTrainer], prompts: Dataset) -> None:
    trainer = make_trainer(per_device_eval_batch_size=4)
    metrics = trainer.evaluate(prompts.select(range(8)))
    assert metrics["eval_loss"] > 0
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"eval_loss/full", "eval_loss/lang", "eval_loss/vis"} <= logged


def test_gamma_schedule_is_followed(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_steps=3, gamma=0.9, gamma_schedule="linear", gamma_start=0.5)
    trainer.train()
    assert [row["steering/gamma"] for row in step_logs(trainer)] == pytest.approx([0.5, 0.7, 0.9])


def test_weight_ratio_is_bounded(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_weight_ratio=0.25)
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
        ({"decomposition": "baies"}, "unknown decomposition 'baies'; choose one of teacher_prior, bayes, matched"),
        ({"image_mask": "crop"}, "unknown image_mask 'crop'; choose one of drop, blank, attention"),
        ({"steering": "cheap"}, "unknown steering"),
        ({"steering_scale": "big"}, "unknown steering_scale .big.; choose one of unit, preserve"),
        ({"refresh_every": -1}, "refresh_every must be 0 .never. or more"),
        ({"refresh_drift": 1.0}, "refresh_drift must be above 1"),
        ({"gamma": 1.2}, r"gamma must be in \[0, 1\] or 'adaptive', got 1.2"),
        ({"gamma_start": -0.1}, r"gamma_start must be in \[0, 1\]"),
        ({"max_weight_ratio": 0.0}, "max_weight_ratio must be positive"),
        ({"token_steering": -1.0}, "token_steering must be 0 .off. or a positive finite number, got -1.0"),
        ({"plausibility": 1.0}, "plausibility must be at least 0 .off. and below 1, got 1.0"),
        ({"teacher_smoothing": -0.1}, "teacher_smoothing must be at least 0 .off. and below 1, got -0.1"),
        (
            {"steering": "none", "teacher_smoothing": 0.1},
            "steering='none' is TRL's loss, which has no teacher_smoothing",
        ),
        ({"beta": 0.5}, "beta=1.0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be 1 or more"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
