"""Where the weights of a step are known, the head's gradient goes straight into `.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vgs_distill import VGSTrainer
from vgs_distill import loss as loss_module

from tests.engine.test_methods import run_one_step

CALLS = ("linear_reverse_kl", "linear_decomposed_kl")


def asked_for(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> list[bool]:
    """What every call of the kernels asks for; `allowed` False: and is refused."""
    asked: list[bool] = []
    for name in CALLS:
        original = getattr(loss_module, name)

        def call(*args: Any, original: Any = original, accumulate_head_grad: bool = False, **options: Any) -> Any:
            asked.append(accumulate_head_grad)
            return original(*args, accumulate_head_grad=accumulate_head_grad and allowed, **options)

        monkeypatch.setattr(loss_module, name, call)
    return asked


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({"method": "opd"}, {True}),
        ({"method": "vgs", "eta": 0.4, "language_preservation": 0.0}, {True}),
        ({"method": "vgs", "eta": 0.4, "language_preservation": 1.0}, {True, False}),  # λ is yet to be multiplied
        ({"method": "vgs", "eta": "measured"}, {False}),
        ({"method": "matched"}, {False}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_it_is_the_gradient_that_a_backward_pass_brings(
    make_trainer: Callable[..., VGSTrainer],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    asks: set[bool],
    bf16: bool,
) -> None:
    found = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            asked = asked_for(patch, allowed)
            trainer, applied, batches = run_one_step(
                make_trainer, gradient_accumulation_steps=2, per_device_train_batch_size=2, bf16=bf16, **settings
            )
        assert len(batches) == 2
        assert set(asked) == asks
        found.append(applied)
    scale = float(found[1].abs().max())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=(0.01 if bf16 else 1e-6) * scale)
    head = trainer.model.get_output_embeddings().weight
    assert head.dtype == torch.float32


def test_a_scaled_loss_and_a_step_that_evaluates_do_not_ask(
    make_trainer: Callable[..., VGSTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=1, method="opd")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    asked = asked_for(monkeypatch, allowed=True)
    trainer.train()
    assert asked
    assert not any(asked)
