"""Two gloo processes against one on the same global batches: DDP and FSDP2, with checkpointing and accumulation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vgs_distill.report.log import read_run

from tests.engine.distributed_worker import CASES

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("distributed_worker.py"))


def run(mode: str, output_dir: Path) -> dict[str, Any]:
    command = [sys.executable, WORKER, str(output_dir), mode]
    if mode != "single":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
        command = [*launcher, *command[1:]]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output_dir / f"{mode}.pt", weights_only=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", tmp_path_factory.mktemp("single"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(mode: str, single: dict[str, Any], tmp_path: Path) -> None:
    results = run(mode, tmp_path)
    for case in CASES:
        got, expected = results[case.name], single[case.name]
        assert got["sharded"] == (mode == "fsdp2")
        assert got["gradients"].keys() == expected["gradients"].keys()
        for key, gradient in expected["gradients"].items():
            torch.testing.assert_close(
                got["gradients"][key], gradient, atol=1e-6, rtol=0, msg=lambda m, k=key: f"{k}{m}"
            )
        for key, parameter in expected["parameters"].items():
            torch.testing.assert_close(got["parameters"][key], parameter, atol=1e-5, rtol=0)
        torch.testing.assert_close(got["losses"], expected["losses"], atol=1e-5, rtol=0)
    for case in CASES:
        log = read_run(tmp_path / "run" / case.name)
        if case.teacher == "shard":
            assert log.teacher_silent == "it is sharded, and would write only with all processes at once"
        else:
            assert log.teacher_silent is None
            assert all(record["teacher"] is not None for record in log.completions)


def test_accumulation_and_checkpointing_change_nothing_on_one_process(single: dict[str, Any]) -> None:
    for case in CASES:
        if case.lora or case.uneven or case.teacher != "replicate" or case.tied:
            continue
        # Amortized weights come from the step itself, or with accumulation from the one before: those steps differ.
        plain = case._replace(checkpointing=False, accumulation=case.accumulation if case.eta == "amortized" else 1)
        for key, parameter in single[plain.name]["parameters"].items():
            torch.testing.assert_close(single[case.name]["parameters"][key], parameter, atol=1e-5, rtol=0)
