"""Every file of `examples/` does what it says: configurations parse, scripts run, two processes train under FSDP2."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import invoke
from tests.conftest import Workspace

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
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
        "paper_2b.yaml",
        "paper_4b.yaml",
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


# Of the real models: width, inner width, layers and heads of the decoder; whether its head is tied; depth and widths of
# the tower.
QWEN3_VL = {
    "2B": (2048, 6144, 28, 16, True, 24, 1024, 4096),
    "4B": (2560, 9728, 36, 32, True, 24, 1024, 4096),
    "8B": (4096, 12288, 36, 32, False, 27, 1152, 4304),
}
PLAN = """
import json, sys
from rich.console import Console
from vgs_distill.commands.plan import plan
print(json.dumps({name: plan(["--config", name], 1024, Console(file=sys.stderr)) for name in sys.argv[1:]}))
"""


def qwen3_vl(size: str) -> Any:
    from transformers import Qwen3VLConfig

    width, inner, layers, heads, tied, depth, tower, tower_inner = QWEN3_VL[size]
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        },
        vision_config={
            "depth": depth, "hidden_size": tower, "intermediate_size": tower_inner, "num_heads": 16,
            "out_hidden_size": width, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=tied,
    )  # fmt: skip
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    return config


def test_every_configuration_is_planned_from_the_configs_of_its_models(tmp_path: Path) -> None:
    for size in QWEN3_VL:  # where the hub's library keeps what it has downloaded
        folder = tmp_path / "hub" / f"models--Qwen--Qwen3-VL-{size}-Instruct"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        qwen3_vl(size).save_pretrained(folder / "snapshots" / ("0" * 40))
    names = [str(path) for path in EXAMPLES.glob("*.yaml") if path.name != "two_nodes.yaml"]
    assert len(names) == 4
    result = run(sys.executable, "-c", PLAN, *names, HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    plans = {Path(name).name: plan for name, plan in json.loads(result.stdout).items()}
    for plan in plans.values():
        totals = plan["totals"]
        for trained in totals.values():
            assert trained["shard"]["FSDP2, 16"] < trained["shard"]["FSDP2, 8"] < trained["replicate"]["DDP, 8"]
        assert totals["LoRA"]["replicate"]["DDP, 8"] < totals["all parameters"]["replicate"]["DDP, 8"]
        assert plan["operations"]["teacher"] > plan["operations"]["student"]
    two, four = (plans[f"paper_{size}.yaml"]["memory"]["DDP, 8"] for size in ("2b", "4b"))
    assert two["student"] == 2_127_532_032 * 4, "the real count of parameters, in float32"
    assert four["student"] == 4_437_815_808 * 4
    assert two["teacher"] == 8_767_123_696 * 2
    assert two["optimizer"] == 2 * two["student"]


@pytest.mark.parametrize("name", ["paper_2b.yaml", "paper_4b.yaml"])
def test_the_papers_run_trains_at_small_size(name: str, workspace: Workspace, tmp_path: Path) -> None:
    import yaml

    settings = yaml.safe_load((EXAMPLES / name).read_text())
    small = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(workspace.root / "student"),
        "teacher_model_name_or_path": str(workspace.root / "teacher"),
        "dataset_name": str(workspace.root / "rows.jsonl"),
        "max_completion_length": 4,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
    }
    assert small.keys() <= settings.keys(), "the same fields"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**settings, **small}))
    result = invoke(["train", "--config", str(tmp_path / "small.yaml"), "--use_cpu", "--max_steps", "2"])
    assert result.exit_code == 0, result.output
    steps = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    first, *_ = (row for row in steps if "loss/standard" in row)
    assert first["steering/eta"] == pytest.approx({"paper_2b.yaml": 0.41, "paper_4b.yaml": 0.36}[name])
    assert first["steering/weight_ratio"] == pytest.approx(2.0)
    assert first["steering/language_preservation"] == 0.01
    assert first["learning_rate"] == 1e-6
    load(tmp_path / "run")


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
