"""The pieces for other trainers, alone: two losses steered, hidden states by the wrapped forward, the masked view."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vgs_distill import DecomposedLoss, MaskedView, MethodSettings, Steering, VGSTrainer, View
from vgs_distill.errors import InputError
from vgs_distill.masking import Batch
from vgs_distill.rollouts import loss_mask
from vgs_distill.steering.averages import GramianAverage
from vgs_distill.steering.methods import METHODS

from vgs_kernels import UnitGradients, VisualGradientSteering, head_passes_through

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------ Steering


def model_and_batches(steps: int, accumulation: int) -> tuple[nn.Module, list[list[Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].bias.requires_grad_(False)
    return model, [[torch.randn(4, 6, dtype=torch.float64) for _ in range(accumulation)] for _ in range(steps)]


def losses(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    output = model(batch)
    return output.square().mean(), output[:, 0].exp().mean()


def textbook(model: nn.Module, step: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Both gradients of a step in one vector each, by autograd."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.stack([losses(model, batch)[part] for batch in step]).sum() for part in (0, 1)]
    grads = [torch.autograd.grad(total, trained) for total in sums]
    first, second = (torch.cat([g.flatten() for g in grad]) for grad in grads)
    return first, second


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def run_micro_batch(steering: Steering, way: str, model: Any, batch: Any) -> None:
    with steering.micro_batch(model):
        if way == "backward":
            steering.backward(*losses(model, batch))
        else:
            steering.sequential(*(lambda p=part: losses(model, batch)[p] for part in (0, 1)))


@pytest.mark.parametrize("policy", [VisualGradientSteering(2.0), UnitGradients(0.7)])
@pytest.mark.parametrize("way", ["backward", "sequential"])
def test_the_step_is_steered_by_its_own_gramian(policy: Any, way: str) -> None:
    model, (step,) = model_and_batches(1, 3)
    steering = Steering(model.parameters(), policy)
    for batch in step:
        run_micro_batch(steering, way, model, batch)
        assert all(p.grad is None for p in model.parameters()), "one gradient alone may not meet an optimizer"
    record = steering.finish()
    first, second = textbook(model, step)
    gramian = torch.stack([first, second]) @ torch.stack([first, second]).T
    weights = policy(gramian)
    assert record is not None
    torch.testing.assert_close(record.gramian, gramian)
    torch.testing.assert_close(flat(model), weights[0] * first + weights[1] * second)
    assert model[0].bias.grad is None


@pytest.mark.parametrize("way", ["backward", "sequential"])
def test_between_measurements_the_average_steers(way: str) -> None:
    policy = VisualGradientSteering(2.0)
    model, steps = model_and_batches(3, 2)
    steering = Steering(model.parameters(), policy, "amortized", refresh_every=2)
    measured = GramianAverage(2, torch.device("cpu"))
    for number, step in enumerate(steps):
        for batch in step:
            run_micro_batch(steering, way, model, batch)
        steering.finish()
        pair = torch.stack(textbook(model, step))
        if number != 1:
            measured.refresh(pair @ pair.T)
            weights = policy(pair @ pair.T)
        else:
            weights = policy(measured.gramian())
        torch.testing.assert_close(flat(model), (weights.to(pair) @ pair), rtol=1e-5, atol=1e-8)
        resumed = Steering(model.parameters(), policy, "amortized", refresh_every=2)
        resumed.load_state_dict(json.loads(json.dumps(steering.state_dict())))
        steering = resumed
        model.zero_grad()


def test_what_cannot_be_steered_is_said() -> None:
    model, ((batch,),) = model_and_batches(1, 1)
    policy = VisualGradientSteering(2.0)
    with pytest.raises(InputError, match="mode must be 'measured' or 'amortized', got 'exact'"):
        Steering(model.parameters(), policy, "exact")
    with pytest.raises(InputError, match="none of the parameters needs a gradient"):
        Steering([torch.ones(2)], policy)
    steering = Steering(model.parameters(), policy)
    with pytest.raises(InputError, match="no micro-batch has been run"):
        steering.finish()
    with pytest.raises(InputError, match="run losses back inside"):
        steering.backward(*losses(model, batch))

    class DeepSpeedEngine(nn.Module):
        """What Steering asks of one: its name."""

    with pytest.raises(InputError, match="wrapped by DeepSpeedEngine"), steering.micro_batch(DeepSpeedEngine()):
        pass


@pytest.mark.slow
def test_two_processes_are_steered_as_one() -> None:
    """DDP and FSDP2 by `pieces_worker.py`, which compares with plain torch on the whole batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    result = subprocess.run(
        [*launcher, str(Path(__file__).with_name("pieces_worker.py"))],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(set(result.stdout.split())) == ["ddp", "fsdp2", "refused"]


# ------------------------------------------------------------------ MaskedView


def read(processor: Any, contents: list[list[dict[str, Any]]], side: str) -> dict[str, Tensor]:
    processor.tokenizer.padding_side = side
    messages = [[{"role": "user", "content": content}] for content in contents]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        return dict(processor.apply_chat_template(messages, **options, processor_kwargs={"padding": True}))
    finally:
        processor.tokenizer.padding_side = "left"


def conversation(world: Any) -> list[list[dict[str, Any]]]:
    """Two rows with an image, one of them longer, and one without."""
    rows = world.training_questions(3, seed=1, prior=0.5)
    return [
        [{"type": "image", "image": rows[0].image}, {"type": "text", "text": rows[0].question}],
        [{"type": "text", "text": rows[1].question}],
        [{"type": "text", "text": rows[1].question}, {"type": "image", "image": rows[2].image}],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_dropping_the_tokens_leaves_the_prompt_that_the_template_writes_without_images(
    processor: Any, make_model: Callable[..., Any], world: Any, side: str
) -> None:
    model, contents = make_model(1), conversation(world)
    seen = read(processor, contents, side)
    without = [[part for part in content if part["type"] != "image"] for content in contents]
    expected = read(processor, without, side)
    seen["labels"] = torch.where(seen["attention_mask"].bool(), seen["input_ids"], -100)
    seen["position_ids"] = torch.zeros(3, *seen["input_ids"].shape, dtype=torch.long)
    view = MaskedView(model.config, processor)
    assert view.rows_with_evidence(seen).tolist() == [True, False, True]
    masked = view.drop_tokens(seen)
    assert masked.keys() == {"input_ids", "attention_mask", "labels", "position_ids"}
    real = expected["attention_mask"].bool()
    torch.testing.assert_close(masked["attention_mask"], expected["attention_mask"])
    torch.testing.assert_close(masked["input_ids"][real], expected["input_ids"][real])
    torch.testing.assert_close(masked["labels"], torch.where(real, expected["input_ids"], -100))
    for row, length in enumerate(real.sum(1).tolist()):
        torch.testing.assert_close(masked["position_ids"][:, row][:, real[row]], torch.arange(length).expand(3, -1))
    with torch.no_grad():
        ours = model(**{name: masked[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
        theirs = model(**{name: expected[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)


def test_dropping_from_jagged_tensors_gives_the_rows_of_the_padded_ones(
    processor: Any, make_model: Callable[..., Any], world: Any
) -> None:
    seen = read(processor, conversation(world), "right")
    view = MaskedView(make_model(1).config, processor)
    padded = view.drop_tokens({name: seen[name] for name in ("input_ids", "attention_mask")})
    lengths = seen["attention_mask"].sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(seen["input_ids"], lengths, strict=True)]
    jagged: dict[str, Any] = {
        "input_ids": rows,
        "position_ids": [torch.arange(length).expand(4, -1).contiguous() for length in lengths],
        "responses": [row[-2:] for row in rows],
    }
    jagged = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in jagged.items()}
    masked = view.drop_tokens({**jagged, "pixel_values": seen["pixel_values"], "temperature": 1.0})
    assert masked.keys() == {"input_ids", "position_ids", "responses", "temperature"}
    assert masked["responses"] is jagged["responses"]
    for row, ids in enumerate(masked["input_ids"].unbind()):
        torch.testing.assert_close(ids, padded["input_ids"][row][padded["attention_mask"][row].bool()])
        torch.testing.assert_close(masked["position_ids"].unbind()[row], torch.arange(len(ids)).expand(4, -1))


def test_blank_keeps_everything_but_the_picture(processor: Any, make_model: Callable[..., Any], world: Any) -> None:
    seen = read(processor, conversation(world), "left")
    masked = MaskedView(make_model(1).config, processor).blank(seen)
    assert masked.keys() == seen.keys()
    assert (masked["pixel_values"] == 0).all()
    assert not (seen["pixel_values"] == 0).all()


# ------------------------------------------------------------------ hidden states and losses


def test_hidden_states_leave_in_the_place_of_logits(processor: Any, make_model: Callable[..., Any], world: Any) -> None:
    model = make_model(1)
    seen = read(processor, conversation(world), "left")
    with torch.no_grad():
        with head_passes_through(model):
            hidden = model(**seen).logits
        torch.testing.assert_close(hidden, model.base_model(**seen).last_hidden_state)
        torch.testing.assert_close(model(**seen).logits, hidden @ model.lm_head.weight.T)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="model type 'qwen3_vl' scales or caps its logits"), head_passes_through(model):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_of_the_trainer(
    make_trainer: Callable[..., VGSTrainer], processor: Any, method: str, prompts: Any
) -> None:
    """The same rollout, as `VGSTrainer` reads it and as labels and tokens; values and gradients of every part."""
    trainer = make_trainer(method=method, language_preservation=1.0)
    trainer.model.train()
    rollout = trainer._prepare_inputs([prompts[index] for index in range(4)])
    student, teacher, batch = trainer.model, trainer.teacher_model, Batch.of(rollout)
    trainer._wrapped_student = student
    mask = loss_mask(rollout)
    preserves = METHODS[method].preserved is not None

    labels = torch.cat([torch.full_like(batch.prompt_ids, -100), batch.completion_ids.masked_fill(mask == 0, -100)], 1)
    whole = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    seen = {**whole, **batch.multimodal}
    masked = MaskedView(student.config, processor).drop_tokens(seen)
    loss = DecomposedLoss(MethodSettings(method=method, language_preservation=1.0))

    def run(micro_batch: Any) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}
        for view in micro_batch:
            for number, (part, value) in enumerate(view.parts.items(), 1):
                student.zero_grad()
                value.backward(retain_graph=number < len(view.parts))
                found[part] = value.detach(), flat(student)
        student.zero_grad()
        return found

    theirs = run(trainer._loss.micro_batch(student, teacher, batch, mask, mask.sum(), None, preserves))
    view = None if not METHODS[method].masks_teacher else View.of(masked)
    micro_batch = loss.views(student, teacher, View.of(seen), view, mask.sum(), preserves=preserves)
    ours = run(micro_batch)
    assert ours.keys() == theirs.keys() == set(range(len(METHODS[method].parts)))
    for part, (value, gradient) in theirs.items():
        torch.testing.assert_close(ours[part][0], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours[part][1], gradient, atol=1e-6, rtol=1e-4)
    assert set(micro_batch.result.per_token) == set(loss.logged)


def test_views_that_count_different_tokens_are_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(1)
    ids = torch.randint(5, 20, (2, 7))
    seen = View.of({"input_ids": ids, "labels": ids})
    loss = DecomposedLoss(MethodSettings())
    with pytest.raises(InputError, match="the views count different tokens, 12 with the image and 10 without"):
        loss.views(model, model, seen, View.of({"input_ids": ids[:, 1:], "labels": ids[:, 1:]}), 1.0)
    with pytest.raises(InputError, match="compares with the view without the image; hand in `masked`"):
        loss.views(model, model, seen, None, 1.0)
