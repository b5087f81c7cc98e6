"""The `shapes` world: up to three rendered shapes in a 2x2 grid.

A second world whose pictures are drawn (Pillow) rather than scanned, with a stronger prior: each shape has a usual
colour and a usual size, so a student that does not look still answers a third of the balanced test by habit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

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

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
PREFERRED_COLOR = dict(zip(SHAPES, COLORS, strict=True))
"""The language prior: each shape's usual colour, and so each colour's usual shape."""
PREFERRED_SIZE = dict(zip(SHAPES, ("large", "small", "large", "small"), strict=True))
PREFERRED_COUNT = 1
MAX_COUNT = 3
_COUNT_PRIOR = (0.5, 0.3, 0.2)
_PIGMENTS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (225, 205, 40)}
_RADIUS = {"small": 5, "large": 8}
_PIGMENT_SPREAD = 15.0  # grey levels, per object
_NOISE = 8.0  # grey levels, per pixel
_USUAL_OPENING = 0.7  # how often a question type is answered with its own opening

_PHRASE_WORDS = "what color is the ? shape one size how many objects are there count describe image . , : answer a"

# Each question type has a usual opening. It is a habit of language that no picture explains, so the text-only view
# has something to learn besides the prior over answers.
_OPENINGS = (
    "let me look at the image .",
    "i see the picture .",
    "well , checking the scene .",
    "first i look carefully .",
)


@dataclass(frozen=True)
class PlacedShape:
    """One object in the grid. A scene holds each shape at most once."""

    cell: int
    shape: str
    color: str
    size: str


@lru_cache(maxsize=len(SHAPES) * len(SIZES))
def _stencil(shape: str, size: str) -> np.ndarray:
    """Coverage of one cell, (CELL, CELL, 1) in 0..1."""
    image = Image.new("L", (CELL, CELL), 0)
    pen = ImageDraw.Draw(image)
    center, radius = CELL // 2, _RADIUS[size]
    low, high = center - radius, center + radius - 1
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=255)
    elif shape == "triangle":
        pen.polygon([(center, low), (low, high), (high, high)], fill=255)
    else:
        arm = max(1, radius // 3)
        pen.rectangle((center - arm, low, center + arm - 1, high), fill=255)
        pen.rectangle((low, center - arm, high, center + arm - 1), fill=255)
    return np.asarray(image, np.float32)[..., None] / 255.0


class ShapesWorld(World):
    """What color, which shape, what size, how many."""

    name = "shapes"
    question_types = ("color", "shape", "size", "count")
    words = tuple(
        dict.fromkeys(
            [
                *_PHRASE_WORDS.split(),
                *" ".join(_OPENINGS).split(),
                *SHAPES,
                *COLORS,
                *SIZES,
                *NUMBER_WORDS[1 : MAX_COUNT + 1],
            ]
        )
    )
    opening = _OPENINGS[0]

    def answers(self, question_type: str) -> tuple[str, ...]:
        return {
            "color": COLORS,
            "shape": SHAPES,
            "size": SIZES,
            "count": NUMBER_WORDS[1 : MAX_COUNT + 1],
        }[question_type]

    def draw(
        self,
        generator: np.random.Generator,
        question_type: str,
        *,
        prior: float,
        split: str = TRAINING,
        answer: str | None = None,
    ) -> Example:
        # Nothing to hold out: every picture is rendered afresh, with its own pigments and noise.
        del split
        objects = self._draw_objects(generator, question_type, prior, answer)
        asked = objects[0]
        question, sentence, found, against_prior = self._ask(question_type, objects, asked)
        if question_type == CAPTION:
            completion = sentence
        else:
            opening = self._opening(generator, question_type)
            completion = f"{opening} {sentence} {ANSWER_MARK} {found}"
        scene = tuple(sorted(objects, key=lambda placed: placed.cell))
        return Example(
            image=self._render(generator, scene),
            question=question,
            completion=completion,
            answer=found,
            question_type=question_type,
            against_prior=against_prior,
            scene=scene,
        )

    def _draw_objects(
        self, generator: np.random.Generator, question_type: str, prior: float, answer: str | None
    ) -> list[PlacedShape]:
        """The asked object first. A forced answer overrides what was drawn for it."""
        if answer is not None and question_type == "count":
            count = NUMBER_WORDS.index(answer)
        else:
            count = int(generator.choice(MAX_COUNT, p=_COUNT_PRIOR if prior > 0 else None)) + 1
        cells = generator.permutation(GRID * GRID)[:count].tolist()
        shapes = [SHAPES[index] for index in generator.permutation(len(SHAPES))]
        if answer is not None and question_type == "shape":
            shapes.remove(answer)
            shapes.insert(0, answer)
        objects: list[PlacedShape] = []
        for cell, shape in zip(cells, shapes, strict=False):
            color = PREFERRED_COLOR[shape] if generator.random() < prior else str(generator.choice(COLORS))
            size = PREFERRED_SIZE[shape] if generator.random() < prior else str(generator.choice(SIZES))
            if not objects and question_type == "color" and answer is not None:
                color = answer
            if not objects and question_type == "size" and answer is not None:
                size = answer
            # "What shape is the red one" needs a single red object.
            if objects and question_type == "shape" and color == objects[0].color:
                color = str(generator.choice([other for other in COLORS if other != objects[0].color]))
            objects.append(PlacedShape(cell, shape, color, size))
        return objects

    def _ask(self, question_type: str, objects: list[PlacedShape], asked: PlacedShape) -> tuple[str, str, str, bool]:
        """Question, sentence, answer, and whether the prior would get it wrong."""
        shape, color, size = asked.shape, asked.color, asked.size
        usual_color = color == PREFERRED_COLOR[shape]
        if question_type == "color":
            return f"what color is the {shape} ?", f"the {shape} is {color} .", color, not usual_color
        if question_type == "shape":
            return (
                f"what shape is the {color} one ?",
                f"the {color} one is a {shape} .",
                shape,
                not usual_color,
            )
        if question_type == "size":
            against = size != PREFERRED_SIZE[shape]
            return f"what size is the {shape} ?", f"the {shape} is {size} .", size, against
        if question_type == "count":
            word = NUMBER_WORDS[len(objects)]
            against = len(objects) != PREFERRED_COUNT
            return "how many objects are there ?", f"the count is {word} .", word, against
        listed = sorted(objects, key=lambda placed: placed.cell)
        sentence = " , ".join(f"{placed.size} {placed.color} {placed.shape}" for placed in listed) + " ."
        return "describe the image .", sentence, "", False

    def _opening(self, generator: np.random.Generator, question_type: str) -> str:
        usual = self.question_types.index(question_type)
        if generator.random() < _USUAL_OPENING:
            return _OPENINGS[usual]
        return _OPENINGS[int(generator.integers(len(_OPENINGS)))]

    def _render(self, generator: np.random.Generator, scene: tuple[PlacedShape, ...]) -> Image.Image:
        canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), generator.uniform(0.0, 60.0), np.float32)
        for placed in scene:
            rows, columns = cell_slice(placed.cell)
            cover = _stencil(placed.shape, placed.size)
            pigment = np.clip(generator.normal(_PIGMENTS[placed.color], _PIGMENT_SPREAD), 0, 255)
            canvas[rows, columns] = (1.0 - cover) * canvas[rows, columns] + cover * pigment
        return finish_canvas(canvas, generator, _NOISE)
