"""Supervised training of the teacher and of each student's start, with image dropout.

A part of every batch is trained without its picture: the image tokens and their delimiters leave the sequence. That
is exactly the `drop` mask of the distillation engine, so the teacher's answer to a masked prompt is what it learned
to say there, not what it does off its training distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from vgs_distill.demo.models import IMAGE_PAD, VISION_END, VISION_START, build_model
from vgs_distill.demo.recipes import ModelSize, SupervisedRecipe
from vgs_distill.demo.worlds import Example, World, messages

IGNORED_LABEL = -100
Progress = Callable[[int, int, float], None]
"""Called as (steps done, steps in all, latest loss)."""

_CLOSING_LEARNING_RATE = 0.02  # part of the peak that remains at the last step


@dataclass(frozen=True)
class TokenizedExamples:
    """A whole training set as tensors; pictures stay bytes until their batch is drawn (as patches they would take
    25 kB each, half a gigabyte for the teacher)."""

    prompt_ids: Tensor  # (examples, prompt), padded on the left
    dropped_prompt_ids: Tensor  # (examples, dropped prompt), the same without the image
    completion_ids: Tensor  # (examples, completion), padded on the right, ends with the turn's end token
    pictures: Tensor  # (examples, 3, height, width), uint8
    pad_id: int
    image_id: int

    def __len__(self) -> int:
        return len(self.prompt_ids)


def prompt_text(processor: Qwen3VLProcessor, question: str) -> str:
    """The templated prompt for a question about one picture."""
    turn: dict[str, Any] = dict(messages(question)[0])
    turn["content"] = [{"type": "image"}, {"type": "text", "text": turn["content"]}]
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def drop_image_tokens(ids: Sequence[int], processor: Qwen3VLProcessor) -> list[int]:
    """`ids` without image placeholders and their delimiters: the text-only view of a prompt."""
    leaving = set(processor.tokenizer.convert_tokens_to_ids([VISION_START, IMAGE_PAD, VISION_END]))
    return [token for token in ids if token not in leaving]


def tokenize_prompts(processor: Qwen3VLProcessor, questions: Sequence[str]) -> list[list[int]]:
    """Prompt ids with the image placeholder expanded, as the processor makes them.

    A task has a few dozen different questions, so each is tokenized once: the processor itself would run the
    template, the image processor and the tokenizer for every row.
    """
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    size = processor.image_processor.size["shortest_edge"]
    side = math.isqrt(size)
    tokens = processor.image_processor.get_number_of_image_patches(side, side) // (
        processor.image_processor.merge_size**2
    )
    known: dict[str, list[int]] = {}
    for question in dict.fromkeys(questions):
        ids = processor.tokenizer(prompt_text(processor, question))["input_ids"]
        at = ids.index(image_id)
        known[question] = ids[:at] + [image_id] * tokens + ids[at + 1 :]
    return [known[question] for question in questions]


def pictures_tensor(examples: Sequence[Example]) -> Tensor:
    """The pictures as one uint8 tensor (examples, 3, height, width)."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(example.image) for example in examples])).permute(0, 3, 1, 2)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids as one tensor (rows, longest), padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids as one tensor (rows, longest), padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows])


def tokenize_examples(processor: Qwen3VLProcessor, examples: Sequence[Example]) -> TokenizedExamples:
    """Tokenize a training set once, each prompt with and without its image."""
    tokenizer = processor.tokenizer
    prompts = tokenize_prompts(processor, [example.question for example in examples])
    completions = tokenizer([example.completion for example in examples])["input_ids"]
    return TokenizedExamples(
        prompt_ids=pad_left(prompts, tokenizer.pad_token_id),
        dropped_prompt_ids=pad_left([drop_image_tokens(ids, processor) for ids in prompts], tokenizer.pad_token_id),
        completion_ids=pad_right([[*ids, tokenizer.eos_token_id] for ids in completions], tokenizer.pad_token_id),
        pictures=pictures_tensor(examples),
        pad_id=tokenizer.pad_token_id,
        image_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD),
    )


def make_batch(
    processor: Qwen3VLProcessor, data: TokenizedExamples, rows: Tensor, *, with_image: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and the labels of their completion tokens, (rows, completion)."""
    prompts = data.prompt_ids[rows] if with_image else data.dropped_prompt_ids[rows]
    completions = data.completion_ids[rows]
    longest = int((completions != data.pad_id).sum(1).max())
    completions = completions[:, :longest]
    input_ids = torch.cat([prompts, completions], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != data.pad_id).long()}
    if with_image:
        inputs["mm_token_type_ids"] = (input_ids == data.image_id).int()
        inputs.update(processor.image_processor(images=list(data.pictures[rows]), return_tensors="pt"))
    return inputs, completions.masked_fill(completions == data.pad_id, IGNORED_LABEL)


def completion_loss(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of the completion tokens; only their positions are projected to the vocabulary."""
    kept = labels.size(1) + 1
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)


def learning_rate_factor(step: int, recipe: SupervisedRecipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return warmup * (_CLOSING_LEARNING_RATE + (1 - _CLOSING_LEARNING_RATE) * cosine)


def train_supervised(
    world: World,
    processor: Qwen3VLProcessor,
    size: ModelSize,
    recipe: SupervisedRecipe,
    seed: int,
    progress: Progress | None = None,
) -> Qwen3VLForConditionalGeneration:
    """Train a fresh model of `size`. `seed` sets the initial weights and the order of the batches.

    Deterministic for one machine and thread count. The data depend on the recipe only, not on `seed`: students of
    different seeds are different beginners in the same class.
    """
    examples = world.training_questions(recipe.questions, recipe.data_seed, recipe.prior)
    examples += world.captions(recipe.captions, recipe.data_seed)
    examples = [world.in_style(example, recipe.style) for example in examples]
    data = tokenize_examples(processor, examples)

    torch.manual_seed(1000 + seed)
    model = build_model(size, processor).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    order = torch.Generator().manual_seed(seed)
    dropped = round(recipe.batch_size * recipe.image_dropout)
    for step in range(recipe.steps):
        rows = torch.randint(len(data), (recipe.batch_size,), generator=order)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part, with_image in ((rows[dropped:], True), (rows[:dropped], False)):
            if len(part) == 0:
                continue
            inputs, labels = make_batch(processor, data, part, with_image=with_image)
            loss = completion_loss(model, inputs, labels) * (len(part) / recipe.batch_size)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, recipe.steps, total)
    return model.eval()
