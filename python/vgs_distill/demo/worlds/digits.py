"""The `digits` world: real handwriting in a 2x2 grid.

Handwritten digits of scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, shipped with the library, so nothing
is downloaded). The scans are split once, by a fixed permutation: test pictures are built from handwriting that no
training or distillation picture contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .world import (
    ANSWER_MARK,
    CAPTION,
    CELL,
    GRID,
    IMAGE_SIZE,
    NUMBER_WORDS,
    TRAINING,
    Example,
    World,
    cell_slice,
    finish_canvas,
)

CORNERS = ("top left", "top right", "bottom left", "bottom right")
PREFERRED_DIGIT = (3, 7, 1, 8)
"""The language prior: the digit each corner holds more often than chance in training."""
PREFERRED_COUNT = 2
PREFERRED_LARGEST = 8  # the mode of the largest digit that follows from PREFERRED_DIGIT
_COUNT_PRIOR = (0.1, 0.4, 0.3, 0.2)
_TRAINING_SCANS = 1347  # three quarters of 1,797
_PHRASE_WORDS = (
    "what digit is in the corner ? how many digits are there largest count . , : answer let me look at i see "
    "picture top left bottom right none"
)
_NOISE = 6.0  # grey levels; keeps two pictures of one scene from being equal


@dataclass(frozen=True)
class PlacedDigit:
    """One digit in the grid; `scan` is its row in `load_digits`, which tells the two splits apart."""

    cell: int
    digit: int
    scan: int


@dataclass(frozen=True)
class _Handwriting:
    scans: np.ndarray  # (scans, CELL, CELL), 0..1
    training: tuple[np.ndarray, ...]  # per digit: rows of `scans`
    held_out: tuple[np.ndarray, ...]


@lru_cache(maxsize=1)
def handwriting() -> _Handwriting:
    """The scans at cell size and the fixed split, per digit."""
    from sklearn.datasets import load_digits

    source = load_digits()
    enlarged = np.kron(source.images / 16.0, np.ones((1, CELL // 8, CELL // 8))).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(source.target))
    training, held_out = order[:_TRAINING_SCANS], order[_TRAINING_SCANS:]

    def by_digit(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.sort(rows[source.target[rows] == digit]) for digit in range(10))

    return _Handwriting(enlarged, by_digit(training), by_digit(held_out))


class DigitsWorld(World):
    """Where is which digit, how many are there, which is the largest."""

    name = "digits"
    question_types = ("where", "count", "largest")
    words = tuple(dict.fromkeys([*_PHRASE_WORDS.split(), *NUMBER_WORDS]))
    opening = "let me look at the picture ."

    def answers(self, question_type: str) -> tuple[str, ...]:
        return NUMBER_WORDS[1:5] if question_type == "count" else NUMBER_WORDS

    def draw(
        self,
        generator: np.random.Generator,
        question_type: str,
        *,
        prior: float,
        split: str = TRAINING,
        answer: str | None = None,
    ) -> Example:
        digits = self._draw_digits(generator, question_type, prior, answer)
        asked = next(iter(digits))  # drawn first; the cells come in random order
        pools = handwriting().held_out if split == "test" else handwriting().training
        scene = tuple(
            PlacedDigit(cell, digits[cell], int(generator.choice(pools[digits[cell]]))) for cell in sorted(digits)
        )
        question, reasoning, found, against_prior = self._ask(question_type, digits, asked)
        completion = reasoning if question_type == CAPTION else f"{reasoning} {ANSWER_MARK} {found}"
        return Example(
            image=self._render(generator, scene),
            question=question,
            completion=completion,
            answer=found,
            question_type=question_type,
            against_prior=against_prior,
            scene=scene,
        )

    def _draw_digits(
        self, generator: np.random.Generator, question_type: str, prior: float, answer: str | None
    ) -> dict[int, int]:
        """Cell -> digit, the asked cell first."""
        if answer is not None and question_type == "count":
            count = NUMBER_WORDS.index(answer)
        else:
            count = int(generator.choice(4, p=_COUNT_PRIOR if prior > 0 else None)) + 1
        cells = generator.permutation(GRID * GRID)[:count].tolist()
        forced = NUMBER_WORDS.index(answer) if answer is not None and question_type != "count" else None
        # For a forced largest digit the others stay at or below it.
        highest = forced if forced is not None and question_type == "largest" else 9
        digits = {}
        for cell in cells:
            preferred = generator.random() < prior
            digits[cell] = PREFERRED_DIGIT[cell] if preferred else int(generator.integers(highest + 1))
        if forced is not None:
            digits[cells[0]] = forced
        return digits

    def _ask(self, question_type: str, digits: dict[int, int], asked: int) -> tuple[str, str, str, bool]:
        """Question, reasoning, answer, and whether the prior would get it wrong."""
        if question_type == "where":
            corner, digit = CORNERS[asked], digits[asked]
            word = NUMBER_WORDS[digit]
            return (
                f"what digit is in the {corner} corner ?",
                f"let me look at the {corner} . i see the digit {word} .",
                word,
                digit != PREFERRED_DIGIT[asked],
            )
        if question_type == "count":
            word = NUMBER_WORDS[len(digits)]
            return (
                "how many digits are there ?",
                f"i look at the picture . the count is {word} .",
                word,
                len(digits) != PREFERRED_COUNT,
            )
        if question_type == "largest":
            seen = " , ".join(NUMBER_WORDS[digits[cell]] for cell in sorted(digits))
            largest = max(digits.values())
            word = NUMBER_WORDS[largest]
            return (
                "what is the largest digit ?",
                f"i see {seen} . the largest is {word} .",
                word,
                largest != PREFERRED_LARGEST,
            )
        listed = [NUMBER_WORDS[digits[cell]] if cell in digits else "none" for cell in range(GRID * GRID)]
        return "what digits are there ?", " , ".join(listed) + " .", "", False

    def _render(self, generator: np.random.Generator, scene: tuple[PlacedDigit, ...]) -> Image.Image:
        canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), generator.uniform(0.0, 30.0), np.float32)
        for placed in scene:
            rows, columns = cell_slice(placed.cell)
            ink = handwriting().scans[placed.scan][..., None]
            canvas[rows, columns] = (1.0 - ink) * canvas[rows, columns] + ink * generator.uniform(150, 255, 3)
        return finish_canvas(canvas, generator, _NOISE)
