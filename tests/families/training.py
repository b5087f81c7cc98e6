"""Trains a small student of any family on a few pictures, videos or sounds.

Shared by the tests and the table of `docs/families.md`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.inputs.modalities import MODALITIES

from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.small_run import ON_CPU

QUESTIONS = ("which colour is it", "what do you see left and right", "what is it")


def picture(seed: int) -> Image.Image:
    """Noise; every second one is taller, so that rows differ in tiles and tokens."""
    height = 48 if seed % 2 else 32
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, 32, 3), dtype=np.uint8))


def video(seed: int) -> list[Image.Image]:
    """Four or six frames of noise."""
    return [picture(100 * seed + 2 * frame) for frame in range(6 if seed % 2 else 4)]


def sound(seed: int) -> dict[str, Any]:
    """A tone whose pitch and length follow from the seed, a tenth to a fifth of a second of it."""
    time = np.arange(1600 + 160 * (seed % 11)) / 16_000
    return {"array": np.sin(2 * np.pi * (200 + 37 * seed) * time).astype(np.float32), "sampling_rate": 16_000}


MAKE = {"image": picture, "video": video, "audio": sound}


def questions(per_row: tuple[int, ...] = (1,), rows: int = 8, modality: str = "image") -> Dataset:
    """Rows in TRL's format; row i has `per_row[i % len]` images, or videos, or sounds."""
    counts = [per_row[row % len(per_row)] for row in range(rows)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": QUESTIONS[row % len(QUESTIONS)]}],
                MODALITIES[modality].plural: [MAKE[modality](10 * row + number) for number in range(count)],
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
    dataset: Dataset | tuple[int, ...] = (1,),
    student: Any = None,
    teacher: Any = None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> VGSTrainer:
    """A trainer of a fresh student against a fresh, wider teacher; keyword arguments go to `VGSConfig`.

    `dataset`: rows, or for how many images, videos or sounds each of eight rows asks in turn.
    """
    small, processor = SMALL_FAMILIES[family], processor_of(family)
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "modality": small.modality,
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
        train_dataset=questions(dataset, modality=small.modality) if isinstance(dataset, tuple) else dataset,
        processing_class=processor,
        **(trainer or {}),
    )


def first_rows(trainer: VGSTrainer, count: int) -> list[dict[str, Any]]:
    """The first rows of its dataset, as its data loader hands them on."""
    return trainer.data_collator([trainer.train_dataset[row] for row in range(count)])


def step_logs(trainer: VGSTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss/standard" in row]
