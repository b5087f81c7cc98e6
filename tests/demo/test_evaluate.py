"""Evaluation judges what the model wrote by itself, and never lets it write an image token."""

from __future__ import annotations

import pytest
import torch
from vgs_distill.demo.evaluate import evaluate, generate_greedy, read_answer
from vgs_distill.demo.models import IMAGE_PAD, TURN_END, banned_token_ids
from vgs_distill.demo.recipes import EvaluationRecipe

RECIPE = EvaluationRecipe(examples=24, batch_size=10, max_new_tokens=8)


@pytest.mark.parametrize(
    ("completion", "finished", "answer"),
    [
        ("i see a one . answer : one", True, "one"),
        ("answer : one . answer : two", True, "two"),
        ("answer : one two", True, None),
        ("answer :", True, None),
        ("one", True, None),
        ("answer : one", False, None),
    ],
)
def test_the_answer_is_the_single_word_after_the_last_mark(completion, finished, answer):
    assert read_answer(completion, finished) == answer


def always_say(model, token_ids: list[int], strength: float = 1e4) -> None:
    """Make `model` prefer `token_ids`, the first most, whatever it reads: the head ignores its input."""
    hidden = model.lm_head.weight.size(1)
    bias = torch.zeros(model.lm_head.weight.size(0))
    for rank, token in enumerate(token_ids):
        bias[token] = strength / (rank + 1)
    head = torch.nn.Linear(hidden, len(bias))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(bias)
    model.lm_head = head


@pytest.mark.parametrize("with_image", [True, False])
def test_banned_tokens_are_never_written(untrained, processor, digits, with_image):
    banned = banned_token_ids(processor)
    always_say(untrained, [*banned, processor.tokenizer.convert_tokens_to_ids("three")])
    written = generate_greedy(untrained, processor, digits.balanced("test", 12, 0), RECIPE, with_image=with_image)
    assert not torch.isin(written, torch.tensor(banned)).any()
    assert (written == processor.tokenizer.convert_tokens_to_ids("three")).all()


def test_a_model_that_never_ends_is_not_well_formed(untrained, processor, digits):
    always_say(untrained, [processor.tokenizer.convert_tokens_to_ids("three")])
    result = evaluate(untrained, processor, digits.balanced("test", 12, 0), RECIPE)
    assert result.well_formed == 0.0
    assert result.accuracy == 0.0
    assert result.judgements[0].completion == " ".join(["three"] * RECIPE.max_new_tokens)


def test_the_reference_completion_is_not_shown_to_the_model(untrained, processor, digits, monkeypatch):
    """Teacher forcing would need the reference: generation must only ever be given the prompt."""
    examples = digits.balanced("test", 9, 0)
    given = []
    generate = untrained.generate

    def spy(**inputs):
        given.append(inputs["input_ids"])
        return generate(**inputs)

    monkeypatch.setattr(untrained, "generate", spy)
    evaluate(untrained, processor, examples, RECIPE)
    texts = [text for ids in given for text in processor.tokenizer.batch_decode(ids)]
    assert len(texts) == len(examples)
    for text in texts:
        assert "answer" not in text
        assert text.endswith("assistant")


def test_masked_evaluation_shows_no_picture(untrained, processor, digits, monkeypatch):
    given = []
    generate = untrained.generate
    monkeypatch.setattr(untrained, "generate", lambda **inputs: given.append(inputs) or generate(**inputs))
    evaluate(untrained, processor, digits.balanced("test", 9, 0), RECIPE, with_image=False)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    assert given
    assert all("pixel_values" not in inputs for inputs in given)
    assert not any((inputs["input_ids"] == image_id).any() for inputs in given)


def test_shares_are_counted_over_the_right_examples(processor, digits, untrained, monkeypatch):
    """Hand the evaluation written texts: the reference for `count` and `largest`, nonsense for `where`."""
    examples = digits.balanced("test", 24, 0)
    texts = [
        example.completion + TURN_END if example.question_type != "where" else "none none" + TURN_END
        for example in examples
    ]
    tokenizer = processor.tokenizer
    written = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    monkeypatch.setattr("vgs_distill.demo.evaluate.generate_greedy", lambda *args, **kwargs: written)
    result = evaluate(untrained, processor, examples, RECIPE)
    assert result.by_question_type == {"where": 0.0, "count": 1.0, "largest": 1.0}
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.well_formed == pytest.approx(2 / 3)
    against = [example for example in examples if example.against_prior]
    expected = sum(example.question_type != "where" for example in against) / len(against)
    assert result.against_prior == pytest.approx(expected)
    assert result.judgements[0].answer is None


def test_batching_does_not_change_what_is_written(untrained, processor, digits):
    examples = digits.balanced("test", 12, 0)
    small = generate_greedy(untrained, processor, examples, RECIPE, with_image=True)
    large = generate_greedy(
        untrained,
        processor,
        examples,
        EvaluationRecipe(examples=12, batch_size=12, max_new_tokens=8),
        with_image=True,
    )
    assert torch.equal(small, large)
