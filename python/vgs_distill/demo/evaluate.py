"""Accuracy by greedy free generation, with the picture and without it.

The model writes its own reasoning and is judged on the word after `answer :`. Teacher forcing would flatter every
model: given the reference reasoning, the answer is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from vgs_distill.demo.models import banned_token_ids
from vgs_distill.demo.recipes import EvaluationRecipe
from vgs_distill.demo.supervised import drop_image_tokens, pad_left, pictures_tensor, tokenize_prompts
from vgs_distill.demo.worlds import ANSWER_MARK, Example


@dataclass(frozen=True)
class Judgement:
    """What one model wrote for one example."""

    completion: str
    answer: str | None
    """The answer word, or None where the completion is not well formed."""
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in 0..1 over one test set. A malformed completion counts as wrong."""

    accuracy: float
    by_question_type: dict[str, float]
    against_prior: float
    """Accuracy on the examples that the training prior gets wrong."""
    with_prior: float
    """Accuracy on those that it gets right."""
    well_formed: float
    judgements: tuple[Judgement, ...]


def read_answer(completion: str, finished: bool) -> str | None:
    """The single word after the last `answer :`, or None if the completion is cut off or has another shape."""
    if not finished or ANSWER_MARK not in completion:
        return None
    words = completion.rsplit(ANSWER_MARK, 1)[1].split()
    return words[0] if len(words) == 1 else None


@torch.inference_mode()
def generate_greedy(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    examples: Sequence[Example],
    recipe: EvaluationRecipe,
    *,
    with_image: bool,
) -> Tensor:
    """Completion ids, (examples, max_new_tokens), padded after the turn's end token."""
    tokenizer = processor.tokenizer
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=recipe.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=banned_token_ids(processor),
        disable_compile=True,
    )
    prompts = tokenize_prompts(processor, [example.question for example in examples])
    if not with_image:
        prompts = [drop_image_tokens(ids, processor) for ids in prompts]
    completions = torch.full((len(examples), recipe.max_new_tokens), tokenizer.pad_token_id)
    for start in range(0, len(examples), recipe.batch_size):
        chunk = slice(start, start + recipe.batch_size)
        input_ids = pad_left(prompts[chunk], tokenizer.pad_token_id)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != tokenizer.pad_token_id).long()}
        if with_image:
            inputs["mm_token_type_ids"] = (input_ids == processor.image_token_id).int()
            pictures = list(pictures_tensor(examples[chunk]))
            inputs.update(processor.image_processor(images=pictures, return_tensors="pt"))
        written = model.generate(**inputs, generation_config=config)[:, input_ids.size(1) :]
        completions[chunk, : written.size(1)] = written
    return completions


def evaluate(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    examples: Sequence[Example],
    recipe: EvaluationRecipe,
    *,
    with_image: bool = True,
) -> Evaluation:
    """Judge `model` on `examples`; `with_image=False` removes the picture as the distillation engine's `drop` does."""
    was_training = model.training
    model.eval()
    completions = generate_greedy(model, processor, examples, recipe, with_image=with_image)
    model.train(was_training)
    finished = (completions == processor.tokenizer.eos_token_id).any(1).tolist()
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    judgements = []
    for example, text, ended in zip(examples, texts, finished, strict=True):
        answer = read_answer(text, ended)
        judgements.append(Judgement(text.strip(), answer, answer == example.answer))

    def share(rows: list[bool]) -> float:
        return sum(rows) / len(rows) if rows else 0.0

    pairs = list(zip(examples, judgements, strict=True))
    types = dict.fromkeys(example.question_type for example in examples)
    return Evaluation(
        accuracy=share([judged.correct for judged in judgements]),
        by_question_type={
            kind: share([judged.correct for example, judged in pairs if example.question_type == kind])
            for kind in types
        },
        against_prior=share([judged.correct for example, judged in pairs if example.against_prior]),
        with_prior=share([judged.correct for example, judged in pairs if not example.against_prior]),
        well_formed=share([judged.answer is not None for judged in judgements]),
        judgements=tuple(judgements),
    )
