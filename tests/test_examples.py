"""Every file of `examples/` does what it says: configurations parse, scripts run, two processes train under FSDP2."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workspace

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def has_moved(model: Any, start: Any) -> bool:
    return all(
        bool((parameter != before).any())
        for parameter, before in zip(model.parameters(), start.parameters(), strict=True)
        if parameter.dim() > 1
    )


def test_every_example_is_tested() -> None:
    tested = {
        "qwen3vl_full.yaml",
        "qwen3vl_lora.yaml",
        "two_nodes.yaml",
        "two_nodes.sh",
        "own_loop.py",
        "hf_trainer.py",
        "swift_gkd.sh",  # in tests/integrations, as its plugin is
        "swift_plugin.py",
    }
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


@pytest.mark.parametrize("name", ["qwen3vl_full.yaml", "qwen3vl_lora.yaml"])
def test_a_configuration_is_read_by_the_parser(name: str) -> None:
    from trl import get_peft_config
    from vgs_distill.commands.arguments import given, train_parser
    from vgs_distill.commands.fields import require
    from vgs_distill.models.sources import student_source, teacher_source

    (config, _, model), values = train_parser().parse(["--config", str(EXAMPLES / name), "--use_cpu"])
    require("train", given(values))
    assert (config.gamma, config.method) == (2.0, "vgs")
    eta, preservation = ("amortized", 0.01) if name == "qwen3vl_full.yaml" else ("measured", "adaptive")
    assert (config.eta, config.language_preservation) == (eta, preservation)
    if name == "qwen3vl_full.yaml":
        assert student_source("student", config, model).options["dtype"] == "float32"
        assert teacher_source("teacher", config, model).options["dtype"] == "bfloat16"
    adapter = get_peft_config(model)
    assert (adapter is not None) == (name == "qwen3vl_lora.yaml")


@pytest.mark.parametrize("name", ["own_loop.py", "hf_trainer.py"])
def test_a_script_trains(name: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [str(workspace.root / part) for part in ("student", "teacher", "rows.jsonl")]
    monkeypatch.syspath_prepend(EXAMPLES)  # as python does for a script
    monkeypatch.setattr(sys, "argv", [name, *models, str(tmp_path / "run"), "2"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    (weights,) = (tmp_path / "run").rglob("model.safetensors")
    assert has_moved(load(weights.parent), load(workspace.root / "student"))


def test_the_two_node_script_names_what_it_needs() -> None:
    result = run("bash", str(EXAMPLES / "two_nodes.sh"))
    assert result.returncode != 0
    assert "set it to 0 on the first node" in result.stderr


@pytest.mark.slow
def test_two_processes_train_under_fsdp2(workspace: Workspace, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one_node = ["--num_machines", "1", "--num_processes", "2", "--machine_rank", "0", "--main_process_port", port]
    launcher = ["accelerate.commands.launch", "--config_file", str(EXAMPLES / "two_nodes.yaml"), *one_node]
    folder = tmp_path / "run"
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(folder), save_strategy="steps", save_steps=2)
    result = run(sys.executable, "-m", *launcher, "-m", "vgs_distill", "train", "--config", config)
    assert result.returncode == 0, result.stderr[-3000:]
    shards = {path.name for path in (folder / "checkpoint-2" / "pytorch_model_fsdp_0").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= shards  # each process wrote its own: FSDP did run
    assert has_moved(load(folder), load(workspace.root / "student"))
