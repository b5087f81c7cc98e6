"""Visual gradient steering in transformers' plain `Trainer`: only `compute_loss` changes.

    python examples/hf_trainer.py STUDENT TEACHER ROWS.jsonl OUTPUT_DIR [STEPS]

`Trainer` runs one loss back: the objective with a constant eta, as in the paper. Models and rows: `own_loop.py`.
"""

from __future__ import annotations

import sys
from typing import Any

from own_loop import parts_of_loss
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from vgs_distill import canonical_row, load_rows


class SteeredTrainer(Trainer):
    def __init__(self, *, teacher: Any, gamma: float, eta: float, new_tokens: int, **options: Any) -> None:
        super().__init__(data_collator=lambda rows: [canonical_row(row) for row in rows], **options)
        self.teacher = teacher.to(self.args.device).eval()
        self.objective = (eta, eta * gamma, 0)  # of standard, vis, lang
        self.new_tokens = new_tokens

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        parts = parts_of_loss(
            model, self.teacher, self.processing_class, inputs, self.new_tokens, objective=self.objective
        )
        assert parts.objective is not None
        return parts.objective


def main(student: str, teacher: str, dataset: str, output_dir: str, steps: str = "3") -> None:
    SteeredTrainer(
        model=AutoModelForImageTextToText.from_pretrained(student),
        teacher=AutoModelForImageTextToText.from_pretrained(teacher),
        processing_class=AutoProcessor.from_pretrained(student, padding_side="left"),
        train_dataset=load_rows(dataset, split="train"),
        gamma=2.0,
        eta=0.4,
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
