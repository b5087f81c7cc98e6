"""What small runs on the CPU have in common: their settings, and students and teachers of half a second's training.

For tests and the processes they start. Imports nothing heavy before a function is called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgs_distill.demo.recipes import DemoRecipe

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def build_student(processor: Any, seed: int, width: int = 32, tied: bool = False) -> Any:
    """A Qwen3-VL with random weights that reads what `processor` writes; a wider one serves as the teacher.

    `tied`: its head is its embedding, as in the real ones of 2B and 4B.
    """
    import torch
    from vgs_distill.demo.models import build_model
    from vgs_distill.demo.recipes import ModelSize

    torch.manual_seed(seed)
    model = build_model(ModelSize(text_width=width, vision_width=32), processor)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def small_recipe(recipe: DemoRecipe) -> DemoRecipe:
    """A demo recipe of the same task that is through in seconds. Teacher and student start differ in their steps."""
    from vgs_distill.demo.recipes import EvaluationRecipe, ModelSize

    size = ModelSize(text_width=32, text_layers=1, vision_width=32, vision_layers=1, heads=2)
    training = replace(recipe.teacher, steps=3, questions=20, captions=20, batch_size=8, warmup_steps=1)
    return replace(
        recipe,
        teacher_size=size,
        student_size=size,
        teacher=training,
        student_start=replace(training, steps=2),
        distillation=replace(recipe.distillation, steps=2, prompts=8, batch_size=4, warmup_steps=1),
        evaluation=EvaluationRecipe(examples=12, max_new_tokens=6),
    )
