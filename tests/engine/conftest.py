"""Real Qwen3-VL classes, a real processor and real images at small size, shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.demo.models import build_processor
from vgs_distill.demo.worlds import World, make_world, to_prompt_dataset

from tests.small_run import ON_CPU, build_student


@pytest.fixture(scope="session")
def world() -> World:
    return make_world("shapes")


@pytest.fixture(scope="session")
def processor(world: World) -> Qwen3VLProcessor:
    return build_processor(world.words)


@pytest.fixture(scope="session")
def make_model(processor: Qwen3VLProcessor) -> Callable[..., Qwen3VLForConditionalGeneration]:
    return partial(build_student, processor)


@pytest.fixture(scope="session")
def prompts(world: World) -> Dataset:
    return to_prompt_dataset(world.training_questions(24, seed=5, prior=0.5))


@pytest.fixture
def make_trainer(
    tmp_path: Path, processor: Qwen3VLProcessor, make_model: Callable[..., Any], prompts: Dataset
) -> Callable[..., VGSTrainer]:
    """A trainer of a fresh student against a fresh teacher; keyword arguments go to `VGSConfig`."""

    def make(
        dataset: Dataset | None = None,
        student: Any = None,
        teacher: Any = None,
        eval_dataset: Dataset | None = None,
        **config: Any,
    ) -> VGSTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "seed": 11,
            **ON_CPU,
            **config,
        }
        return VGSTrainer(
            model=make_model(1) if student is None else student,
            teacher_model=make_model(2, width=48).eval() if teacher is None else teacher,
            args=VGSConfig(**settings),
            train_dataset=prompts if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
        )

    return make
