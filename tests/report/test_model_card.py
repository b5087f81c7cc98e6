"""The model card of a run: what it names, and its code on the model that the run saved."""

from __future__ import annotations

import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainerState
from vgs_distill import VGSConfig
from vgs_distill.report.model_card import model_card
from vgs_distill.steering.methods import METHODS

from tests.command_line import invoke
from tests.conftest import Workspace
from tests.families.models import SMALL_FAMILIES
from tests.families.training import make_trainer, picture, processor_of, video

_LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]


def run_code(card: ModelCard, folder: Path) -> str:
    """What the code of a card prints when it runs in `folder`."""
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_leaves_a_card_whose_code_runs(workspace: Workspace, tmp_path: Path, adapter: bool) -> None:
    settings = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), gamma=0.6)
    result = invoke(["train", "--config", settings, *(_LORA if adapter else [])])
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model is card.data.datasets is None, "no name of the hub"
    assert {"vgs", "distillation", "trl"} <= set(card.data.tags)
    for words in (
        "# run\n", "arxiv.org/abs/2606.00564", "| base | `student` |", "| teacher | `teacher` |",
        "| data | `rows.jsonl` |", "γ 0.6, λ 0.01, η amortized |",
        "| steps | 2, of 4 prompts each |", "| learning rate | 0.001, linear |",
    ):  # fmt: skip
        assert words in card.content, words
    assert str(workspace.root) not in card.content, "where models lay on this machine is nobody's business"
    picture(1).save(tmp_path / "picture.png")
    run_code(card, tmp_path)


@pytest.mark.parametrize("family", ["qwen3_vl_video", "qwen2_audio"])
def test_the_code_for_video_and_sound_runs(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path / "run"), max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    modality = SMALL_FAMILIES[family].modality
    assert card.data.pipeline_tag == f"{modality}-text-to-text"
    assert "mine" in card.data.tags
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(video(0)):
        frame.save(tmp_path / "frames" / f"{index:02}.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((3000 * np.sin(np.arange(1600) / 7)).astype(np.int16).tobytes())
    run_code(card, tmp_path)


def named(model: Any, name: str) -> Any:
    model.config.name_or_path = name
    return model


@pytest.mark.parametrize("method", METHODS)
def test_names_of_the_hub_become_links(tmp_path: Path, method: str) -> None:
    family, processor = SMALL_FAMILIES["qwen3_vl"], processor_of("qwen3_vl")
    config = VGSConfig(
        output_dir=str(tmp_path / "run"), hub_model_id="me/mine", method=method, use_cpu=True, bf16=False
    )
    card = model_card(
        config,
        TrainerState(global_step=7),
        named(family.model(processor, 1), "org/student"),
        named(family.model(processor, 2), "org/teacher"),
        name="mine",
        dataset="org/rows",
        tags=["vgs"],
        paper={"title": "On something", "id": "2306.13649"},
    )
    assert card.data.base_model == "org/student"
    assert card.data.datasets == "org/rows"
    assert "distilled on-policy from [org/teacher](https://huggingface.co/org/teacher) on [org/rows]" in card.content
    assert '\nname = "me/mine"' in card.content
    assert ("Visual Gradient Steering" in card.content) == (method != "opd")
    assert ("None" in card.content) is False
    assert "{On something}" in card.content
    assert "eprint        = {2306.13649}" in card.content
    assert "year          = {2023}" in card.content
    assert "\n\n\n" not in card.content


def test_a_checkpoint_brings_the_card_along(tmp_path: Path) -> None:
    trainer = make_trainer(
        "qwen3_vl", str(tmp_path / "run"), max_steps=1, save_strategy="steps", save_steps=1,
        trainer={"peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
    )  # fmt: skip
    trainer.dataset_name = "org/rows"
    trainer.train()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets == "org/rows"
    assert card.content.count("An adapter of `Qwen3VLForConditionalGeneration`, distilled") == 1
