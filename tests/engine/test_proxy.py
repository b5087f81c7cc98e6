"""The proxy of the parameter gradients: what its sums are, how they add up, and what a run records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vgs_distill import VGSTrainer
from vgs_distill.steering.predictor import GramianPredictor
from vgs_distill.steering.proxy import GradientProxy

from tests.engine.test_trainer import with_images_removed
from vgs_kernels import LMHead
from vgs_kernels import old_linear_decomposed_kl as linear_decomposed_kl


def random_states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = torch.randn(2, tokens, 6, dtype=torch.float64, generator=generator).unbind()
    return hidden, gradient


def test_coherent_is_the_gradient_of_a_linear_layer_before_the_norm() -> None:
    torch.manual_seed(0)
    tokens, width, vocab = 7, 6, 19
    states = torch.randn(2, tokens, width, dtype=torch.float64)  # with the image and without
    layer = torch.zeros(width, width, dtype=torch.float64, requires_grad=True)

    def normed(x: Tensor) -> Tensor:
        changed = x + x @ layer
        return x.norm(dim=1, keepdim=True) * changed / changed.norm(dim=1, keepdim=True)

    teacher, masked_teacher = torch.randn(2, tokens, 5, dtype=torch.float64).unbind()
    seen, masked = normed(states[0]), normed(states[1])
    loss = linear_decomposed_kl(
        seen, LMHead(torch.randn(vocab, width, dtype=torch.float64)),
        teacher, LMHead(torch.randn(vocab, 5, dtype=torch.float64)),
        masked_teacher_hidden=masked_teacher, masked_student_hidden=masked,
    )  # fmt: skip
    of_lang, of_vis, _ = loss.hidden_gradients
    assert of_lang is not None
    assert of_vis is not None
    proxy = GradientProxy.of_tokens((masked, of_lang), (seen, of_vis))
    for component, part in enumerate((loss.lang, loss.vis)):
        (expected,) = torch.autograd.grad(part, layer, retain_graph=True)
        torch.testing.assert_close(proxy.coherent[component], expected)


def test_between_coherent_and_incoherent() -> None:
    hidden, gradient = random_states(1, 0)
    one = GradientProxy.of_tokens((hidden, gradient), (hidden, gradient))
    # One token leaves nothing to cohere: both sums are the squared norm of the layer's gradient.
    torch.testing.assert_close(one.squares(), one.coherent.square().sum((1, 2)))
    repeated = hidden.expand(9, -1), gradient.expand(9, -1)
    alike = GradientProxy.of_tokens(repeated, None)
    assert alike.squares()[0] == pytest.approx(9**1.5 * one.squares()[0].item())  # 9 incoherent, 81 coherent
    assert alike.squares()[1] == 0
    along = GradientProxy.of_tokens((hidden, 3 * hidden), None)  # the norm layer lets nothing through
    assert along.squares()[0] < 1e-20


def test_sums_add_up_over_tokens_and_scale_with_each_component() -> None:
    lang, vis = random_states(8, 1), random_states(8, 2)
    whole = GradientProxy.of_tokens(lang, vis)
    parts = [
        GradientProxy.of_tokens((lang[0][rows], lang[1][rows]), (vis[0][rows], vis[1][rows]))
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(parts[0].plus(parts[1]).squares(), whole.squares())
    torch.testing.assert_close(whole.scaled(0.1).squares(), 0.01 * whole.squares())
    longer = GradientProxy.of_tokens(lang, (vis[0], 5 * vis[1]))
    torch.testing.assert_close(longer.squares(), whole.squares() * torch.tensor([1.0, 25.0]))


def test_bf16_and_autocast_keep_float32_sums() -> None:
    hidden, gradient = (t.bfloat16() for t in random_states(50, 3))
    plain = GradientProxy.of_tokens((hidden, gradient), None)
    assert plain.coherent.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(GradientProxy.of_tokens((hidden, gradient), None).coherent, plain.coherent)


def recorded_proxies(trainer: VGSTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    original = GramianPredictor.observe

    def observe(self: GramianPredictor, proxy: Tensor) -> None:
        seen.append(proxy)
        original(self, proxy)

    monkeypatch.setattr(GramianPredictor, "observe", observe)
    trainer.train()
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("decomposition", ["matched", "teacher_prior"])
def test_accumulation_does_not_change_the_proxy(
    make_trainer: Callable[..., VGSTrainer], prompts: Any, decomposition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = with_images_removed(prompts, lambda row: row % 3 > 0)
    (one,), (four,) = (
        recorded_proxies(
            make_trainer(
                mixed, steering="amortized", refresh_every=0, decomposition=decomposition, max_steps=1,
                per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            ),
            monkeypatch,
        )
        for size in (8, 2)
    )  # fmt: skip
    assert (one > 0).all()
    torch.testing.assert_close(one, four, rtol=1e-4, atol=0)


def test_a_frozen_backbone_is_steered_too(make_trainer: Callable[..., VGSTrainer], make_model: Any) -> None:
    student = make_model(1).requires_grad_(False)
    head = student.get_output_embeddings().weight.requires_grad_()
    before = head.detach().clone()
    trainer = make_trainer(student=student, steering="amortized", refresh_every=2, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert not torch.equal(head, before)
    rows = [row for row in trainer.state.log_history if "steering/weight_ratio" in row]
    assert len(rows) == 3
    assert all(0 < row["steering/weight_ratio"] < 1e6 for row in rows)
