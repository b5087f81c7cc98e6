"""What a worker does with models: train one under supervision, load one, distil one, judge one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from vgs_distill.demo.cache import cached_folder, entry_key
from vgs_distill.demo.distillation import History, distill, make_trainer, step_ratio
from vgs_distill.demo.evaluate import evaluate
from vgs_distill.demo.methods import Method
from vgs_distill.demo.models import build_processor
from vgs_distill.demo.recipes import DemoRecipe
from vgs_distill.demo.supervised import Progress, train_supervised
from vgs_distill.demo.worlds import make_world, to_prompt_dataset
from vgs_distill.diagnosis.measure import Diagnosis, diagnose
from vgs_distill.steering.methods import METHODS

DIAGNOSED_ROWS = 96


class Distilled(NamedTuple):
    """What a run of distillation leaves beside the student."""

    history: History
    step_ratio: float | None  # seconds of a step of `Method.as_long_as` over those of a step of OPD


def supervised_model(
    recipe: DemoRecipe,
    role: str,
    seed: int,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[Path, bool]:
    """The cached folder of the `role` ("teacher" or "student") of a recipe, weights and processor; trained unless it
    is there, which the second value says."""
    size, training = (
        (recipe.teacher_size, recipe.teacher) if role == "teacher" else (recipe.student_size, recipe.student_start)
    )
    key = entry_key(
        f"{recipe.task}-{role}-seed{seed}",
        {"task": recipe.task, "size": size, "training": training, "seed": seed},
    )

    def build(folder: Path) -> None:
        world = make_world(recipe.task)
        processor = build_processor(world.words)
        model = train_supervised(world, processor, size, training, seed, progress)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return cached_folder(key, build, say=say)


def load(folder: Path) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A saved model and its processor."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def distillation_prompts(recipe: DemoRecipe, seed: int) -> Dataset:
    """Prompts differ from seed to seed and are the same for all methods of one seed."""
    distillation = recipe.distillation
    world = make_world(recipe.task)
    return to_prompt_dataset(
        world.training_questions(distillation.prompts, seed, distillation.prior, stream="distillation")
    )


def distilled(
    recipe: DemoRecipe,
    method: Method,
    seed: int,
    student: Qwen3VLForConditionalGeneration,
    teacher: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    scratch: Path,
    progress: Progress,
) -> Distilled:
    """Train `student` in place; what the engine records of the run goes to `scratch`."""
    ratio = None
    if method.as_long_as is not None:
        prompts = distillation_prompts(recipe, seed)
        ratio = step_ratio(student, teacher, processor, prompts, recipe.distillation, method.as_long_as, seed)
        steps = round(ratio * recipe.distillation.steps)
        recipe = replace(recipe, distillation=recipe.distillation.lasting(steps))
    prompts = distillation_prompts(recipe, seed)
    history = distill(
        student, teacher, processor, prompts, recipe.distillation, method, seed, scratch, progress
    )  # fmt: skip
    return Distilled(history, ratio)


def diagnosed(
    recipe: DemoRecipe,
    seed: int,
    student: Qwen3VLForConditionalGeneration,
    teacher: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    scratch: Path,
) -> Diagnosis:
    """What `vgs diagnose` measures of a start, on the first prompts of its distillation."""
    vgs = Method("vgs", "VGS", "vgs", METHODS["vgs"].gamma)
    prompts = distillation_prompts(recipe, seed)
    trainer = make_trainer(student, teacher, processor, prompts, recipe.distillation, vgs, seed, scratch)
    torch.manual_seed(seed)
    return diagnose(trainer, DIAGNOSED_ROWS)


def judge(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, recipe: DemoRecipe, *, with_image: bool = True
) -> dict[str, Any]:
    """`evaluate.Evaluation` on the recipe's evaluation set, as plain data."""
    evaluation = recipe.evaluation
    examples = make_world(recipe.task).balanced(evaluation.split, evaluation.examples, evaluation.seed)
    return asdict(evaluate(model, processor, examples, evaluation, with_image=with_image))
