"""What a demo world is: pictures, questions with known answers, and the order they are drawn in.

A world exists so that the demo can say, on a laptop and in minutes, whether a student looked at the picture:
its training questions carry a language prior (an answer that is usually right without looking), its test
questions carry none. `digits.py` and `shapes.py` each implement one; the rest of the demo knows only this page.

No torch here, so that the process which draws the progress bars and the report starts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from datasets import Dataset

CELL = 16  # pixels; two 8-pixel patches a side, which the vision tower merges into one image token
GRID = 2  # cells a side: four image tokens, few enough for a step to stay near a tenth of a second
IMAGE_SIZE = CELL * GRID

CAPTION = "caption"
"""Question type of the captioning rows: supervised data only, never tested."""

ANSWER_MARK = "answer :"
"""Every completion but a caption ends `answer : <one word>`; evaluation reads the word after the last mark."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The streams keep training, distillation and test drawings apart even when they share a seed.
_STREAMS = {"questions": 1, "captions": 2, "distillation": 3, "test": 4, "validation": 5}

TRAINING = "training"
SPLITS = ("validation", "test")
STYLES = ("plain", "terse", "verbose")


@dataclass(frozen=True)
class Example:
    """One question about one picture, with the completion a supervised row is trained on."""

    image: Image.Image
    question: str
    completion: str
    answer: str
    question_type: str
    against_prior: bool
    """True where guessing by the training prior gives the wrong answer: only looking helps."""
    scene: tuple[Any, ...]
    """What was drawn, in the world's own objects: enough to recompute the answer without the picture."""


class World(ABC):
    """A task: how scenes are drawn, asked about and answered.

    Drawing is a pure function of (stream, count, seed, prior): the same arguments give the same pixels on every
    machine, which is what lets a cached teacher and a results file be reproduced.
    """

    name: str
    question_types: tuple[str, ...]
    words: tuple[str, ...]
    """Every word a question or completion may hold: the tokenizer's vocabulary, less the special tokens."""
    opening: str
    """What a verbose speaker says before everything else, in `words`."""

    @abstractmethod
    def answers(self, question_type: str) -> tuple[str, ...]:
        """All possible answers of one question type, in the order the balanced test set cycles through them."""

    @abstractmethod
    def draw(
        self,
        generator: np.random.Generator,
        question_type: str,
        *,
        prior: float,
        split: str = TRAINING,
        answer: str | None = None,
    ) -> Example:
        """Draw one example. `prior` in [0, 1] is how often the preferred answer is drawn; `answer` forces one."""

    def training_questions(self, count: int, seed: int, prior: float, stream: str = "questions") -> list[Example]:
        """Questions from the training split, question types uniform, answers following the prior."""
        generator = self._generator(stream, seed)
        types = generator.integers(len(self.question_types), size=count)
        return [self.draw(generator, self.question_types[kind], prior=prior) for kind in types]

    def captions(self, count: int, seed: int) -> list[Example]:
        """Unbiased descriptions of whole pictures. Question answering alone does not teach a tiny model to see:
        it settles on the prior, and one answer word per picture is too thin a signal to leave it."""
        generator = self._generator("captions", seed)
        return [self.draw(generator, CAPTION, prior=0.0) for _ in range(count)]

    def balanced(self, split: str, count: int, seed: int) -> list[Example]:
        """Examples without a prior: question types take turns, and within a type so do the answers.

        `split` "test" is drawn from what is held out; "validation" from nothing of it, so that choosing a setting
        leaves the test set unread. Any leading part of the list is balanced too, so a shorter evaluation is the head of
        a longer one.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        generator = self._generator(split, seed)
        examples = []
        for index in range(count):
            round_number, kind = divmod(index, len(self.question_types))
            question_type = self.question_types[kind]
            answers = self.answers(question_type)
            answer = answers[round_number % len(answers)]
            examples.append(self.draw(generator, question_type, prior=0.0, split=split, answer=answer))
        return examples

    def in_style(self, example: Example, style: str) -> Example:
        """The same example with its completion said otherwise: "terse" leaves the reasoning out, "verbose" opens with
        a phrase said three times. Captions have no answer and stay as they are."""
        if style not in STYLES:
            raise ValueError(f"there is no style {style!r}; choose one of {', '.join(STYLES)}")
        if style == "plain" or ANSWER_MARK not in example.completion:
            return example
        answer = f"{ANSWER_MARK} {example.answer}"
        said = answer if style == "terse" else " ".join([self.opening] * 3 + [example.completion])
        return replace(example, completion=said)

    def _generator(self, stream: str, seed: int) -> np.random.Generator:
        return np.random.default_rng([_STREAMS[stream], seed])


def messages(question: str) -> list[dict[str, str]]:
    """One user turn in the conversational format; the image joins it through the `image` column."""
    return [{"role": "user", "content": question}]


def to_prompt_dataset(examples: Sequence[Example]) -> Dataset:
    """The `prompt` and `image` columns that TRL's `DistillationTrainer` reads; it samples the completions itself."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()})
    columns = {
        "prompt": [messages(example.question) for example in examples],
        "image": [example.image for example in examples],
    }
    return Dataset.from_dict(columns, features=features)


def finish_canvas(canvas: np.ndarray, generator: np.random.Generator, noise: float) -> Image.Image:
    """Add sensor noise to a float canvas (height, width, 3) in 0..255 and return the RGB image."""
    noisy = canvas + generator.normal(0.0, noise, canvas.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8), "RGB")


def cell_slice(cell: int) -> tuple[slice, slice]:
    """Rows and columns of the canvas that belong to `cell`, counted in reading order."""
    row, column = divmod(cell, GRID)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)
