"""Prompts are rendered the same in training and in evaluation: system prompts, arguments of the template, tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from vgs_distill.commands import evaluate
from vgs_distill.inputs.formats import canonical_row
from vgs_distill.rollouts import Rollouts

from tests.command_line import invoke
from tests.conftest import Workspace
from tests.small_run import ON_CPU

SYSTEM = "how many"  # words of the small vocabulary, which has none for the role


def rendered(processor: Any, ids: Any) -> list[str]:
    return [processor.tokenizer.decode(row).replace(processor.tokenizer.pad_token, "").strip() for row in ids]


def test_a_run_and_its_evaluation_render_prompts_alike(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, run = tmp_path / "student", tmp_path / "run"
    shutil.copytree(workspace.root / "student", student)
    processor = AutoProcessor.from_pretrained(student)
    processor.chat_template += "{%- if word -%}{{ word + ' ' }}{%- endif -%}"
    processor.save_pretrained(student)
    trained: list[str] = []
    evaluated: list[str] = []
    inputs = evaluate._Evaluator._inputs

    def keep(self: Any, rows: Any, evidence: bool) -> Any:
        made = inputs(self, rows, evidence)
        if evidence:
            evaluated.extend(rendered(self.processor, made["input_ids"]))
        return made

    monkeypatch.setattr(evaluate._Evaluator, "_inputs", keep)
    monkeypatch.setattr(
        Rollouts,
        "_sample",
        lambda self, rows, sample=Rollouts._sample: (
            trained.extend(rendered(self.processing_class, (made := sample(self, rows))["prompt_ids"])) or made
        ),
    )
    settings = workspace.yaml(
        tmp_path / "run.yaml",
        model_name_or_path=str(student),
        output_dir=str(run),
        max_steps=1,
        per_device_train_batch_size=16,  # all rows there are
        system_prompt=SYSTEM,
        chat_template_kwargs={"word": "red"},
    )
    assert invoke(["train", "--config", settings]).exit_code == 0
    rows = ["--dataset_name", str(workspace.root / "rows.jsonl"), "--max_completion_length", "2", "--use_cpu"]
    rows += ["--output_file", str(tmp_path / "eval.json"), "--max_rows", "3"]
    result = invoke(["eval", "--model_name_or_path", str(run), *rows])
    assert result.exit_code == 0, result.output
    assert len(evaluated) == 3
    assert all(
        f"<|unknown|> {SYSTEM} <|im_end|>" in prompt and prompt.endswith("assistant red") for prompt in evaluated
    )
    assert set(evaluated) <= set(trained)
    asked = ["--system_prompt", "objects are", "--chat_template_kwargs", '{"word": "blue"}']
    assert invoke(["eval", "--model_name_or_path", str(run), *rows, *asked]).exit_code == 0
    assert all(
        "<|unknown|> objects are <|im_end|>" in prompt and prompt.endswith("assistant blue") for prompt in evaluated[3:]
    )
    result = invoke(["eval", "--model_name_or_path", str(run), *rows, "--chat_template_kwargs", "word"])
    assert result.exit_code == 2
    assert "chat_template_kwargs must be a mapping" in result.output


def test_a_conversation_keeps_a_system_prompt_of_its_own() -> None:
    turns = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "?"},
    ]
    own = {"role": "system", "content": "be brief"}
    prompt = canonical_row({"prompt": [own, *turns]}, system_prompt=SYSTEM)["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[0]["content"] == [{"type": "text", "text": "be brief"}]
    prompt = canonical_row({"prompt": turns}, system_prompt=SYSTEM)["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[0]["content"] == [{"type": "text", "text": SYSTEM}]


def test_a_tool_that_returns_an_image_is_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(
        Rollouts.__mro__[1], "_generate", lambda self, prompts: ([[1]], [[2]], None, [["image"]], [["image"]])
    )
    with pytest.raises(ValueError, match="a tool returned an image, which the views without images would keep"):
        trainer.train()


def test_one_process_that_sees_several_gpus_says_what_to_type(make_trainer: Any, tmp_path: Path) -> None:
    from vgs_distill import VGSConfig
    from vgs_distill.distributed import use_one_gpu

    config = VGSConfig(str(tmp_path), **ON_CPU)
    assert config.n_gpu < 2
    config._n_gpu = 8  # what transformers finds on a machine with eight
    with pytest.raises(ValueError, match="accelerate launch --num_processes 8 -m vgs_distill train"):
        use_one_gpu(config)
    config.teacher_device = "cuda:1"
    use_one_gpu(config)
    assert config.n_gpu == 1, "or Trainer would split batches between them"
