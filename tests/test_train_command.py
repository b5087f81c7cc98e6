"""`vgs train` and `vgs eval` from a YAML file to what they leave on disk, with every kind of dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import invoke
from tests.conftest import Workspace


def vgs(*arguments: str) -> str:
    result = invoke(arguments)
    assert result.exit_code == 0, result.output
    return result.output


def train(workspace: Workspace, tmp_path: Path, *flags: str, **changes: Any) -> Path:
    run = tmp_path / "run"
    vgs("train", "--config", workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), **changes), *flags)
    return run


def history(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_a_run_leaves_a_model_a_processor_and_what_repeats_it(workspace: Workspace, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vgs_distill.commands.arguments import train_parser

    run = train(workspace, tmp_path, "--gamma", "0.6", gamma=0.9, save_strategy="steps", save_steps=1)
    assert [row["steering/gamma"] for row in history(run) if "steering/gamma" in row] == [0.6, 0.6]
    trained = AutoModelForImageTextToText.from_pretrained(run)
    start = AutoModelForImageTextToText.from_pretrained(workspace.root / "student")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoProcessor.from_pretrained(run).image_processor is not None

    again = yaml.safe_load((run / "run.yaml").read_text())
    assert again["gamma"] == 0.6
    assert again["max_steps"] == 2
    _, values = train_parser().parse(["--config", str(run / "run.yaml")])
    assert values == again

    vgs("train", "--config", str(run / "run.yaml"), "--output_dir", str(tmp_path / "again"))
    repeated = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(trained.lm_head.weight, repeated.lm_head.weight)

    vgs("train", "--config", str(run / "run.yaml"), "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert [row["step"] for row in history(run) if "steering/gamma" in row] == [1, 2, 3]


def final_model(run: Path) -> dict[str, tuple[int, bytes]]:
    """The files of the run's folder that are no records, with their times and contents."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir() if path.is_file()}


def same_weights(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_resumed_run_is_repeated_elsewhere_and_a_finished_one_left_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    whole = train(workspace, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    resumed = tmp_path / "resumed"
    resume = ["--resume_from_checkpoint", str(whole / "checkpoint-1")]
    vgs("train", "--config", str(whole / "run.yaml"), "--output_dir", str(resumed), *resume)
    assert same_weights(resumed, whole)
    settings = yaml.safe_load((resumed / "run.yaml").read_text())
    assert settings["resume_from_checkpoint"] is None
    assert settings["output_dir"] == str(resumed)
    vgs("train", "--config", str(resumed / "run.yaml"), "--output_dir", str(tmp_path / "again"))
    assert history(tmp_path / "again")[0]["step"] == 1
    assert same_weights(tmp_path / "again", whole)

    before = final_model(whole)
    assert "run.yaml" in before
    vgs("train", "--config", str(whole / "run.yaml"), "--resume_from_checkpoint", "true")
    vgs(
        "train",
        "--config",
        str(whole / "run.yaml"),
        "--resume_from_checkpoint",
        str(whole / "checkpoint-2"),
        "--max_steps",
        "2",
    )
    assert final_model(whole) == before
    (whole / "trainer_state.json").unlink()  # the last file of a model: its saving was cut off
    (whole / "model.safetensors").write_bytes(b"half")
    vgs("train", "--config", str(whole / "run.yaml"), "--resume_from_checkpoint", "true")
    assert same_weights(whole, resumed)
    assert (whole / "trainer_state.json").exists()


def test_a_start_that_failed_leaves_a_folder_to_start_in(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run))
    result = invoke(["train", "--config", config, "--max_prompt_length", "1"])
    assert result.exit_code == 2
    assert "longer than max_prompt_length=1" in result.output  # found in the first step
    assert sorted(path.name for path in run.iterdir()) == ["recording"]
    (run / "log.txt").write_text("as a shell writes it")
    vgs("train", "--config", config, "--save_strategy", "steps", "--save_steps", "1")
    assert [row["step"] for row in history(run) if "steering/gamma" in row] == [1, 2]

    before = (run / "run.yaml").read_text()
    again = ["train", "--config", str(run / "run.yaml"), "--resume_from_checkpoint", "true"]
    result = invoke([*again, "--max_steps", "3", "--method", "matched"])
    assert result.exit_code == 2
    assert "was trained with method='vgs'" in result.output
    result = invoke([*again, "--max_steps", "3", "--max_prompt_length", "1"])
    assert result.exit_code == 2
    assert (run / "run.yaml").read_text() == before


def test_the_environment_of_a_run_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgs_distill.commands.arguments import train_parser

    monkeypatch.setenv("VGS_TEST_ONLY", "before")
    (tmp_path / "run.yaml").write_text("env: {VGS_TEST_ONLY: 7}\nuse_cpu: true")
    _, values = train_parser().parse(["--config", str(tmp_path / "run.yaml")])
    assert os.environ["VGS_TEST_ONLY"] == "7"
    assert values["env"] == {"VGS_TEST_ONLY": "7"}


@pytest.mark.parametrize("name", ["saved", "rows.parquet", "pictures"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_dataset_gives_the_same_rows(name: str, streaming: bool, workspace: Workspace) -> None:
    from vgs_distill import canonical_row, load_rows

    expected = [canonical_row(row) for row in load_rows(str(workspace.root / "rows.jsonl"))]
    found = [canonical_row(row) for row in load_rows(str(workspace.root / name), split="train", streaming=streaming)]
    assert len(found) == len(expected) == 16
    pixels = {row["images"][0].tobytes(): row["prompt"] for row in expected}
    for row in found:
        assert pixels[row["images"][0].tobytes()] == row["prompt"]


def test_a_streamed_file_trains(workspace: Workspace, tmp_path: Path) -> None:
    run = train(workspace, tmp_path, dataset_streaming=True, eta="measured")
    assert [row["step"] for row in history(run) if "loss/vis" in row] == [1, 2]


def test_several_images_per_row_are_read_from_paths(workspace: Workspace, tmp_path: Path) -> None:
    from vgs_distill import canonical_row, load_rows

    pictures = [str(workspace.root / "pictures" / "0.png"), str(workspace.root / "pictures" / "1.png")]
    rows = [{"prompt": "compare", "images": pictures}, {"prompt": "tell", "images": []}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = [canonical_row(row) for row in load_rows(str(tmp_path / "rows.jsonl"))]
    assert [[image.size for image in row["images"]] for row in found] == [[(32, 32), (32, 32)], []]


def test_an_adapter_is_trained_and_saved(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    run = train(
        workspace,
        tmp_path,
        "--use_peft",
        lora_r=4,
        eval_dataset_name=str(workspace.root / "saved"),
        eval_strategy="steps",
        eval_steps=2,
    )
    assert not (run / "model.safetensors").exists()
    model = AutoModelForImageTextToText.from_pretrained(run)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)
    assert any("eval_loss" in row for row in history(run))


def test_eval_tells_with_the_image_from_without(workspace: Workspace, tmp_path: Path) -> None:
    files = {"dataset_name": "rows.jsonl", "model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
    settings = {name: str(workspace.root / file) for name, file in files.items()}
    settings |= {"output_file": str(tmp_path / "eval.json"), "max_completion_length": 4, "use_cpu": True, "dtype": None}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    output = vgs("eval", "--config", str(tmp_path / "eval.yaml"), "--answer_pattern", r"\w+")
    assert "KL(student || teacher)" in output
    results = json.loads((tmp_path / "eval.json").read_text())
    seen, blind = results["with_image"], results["without_image"]
    assert results["rows"] == len(seen["completions"]) == len(blind["completions"]) == 16
    assert len({round(seen[part], 6) for part in ("standard", "lang", "vis", "dependency")}) == 4
    assert min(seen[part] for part in ("standard", "lang", "vis", "dependency", "entropy")) > 0
    assert blind["vis"] == blind["dependency"] == 0
    assert blind["lang"] == blind["standard"] != pytest.approx(seen["standard"])


def test_eval_measures_what_the_method_has(workspace: Workspace, tmp_path: Path) -> None:
    models = [f"--{name}={workspace.root / name.split('_')[0]}" for name in ("teacher_model_name_or_path",)]
    models += ["--model_name_or_path", str(workspace.root / "student"), "--use_cpu"]
    where = ["--dataset_name", str(workspace.root / "saved"), "--max_rows", "2", "--max_completion_length", "2"]
    found = {}
    for method in ("opd", "matched", "teacher_prior"):
        file = tmp_path / f"{method}.json"
        vgs("eval", *models, *where, "--method", method, "--output_file", str(file))
        found[method] = json.loads(file.read_text())["with_image"]
    names = ("standard", "lang", "vis", "dependency", "entropy")
    measured = {method: {name for name in names if of[name] is not None} for method, of in found.items()}
    assert measured == {
        "opd": {"standard", "entropy"},
        "matched": {"standard", "lang", "entropy"},
        "teacher_prior": {"standard", "lang", "vis", "entropy"},
    }
    prior = found["teacher_prior"]
    assert prior["lang"] + prior["vis"] == pytest.approx(prior["standard"], abs=1e-5)
    assert found["opd"]["standard"] == pytest.approx(prior["standard"], abs=1e-5)


def test_a_model_is_its_own_perfect_teacher(workspace: Workspace, tmp_path: Path) -> None:
    student, rows = str(workspace.root / "student"), str(workspace.root / "saved")
    models = ["--model_name_or_path", student, "--teacher_model_name_or_path", student, "--use_cpu"]
    where = ["--dataset_name", rows, "--max_rows", "3", "--output_file", str(tmp_path / "eval.json")]
    vgs("eval", *models, *where, "--max_completion_length", "3")
    results = json.loads((tmp_path / "eval.json").read_text())
    assert len(results["with_image"]["completions"]) == 3
    for part in ("standard", "lang", "vis"):
        assert results["with_image"][part] == pytest.approx(0, abs=1e-6)


def test_the_matching_rule() -> None:
    import re

    from vgs_distill.commands.evaluate import normalise, read_answer

    assert normalise("  The  Cat. ") == normalise("the cat")
    assert normalise("cats") != normalise("cat")
    pattern = re.compile(r"answer\s*:\s*(\w+)", re.IGNORECASE)
    assert read_answer("answer: one. No, Answer : two", pattern) == "two"
    assert read_answer("two", pattern) is None
    assert read_answer("it is two", re.compile("two|three")) == "two"
    assert read_answer("it is two", None) == "it is two"
