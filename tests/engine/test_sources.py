"""How student and teacher are loaded from their names: in which dtype, on which device, from which files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen3VLProcessor
from trl import ModelConfig
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.commands.arguments import EvalArguments
from vgs_distill.errors import InputError
from vgs_distill.models.sources import student_source, teacher_source
from vgs_distill.models.weights import with_adapter

from tests.small_run import ON_CPU, build_student


def options(arguments: Any = None, teacher_device: str | None = None, **settings: Any) -> dict[str, Any]:
    config = VGSConfig(**ON_CPU, **settings)
    config.teacher_device = teacher_device  # which may be none of this machine
    return teacher_source("teacher", config, arguments).options


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_a_teacher_on_a_gpu_is_in_bf16_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    able = True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    on_gpu: dict[str, Any] = {"teacher_device": "cuda:1"}
    assert options(**on_gpu) == {"dtype": torch.bfloat16, "device_map": "cuda:1"}
    assert options(ModelConfig(dtype="float32"), **on_gpu)["dtype"] == torch.bfloat16, "that is the student's"
    assert options(**on_gpu, teacher_model_init_kwargs={"dtype": "float32"})["dtype"] == "float32"
    able = False
    assert "dtype" not in options(**on_gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_at_hand_is_asked(tmp_path: Path) -> None:
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    settings = {**ON_CPU, "use_cpu": False}
    for where in (None, "offload", "cuda:0"):
        assert teacher_source("teacher", VGSConfig(**settings, teacher_device=where)).options.get("dtype") == expected
    assert "dtype" not in teacher_source("teacher", VGSConfig(**settings, teacher_device="cpu")).options


def test_on_the_cpu_and_in_an_evaluation_the_teacher_is_loaded_as_the_student() -> None:
    given = ModelConfig(dtype="float16", attn_implementation="eager")
    assert options() == {}
    assert options(teacher_device="offload") == {"device_map": "cpu"}
    assert options(given) == {"dtype": "float16", "attn_implementation": "eager"}
    assert options(given) == student_source("student", VGSConfig(**ON_CPU), given).options
    assert teacher_source("teacher", EvalArguments(), given).options == options(given)


def test_the_trainer_loads_both_from_their_names(processor: Qwen3VLProcessor, prompts: Any, tmp_path: Path) -> None:
    for seed, (name, width) in enumerate((("student", 32), ("teacher", 48))):
        build_student(processor, seed, width).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    config = VGSConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, max_completion_length=3,
        teacher_device="offload", teacher_model_init_kwargs={"dtype": "bfloat16"},
        model_init_kwargs={"attn_implementation": "eager"}, **ON_CPU,
    )  # fmt: skip
    trainer = VGSTrainer(str(tmp_path / "student"), str(tmp_path / "teacher"), config, prompts)
    assert trainer.model.config._attn_implementation == "eager"
    assert dtypes(trainer.model) == {torch.float32}
    assert dtypes(trainer.teacher_model) == {torch.bfloat16}
    assert trainer.processing_class.tokenizer.padding_side == "left"
    trainer.train()


def test_an_option_that_no_model_takes_is_named(make_model: Any, tmp_path: Path) -> None:
    make_model(1).save_pretrained(tmp_path)
    config = VGSConfig(**ON_CPU, model_init_kwargs={"colour": "red", "revision": "main", "trust_remote_code": False})
    source = student_source(str(tmp_path), config)
    assert (source.revision, source.trust_remote_code, source.options) == ("main", False, {"colour": "red"})
    with pytest.raises(InputError, match=r"cannot load the student .*colour"):
        source.load()


def test_a_pickled_adapter_is_not_opened(make_model: Any, tmp_path: Path) -> None:
    adapter = get_peft_model(make_model(1), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"cannot use the adapter .* adapter_model.safetensors"):
        with_adapter(make_model(1), str(tmp_path))


def test_an_adapter_is_no_student(
    make_trainer: Any, processor: Qwen3VLProcessor, make_model: Any, tmp_path: Path
) -> None:
    make_model(1).save_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"the student .*adapter' is an adapter, .* merge it first: vgs export"):
        make_trainer(student=str(tmp_path / "adapter"))
