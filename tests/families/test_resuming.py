"""Every family: an interrupted and resumed run ends as the uninterrupted one, and a finished run stays as it is.

Checkpoints name weights as the hub does, which in most families is not what the model calls its parameters.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from vgs_distill.errors import InputError
from vgs_distill.models.weights import load_weights

from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.families.test_families import every_family
from tests.families.training import make_trainer, processor_of, questions

STEPS = 3  # the last one in the middle of an epoch
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
RENAMED = "qwen2_5_vl"  # 'model.visual.…' in the model, 'visual.…' in its checkpoints


class Interrupt(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


class EarlierIsBetter(TrainerCallback):
    """A metric by which the first checkpoint is the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
        metrics["eval_step"] = state.global_step


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name in expected if not torch.equal(got[name], expected[name])]


def small_model(seed: int, family: str = RENAMED, width: int = 32) -> Any:
    return SMALL_FAMILIES[family].model(processor_of(family), seed, width)


def interrupt_and_resume(family: str, tmp_path: Path, adapters: bool) -> None:
    models = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}  # as a user has them
    small_model(1, family).save_pretrained(models["student"])
    small_model(2, family, TEACHER_WIDTH).save_pretrained(models["teacher"])

    def trainer(folder: str, **settings: Any) -> Any:
        more = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if adapters else None
        return make_trainer(family, str(tmp_path / folder), **models, max_steps=STEPS, trainer=more, **settings)

    straight = trainer("straight")
    start = weights(straight.model)
    straight.train()
    assert differing(weights(straight.model), start)

    saving = {"save_strategy": "steps", "save_steps": 2}
    stopped = trainer("run", **saving)
    stopped.add_callback(Interrupt())
    with pytest.raises(SystemExit):
        stopped.train()
    assert stopped.state.global_step == 2
    resumed = trainer("run", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert not differing(weights(resumed.model), weights(straight.model))

    finished = trainer("run", **saving)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == STEPS
    assert not differing(weights(finished.model), weights(straight.model))


@every_family
def test_an_interrupted_run_ends_as_the_other_and_a_finished_one_stays(family: str, tmp_path: Path) -> None:
    interrupt_and_resume(family, tmp_path, adapters=False)


@pytest.mark.parametrize("family", [RENAMED, "llava_next", "gemma3"])
def test_adapters_resume_too(family: str, tmp_path: Path) -> None:
    interrupt_and_resume(family, tmp_path, adapters=True)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_best_model_is_loaded_at_the_end(adapters: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        RENAMED, str(tmp_path), save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_step", greater_is_better=False,
        trainer={
            "eval_dataset": questions(rows=4),
            "callbacks": [EarlierIsBetter()],
            "peft_config": LoraConfig(r=2, target_modules="all-linear") if adapters else None,
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    trainer.model.save_pretrained(tmp_path / "kept")
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    kept, first, second = (load_file(tmp_path / folder / name) for folder in ("kept", "checkpoint-1", "checkpoint-2"))
    assert not differing(kept, first)
    assert differing(kept, second)


@pytest.mark.parametrize("family", [RENAMED, "gemma3"])  # of which the second ties its head to its embedding
def test_weights_of_several_files_and_dtypes(family: str, tmp_path: Path) -> None:
    saved, model = (small_model(seed, family).to(torch.bfloat16) for seed in (1, 2))
    for each in (saved, model):
        each.get_input_embeddings().float()
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    before = {name: value.dtype for name, value in model.state_dict().items()}
    load_weights(model, tmp_path)
    assert not differing(weights(model), weights(saved))
    assert {name: value.dtype for name, value in model.state_dict().items()} == before


def without_one(tensors: dict[str, Tensor]) -> None:
    del tensors["visual.patch_embed.proj.weight"]


def with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors["visual.more.weight"] = torch.ones(2)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["visual.patch_embed.proj.weight"] = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_one, "1 are missing, first 'model.visual.patch_embed.proj.weight'; resume with the model"),
        (with_one_more, "1 are unknown, first 'model.visual.more.weight'"),
        (with_another_shape, "1 have another shape, first 'model.visual.patch_embed.proj.weight'"),
    ],
)
def test_weights_that_nothing_explains_are_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    small_model(1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = small_model(2)
    before = weights(model)
    with pytest.raises(InputError, match=sentence):
        load_weights(model, tmp_path)
    assert not differing(weights(model), before)


def test_adapters_of_other_layers_are_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    get_peft_model(small_model(1), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(small_model(1), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(InputError, match=r"are not those of this model: \d+ are missing, first '.*v_proj.lora_A"):
        load_weights(model, tmp_path)
    model = get_peft_model(small_model(1), LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(InputError, match=r"are not those of this model: \d+ are missing, first '.*k_proj.lora_A"):
        load_weights(model, tmp_path)
    model = get_peft_model(small_model(1), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"cannot load the weights in .*size mismatch"):
        load_weights(model, tmp_path)
