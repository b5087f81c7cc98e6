"""The worlds: what is drawn can be recomputed, is balanced where it says so, and repeats by seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from vgs_distill.demo.evaluate import read_answer
from vgs_distill.demo.worlds import CAPTION, IMAGE_SIZE, make_world, to_prompt_dataset
from vgs_distill.demo.worlds.digits import CORNERS, PREFERRED_DIGIT, handwriting
from vgs_distill.demo.worlds.easyvqa import COLORS, SHAPES
from vgs_distill.demo.worlds.shapes import PREFERRED_COLOR
from vgs_distill.demo.worlds.world import NUMBER_WORDS, cell_slice


def answer_of_digits(example) -> str:
    by_cell = {placed.cell: placed.digit for placed in example.scene}
    if example.question_type == "count":
        return NUMBER_WORDS[len(by_cell)]
    if example.question_type == "largest":
        return NUMBER_WORDS[max(by_cell.values())]
    cell = next(cell for cell, corner in enumerate(CORNERS) if corner in example.question)
    return NUMBER_WORDS[by_cell[cell]]


def answer_of_shapes(example) -> str:
    if example.question_type == "count":
        return NUMBER_WORDS[len(example.scene)]
    words = example.question.split()
    matching = [placed for placed in example.scene if {placed.shape, placed.color} & set(words)]
    if example.question_type == "shape":
        matching = [placed for placed in example.scene if placed.color in words]
    else:
        matching = [placed for placed in example.scene if placed.shape in words]
    assert len(matching) == 1, "the question must point at one object"
    return getattr(matching[0], example.question_type)


def answer_of_easyvqa(example) -> str:
    """From the picture's colour and shape alone, which other questions about it told."""
    (shown,) = example.scene
    if example.question_type != "contains":
        return getattr(shown, example.question_type)
    words = set(example.question.split())
    (asked,) = words & {*COLORS, *SHAPES}
    return "yes" if (asked in (shown.color, shown.shape)) != bool({"no", "not"} & words) else "no"


ANSWERS = {"digits": answer_of_digits, "shapes": answer_of_shapes, "easyvqa": answer_of_easyvqa}


def test_answers_follow_from_the_scene(world):
    examples = world.training_questions(300, 1, prior=0.5) + world.balanced("test", 300, 1)
    for example in examples:
        assert example.answer == ANSWERS[world.name](example)
        assert example.completion.endswith(f"answer : {example.answer}")
        assert example.answer in world.answers(example.question_type)


def test_every_word_is_in_the_vocabulary(world):
    examples = world.training_questions(300, 1, prior=0.5) + world.captions(100, 1) + world.balanced("test", 100, 1)
    used = {word for example in examples for word in f"{example.question} {example.completion}".split()}
    assert used <= set(world.words)


def test_handwriting_of_the_test_set_is_never_trained_on(digits):
    trained = digits.training_questions(500, 3, prior=0.5) + digits.captions(500, 3)
    trained += digits.training_questions(500, 3, prior=0.5, stream="distillation")
    seen = {placed.scan for example in trained for placed in example.scene}
    tested = {placed.scan for example in digits.balanced("test", 600, 999) for placed in example.scene}
    assert len(seen) > 1000
    assert len(tested) > 300
    assert not seen & tested


def test_validation_reads_nothing_of_the_test_set(world):
    validation, test = (world.balanced(split, 60, 999) for split in ("validation", "test"))
    assert not {example.image.tobytes() for example in validation} & {example.image.tobytes() for example in test}
    assert Counter(example.question_type for example in validation) == Counter(
        example.question_type for example in test
    )
    if world.name == "digits":
        held_out = set(np.concatenate(handwriting().held_out))
        assert not held_out & {placed.scan for example in validation for placed in example.scene}


@pytest.mark.parametrize("style", ["plain", "terse", "verbose"])
def test_every_style_gives_the_same_answer_in_known_words(world, style):
    for example in world.training_questions(30, 1, prior=0.5) + world.captions(5, 1):
        said = world.in_style(example, style)
        assert set(said.completion.split()) <= set(world.words)
        assert replace(said, completion=example.completion) == example
        if example.answer:
            assert read_answer(said.completion, finished=True) == example.answer
        assert (said.completion == example.completion) == (style == "plain" or not example.answer)
        assert said.completion.endswith(example.completion) == (style != "terse" or not example.answer)


def test_an_unknown_split_or_style_is_refused(digits):
    with pytest.raises(ValueError, match="validation, test"):
        digits.balanced("questions", 3, 0)
    with pytest.raises(ValueError, match="plain, terse, verbose"):
        digits.in_style(digits.balanced("test", 1, 0)[0], "rude")


def test_the_handwriting_split_covers_every_digit_and_shares_nothing():
    source = handwriting()
    training, held_out = np.concatenate(source.training), np.concatenate(source.held_out)
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == len(source.scans)
    assert min(map(len, source.held_out)) > 30


def test_the_placed_scan_is_what_is_in_the_picture(digits):
    """Ink correlates with the scan in its own cell, which ties the recorded scene to the pixels."""
    for example in digits.balanced("test", 30, 5):
        pixels = np.asarray(example.image, np.float32).mean(axis=2)
        for placed in example.scene:
            drawn = pixels[cell_slice(placed.cell)].ravel()
            assert np.corrcoef(drawn, handwriting().scans[placed.scan].ravel())[0, 1] > 0.95


def test_the_test_set_is_balanced(world):
    per_answer = 6
    rounds = per_answer * int(np.lcm.reduce([len(world.answers(kind)) for kind in world.question_types]))
    examples = world.balanced("test", rounds * len(world.question_types), 999)
    kinds = Counter(example.question_type for example in examples)
    assert set(kinds.values()) == {rounds}
    for kind in world.question_types:
        answers = Counter(example.answer for example in examples if example.question_type == kind)
        assert set(answers) == set(world.answers(kind))
        assert len(set(answers.values())) == 1


def test_a_shorter_test_set_is_the_head_of_a_longer_one(world):
    short, long = world.balanced("test", 20, 7), world.balanced("test", 40, 7)
    assert [example.scene for example in short] == [example.scene for example in long[:20]]


def test_training_questions_follow_the_prior_and_the_test_set_does_not(digits):
    def preferred(examples) -> float:
        placed = [one for example in examples if example.question_type == "where" for one in example.scene]
        return sum(one.digit == PREFERRED_DIGIT[one.cell] for one in placed) / len(placed)

    assert preferred(digits.training_questions(1500, 0, prior=0.5)) == pytest.approx(0.55, abs=0.04)
    assert preferred(digits.balanced("test", 1500, 0)) == pytest.approx(0.1, abs=0.04)


def test_colors_follow_the_prior_only_in_training():
    shapes = make_world("shapes")

    def preferred(examples) -> float:
        placed = [example.scene[0] for example in examples if example.question_type == "size"]
        return sum(one.color == PREFERRED_COLOR[one.shape] for one in placed) / len(placed)

    assert preferred(shapes.training_questions(1500, 0, prior=0.5)) == pytest.approx(0.625, abs=0.07)
    assert preferred(shapes.balanced("test", 1500, 0)) == pytest.approx(0.25, abs=0.07)


def test_against_the_prior_marks_unusual_answers(digits):
    for example in digits.balanced("test", 120, 0):
        if example.question_type == "where":
            cell = next(cell for cell, corner in enumerate(CORNERS) if corner in example.question)
            assert example.against_prior == (example.answer != NUMBER_WORDS[PREFERRED_DIGIT[cell]])


def test_pictures_of_easyvqa_are_of_one_split_each_and_look_as_told():
    world = make_world("easyvqa")
    pictures = {
        split: {one.scene[0].picture for one in world.balanced(split, 600, 1)} for split in ("test", "validation")
    }
    trained = {one.scene[0].picture for one in world.training_questions(3000, 1, prior=0.0) + world.captions(500, 1)}
    assert min(pictures["validation"]) >= 3500 > max(trained)
    assert len(trained) > 1000
    for example in world.balanced("test", 96, 1):
        color = example.scene[0].color
        if color in ("red", "green", "blue"):
            pixels = np.asarray(example.image, np.float32).reshape(-1, 3)
            own = ("red", "green", "blue").index(color)
            others = np.delete(pixels, own, axis=1).max(axis=1)
            assert (pixels[:, own] - others > 60).mean() > 0.04, "a twentieth of the picture, at least, has the colour"


def test_questions_of_easyvqa_come_as_often_as_in_the_data_set_without_a_prior():
    def share(prior: float) -> float:
        found = [one.answer for one in make_world("easyvqa").training_questions(2000, 0, prior=prior)]
        return found.count("yes") / (found.count("yes") + found.count("no"))

    assert share(0.0) == pytest.approx(0.5, abs=0.05)
    assert max(share(1.0), 1 - share(1.0)) == 1.0


def test_drawing_repeats_by_seed_and_differs_between_seeds_and_streams(world):
    def pixels(examples):
        return np.stack([np.asarray(example.image) for example in examples])

    first = pixels(world.training_questions(20, 4, prior=0.5))
    assert np.array_equal(first, pixels(world.training_questions(20, 4, prior=0.5)))
    assert not np.array_equal(first, pixels(world.training_questions(20, 5, prior=0.5)))
    assert not np.array_equal(first, pixels(world.training_questions(20, 4, prior=0.5, stream="distillation")))


def test_captions_describe_every_object(world):
    for example in world.captions(50, 2):
        assert example.question_type == CAPTION
        assert example.answer == ""
        words = example.completion.split()
        named = sum(word in {*NUMBER_WORDS, "circle", "square", "triangle", "cross", "rectangle"} for word in words)
        assert named == len(example.scene)


def test_pictures_are_small_rgb_images(world):
    image = world.balanced("test", 1, 0)[0].image
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.mode == "RGB"


def test_the_prompt_dataset_has_the_columns_that_distillation_reads(digits):
    examples = digits.training_questions(3, 0, prior=0.5)
    dataset = to_prompt_dataset(examples)
    assert dataset.column_names == ["prompt", "image"]
    row = dataset[1]
    assert row["prompt"] == [{"role": "user", "content": examples[1].question}]
    assert np.array_equal(np.asarray(row["image"]), np.asarray(examples[1].image))


def test_an_unknown_world_names_the_known_ones():
    with pytest.raises(ValueError, match="digits, shapes, easyvqa"):
        make_world("letters")
