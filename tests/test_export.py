"""`vgs export`, and adapters in `vgs eval`: what they leave, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.command_line import invoke
from tests.conftest import Workspace


@pytest.fixture(scope="module")
def run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with `--use_peft` alone, and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = workspace.yaml(folder.parent / "run.yaml", output_dir=str(folder), save_strategy="steps", save_steps=1)
    result = invoke(["train", "--config", config, "--use_peft", "--learning_rate", "0.1"])
    assert result.exit_code == 0, result.output
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def evaluated(model: Path, workspace: Workspace, tmp_path: Path) -> dict[str, Any]:
    settings = {
        "model_name_or_path": model, "teacher_model_name_or_path": workspace.root / "teacher", "use_cpu": True,
        "dataset_name": workspace.root / "rows.jsonl", "dataset_test_split": "train", "max_completion_length": 4,
        "max_rows": 4, "output_file": tmp_path / "eval.json",
    }  # fmt: skip
    result = invoke(["eval", *(f"--{name}={value}" for name, value in settings.items())])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    return {name: found[name] for name in ("with_image", "without_image")}


def test_an_adapter_is_measured_as_the_model_it_makes(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    adapter = evaluated(run, workspace, tmp_path)
    assert invoke(["export", str(run), "--merge", "-o", str(tmp_path / "merged")]).exit_code == 0
    merged = evaluated(tmp_path / "merged", workspace, tmp_path)
    assert adapter["with_image"]["completions"] == merged["with_image"]["completions"]
    for view in ("with_image", "without_image"):
        for part in ("standard", "lang", "vis", "dependency", "entropy"):
            assert adapter[view][part] == pytest.approx(merged[view][part], abs=1e-5)
    start = evaluated(workspace.root / "student", workspace, tmp_path)
    assert abs(start["with_image"]["standard"] - adapter["with_image"]["standard"]) > 1e-3


def test_a_copy_has_the_model_and_its_processor_and_nothing_else(run: Path, tmp_path: Path) -> None:
    result = invoke(["export", str(run / "checkpoint-1"), "--output", str(tmp_path / "copy")])
    assert result.exit_code == 0
    assert "an adapter of" in result.stdout
    processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    kept = {"adapter_config.json", "adapter_model.safetensors"}
    assert names(tmp_path / "copy") - {"README.md"} == processor | kept
    for name in kept:
        assert (tmp_path / "copy" / name).read_bytes() == (run / "checkpoint-1" / name).read_bytes()


def test_a_merged_folder_is_a_model(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    assert invoke(["export", str(run), "--merge", "--output", str(tmp_path / "deep" / "merged")]).exit_code == 0
    merged = load_file(tmp_path / "deep" / "merged" / "model.safetensors")
    base = load_file(workspace.root / "student" / "model.safetensors")
    assert merged.keys() == base.keys()
    moved = {name for name in base if not merged[name].equal(base[name])}
    assert moved
    assert all("language_model" in name or "merger" in name for name in moved)
    result = invoke(["export", str(tmp_path / "deep" / "merged"), "--output", str(tmp_path / "again")])
    assert result.exit_code == 0
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == base.keys()
    assert "config.json" in names(tmp_path / "again")


def test_what_cannot_be_exported_is_one_sentence(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoint-2", unfinished / "checkpoint-2")
    orphan = tmp_path / "orphan"
    shutil.copytree(run / "checkpoint-2", orphan)
    settings = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "./gone"}))
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoint-2", broken)
    (broken / "adapter_config.json").write_text("{}")
    student = workspace.root / "student"
    for arguments, sentence in (
        ([tmp_path / "none"], "there is no folder"),
        ([student, "--merge"], "holds a whole model, no adapter; leave out --merge"),
        (
            [unfinished],
            f"holds no model in safetensors; export a checkpoint, such as '{unfinished / 'checkpoint-2'}'",
        ),
        ([tmp_path / "taken"], "holds no model in safetensors; give the output folder of a run"),
        ([orphan, "--merge"], "there is no adapter's base model at './gone'"),
        ([broken, "--merge"], "cannot read the adapter"),
    ):
        result = invoke(["export", *map(str, arguments), "--output", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert sentence in result.stderr.splitlines()[-1]
    result = invoke(["export", str(run), "--output", str(tmp_path / "taken")])
    assert result.exit_code == 2
    assert "exists already; choose another folder" in result.stderr
    assert names(tmp_path) == {"taken", "unfinished", "orphan", "broken"}, "nothing is left behind"


def test_an_adapter_is_no_student(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), model_name_or_path=str(run))
    result = invoke(["train", "--config", config])
    assert result.exit_code == 2
    assert f"merge it first: vgs export {run} --merge" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_adapter_may_be_the_teacher(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    output, teacher = str(tmp_path / "run"), str(run)
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=output, teacher_model_name_or_path=teacher, max_steps=1)
    result = invoke(["train", "--config", config])
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss/standard"] > 1e-3, "the student is the model below that adapter"
