"""Angles by dependency against the textbook (full logits, autograd), and that measuring them changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.masking import Batch
from vgs_distill.report.dependency_angles import GROUPS
from vgs_distill.report.log import RunLog, read_run
from vgs_distill.report.timing import StepTimer

from tests.engine.test_methods import flat, guarded_target, kl, log_probs, masked_log_probs, run_one_step
from tests.engine.test_trainer import with_images_removed


def recorded(trainer: VGSTrainer) -> RunLog:
    assert trainer.args.output_dir is not None
    return read_run(Path(trainer.args.output_dir))


def textbook(student: Any, teacher: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """VDS and the three losses of every token, (tokens,), with their graphs."""
    batch = Batch.of(inputs)
    lp, lp0 = log_probs(student, batch), masked_log_probs(student, batch)
    with torch.no_grad():
        lq, lr = log_probs(teacher, batch), masked_log_probs(teacher, batch)
    valid = batch.completion_mask.bool()
    vis = kl(lp, guarded_target(lp0.detach(), lq, lr, None, 0.0))
    losses = {"standard": kl(lp, lq), "vis": vis, "lang": kl(lp0, lr)}
    return kl(lq, lr)[valid], {name: loss[valid] for name, loss in losses.items()}


@pytest.mark.parametrize("method", ["vgs", "vgs_unit", "language"])
def test_angles_and_norms_are_the_textbooks(make_trainer: Callable[..., VGSTrainer], method: str) -> None:
    trainer, _, batches = run_one_step(make_trainer, method=method, record_dependency_every=1)
    (record,) = recorded(trainer).angles
    scores, losses = textbook(trainer.model, trainer.teacher_model, batches[0])
    assert len(scores) > GROUPS
    assert sum(record["tokens"]) == len(scores)
    assert max(record["tokens"]) - min(record["tokens"]) <= 1
    parameters = list(trainer.model.parameters())
    groups = scores.argsort(stable=True).split(record["tokens"])
    assert len(groups) == GROUPS
    for at, group in enumerate(groups):
        assert record["dependency"][at] == pytest.approx(scores[group].mean().item(), rel=1e-4)
        gradients = {
            name: flat(
                list(torch.autograd.grad(loss[group].mean(), parameters, allow_unused=True, retain_graph=True)),
                parameters,
            ).double()
            for name, loss in losses.items()
        }
        for name, gradient in gradients.items():
            assert record[f"norm_{name}"][at] == pytest.approx(gradient.norm().item(), rel=1e-3)
        for first, second in (("lang", "vis"), ("standard", "vis"), ("standard", "lang")):
            cosine = torch.nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0).item()
            assert record[f"angle_{first}_{second}"][at] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.1)


@pytest.mark.parametrize("settings", [{}, {"eta": 0.4, "gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_measuring_changes_nothing(make_trainer: Callable[..., VGSTrainer], settings: dict[str, Any]) -> None:
    ends = []
    for every in (0, 1):
        trainer = make_trainer(
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            record_dependency_every=every,
            **settings,
        )
        trainer.train()
        states = (torch.get_rng_state().tolist(), random.getstate())
        ends.append(({n: p.detach().clone() for n, p in trainer.model.named_parameters()}, states))
        assert [record["step"] for record in recorded(trainer).angles] == ([1, 2, 3] if every else [])
    (without, states_without), (with_angles, states_with) = ends
    assert all(torch.equal(value, with_angles[name]) for name, value in without.items())
    assert states_without == states_with


def test_gradients_and_random_numbers_are_left_as_they_were(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_steps=1, record_dependency_every=1)
    for module in trainer.model.modules():  # so that passes draw random numbers
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    seen = []
    original = trainer._record_angles

    def watched(inputs: dict[str, Any]) -> None:
        kept = [torch.ones_like(p) for p in trainer.model.parameters()]
        for parameter, gradient in zip(trainer.model.parameters(), kept, strict=True):
            parameter.grad = gradient
        state = torch.get_rng_state()
        original(inputs)
        seen.append(torch.equal(state, torch.get_rng_state()))
        for parameter, gradient in zip(trainer.model.parameters(), kept, strict=True):
            seen.append(parameter.grad is gradient and bool((gradient == 1).all()))
            parameter.grad = None

    trainer._record_angles = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(recorded(trainer).angles) == 1
    assert seen
    assert all(seen)


def test_it_is_due_on_a_schedule_and_fewer_tokens_make_fewer_groups(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(
        max_steps=4, per_device_train_batch_size=1, max_completion_length=2, record_dependency_every=2
    )
    trainer.train()
    records = recorded(trainer).angles
    assert [record["step"] for record in records] == [1, 2, 4]
    for record in records:
        assert record["tokens"] == [1] * len(record["tokens"])
        assert 1 <= len(record["tokens"]) <= 2


def test_rows_without_an_image_have_no_angles_and_no_thirds(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset
) -> None:
    trainer = make_trainer(with_images_removed(prompts, lambda row: False), record_dependency_every=1)
    trainer.train()
    log = recorded(trainer)
    assert log.steps
    assert log.angles == log.thirds == []


@pytest.mark.parametrize("method", ["opd", "matched", "teacher_prior"])
def test_methods_without_the_streams_refuse(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match=f"method='{method}' does not compute the parts whose angles"):
        VGSConfig(output_dir=str(tmp_path), method=method, record_dependency_every=1, use_cpu=True)


def test_thirds_add_up_to_the_logged_loss_and_rise_with_dependency(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    log = recorded(trainer)
    assert [record["step"] for record in log.thirds] == [1, 2]
    for record in log.thirds:
        for part in ("standard", "vis", "lang"):
            total = sum(count * mean for count, mean in zip(record["tokens"], record[part], strict=True))
            logged = log.steps[record["step"]][f"loss/{part}"]
            assert total / sum(record["tokens"]) == pytest.approx(logged, rel=1e-4)


def test_thirds_are_those_of_the_dependency(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer, _, batches = run_one_step(make_trainer)
    (record,) = recorded(trainer).thirds
    scores, losses = textbook(trainer.model, trainer.teacher_model, batches[0])
    for third, chosen in enumerate(scores.argsort().tensor_split(3)):
        assert record["tokens"][third] == len(chosen)
        for part, values in losses.items():
            assert record[part][third] == pytest.approx(values[chosen].mean().item(), rel=1e-3)


def test_a_completion_is_recorded_with_the_dependency_of_its_tokens(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer, _, batches = run_one_step(make_trainer)
    scores, _ = textbook(trainer.model, trainer.teacher_model, batches[0])
    expected = scores.split(batches[0]["completion_mask"].sum(dim=1).tolist())
    records = recorded(trainer).completions
    assert records
    for record in records:
        assert len(record["dependency"]) == len(record["tokens"])
        assert any(record["dependency"] == pytest.approx(row.tolist(), abs=2e-4) for row in expected)


def test_opd_records_no_dependency(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(method="opd", max_steps=1)
    trainer.train()
    log = recorded(trainer)
    assert log.completions
    assert all(record["dependency"] is None for record in log.completions)
    assert log.thirds == []


def test_time_alone_hides_the_spans_within() -> None:
    timer = StepTimer(torch.device("cpu"))
    with timer.span("step"), timer.alone("recording"), timer.span("teacher"):
        pass
    assert timer.flush().keys() == {"step", "recording"}
