"""Trains a small student of any family on a few pictures. Shared by the tests and the table of `docs/families.md`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin
from vgs_distill import VGSConfig, VGSTrainer

from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.small_run import ON_CPU

QUESTIONS = ("which colour is it", "what do you see left and right", "what is it")


def picture(seed: int) -> Image.Image:
    """Noise; every second one is taller, so that rows differ in tiles and tokens."""
    height = 48 if seed % 2 else 32
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, 32, 3), dtype=np.uint8))


def questions(images_per_row: tuple[int, ...] = (1,), rows: int = 8) -> Dataset:
    """Rows in TRL's format; row i has `images_per_row[i % len]` images."""
    counts = [images_per_row[row % len(images_per_row)] for row in range(rows)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": QUESTIONS[row % len(QUESTIONS)]}],
                "images": [picture(10 * row + number) for number in range(count)],
            }
            for row, count in enumerate(counts)
        ]
    )


@cache
def processor_of(family: str) -> ProcessorMixin:
    return SMALL_FAMILIES[family].processor()


def make_trainer(
    family: str,
    output_dir: str,
    dataset: Dataset | None = None,
    student: Any = None,
    teacher: Any = None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> VGSTrainer:
    """A trainer of a fresh student against a fresh, wider teacher; keyword arguments go to `VGSConfig`."""
    small, processor = SMALL_FAMILIES[family], processor_of(family)
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "seed": 11,
        **ON_CPU,
        **config,
    }
    return VGSTrainer(
        model=small.model(processor, 1) if student is None else student,
        teacher_model=small.model(processor, 2, TEACHER_WIDTH) if teacher is None else teacher,
        args=VGSConfig(**settings),
        train_dataset=questions() if dataset is None else dataset,
        processing_class=processor,
        **(trainer or {}),
    )


def step_logs(trainer: VGSTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss/full" in row]
