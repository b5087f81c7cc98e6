"""The `easyvqa` world: the public data set easy-VQA 1.0 (Victor Zhou, MIT), as its package ships it.

5,000 pictures of one coloured shape each and 48,248 questions, with a split of its own; nothing of it was made for this
project. Pictures are cut to the 32x32 pixels around their shape, which hardly one is larger than. What a picture shows
is read off its own questions and answers, and gives the reasoning and the captions; the 12 % of pictures whose
questions leave colour or shape open are left out.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

from .world import ANSWER_MARK, CAPTION, IMAGE_SIZE, TRAINING, Example, World

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_FOLDERS = {TRAINING: "train", "validation": "train", "test": "test"}
_VALIDATION_FROM = 3500  # of the 4,000 training pictures: those from this number on are the validation split
_FAINTEST = 40.0  # grey levels of all channels together by which a shape stands out from its background
_NEGATIONS = {"no", "not"}
_PHRASE_WORDS = (
    "what color shape is in the image present of there does contain a not no ? yes i see describe . : answer let me "
    "look at"
)


@dataclass(frozen=True)
class ColoredShape:
    """What a picture shows, and its number in its half of the data set."""

    color: str
    shape: str
    picture: int


@dataclass(frozen=True)
class _Row:
    question: str
    answer: str
    scene: ColoredShape


@dataclass(frozen=True)
class _Split:
    rows: Mapping[str, Mapping[str, tuple[_Row, ...]]]  # question type -> answer -> rows
    scenes: tuple[ColoredShape, ...]


def _type_of(question: str, answer: str) -> str:
    if not question.startswith("what"):
        return "contains"
    return "color" if answer in COLORS else "shape"


def _scenes(rows: Iterable[tuple[str, str, int]]) -> dict[int, ColoredShape]:
    """Pictures whose questions and answers tell their colour and shape."""
    told: defaultdict[int, set[str]] = defaultdict(set)
    for question, answer, picture in rows:
        words = question.rstrip("?").split()
        holds = words[0] == "what" or (answer == "yes") != bool(_NEGATIONS & set(words))
        told[picture] |= {answer, *(words if holds else ())} & {*COLORS, *SHAPES}
    return {
        picture: ColoredShape(min(words & set(COLORS)), min(words & set(SHAPES)), picture)
        for picture, words in told.items()
        if len(words) == 2 and words & set(COLORS) and words & set(SHAPES)
    }


@lru_cache(maxsize=len(_FOLDERS))
def _split(name: str) -> _Split:
    text = (files("easy_vqa") / "data" / _FOLDERS[name] / "questions.json").read_text(encoding="utf-8")
    found: list[tuple[str, str, int]] = json.loads(text)
    scenes = {
        picture: scene
        for picture, scene in _scenes(found).items()
        if name == "test" or (picture >= _VALIDATION_FROM) == (name == "validation")
    }
    rows: defaultdict[str, defaultdict[str, list[_Row]]] = defaultdict(lambda: defaultdict(list))
    for question, answer, picture in found:
        if picture in scenes:
            row = _Row(question.replace("?", " ?"), answer, scenes[picture])
            rows[_type_of(question, answer)][answer].append(row)
    return _Split(
        {kind: {answer: tuple(own) for answer, own in by_answer.items()} for kind, by_answer in rows.items()},
        tuple(scenes.values()),
    )


@lru_cache(maxsize=1)
def _usual() -> Mapping[str, str]:
    """Question -> its most frequent answer in training."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for by_answer in _split(TRAINING).rows.values():
        for answer in sorted(by_answer):  # so that ties fall the same way everywhere
            counts.update({row.question: Counter() for row in by_answer[answer] if row.question not in counts})
            for row in by_answer[answer]:
                counts[row.question][answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


@lru_cache(maxsize=5000)
def _picture(folder: str, number: int) -> Image.Image:
    path = files("easy_vqa") / "data" / folder / "images" / f"{number}.png"
    with path.open("rb") as file:
        image: Image.Image = Image.open(file).convert("RGB")
    pixels = np.asarray(image, np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    rows, columns = np.nonzero(np.abs(pixels - background).sum(axis=2) > _FAINTEST)
    left, top = (
        min(max((int(at.min()) + int(at.max()) + 1 - IMAGE_SIZE) // 2, 0), length - IMAGE_SIZE)
        for at, length in ((columns, image.width), (rows, image.height))
    )
    return image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))


class EasyVqaWorld(World):
    """Which shape, which colour, is there such a shape."""

    name = "easyvqa"
    question_types = ("shape", "color", "contains")
    words = tuple(dict.fromkeys([*_PHRASE_WORDS.split(), *SHAPES, *COLORS]))
    opening = "let me look at the image ."

    def answers(self, question_type: str) -> tuple[str, ...]:
        return {"shape": SHAPES, "color": COLORS, "contains": ("yes", "no")}[question_type]

    def draw(
        self,
        generator: np.random.Generator,
        question_type: str,
        *,
        prior: float,
        split: str = TRAINING,
        answer: str | None = None,
    ) -> Example:
        """One row of the data set. With `prior` 0 answers come as often as they do there."""
        source = _split(split)
        if question_type == CAPTION:
            scene = source.scenes[int(generator.integers(len(source.scenes)))]
            return self._example(split, "describe the image .", f"a {scene.color} {scene.shape} .", "", CAPTION, scene)
        by_answer = source.rows[question_type]
        if answer is None:
            counts = {each: len(by_answer[each]) for each in self.answers(question_type)}
            total = sum(counts.values())
            answer = str(generator.choice(list(counts), p=[count / total for count in counts.values()]))
            if generator.random() < prior:
                answer = max(counts, key=lambda each: counts[each])
        row = by_answer[answer][int(generator.integers(len(by_answer[answer])))]
        said = f"i see a {row.scene.color} {row.scene.shape} . {ANSWER_MARK} {answer}"
        return self._example(split, row.question, said, answer, question_type, row.scene)

    def _example(
        self, split: str, question: str, completion: str, answer: str, question_type: str, scene: ColoredShape
    ) -> Example:
        return Example(
            image=_picture(_FOLDERS[split], scene.picture),
            question=question,
            completion=completion,
            answer=answer,
            question_type=question_type,
            against_prior=bool(answer) and answer != _usual().get(question),
            scene=(scene,),
        )
