"""Nothing is lost: runs that are killed or told to stop, in processes of their own, and resumed to the same parameters.

A run here is eight updates over three epochs, with accumulation and a checkpoint after every second update.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from vgs_distill.config import VGSConfig
from vgs_distill.resilience.checkpoints import STAGING, last_checkpoint

from tests.engine.distributed_worker import FSDP2
from tests.small_run import ON_CPU, build_student

PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and then forks for every run
PROCESSES.set_forkserver_preload(["vgs_distill.trainer", "vgs_distill.demo.models", "peft"])

STEPS = 8
CASES = {
    "full-exact": {"eta": "measured"},
    "full-amortized": {"eta": "amortized", "refresh_every": 3, "language_preservation": "adaptive"},
    "lora-exact": {"eta": "measured", "lora": True},
    "lora-amortized": {
        "method": "teacher_prior",
        "eta": "amortized",
        "refresh_every": 3,
        "lora": True,
        "token_steering": 3.0,
        "steering_scale": "preserve",
    },
}
pytestmark = pytest.mark.slow


class Reporter(TrainerCallback):
    """Tells the test that a step begins."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.pipe.send(state.global_step)


class Dawdler(TrainerCallback):
    """Makes step 3 last for ever, for a signal to arrive in it."""

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        while state.global_step == 2:
            time.sleep(0.01)


def make_trainer(output_dir: Path, lora: bool = False, **config: Any) -> Any:
    from peft import LoraConfig
    from vgs_distill.demo.models import build_processor
    from vgs_distill.demo.worlds import make_world, to_prompt_dataset
    from vgs_distill.trainer import VGSTrainer

    torch.set_num_threads(1)
    world = make_world("shapes")
    processor = build_processor(world.words)
    student, teacher = build_student(processor, 1), build_student(processor, 2, width=48).eval()
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "gamma_schedule": "cosine",
        **ON_CPU,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 100,
        "seed": 11,
    }
    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]) if lora else None
    return VGSTrainer(
        model=student,
        teacher_model=teacher,
        args=VGSConfig(output_dir=str(output_dir), **{**settings, **config}),
        train_dataset=to_prompt_dataset(world.training_questions(12, seed=5, prior=0.5)),
        processing_class=processor,
        peft_config=adapter,
    )


def train(
    output_dir: Path,
    settings: dict[str, Any],
    pipe: Connection,
    *,
    resume: bool = False,
    dawdle: bool = False,
    die_in: str | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Runs in the process of a run. `die_in`: the method that ends it by SIGKILL once step 4 is done."""
    os.environ |= environment or {}
    trainer = make_trainer(output_dir, **settings)
    trainer.add_callback(Reporter(pipe))
    if dawdle:
        trainer.add_callback(Dawdler())
    if die_in is not None:
        method = getattr(trainer, die_in)

        def die(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)

        setattr(trainer, die_in, die)
    trainer.train(resume_from_checkpoint=resume and last_checkpoint(output_dir) is not None)
    final = {name: whole(p).detach().contiguous() for name, p in trainer.model.named_parameters()}
    if trainer.accelerator.is_main_process:
        save_file(final, output_dir / "final.safetensors")


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class Run:
    """A started run."""

    def __init__(self, output_dir: Path, settings: dict[str, Any], **options: Any) -> None:
        self.pipe, theirs = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=train, args=(output_dir, settings, theirs), kwargs=options)
        self.process.start()
        theirs.close()

    def wait_for_step(self, step: int) -> None:
        """Until so many updates are done and the next one begins."""
        while self.pipe.recv() < step:
            pass

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self) -> int | None:
        self.process.join(timeout=120)
        return self.process.exitcode


def finish(output_dir: Path, settings: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Run to the end, resuming if there is anything to resume from, and return the parameters."""
    assert Run(output_dir, settings, resume=True, **options).exit_code() == 0
    return load_file(output_dir / "final.safetensors")


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """The parameters that a case ends with when nothing stops it."""
    return cache(lambda case: finish(tmp_path_factory.mktemp(case), CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_five_times_ends_with_the_same_parameters(
    uninterrupted: Callable[[str], dict[str, Tensor]], case: str, tmp_path: Path
) -> None:
    for step in sorted(random.SystemRandom().sample(range(STEPS - 1), 5)):
        delay = random.SystemRandom().uniform(0.0, 0.1)
        print(f"killed {delay:.3f} s into step {step + 1}")  # shown when the test fails
        run = Run(tmp_path, CASES[case], resume=True)
        run.wait_for_step(step)
        time.sleep(delay)
        run.process.kill()
        assert run.exit_code() == -signal.SIGKILL
    assert_equal(finish(tmp_path, CASES[case]), uninterrupted(case))


@pytest.mark.parametrize("die_in", ["_save_rng_state", "_stream_position"])
def test_a_checkpoint_that_was_being_written_is_not_taken_for_one(
    uninterrupted: Callable[[str], dict[str, Tensor]], die_in: str, tmp_path: Path
) -> None:
    assert Run(tmp_path, CASES["full-exact"], die_in=die_in).exit_code() == -signal.SIGKILL
    assert (tmp_path / STAGING / "checkpoint-4" / "model.safetensors").exists()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert_equal(finish(tmp_path, CASES["full-exact"]), uninterrupted("full-exact"))
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(
    uninterrupted: Callable[[str], dict[str, Tensor]], number: int, code: int, tmp_path: Path
) -> None:
    run = Run(tmp_path, CASES["full-exact"])
    run.wait_for_step(2)
    run.signal(number)
    run.signal(number)  # as launchers pass it on once more
    assert run.exit_code() == code
    assert not (tmp_path / "final.safetensors").exists()
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert last.name in ("checkpoint-3", "checkpoint-4")
    assert_equal(finish(tmp_path, CASES["full-exact"]), uninterrupted("full-exact"))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, CASES["full-exact"], dawdle=True)
    run.wait_for_step(2)
    run.signal(signal.SIGTERM)
    time.sleep(1.2)
    assert run.process.is_alive()
    run.signal(signal.SIGTERM)
    assert run.exit_code() == -signal.SIGTERM
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def start_two(output_dir: Path, shard: bool, **options: Any) -> list[Run]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Run(
            output_dir,
            {**CASES["full-amortized"], "per_device_train_batch_size": 1},
            environment={**shared, **(FSDP2 if shard else {}), "RANK": rank, "LOCAL_RANK": rank},
            **options,
        )
        for rank in "01"
    ]


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_a_signal_to_one_process_stops_both_and_they_resume(shard: bool, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert [run.exit_code() for run in start_two(straight, shard)] == [0, 0]
    runs = start_two(stopped, shard)
    runs[1].wait_for_step(3)
    runs[1].signal(signal.SIGTERM)
    assert [run.exit_code() for run in runs] == [143, 143]
    last = last_checkpoint(stopped)
    assert last in (stopped / "checkpoint-4", stopped / "checkpoint-5")
    assert (last / "model.safetensors").exists() != shard
    for _ in range(2):  # the second time there is nothing left to do
        assert [run.exit_code() for run in start_two(stopped, shard, resume=True)] == [0, 0]
        assert_equal(load_file(stopped / "final.safetensors"), load_file(straight / "final.safetensors"))


class Memory(TrainerCallback):
    """Resident memory after every step."""

    def __init__(self) -> None:
        self.resident: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.resident.append(psutil.Process().memory_info().rss)


def train_and_weigh(output_dir: Path, pipe: Connection) -> None:
    trainer = make_trainer(
        output_dir,
        max_steps=300,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_completion_length=2,
        save_steps=50,
        save_total_limit=1,
    )
    memory = Memory()
    trainer.add_callback(memory)
    trainer.train()
    pipe.send(memory.resident)


def test_memory_is_flat_over_300_steps(tmp_path: Path) -> None:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=train_and_weigh, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(timeout=240)
    resident = [value / 2**20 for value in ours.recv()]
    process.join()
    assert len(resident) == 300
    first, last = sum(resident[10:60]) / 50, sum(resident[-50:]) / 50
    print(f"resident memory: {first:.1f} MiB in steps 11-60, {last:.1f} MiB in the last 50")
    assert last == pytest.approx(first, rel=0.02)
