"""One student, one method: on-policy distillation through the engine, and the history it leaves."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import (
    PrinterCallback,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.demo.methods import OPD, Method
from vgs_distill.demo.models import banned_token_ids
from vgs_distill.demo.recipes import DistillationRecipe
from vgs_distill.demo.supervised import Progress

if TYPE_CHECKING:
    from datasets import Dataset

HISTORY_KEYS = (
    "loss",
    "loss/standard",
    "loss/lang",
    "loss/vis",
    "dependency",
    "entropy",
    "learning_rate",
    "grad_norm",
    "gradient/norm_standard",
    "gradient/norm_lang",
    "gradient/norm_vis",
    "gradient/cosine",
    "steering/gamma",
    "steering/eta",
    "steering/language_preservation",
    "steering/weight_ratio",
    "steering/direction_cosine",
    "runaway/divergence_growth",
    "runaway/weight_growth",
    "runaway/cut_off_rise",
    "runaway/language_growth",
    "runaway/alarm",
    "completions/mean_length",
    "completions/clipped_ratio",
    "step_time",
    "time/rollout",
    "time/teacher",
    "time/student",
    "time/steering",
    "time/masked_teacher",
    "time/masked_student",
)
"""What is kept of each step's log, where the method logs it. Losses in nats per token, times in seconds."""

History = list[dict[str, float]]


class _Reporter(TrainerCallback):
    """Hands each step's loss to the progress bar. Raising in here stops training, which is how a worker whose
    parent is gone ends. `seconds` holds the processor's time of every step: what else the machine does leaves it as it
    is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = 0.0
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._progress(state.global_step, state.max_steps, float(logs["loss"]))


def distill(
    student: Qwen3VLForConditionalGeneration,
    teacher: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    prompts: Dataset,
    recipe: DistillationRecipe,
    method: Method,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> History:
    """Train `student` in place and return its history, one row per step with the keys of `HISTORY_KEYS` and
    `processor_seconds`.

    `seed` sets the order of the prompts and the sampling; every method of a seed meets the same prompts in the same
    order. `scratch` is where the trainer may put its own files; nothing of interest is left there.
    """
    trainer = make_trainer(student, teacher, processor, prompts, recipe, method, seed, scratch)
    reporter = _Reporter(progress)
    trainer.add_callback(reporter)
    trainer.train()
    student.eval()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return [
        {
            "step": row["step"],
            "processor_seconds": seconds,
            **{key: float(row[key]) for key in HISTORY_KEYS if _is_number(row.get(key))},
        }
        for row, seconds in zip(logged, reporter.seconds, strict=True)
    ]


def step_ratio(
    student: Qwen3VLForConditionalGeneration,
    teacher: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    prompts: Dataset,
    recipe: DistillationRecipe,
    method: Method,
    seed: int,
) -> float:
    """The processor's time for a step of `method` over that of a step of OPD, measured now on copies of `student`.

    17 steps of the method, between two times 9 of OPD so that what drifts favours neither. The first step of each is
    left out, which leaves one measurement of gradients in 16, as often as `"amortized"` makes one.
    """

    def seconds(timed: Method, steps: int) -> float:
        with TemporaryDirectory() as scratch:
            history = distill(
                copy.deepcopy(student), teacher, processor, prompts, recipe.lasting(steps), timed, seed,
                Path(scratch), lambda done, total, loss: None,
            )  # fmt: skip
        return fmean(row["processor_seconds"] for row in history[1:])

    before, steered, after = seconds(OPD, 9), seconds(method, 17), seconds(OPD, 9)
    return 2.0 * steered / (before + after)


def make_trainer(
    student: Qwen3VLForConditionalGeneration,
    teacher: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    prompts: Dataset,
    recipe: DistillationRecipe,
    method: Method,
    seed: int,
    scratch: Path,
) -> VGSTrainer:
    trainer = VGSTrainer(
        model=student,
        teacher_model=teacher,
        args=_config(processor, recipe, method, seed, scratch),
        train_dataset=prompts,
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)  # it would print every step's log over the progress bars
    return trainer


def _config(
    processor: Qwen3VLProcessor, recipe: DistillationRecipe, method: Method, seed: int, scratch: Path
) -> VGSConfig:
    return VGSConfig(
        output_dir=str(scratch),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_ratio},
        warmup_steps=recipe.warmup_steps,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        weight_decay=recipe.weight_decay,
        temperature=recipe.temperature,
        max_completion_length=recipe.max_completion_length,
        generation_kwargs={"suppress_tokens": banned_token_ids(processor)},
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        method=method.method,
        gamma=method.gamma,
        eta=method.eta,
        image_mask="drop",
        **method.settings,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
