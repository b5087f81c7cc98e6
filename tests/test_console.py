"""What `vgs train` shows: in a pipe, in a terminal, after Ctrl-C, and before anything is trained."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import invoke
from tests.conftest import Workspace

LINE = re.compile(
    r" *(\d+)/(\d+)  loss \d\.\d{4}  lang \d\.\d{4}  vis \d\.\d{4}  (?:cos -?\d\.\d\d  )?γ 2\.00  η \d\.\d\d  "
    r"length \d+\.\d  cut \d+%  lr \d\.\de-\d\d  s/step [\d.]+(  \d+:\d\d left)?"
)


def config(workspace: Workspace, tmp_path: Path, **changes: Any) -> str:
    return workspace.yaml(tmp_path / "in.yaml", output_dir=str(tmp_path / "run"), **changes)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "vgs_distill", *arguments], text=True, **options)


def commands(output: str, heading: str) -> list[list[str]]:
    """What the lines from this heading on tell to call."""
    told = output[output.index(f"\n{heading} ") :].splitlines()[1:]
    return [shlex.split(line.removeprefix(heading)) for line in told]


def test_a_pipe_gets_whole_lines_and_the_next_commands_work(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_text((workspace.root / "rows.jsonl").read_text())
    (tmp_path / "pictures").symlink_to(workspace.root / "pictures")
    where = config(
        workspace, tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False, use_peft=True,
        eval_dataset_name=str(tmp_path / "held_out.jsonl"),
    )  # fmt: skip
    run = start("train", "--config", where, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    opening, *rest = re.split(r"(?m)^output +(.*)$", output)
    summary = dict(line.split(maxsplit=1) for line in opening.splitlines())
    assert summary.keys() == {"student", "teacher", "data", "steps", "method", "device", "kernels"}
    assert re.search(r"student, [\d.]+k parameters, of which [\d.]+k learn$", summary["student"])
    assert summary["data"] == f"{workspace.root / 'rows.jsonl'}, 16 rows"
    assert summary["steps"] == "4; 4 rows each, learning rate 0.001"
    assert summary["device"].startswith("cpu")
    assert rest[0] == str(tmp_path / "run")
    two, four, finished, *_ = rest[1].strip().splitlines()
    for line, step in ((two, "2"), (four, "4")):
        found = LINE.fullmatch(line)
        assert found, line
        assert found.groups()[:2] == (step, "4")
        assert bool(found[3]) == (step == "2"), "the time left, while there is some"
    assert re.fullmatch(rf"done     4 steps in 0:\d\d, loss .* -> .*; the model is in {tmp_path / 'run'}", finished)
    for noise in ("Warning", "it/s", "{'loss'", "%|"):
        assert noise not in output + errors, "bars, dictionaries, and what TRL is told of its own code"
    for command in commands(output, "next"):
        assert command[0] == "vgs"
        length = ["--max_completion_length", "4"] if command[1] == "eval" else []
        result = invoke([*command[1:], *length])
        assert result.exit_code == 0, result.output
    assert {"report.html", "eval.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run-merged" / "model.safetensors").exists()


def test_the_line_after_ctrl_c_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    where = config(workspace, tmp_path, max_steps=1000)
    run = start("train", "--config", where, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    for line in run.stdout:
        if LINE.match(line):
            run.send_signal(signal.SIGINT)
            break
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    step = re.search(r"(?m)^stopped +at step (\d+)$", output)
    assert step
    (resume,) = commands(output, "resume")
    result = invoke([*resume[1:], "--max_steps", str(int(step[1]) + 1)])
    assert result.exit_code == 0, result.output
    assert f"{step[1]} of them done" in result.stdout
    assert "done     1 steps" in result.stdout


def test_a_terminal_gets_a_bar_below_whole_lines(workspace: Workspace, tmp_path: Path) -> None:
    # One prompt in two is left out, with a warning that transformers' logger writes.
    where = config(workspace, tmp_path, max_steps=3, disable_tqdm=False, max_prompt_length=17)
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "150", "TERM": "xterm"}
    run = start("train", "--config", where, stdout=child, stderr=child, stdin=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert run.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    assert [LINE.fullmatch(line)[1] for line in lines if re.match(r"\d/3  ", line)] == ["1", "2", "3"]  # type: ignore[index]
    assert any(re.match(r"training [━╸╺]+ [12]/3 0:\d\d left", line) for line in lines)
    warned = [line for line in lines if "and are left out" in line]
    assert warned
    assert not any("━" in line for line in warned)
    assert lines[-2].startswith("done     3 steps")
    assert lines[-1] == f"next     vgs report {tmp_path / 'run'}", "the training rows are no rows to evaluate on"


def test_a_run_goes_on_when_nobody_reads_it(workspace: Workspace, tmp_path: Path) -> None:
    where = config(workspace, tmp_path, max_steps=4)
    run = start("train", "--config", where, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline().startswith("student")
    run.stdout.close()  # as `| head -1` does
    assert run.stderr is not None
    errors = run.stderr.read()
    assert run.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_warnings_of_the_run_are_shown_in_a_pipe(workspace: Workspace, tmp_path: Path) -> None:
    where = config(workspace, tmp_path, max_steps=1, max_prompt_length=17)
    run = start("train", "--config", where, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = run.communicate(timeout=120)
    assert "and are left out" in errors


@pytest.mark.parametrize("image_mask", ["drop", "blank", "attention"])
def test_a_preview_shows_the_tokens_and_leaves_nothing(image_mask: str, workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoProcessor
    from vgs_distill.inputs.data import load_rows

    result = invoke(["train", "--config", config(workspace, tmp_path, image_mask=image_mask), "--preview", "3"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    processor = AutoProcessor.from_pretrained(workspace.root / "student")
    row = load_rows(str(workspace.root / "rows.jsonl"), split="train")[2]
    question = row["prompt"][0]["content"]
    image = {"type": "image", "image": row["image"]}
    seen, blind = (
        processor.apply_chat_template(
            [{"role": "user", "content": [*images, {"type": "text", "text": question}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True,
        )["input_ids"][0]
        for images in ([image], [])
    )  # fmt: skip
    shown = result.stdout.split("row 3\n")[1]
    assert shown.startswith(f"with its image: {len(seen)} tokens, {len(seen) - len(blind) - 2} of them of the image\n")
    assert f"<|vision_start|> <|image_pad|> × {len(seen) - len(blind) - 2} <|vision_end|> {question}" in shown
    if image_mask == "drop":
        assert f"\nwithout it: {len(blind)} tokens\n<|im_start|> user {question}" in shown
    else:
        assert "\nwithout it: the same tokens, and " in shown
    assert re.search(r"\nthe student writes: [1-4] tokens", shown)
    assert "row 4" not in result.stdout


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    where = config(workspace, tmp_path, max_steps=..., num_train_epochs=3, gradient_accumulation_steps=2)
    result = invoke(["train", "--config", where, "--dry-run", "--eta", "amortized"])
    assert result.exit_code == 0, result.output
    assert "steps    6; 8 rows each" in result.stdout
    assert "amortized" in result.stdout
    assert result.stdout.endswith("nothing was trained, nothing was written\n")
    assert not (tmp_path / "run").exists()
    kept = tmp_path / "run"
    kept.mkdir()
    assert invoke(["train", "--config", where, "--dry-run"]).exit_code == 0
    assert kept.is_dir()
    assert not list(kept.iterdir())


def test_a_preview_of_less_than_no_row_is_refused() -> None:
    assert invoke(["train", "--preview", "-1"]).stderr == "vgs: preview must be 1 or more rows, got -1\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("settings", [{"bf16": ...}, {"bf16": True}])
def test_without_a_gpu_the_flag_for_the_cpu_is_named(
    settings: dict[str, Any], workspace: Workspace, tmp_path: Path
) -> None:
    result = invoke(["train", "--config", config(workspace, tmp_path, use_cpu=..., **settings)])
    assert result.exit_code == 2
    assert "add --use_cpu to train on the CPU" in result.stderr.splitlines()[-1]
