"""`vgs train`: from arguments to a trained model in a folder.

What is cheap to check is checked first, so that bad input ends within seconds and leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ..config import VGSConfig
from ..distributed import use_one_gpu
from ..errors import InputError, one_sentence
from ..inputs.data import has_splits, is_same_source, load_rows, where
from ..inputs.dataset_checks import RowCheck
from ..inputs.families import check_image_mask, check_modality, check_teacher_reads_the_same
from ..inputs.modalities import MODALITIES, Modality
from ..models.sources import (
    adapter_config,
    check_installed,
    check_no_adapter,
    check_tokenizers,
    student_source,
    teacher_source,
)
from ..resilience.checkpoints import find_checkpoint
from ..resilience.output_dir import check_output_dir
from ..resilience.run_folder import RunFile, in_the_way, saved_step
from ..steering.methods import METHODS
from ..trainer import VGSTrainer
from .arguments import DataArguments, given, train_parser
from .console import RunConsole, next_commands
from .fields import require


def train(arguments: Sequence[str], *, dry_run: bool = False, preview: int = 0) -> Path:
    """Run `vgs train` with these flags and return the output folder.

    `dry_run`: check and load everything, say what would be trained, and leave nothing behind; so does a `preview`,
    which shows that many rows, too.

    Raises:
        InputError: something handed in cannot work; nothing has been written.
    """
    (config, data, model), values = train_parser().parse(arguments)
    existed = config.output_dir is not None and Path(config.output_dir).exists()
    trainer, checkpoint = build(config, data, model, values)
    console = RunConsole.attach(trainer, values["dataset_name"])
    if dry_run or preview:
        console.look(preview)
        if not existed:
            Path(config.output_dir).rmdir()  # which transformers makes
        return Path(config.output_dir)
    trainer.add_callback(RunFile(values))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except SystemExit:
        console.interrupted()
        raise
    finally:
        console.stop()
    save(trainer)
    console.closing(next_commands(trainer, values))
    return Path(config.output_dir)


def build(
    config: VGSConfig, data: DataArguments, model: ModelConfig, values: dict[str, Any]
) -> tuple[VGSTrainer, str | None]:
    """The trainer, and the checkpoint it resumes from; cheap checks first."""
    require("train", given(values))
    assert config.output_dir is not None
    assert data.dataset_name is not None
    checkpoint = resume_point(config.output_dir, config.resume_from_checkpoint)
    check_installed(model.attn_implementation, config.use_liger_kernel)
    use_one_gpu(config)
    if data.dataset_streaming and config.max_steps < 1:
        raise InputError("a streamed dataset has no length; set max_steps with dataset_streaming")
    student = student_source(values["model_name_or_path"], config, model)
    teacher = teacher_source(values["teacher_model_name_or_path"], config, model)
    modality = MODALITIES[config.modality]
    configs = student.check(modality), teacher.check(modality)
    check_no_adapter(student)
    check_modality(configs[0], modality)
    check_teacher_reads_the_same(*configs, modality)
    if METHODS[config.method].masks_teacher:
        check_image_mask(configs[0], config.image_mask)
    processor = student.processor_to_sample(configs[0])
    check_tokenizers(processor, teacher)
    train_rows, eval_rows = rows(data, modality, evaluated=config.eval_strategy != "no")
    check = RowCheck.of(config, configs[0], processor)
    check.check(train_rows)
    check.check_evaluation(eval_rows)
    config.check_dataset_rows = 0  # the trainer need not read the rows again
    existed = Path(config.output_dir).exists()
    config.model_init_kwargs = config.teacher_model_init_kwargs = None  # in the sources by now
    try:
        model_to_train = student.load()
        trainer = VGSTrainer(
            model=model_to_train,
            teacher_model=teacher.load(),
            args=config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processor,
            peft_config=adapter_config(model, model_to_train, modality),
        )
    except (ValueError, TypeError, ImportError) as error:
        if not existed:
            with suppress(OSError):  # transformers makes the folder before it checks the rest
                Path(config.output_dir).rmdir()
        raise InputError(one_sentence(error)) from error
    trainer.dataset_name = data.dataset_name
    return trainer, checkpoint


def rows(data: DataArguments, modality: Modality, *, evaluated: bool) -> tuple[Any, Any]:
    """What to train on, and what to evaluate on where that is asked for; InputError where both are the same rows."""

    def load(name: str, split: str | None) -> Any:
        return load_rows(
            name,
            split=split,
            config=data.dataset_config,
            streaming=data.dataset_streaming,
            prompt_column=data.prompt_column,
            image_column=data.image_column,
            modality=modality,
        )

    assert data.dataset_name is not None
    train_name, train_split = data.dataset_name, data.dataset_train_split
    train_rows = load(train_name, train_split)
    if not evaluated:
        return train_rows, None
    name = data.eval_dataset_name or train_name
    split = data.dataset_test_split or ("test" if has_splits(name) else None)
    if is_same_source(name, split, train_name, train_split):
        raise InputError(
            f"eval_strategy would evaluate on the rows that are trained on, {where(name, split)}; give "
            "eval_dataset_name, or another dataset_test_split"
        )
    return train_rows, load(name, split)


def resume_point(output_dir: str, asked: str | None) -> str | None:
    """The checkpoint to resume from, if any; InputError if it is none, or if the run would overwrite another."""
    folder = check_output_dir(output_dir)
    if asked is None or asked.lower() == "false":
        # Of several processes the first asks: it may be writing while the others still start.
        if os.environ.get("RANK", "0") == "0" and (name := in_the_way(folder)) is not None:
            raise InputError(
                f"the output directory {output_dir!r} holds {name!r}, which the run would overwrite; choose another "
                "one, or continue what is there with resume_from_checkpoint=true"
            )
        return None
    return str(find_checkpoint(folder, True if asked.lower() == "true" else asked))


def save(trainer: VGSTrainer) -> None:
    """The final model, its processor and its card in the output folder, as `from_pretrained` reads them.

    A resumed run that had been finished leaves what is there, but for a model that was not saved to its end.
    """
    assert trainer.args.output_dir is not None
    if not trainer.took_a_step and saved_step(Path(trainer.args.output_dir)) >= trainer.state.global_step:
        return
    if trainer.is_fsdp_enabled:
        # Shards are for resuming; accelerate would write nothing here.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.create_model_card()  # last: saving an adapter writes one of its own
    trainer.save_state()
