"""The demo's tasks, by name; `world.py` says what one is."""

from __future__ import annotations

from .world import (
    ANSWER_MARK,
    CAPTION,
    IMAGE_SIZE,
    SPLITS,
    STYLES,
    Example,
    World,
    messages,
    to_prompt_dataset,
)

__all__ = [
    "ANSWER_MARK",
    "CAPTION",
    "IMAGE_SIZE",
    "SPLITS",
    "STYLES",
    "Example",
    "World",
    "make_world",
    "messages",
    "to_prompt_dataset",
    "world_names",
]


def world_names() -> tuple[str, ...]:
    """The tasks `make_world` knows."""
    return ("digits", "shapes", "easyvqa")


def make_world(name: str) -> World:
    """The world called `name`; raises `ValueError` naming the known ones."""
    # Imported here because each world pulls in its own library (scikit-learn for the handwriting, easy-vqa).
    if name == "digits":
        from .digits import DigitsWorld

        return DigitsWorld()
    if name == "shapes":
        from .shapes import ShapesWorld

        return ShapesWorld()
    if name == "easyvqa":
        from .easyvqa import EasyVqaWorld

        return EasyVqaWorld()
    raise ValueError(f"There is no task called {name!r}; choose one of: {', '.join(world_names())}.")
