"""What `vgs train --plan` says of memory, against the peaks of small runs; and that its parts follow the settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vgs_distill import VGSConfig
from vgs_distill.inputs.modalities import IMAGE
from vgs_distill.planning.cost import Launch, Rows, memory, operations
from vgs_distill.planning.sizes import ModelSize, model_size

from tests.small_run import ON_CPU, build_student

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("plan_worker.py"))
ROWS = Rows(prompt=1000, image=600, patches=2400, completion=500)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of a process from Linux")
@pytest.mark.parametrize(
    "run",
    [
        {"method": "vgs", "eta": "measured", "gradient_checkpointing": False},
        {"method": "vgs", "eta": 0.4, "gradient_checkpointing": True},
        {"method": "opd", "gradient_checkpointing": False, "lora": True},
    ],
    ids=["measured", "checkpointing", "lora"],
)
def test_the_planned_peak_is_the_measured_one_within_a_tenth(run: dict[str, Any]) -> None:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "OMP_NUM_THREADS": "1",
        # Freed memory goes back at once, or the peak of a process would be that of its allocator.
        "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    asked = json.dumps({**run, "size": [512, 6], "per_device_train_batch_size": 4})
    command = [sys.executable, "-W", "ignore", WORKER, asked]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1), found


@pytest.fixture(scope="module")
def size(processor: Any) -> ModelSize:
    return model_size(build_student(processor, 1).config, torch.float32, IMAGE)


def planned(size: ModelSize, launch: Launch, **settings: Any) -> dict[str, float]:
    return memory(VGSConfig(**{**ON_CPU, **settings}), size, size, ROWS, launch)


def test_sizes_are_those_of_the_model(size: ModelSize, processor: Any) -> None:
    model = build_student(processor, 1)
    assert size.parameters == size.trained == sum(parameter.numel() for parameter in model.parameters())
    assert size.head == model.lm_head.weight.numel()
    tied = build_student(processor, 1, tied=True)
    assert model_size(tied.config, torch.float32, IMAGE).parameters == size.parameters - size.head


def test_memory_follows_launcher_and_settings(size: ModelSize) -> None:
    alone, ddp, fsdp = (planned(size, launch) for launch in (Launch(1, False), Launch(8, False), Launch(8, True)))
    assert alone == ddp
    assert fsdp["student"] == ddp["student"] / 8
    assert fsdp["optimizer"] == ddp["optimizer"] / 8
    assert fsdp["teacher"] == ddp["teacher"]
    assert planned(size, Launch(8, False), teacher_sharding="shard")["teacher"] == ddp["teacher"] / 8
    assert planned(size, Launch(1, False), teacher_device="offload")["teacher"] == 0
    assert planned(size, Launch(1, False), optim="sgd")["optimizer"] == 0
    small = planned(size, Launch(1, False), gradient_checkpointing=True)
    assert sum(small.values()) < sum(alone.values())
    accumulated = {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    for eta, gradients in (("measured", 3), (0.4, 1)):
        assert planned(size, Launch(1, False), eta=eta, **accumulated)["gradients"] >= gradients * size.trained_bytes


def test_operations_follow_the_method(size: ModelSize) -> None:
    def of(**settings: Any) -> dict[str, float]:
        return dict(operations(VGSConfig(**{**ON_CPU, **settings}), size, size, ROWS, 1))

    opd, constant, measured = of(method="opd"), of(eta=0.4), of(eta="measured")
    assert "teacher without the image" not in opd
    assert constant["teacher"] == opd["teacher"]
    assert opd["backward"] == 2 * opd["student"]
    assert opd["backward"] < constant["backward"] < measured["backward"]
    assert of(eta=0.4, language_preservation=0)["backward"] == opd["backward"]
    assert of(method="opd", gradient_checkpointing=True)["backward"] == 3 * opd["student"]
    assert operations(VGSConfig(**ON_CPU, method="opd"), size, size, ROWS, 8)["teacher"] == 8 * opd["teacher"]
