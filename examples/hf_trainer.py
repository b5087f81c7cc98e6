"""Visual gradient steering in transformers' plain `Trainer`: only `compute_loss` changes.

    python examples/hf_trainer.py STUDENT TEACHER ROWS.jsonl OUTPUT_DIR [STEPS]

`Trainer` runs one loss back, so the weights come from the Gramian of the two logit gradients, which the kernel gives
without a backward pass. Models and rows: `own_loop.py`.
"""

from __future__ import annotations

import sys
from typing import Any

from own_loop import steered_parts
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from vgs_distill import canonical_row, load_rows

from vgs_kernels import VisualGradientSteering


class SteeredTrainer(Trainer):
    def __init__(self, *, teacher: Any, gamma: float, new_tokens: int, **options: Any) -> None:
        super().__init__(data_collator=lambda rows: [canonical_row(row) for row in rows], **options)
        self.teacher = teacher.to(self.args.device).eval()
        self.steering = VisualGradientSteering(gamma)
        self.new_tokens = new_tokens

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        parts = steered_parts(model, self.teacher, self.processing_class, inputs, self.new_tokens)
        lang_weight, vis_weight = self.steering(parts.logit_gramian)
        return lang_weight * parts.lang + vis_weight * parts.vis


def main(student: str, teacher: str, dataset: str, output_dir: str, steps: str = "3") -> None:
    SteeredTrainer(
        model=AutoModelForImageTextToText.from_pretrained(student),
        teacher=AutoModelForImageTextToText.from_pretrained(teacher),
        processing_class=AutoProcessor.from_pretrained(student, padding_side="left"),
        train_dataset=load_rows(dataset, split="train"),
        gamma=0.8,
        new_tokens=8,
        args=TrainingArguments(
            output_dir,
            max_steps=int(steps),
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="steps",
            save_steps=int(steps),
            report_to="none",
        ),
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
