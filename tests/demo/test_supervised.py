"""Supervised training: the dropped view is the engine's `drop` mask, and training is seeded and learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vgs_distill.demo.models import IMAGE_TOKENS, VISION_TOKENS, build_model
from vgs_distill.demo.recipes import SupervisedRecipe
from vgs_distill.demo.supervised import (
    IGNORED_LABEL,
    completion_loss,
    drop_image_tokens,
    learning_rate_factor,
    make_batch,
    tokenize_examples,
    tokenize_prompts,
    train_supervised,
)

RECIPE = SupervisedRecipe(
    steps=30,
    questions=40,
    captions=40,
    prior=0.5,
    image_dropout=0.25,
    data_seed=0,
    batch_size=8,
    warmup_steps=5,
)


@pytest.fixture(scope="module")
def data(processor, digits):
    return tokenize_examples(processor, digits.training_questions(24, 0, prior=0.5) + digits.captions(8, 0))


def test_dropping_removes_image_and_delimiters_and_nothing_else(processor, digits):
    vision = set(processor.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))
    for ids in tokenize_prompts(processor, [one.question for one in digits.balanced("test", 9, 0)]):
        dropped = drop_image_tokens(ids, processor)
        assert dropped == [token for token in ids if token not in vision]
        assert len(ids) - len(dropped) == IMAGE_TOKENS + 2


def test_a_batch_without_images_carries_no_trace_of_them(processor, data):
    rows = torch.arange(len(data))
    with_image, labels = make_batch(processor, data, rows, with_image=True)
    without, same_labels = make_batch(processor, data, rows, with_image=False)
    vision = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))
    assert torch.isin(with_image["input_ids"], vision).any()
    assert not torch.isin(without["input_ids"], vision).any()
    assert set(without) == {"input_ids", "attention_mask"}
    assert torch.equal(labels, same_labels), "the completion to predict is the same in both views"


def test_labels_are_the_completion_up_to_its_end_token(processor, data, digits):
    rows = torch.arange(24)
    inputs, labels = make_batch(processor, data, rows, with_image=True)
    examples = digits.training_questions(24, 0, prior=0.5)
    for example, row in zip(examples, labels, strict=True):
        written = row[row != IGNORED_LABEL]
        assert written[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(written[:-1]).strip() == example.completion
    assert inputs["input_ids"][:, -labels.size(1) :][labels != IGNORED_LABEL].equal(labels[labels != IGNORED_LABEL])


def test_padding_changes_no_loss(processor, data, untrained):
    """A short prompt alone, and the same prompt padded beside longer ones, must score its completion alike."""
    lengths = (data.prompt_ids != data.pad_id).sum(1)
    short = int(lengths.argmin())
    for with_image in (True, False):
        inputs, labels = make_batch(processor, data, torch.arange(len(data)), with_image=with_image)
        prompts = inputs["input_ids"].size(1) - labels.size(1)
        with torch.no_grad():
            logits = untrained(**inputs).logits[short, prompts - 1 :]
            ids = inputs["input_ids"][short]
            kept = ids != data.pad_id
            alone = {"input_ids": ids[kept][None], "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.long)}
            if with_image:
                alone["mm_token_type_ids"] = inputs["mm_token_type_ids"][short][kept][None]
                alone["image_grid_thw"] = inputs["image_grid_thw"][short : short + 1]
                alone["pixel_values"] = inputs["pixel_values"].view(len(data), 16, -1)[short]
            expected = untrained(**alone).logits[0]
        written = int((labels[short] != IGNORED_LABEL).sum())
        torch.testing.assert_close(logits[:written], expected[-written - 1 : -1], rtol=1e-4, atol=1e-5)


def test_the_loss_reaches_the_vision_tower_only_with_images(processor, data, tiny_size):
    torch.manual_seed(0)
    model = build_model(tiny_size, processor)
    for with_image in (True, False):
        model.zero_grad(set_to_none=True)
        inputs, labels = make_batch(processor, data, torch.arange(8), with_image=with_image)
        completion_loss(model, inputs, labels).backward()
        touched = any(parameter.grad is not None for parameter in model.model.visual.parameters())
        assert touched == with_image


def test_training_learns_and_repeats_by_seed(processor, digits, tiny_size):
    def train(seed):
        losses = []
        model = train_supervised(
            digits, processor, tiny_size, RECIPE, seed, lambda done, total, loss: losses.append((done, total, loss))
        )
        return model, losses

    model, losses = train(0)
    assert [done for done, _, _ in losses] == list(range(1, 31))
    assert {total for _, total, _ in losses} == {30}
    assert losses[-1][2] < 0.7 * losses[0][2]
    assert not model.training
    again, _ = train(0)
    other, _ = train(1)
    for (name, weight), same in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same), name
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_no_dropout_and_full_dropout_both_train(processor, digits, tiny_size):
    for share in (0.0, 1.0):
        recipe = replace(RECIPE, steps=2, image_dropout=share)
        train_supervised(digits, processor, tiny_size, recipe, seed=0)


def test_the_learning_rate_warms_up_and_comes_down():
    factors = [learning_rate_factor(step, RECIPE) for step in range(RECIPE.steps)]
    assert factors[0] == pytest.approx(0.2, abs=0.01)
    assert max(factors) == factors[RECIPE.warmup_steps - 1]
    assert 0.02 <= factors[-1] < 0.03
