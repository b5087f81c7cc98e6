"""Bad input to commands: one clear sentence, exit code 2, no traceback, and nothing left in the output folder.

Bad rows and images: `test_bad_data.py`; forms of rows that are converted instead: `test_row_formats.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - its log keeps the stderr of its first import, which must outlive one command
import pytest
from vgs_distill.commands.fields import COMMON
from vgs_distill.errors import InputError

from tests.command_line import invoke, refused
from tests.conftest import Workspace
from tests.small_run import ON_CPU

NEEDED = [f"--{name}=x" for name in COMMON["train"]["needed"]]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# Fields of run.yaml that are wrong, and what the sentence says. `...` leaves a field out.
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "key of YAML": ({"gama": 0.5}, "unknown key 'gama'; did you mean 'gamma'?"),
    "type of a number": ({"max_steps": 2.5}, "max_steps: invalid int value: '2.5'"),
    "word for a number": ({"gamma_start": "much"}, "gamma_start: invalid float value: 'much'"),
    "list for a number": ({"gamma": [0.5, 0.8]}, "gamma is a list"),
    "mapping for a word": ({"method": {"a": 1}}, "method is a mapping"),
    "no value": ({"method": None}, "method has no value"),
    "method": ({"method": "mached"}, "unknown method 'mached'; choose one of vgs, opd,"),
    "name of earlier days": (
        {"decomposition": "bayes"},
        "decomposition is no setting any more; write method='vgs_unit'",
    ),
    "image mask": ({"image_mask": "grey"}, "unknown image_mask 'grey'"),
    "word for gamma": ({"gamma": "much"}, "gamma must be a number of at least 0 or 'adaptive', got 'much'"),
    "gamma out of range": ({"gamma": -1.5}, "gamma must be a number of at least 0 or 'adaptive', got -1.5"),
    "weight ratio": ({"max_weight_ratio": -1}, "max_weight_ratio must be positive"),
    "forward KL": ({"beta": 0.5}, "every method distils by the reverse KL divergence"),
    "fp16": ({"fp16": True}, "which the loss scaling of fp16 changes"),
    "learning rate below 0": ({"learning_rate": -1e-6}, "learning_rate must be 0 or more, and finite, got -1e-06"),
    "learning rate NaN": ({"learning_rate": "nan"}, "learning_rate must be 0 or more, and finite, got nan"),
    "endless epochs": ({"num_train_epochs": "inf"}, "num_train_epochs must be positive, got inf"),
    "no steps": ({"max_steps": 0}, "max_steps must be 1 or more, or -1 to go by num_train_epochs, got 0"),
    "empty batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 or more, got 0"),
    "no accumulation": ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be 1 or more, got -1"),
    "weight decay NaN": ({"weight_decay": "nan"}, "weight_decay must be 0 or more, and finite, got nan"),
    "negative clipping": ({"max_grad_norm": -1}, "max_grad_norm must be 0 or more, and finite, got -1.0"),
    "top_p": ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0.0"),
    "teacher device unknown": ({"teacher_device": "gpu"}, "teacher_device='gpu' is no device of this machine"),
    "teacher device absent": ({"teacher_device": "cuda:99"}, "teacher_device='cuda:99' is no device of this machine"),
    "word for a mapping": ({"model_init_kwargs": "fast"}, "model_init_kwargs must be a mapping, as in"),
    "no completion": ({"max_completion_length": 0}, "max_completion_length must be 1 or more"),
    "temperature": ({"temperature": 0}, "temperature must be positive"),
    "DeepSpeed with exact": ({"deepspeed": "zero2.json"}, "DeepSpeed steps inside backward"),
    "no model": ({"model_name_or_path": ...}, "model_name_or_path must be given"),
    "no teacher": ({"teacher_model_name_or_path": ...}, "teacher_model_name_or_path must be given"),
    "no dataset": ({"dataset_name": ...}, "dataset_name must be given"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "there is no student model at './nowhere'"),
    "missing teacher": ({"teacher_model_name_or_path": "./nowhere"}, "there is no teacher model at './nowhere'"),
    "missing dataset": ({"dataset_name": "./nowhere.jsonl"}, "there is no dataset at './nowhere.jsonl'"),
    "kind of dataset": ({"dataset_name": __file__}, "cannot read"),
    "endless stream": ({"dataset_streaming": True, "max_steps": -1}, "set max_steps with dataset_streaming"),
    "resume from nowhere": (
        {"resume_from_checkpoint": "./nowhere"},
        "resume_from_checkpoint='nowhere' is not a folder",
    ),
    "resume from nothing": ({"resume_from_checkpoint": True}, "there is no whole checkpoint in"),
    "FlashAttention absent": ({"attn_implementation": "flash_attention_3"}, "use 'sdpa'"),
    "optimizer": ({"optim": "adamw_torsh"}, "optim cannot be 'adamw_torsh'; did you mean 'adamw_torch'?"),
    "adapter of nothing": ({"use_peft": True, "lora_target_modules": ["nothing"]}, "Target modules"),
    "tracker": ({"report_to": "nowhere"}, "nowhere is not supported"),
    "attention unknown": ({"attn_implementation": "fast"}, "cannot load the student"),
    "4 and 8 bits": ({"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_wrong_field(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    changes, sentence = FIELDS[kind]
    run = tmp_path / "run"
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), **changes)
    assert sentence in refused("train", "--config", config)
    assert not run.exists()


def changed_model(source: Path, target: Path, **config: Any) -> str:
    """A copy of a model whose config differs."""
    shutil.copytree(source, target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return str(target)


def pickled_weights(workspace: Workspace, target: Path) -> dict[str, str]:
    import torch

    folder = changed_model(workspace.root / "student", target)
    (target / "model.safetensors").unlink()
    torch.save({}, target / "pytorch_model.bin")
    return {"model_name_or_path": folder}


def without_weights(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "teacher", target)
    (target / "model.safetensors").unlink()
    return {"teacher_model_name_or_path": folder}


def damaged_weights(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "student", target)
    (target / "model.safetensors").write_bytes(b"half a file")
    return {"model_name_or_path": folder}


def without_vision(workspace: Workspace, target: Path) -> dict[str, str]:
    from transformers import Qwen3Config

    Qwen3Config(architectures=["Qwen3ForCausalLM"]).save_pretrained(target)
    return {"model_name_or_path": str(target)}


def without_processor(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "student", target)
    (target / "processor_config.json").unlink()
    return {"model_name_or_path": folder}


def changed_file(name: str, folder: str, **values: Any) -> None:
    path = Path(folder) / name
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**settings, **values}.items() if value is not ...}))


def without_end(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "student", target)
    changed_file("tokenizer_config.json", folder, eos_token=...)
    changed_file("generation_config.json", folder, eos_token_id=...)
    return {"model_name_or_path": folder}


def without_chat_template(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "student", target)
    (target / "chat_template.jinja").unlink()
    return {"model_name_or_path": folder}


def foreign_code(workspace: Workspace, target: Path) -> dict[str, str]:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    folder = changed_model(workspace.root / "student", target, model_type="own", auto_map=auto_map)
    (target / "configuration_own.py").write_text("raise SystemExit('ran')")
    return {"model_name_or_path": folder}


def other_words(workspace: Workspace, target: Path) -> dict[str, str]:
    from vgs_distill.demo.models import build_processor

    folder = changed_model(workspace.root / "teacher", target)
    build_processor(["other", "words"]).save_pretrained(target)
    return {"teacher_model_name_or_path": folder}


def other_splitting(workspace: Workspace, target: Path) -> dict[str, str]:
    folder = changed_model(workspace.root / "teacher", target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"teacher_model_name_or_path": folder}


MODELS: dict[str, tuple[Callable[[Workspace, Path], dict[str, str]], str]] = {
    "pickled weights": (pickled_weights, "pickled weights (pytorch_model.bin), which are never loaded"),
    "no weights": (without_weights, "the teacher"),
    "damaged weights": (damaged_weights, "cannot load the student"),
    "no vision": (without_vision, "needs a model that reads images"),
    "no processor": (without_processor, "Can't load image processor"),
    "no end token": (without_end, "neither the tokenizer nor the config of the student names an end token"),
    "no chat template": (without_chat_template, "the processor of the student has no chat template"),
    "code of its own": (foreign_code, "ships code of its own"),
    "other vocabulary": (other_words, "different vocabularies"),
    "other tokenizer": (other_splitting, "split text differently"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_wrong_model(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    make, sentence = MODELS[kind]
    run = tmp_path / "run"
    changes = make(workspace, tmp_path / "model")
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), **changes)
    assert sentence in refused("train", "--config", config)
    assert not run.exists()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["pickled weights", "no weights", "damaged weights", "code of its own"])
def test_the_trainer_refuses_a_wrong_model_in_the_same_words(
    kind: str, role: str, workspace: Workspace, tmp_path: Path
) -> None:
    from vgs_distill import VGSConfig, VGSTrainer, load_rows

    (folder,) = MODELS[kind][0](workspace, tmp_path / "model").values()
    models = {name: folder if name == role else str(workspace.root / name) for name in ("student", "teacher")}
    run = str(tmp_path / "run")
    changes = {"model_name_or_path": models["student"], "teacher_model_name_or_path": models["teacher"]}
    told = refused("train", "--config", workspace.yaml(tmp_path / "run.yaml", output_dir=run, **changes))
    assert f"the {role} {folder!r}" in told
    dataset = load_rows(str(workspace.root / "rows.jsonl"), split="train")
    with pytest.raises(InputError) as error:
        VGSTrainer(*models.values(), VGSConfig(output_dir=run, **ON_CPU), dataset)
    assert told == f"vgs: {error.value}"


def test_an_output_dir_that_is_a_file(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"))
    assert "cannot write to the output directory" in refused("train", "--config", config)
    assert (tmp_path / "run").read_text() == "mine"


def test_an_output_dir_that_cannot_be_written(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml", output_dir="/proc/vgs/run")  # not even root writes there
    assert "cannot write to the output directory" in refused("train", "--config", config)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-7", "run.yaml", "README.md"])
def test_an_output_dir_of_something_else(name: str, workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("mine")
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run))
    sentence = refused("train", "--config", config)
    assert f"holds {name!r}, which the run would overwrite; choose another one, or continue" in sentence
    assert entries(run) == [name]
    assert (run / name).read_text() == "mine"


def test_no_output_dir(workspace: Workspace, tmp_path: Path) -> None:
    assert "output_dir must be given" in refused("train", "--config", workspace.yaml(tmp_path / "run.yaml"))


def aliases(levels: int) -> str:
    """A configuration of a few lines that stands for 9 ** levels values."""
    lines = ["model_init_kwargs:", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"  a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gamma: [0.8", "is not valid YAML"),
        ("just words", "does not hold 'field: value' lines"),
        ("", "does not hold 'field: value' lines"),
        ("report_to: " + 2000 * "[" + 2000 * "]", "is nested too deeply"),
        ("model_init_kwargs: " + 2000 * "{a: " + "1" + 2000 * "}", "is nested too deeply"),
        ("report_to: &a [*a]", "is not valid YAML: found unconstructable recursive node"),
        (aliases(9), "stands for more than 10000 values once its aliases are followed"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert sentence in refused("train", "--config", str(tmp_path / "run.yaml"))


def test_a_configuration_that_is_not_there() -> None:
    assert "cannot read the configuration 'nowhere.yaml'" in refused("train", "--config", "./nowhere.yaml")
    assert "cannot read the configuration" in refused("train", "--config")


def test_a_wrong_flag() -> None:
    assert "no flag '--gama'; did you mean 'gamma'?" in refused("train", "--gama", "0.5")
    assert "no flag '--answer-colum'; did you mean 'answer_column'?" in refused("eval", "--answer-colum", "a")


def test_a_flag_that_is_nested_too_deeply() -> None:
    nested = 2000 * '{"a":' + "1" + 2000 * "}"
    assert "a value is nested too deeply" in refused("train", *NEEDED, "--model_init_kwargs", nested, "--use_cpu")


def test_a_flag_without_its_value() -> None:
    assert "gamma: expected one argument" in refused("train", *NEEDED, "--gamma")


def test_liger_asked_for_and_absent(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgs_distill.models.sources.is_liger_kernel_available", lambda: False)
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), use_liger_kernel=True)
    assert "pip install liger-kernel" in refused("train", "--config", config)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed steps inside backward"),
    ],
)
def test_a_launcher_that_steering_cannot_use(
    environment: dict[str, str], sentence: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"))
    assert sentence in refused("train", "--config", config)
    assert not (tmp_path / "run").exists()


def evaluation(workspace: Workspace, tmp_path: Path, *more: str) -> list[str]:
    files = ["--output_file", str(tmp_path / "eval.json"), "--dataset_name", str(workspace.root / "rows.jsonl")]
    return ["--model_name_or_path", str(workspace.root / "student"), "--use_cpu", *files, *more]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--answer_column", "reply"], "has no column 'reply'"),
        (["--answer_pattern", "(answer"], "answer_pattern is not a regular expression"),
        (["--method", "halves"], "unknown method 'halves'"),
        (["--max_rows", "0"], "max_rows must be 1 or more"),
        (["--teacher_model_name_or_path", "./nowhere"], "there is no teacher model"),
        (["--output_file", "/proc/vgs/eval.json"], "cannot write"),
    ],
)
def test_a_wrong_evaluation(more: list[str], sentence: str, workspace: Workspace, tmp_path: Path) -> None:
    assert sentence in refused("eval", *evaluation(workspace, tmp_path, *more))
    assert entries(tmp_path) == []


def test_a_shell_sees_the_sentence_and_the_code(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), model_name_or_path="./nowhere")
    result = subprocess.run(
        [sys.executable, "-m", "vgs_distill", "train", "--config", config],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("vgs: there is no student model at './nowhere'")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--debug"], []])
def test_debug_lets_the_error_through(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGS_DEBUG", "0" if flags else "1")
    with pytest.raises(InputError):
        invoke([*flags, "train", "--config", "./nowhere.yaml"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steering", "none"], "steering is no setting any more; write method='opd'"),
        (["--steering=exact"], "steering is no setting any more; write eta='measured'"),
        (["--decomposition", "matched"], "decomposition is no setting any more; write method='matched'"),
        (["--refresh_drift", "2"], "refresh_drift is no setting any more; leave it out"),
    ],
)
def test_a_name_of_earlier_days_is_answered_by_its_new_one(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused("train", *arguments)
    if "=" not in arguments[0]:
        (tmp_path / "run.yaml").write_text(f"{arguments[0].removeprefix('--')}: {arguments[1]}\n")
        assert sentence in refused("train", "--config", str(tmp_path / "run.yaml"))
