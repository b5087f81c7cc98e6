"""Adapters, checkpointing, bf16, torch.compile, the teacher's place and vocabulary, long prompts: the same results."""

from __future__ import annotations

import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vgs_distill import VGSTrainer
from vgs_distill.masking import Batch
from vgs_distill.models.heads import backbone

from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.families.training import first_rows, make_trainer, processor_of, questions, step_logs

FAMILY = "qwen3_vl"


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])}


def small_model(seed: int, width: int = 32, vocabulary: int | None = None) -> Any:
    model = SMALL_FAMILIES[FAMILY].model(processor_of(FAMILY), seed, width)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def parameters_after(trainer: VGSTrainer) -> dict[str, Tensor]:
    trainer.train()
    assert all(math.isfinite(row["loss/standard"]) for row in step_logs(trainer))
    return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class Allocations(TorchDispatchMode):
    """Follows the tensors that operators make: bytes alive at the peak, and how many have one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.of_shape, self.alive, self.peak = shape, 0, 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.of_shape += value.shape == self.shape
        return out

    def _free(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("eta", ["measured", "amortized"])
def test_lora_leaves_the_base_alone_and_never_forms_the_gradient_of_the_head(eta: str, tmp_path: Path) -> None:
    seen = {}
    for kind, options in (("full", {}), ("LoRA", lora())):
        trainer = make_trainer(
            FAMILY, str(tmp_path), student=small_model(1, vocabulary=4096), teacher=small_model(2, 48, 4096),
            eta=eta, trainer=options, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        with Allocations(trainer.model.get_output_embeddings().weight.shape) as seen[kind]:
            trainer.train()
        moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
        if kind == "LoRA":
            assert moved == {name for name in before if "lora_" in name}
        print(f"{eta}, {kind}: head-shaped tensors {seen[kind].of_shape}, peak {seen[kind].peak / 2**20:.2f} MiB")
    assert seen["full"].of_shape > 0
    assert seen["LoRA"].of_shape == 0
    assert seen["LoRA"].peak < seen["full"].peak


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_update(use_reentrant: bool, adapters: bool, tmp_path: Path) -> None:
    updates, passes = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(
            FAMILY, str(tmp_path), gradient_checkpointing=checkpointing, trainer=lora() if adapters else None,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if checkpointing else None, max_steps=2,
        )  # fmt: skip
        count = [0]
        layer = next(m for n, m in trainer.model.named_modules() if n.endswith("language_model.layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        updates.append(parameters_after(trainer))
        passes.append(count[0])
    assert passes[1] > passes[0], "activations were computed anew"
    assert_same(*updates)


def test_bf16_runs_the_passes_of_the_loss_in_bf16(tmp_path: Path) -> None:
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(FAMILY, str(tmp_path), bf16=bf16, max_steps=1)
        dtypes = set()
        for model in (trainer.model, trainer.teacher_model):
            layer = next(m for n, m in model.named_modules() if n.endswith("language_model.layers.0.mlp.up_proj"))
            layer.register_forward_hook(lambda _, args, out, dtypes=dtypes: dtypes.add(out.dtype))
        trainer.train()
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        losses[bf16] = step_logs(trainer)[0]["loss/standard"]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


@pytest.mark.slow
def test_a_compiled_student_takes_the_same_step(tmp_path: Path) -> None:
    updates = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(
            "internvl", str(tmp_path), trainer=lora(), max_steps=1, per_device_train_batch_size=1, **settings
        )
        updates.append(parameters_after(trainer))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == bool(settings)
    assert_same(*updates, atol=1e-5)


@pytest.mark.parametrize("method", ["vgs", "opd"])
@pytest.mark.parametrize("where", ["offload", "cpu"])
def test_a_teacher_placed_elsewhere_teaches_the_same(where: str, method: str, tmp_path: Path) -> None:
    # AdamW would blow the rounding of tiny gradients up to whole steps.
    beside = parameters_after(make_trainer(FAMILY, str(tmp_path), method=method, optim="sgd"))
    trainer = make_trainer(FAMILY, str(tmp_path), method=method, optim="sgd", teacher_device=where)
    devices = {parameter.device.type for parameter in backbone(trainer.teacher_model).parameters()}
    assert devices == ({"meta"} if where == "offload" else {"cpu"})
    assert trainer.teacher_model.get_output_embeddings().weight.device.type == "cpu"
    assert_same(beside, parameters_after(trainer))


def test_padded_vocabularies_are_compared_where_both_have_entries(tmp_path: Path) -> None:
    real = len(processor_of(FAMILY).tokenizer)
    for ours, theirs in ((real + 32, real + 64), (real + 64, real + 32)):
        trainer = make_trainer(
            FAMILY, str(tmp_path), student=small_model(1, vocabulary=ours), teacher=small_model(2, 48, theirs)
        )
        trainer.model.eval()
        batch = Batch.of(inputs := trainer._prepare_inputs(first_rows(trainer, 4)))
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, inputs)
            logits = [
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.multimodal).logits
                for model in (trainer.model, trainer.teacher_model)
            ]
        p, q = (x[:, :-1][:, -batch.completion_ids.size(1) :, : real + 32].log_softmax(-1) for x in logits)
        expected = (p.exp() * (p - q)).sum(-1)[batch.completion_mask.bool()].mean()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
        assert batch.completion_ids.max() < real + 32, "padding that the teacher lacks is not sampled"
        trainer.model.train()
        trainer.train()
    padded = {"student": small_model(1, vocabulary=real + 32), "teacher": small_model(2)}
    make_trainer(FAMILY, str(tmp_path), **padded, method="opd", max_steps=1).train()
    with pytest.raises(ValueError, match=f"but the tokenizer has {real} tokens; the teacher judges token by token"):
        make_trainer(FAMILY, str(tmp_path), teacher=small_model(2, TEACHER_WIDTH, real - 4))


@pytest.mark.parametrize(("student", "teacher"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_heads_of_different_dtype(student: torch.dtype, teacher: torch.dtype, tmp_path: Path) -> None:
    trainer = make_trainer(
        FAMILY, str(tmp_path), student=small_model(1).to(student), teacher=small_model(2, 48).to(teacher)
    )
    parameters_after(trainer)


def test_rows_with_long_prompts_are_left_out_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = questions((1, 3))  # three images take a row past the limit
    trainer = make_trainer(FAMILY, str(tmp_path), dataset, max_prompt_length=24)
    trainer.model.eval()
    logger = logging.getLogger("vgs_distill.trainer")
    logger.addHandler(caplog.handler)
    try:
        output = trainer._prepare_inputs(first_rows(trainer, 4))
    finally:
        logger.removeHandler(caplog.handler)
    assert "2 of 4 prompts are longer than max_prompt_length=24 tokens, images included" in caplog.text
    assert output["completion_mask"].sum(dim=1).bool().tolist() == [True, False, True, False]
    assert output["prompt_ids"].size(1) <= 24
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    assert len(output["image_grid_thw"]) == 4, "the stand-ins have one image each"
    long = trainer._prepare_inputs(first_rows(trainer, 2)[1:])
    assert not long["completion_mask"].any(), "a batch may have no row that counts"
    trainer.model.train()
    trainer.train()
    assert all(math.isfinite(row["loss/standard"]) for row in step_logs(trainer))
    with pytest.raises(ValueError, match="every prompt so far is longer than max_prompt_length=5 tokens"):
        make_trainer(FAMILY, str(tmp_path), max_prompt_length=5).train()


def test_the_teacher_is_packed_where_that_wastes_no_padding(tmp_path: Path) -> None:
    for settings, packed in (
        ({"image_mask": "drop"}, False),
        ({"image_mask": "attention"}, True),
        ({"image_mask": "drop", "teacher_device": "offload"}, True),
        ({"image_mask": "blank", "pack_teacher": False}, False),
    ):
        assert make_trainer(FAMILY, str(tmp_path), **settings).args.pack_teacher is packed


def test_a_limit_that_no_prompt_can_meet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_prompt_length must be 1 or more, got 0"):
        make_trainer(FAMILY, str(tmp_path), max_prompt_length=0)
