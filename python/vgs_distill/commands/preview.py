"""`vgs train --preview N`: the first rows as the models read them, with and without the image, and what is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from ..errors import InputError
from ..inputs.families import EvidenceTokens
from ..inputs.modalities import MODALITIES
from ..steering.methods import METHODS

if TYPE_CHECKING:
    from ..trainer import VGSTrainer


def preview(trainer: VGSTrainer, rows: int, console: Console) -> None:
    """Print the first `rows` rows of the dataset and a completion of each, sampled as in training.

    Raises:
        InputError: there are several processes.
    """
    if trainer.args.world_size > 1:
        raise InputError("a preview takes one process; call vgs train without accelerate launch")
    trainer.model.eval()  # no dropout
    dataset: Any = trainer.train_dataset
    examples = iter(dataset)
    number = 0
    while batch := list(islice(examples, min(rows - number, trainer.args.train_batch_size))):
        rollout = trainer.roll_out(batch)
        for row in range(len(batch)):
            number += 1
            console.print(f"\nrow {number}", style="bold")
            for title, text in _views(trainer, rollout, row):
                console.print(title, style="cyan", highlight=False)
                console.print(text, markup=False, highlight=False, soft_wrap=True)


def _views(trainer: VGSTrainer, rollout: dict[str, Any], row: int) -> Iterator[tuple[str, str]]:
    """Titles and texts of the prompt with its evidence, the prompt without, and the completion."""
    args, processing = trainer.args, trainer.processing_class
    tokenizer: Any = getattr(processing, "tokenizer", processing)
    tokens = EvidenceTokens.of(trainer.model.config, processing, MODALITIES[args.modality])

    def ids(name: str) -> Tensor:
        of_row: Tensor = rollout[f"{name}_ids"][row][rollout[f"{name}_mask"][row].bool()]
        return of_row

    def text(of_row: Tensor) -> str:
        """Special tokens included; of a run of placeholders the first one and their number."""
        said = str(tokenizer.decode(of_row.tolist(), skip_special_tokens=False))
        for token in tokens.placeholders:
            name = str(tokenizer.decode([token]))
            said = re.sub(rf"({re.escape(name)})(\s*\1)+", _counted, said)
        return said

    prompt, completion = ids("prompt"), ids("completion")
    count = int(tokens.is_placeholder(prompt).sum())
    yield f"with its {args.modality}: {len(prompt)} tokens, {count} of them of the {args.modality}", text(prompt)
    masked = METHODS[args.method].masks_teacher
    if masked and "text_prompt_ids" in rollout:
        without = ids("text_prompt")
        yield f"without it: {len(without)} tokens", text(without)
    elif masked and count:
        how = {"blank": "every pixel has the mean colour", "attention": "nothing attends to those"}[args.image_mask]
        yield f"without it: the same tokens, and {how}", ""
    ends = len(completion) and int(completion[-1]) in trainer.eos_token_ids
    how = "" if ends else f", cut at max_completion_length={args.max_completion_length}"
    yield f"the student writes: {len(completion)} tokens{how}", text(completion)


def _counted(run: re.Match[str]) -> str:
    return f"{run[1]} × {run[0].count(run[1])}"
