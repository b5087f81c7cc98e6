"""Every method's update against the textbook: full logits, log_softmax, autograd, prompts masked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vgs_distill import VGSTrainer
from vgs_distill.masking import Batch
from vgs_distill.steering.methods import METHODS

from tests.engine.test_trainer import BatchTap, GradientTap, step_logs
from tests.textbook import visual_weights

WEIGHTED = {"token_steering": 4.0, "plausibility": 0.2, "teacher_smoothing": 0.05}
LANGUAGE = {"language_preservation": 0.7, "dependency_quantile": 0.6}
Gradient = list[Tensor | None]


def steered(*methods: str) -> list[str]:
    return [name for name in methods or METHODS if METHODS[name].second is not None]


@pytest.mark.parametrize("image_mask", ["drop", "blank", "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_every_mask(
    make_trainer: Callable[..., VGSTrainer], method: str, image_mask: str
) -> None:
    trainer = make_trainer(method=method, image_mask=image_mask, language_preservation=1.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 2
    for row in logs:
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] == pytest.approx(row["loss/standard"], rel=1e-5)
        assert {f"time/{part}" for part in ("rollout", "teacher", "student", "steering")} <= row.keys()
        if METHODS[method].unit:
            norms = [row[key] for key in row if key.startswith("gradient/norm")]
            assert len(norms) == 2
            first = row["gradient/norm_lang"]
            second = next(norm for norm in norms if norm != first)
            assert row["steering/weight_ratio"] == pytest.approx((0.8 / second) / (0.2 / first), rel=1e-4)
        if method == "teacher_prior":
            assert row["loss/standard"] == pytest.approx(row["loss/lang"] + row["loss/vis"], abs=1e-5)
        if method == "opd":
            assert not any(key.startswith(("gradient/norm", "steering/")) or "masked" in key for key in row)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def log_probs(model: Any, batch: Batch) -> Tensor:
    """(rows, completion, vocab), of the batch as it is."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.multimodal).logits
    return logits[:, :-1][:, -batch.completion_ids.size(1) :].log_softmax(-1)


def masked_log_probs(model: Any, batch: Batch) -> Tensor:
    """The same with the image cut out of every prompt by hand."""
    config = model.config
    fence = [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]
    rows = []
    for row in range(batch.prompt_ids.size(0)):
        kept = [
            token
            for token, real in zip(batch.prompt_ids[row].tolist(), batch.prompt_mask[row].tolist(), strict=True)
            if real and token not in fence
        ]
        ids = torch.cat([torch.tensor(kept), batch.completion_ids[row]])[None]
        mask = torch.cat([torch.ones(len(kept), dtype=torch.long), batch.completion_mask[row]])[None]
        logits = model(input_ids=ids, attention_mask=mask).logits
        rows.append(logits[:, :-1][:, -batch.completion_ids.size(1) :].log_softmax(-1))
    return torch.cat(rows)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def guarded_target(lp0: Tensor, lq: Tensor, lr: Tensor, bound: float | None, floor: float) -> Tensor:
    ratio = lp0 - lr
    if bound is not None:
        ratio = ratio.clamp(-bound, bound)
    if floor:
        ratio = torch.where(lq >= lq.amax(-1, keepdim=True) + math.log(floor), ratio, 0.0)
    return (lq + ratio).log_softmax(-1)


def textbook_parts(
    student: Any,
    teacher: Any,
    inputs: dict[str, Any],
    *,
    quantile: float = 0.7,
    before_the_loss: bool = False,
    token_steering: float | str = 0.0,
    plausibility: float = 0.0,
    teacher_smoothing: float = 0.0,
    ratio_bound: float | None = None,
    ratio_floor: float = 0.0,
) -> dict[str, Gradient]:
    """The parameter gradient of every part of the loss of a micro-batch, mean over its tokens."""
    batch = Batch.of(inputs)
    lp, lp0 = log_probs(student, batch), masked_log_probs(student, batch)
    with torch.no_grad():
        lq, lr = log_probs(teacher, batch), masked_log_probs(teacher, batch)
        unsmoothed_scores = kl(lq, lr)
        if teacher_smoothing:
            lq, lr = (((1 - teacher_smoothing) * t.exp() + teacher_smoothing / t.size(-1)).log() for t in (lq, lr))
    valid = batch.completion_mask.bool()
    weights = batch.completion_mask / batch.completion_mask.sum()
    # Known before the loss, where the visual part is chosen by them: of the teacher as it is.
    scores = (unsmoothed_scores if before_the_loss else kl(lq, lr))[valid]
    ranks = scores.argsort(descending=True)
    top = torch.zeros_like(weights)
    count = round((1 - quantile) * len(ranks))
    top[valid] = torch.zeros_like(scores).index_fill(0, ranks[:count], 1.0)
    if token_steering == "dependency":
        factors = torch.zeros_like(scores)
        factors[ranks[: round(0.6 * len(ranks))]] = 0.5
        factors[ranks[:count]] = 1.0
        by_token = torch.zeros_like(weights)
        by_token[valid] = factors
    else:
        by_token = visual_weights(
            lq.flatten(0, 1), lr.flatten(0, 1), batch.completion_ids.flatten(), float(token_steering), plausibility
        ).view_as(weights)
        by_token = by_token / (by_token * weights).sum()
    vis = kl(lp, guarded_target(lp0.detach(), lq, lr, ratio_bound, ratio_floor))
    losses = {
        "standard": kl(lp, lq),
        "vis": vis * by_token,
        "lang": kl(lp0, lr),
        "prior": kl(lp, lr),
        "evidence": (kl(lp, lq) - kl(lp, lr)) * by_token,
        "preserved_lang": kl(lp0, lr) * top,
        "preserved_vis": vis * top,
    }
    parameters = list(student.parameters())
    return {
        name: list(torch.autograd.grad((loss * weights).sum(), parameters, allow_unused=True, retain_graph=True))
        for name, loss in losses.items()
    }


def flat(gradient: Gradient, parameters: list[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradient, parameters, strict=True)]
    )


def textbook_update(method: str, parts: dict[str, Tensor], gamma: float, preservation: float) -> Tensor:
    """design: eta (a + gamma b + lambda c), or (1 - gamma) a / |a| + gamma b / |b|."""
    named = METHODS[method]
    first = parts[named.first]
    if named.second is None:
        return first
    second = parts[named.second]
    if named.unit:
        return (1 - gamma) * first / first.norm() + gamma * second / second.norm()
    eta = first.norm() / (first + gamma * second).norm()
    return eta * (first + gamma * second + preservation * parts[f"preserved_{named.preserved}"])


def run_one_step(make_trainer: Callable[..., VGSTrainer], **settings: Any) -> tuple[VGSTrainer, Tensor, Any]:
    """The trainer, with its student as it was before the step; the gradient it applied; and its micro-batches."""
    trainer = make_trainer(max_steps=1, max_grad_norm=0.0, **settings)
    initial = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    gradients, batches = GradientTap(), BatchTap(trainer)
    trainer.add_callback(gradients)
    trainer.train()
    trainer.model.load_state_dict(initial, strict=False)
    applied = torch.cat(
        [gradients.gradients[0].get(n, torch.zeros_like(p)).flatten() for n, p in trainer.model.named_parameters()]
    )
    return trainer, applied, batches.batches


@pytest.mark.parametrize("settings", [{}, LANGUAGE, WEIGHTED], ids=["plain", "language", "weighted"])
@pytest.mark.parametrize("eta", ["measured", "amortized"])
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_the_textbook_one(
    make_trainer: Callable[..., VGSTrainer], method: str, eta: str, settings: dict[str, Any]
) -> None:
    if settings is WEIGHTED and not {"vis", "evidence"} & {METHODS[method].first, METHODS[method].second}:
        settings = {"teacher_smoothing": 0.05}
    gamma = 0.7 if METHODS[method].unit else 1.6
    trainer, applied, batches = run_one_step(make_trainer, method=method, eta=eta, gamma=gamma, **settings)
    options = {k: v for k, v in settings.items() if k not in LANGUAGE}
    gradients = textbook_parts(
        trainer.model,
        trainer.teacher_model,
        batches[0],
        quantile=settings.get("dependency_quantile", 0.7),
        before_the_loss=METHODS[method].preserved == "vis",
        **options,
    )
    parameters = list(trainer.model.parameters())
    parts = {name: flat(gradient, parameters) for name, gradient in gradients.items()}
    expected = textbook_update(method, parts, gamma, settings.get("language_preservation", 0.01))
    torch.testing.assert_close(applied, expected, atol=2e-6, rtol=1e-4)
    if METHODS[method].second is not None:
        row = step_logs(trainer)[0]
        first = METHODS[method].label.get(METHODS[method].first, METHODS[method].first)
        assert row[f"gradient/norm_{first}"] == pytest.approx(parts[METHODS[method].first].norm().item(), rel=1e-4)


@pytest.mark.parametrize(
    "guard", [{"ratio_bound": 0.5}, {"ratio_floor": 0.9}, {"ratio_bound": 0.3, "ratio_floor": 0.8}], ids=str
)
def test_a_guard_changes_the_visual_target_as_it_says(
    make_trainer: Callable[..., VGSTrainer], guard: dict[str, float]
) -> None:
    trainer, applied, batches = run_one_step(make_trainer, eta=0.4, language_preservation=0.0, **guard)
    parameters = list(trainer.model.parameters())
    for options, same in ((guard, True), ({}, False)):
        gradients = textbook_parts(trainer.model, trainer.teacher_model, batches[0], **options)
        expected = 0.4 * (flat(gradients["standard"], parameters) + 2 * flat(gradients["vis"], parameters))
        assert torch.allclose(applied, expected, atol=2e-6, rtol=1e-4) == same


def test_gamma_by_dependency_is_the_papers(make_trainer: Callable[..., VGSTrainer]) -> None:
    settings = {"token_steering": "dependency", "dependency_quantile": 0.7}
    trainer, applied, batches = run_one_step(make_trainer, eta=0.4, gamma=2.0, language_preservation=0.0, **settings)
    parameters = list(trainer.model.parameters())
    gradients = textbook_parts(trainer.model, trainer.teacher_model, batches[0], token_steering="dependency")
    expected = 0.4 * (flat(gradients["standard"], parameters) + 2 * flat(gradients["vis"], parameters))
    torch.testing.assert_close(applied, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["vgs", "language"])
def test_a_number_for_eta_is_one_gradient(make_trainer: Callable[..., VGSTrainer], method: str) -> None:
    trainer, applied, batches = run_one_step(make_trainer, method=method, eta=0.41, gamma=2.0, **LANGUAGE)
    parameters = list(trainer.model.parameters())
    gradients = textbook_parts(
        trainer.model, trainer.teacher_model, batches[0], quantile=LANGUAGE["dependency_quantile"]
    )
    parts = {name: flat(gradient, parameters) for name, gradient in gradients.items()}
    named = METHODS[method]
    preserved = parts[f"preserved_{named.preserved}"]
    expected = 0.41 * (parts[named.first] + 2.0 * parts[named.second] + 0.7 * preserved)
    torch.testing.assert_close(applied, expected, atol=2e-6, rtol=1e-4)
    assert "gradient/cosine" not in step_logs(trainer)[0]


def test_steered_distillation_keeps_the_length_of_plain_distillation(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer, applied, _ = run_one_step(make_trainer, eta="measured", language_preservation=0.0)
    assert applied.norm().item() == pytest.approx(step_logs(trainer)[0]["gradient/norm_standard"], rel=1e-5)


def test_without_language_preservation_the_masked_student_leaves_no_graph(
    make_trainer: Callable[..., VGSTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=1, language_preservation=0.0)
    graphs: list[bool] = []
    original = VGSTrainer._run_student

    def watched(self: VGSTrainer, model: Any, batch: Batch) -> Tensor:
        hidden = original(self, model, batch)
        graphs.append(hidden.requires_grad)
        return hidden

    trainer._loss.run_student = lambda model, batch: watched(trainer, model, batch)
    trainer.train()
    assert graphs == [False, True]


@pytest.mark.parametrize("settings", [{}, {**WEIGHTED}], ids=["plain", "weighted"])
@pytest.mark.parametrize("method", METHODS)
def test_accumulation_does_not_change_the_update(
    make_trainer: Callable[..., VGSTrainer], method: str, settings: dict[str, Any]
) -> None:
    if settings and not {"vis", "evidence"} & {METHODS[method].first, METHODS[method].second}:
        settings = {"teacher_smoothing": 0.05}
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            method=method,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            language_preservation=0.5,
            dependency_quantile=0.0,  # whose tokens do not depend on how rows are grouped
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
    for key in log_one:
        if key.startswith(("loss", "gradient", "steering", "entropy", "dependency")):
            assert log_one[key] == pytest.approx(log_four[key], rel=1e-4, abs=1e-5), key
