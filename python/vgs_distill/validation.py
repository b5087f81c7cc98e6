"""Checks of what a user hands in, before any training time is spent. Each failure is one sentence that says what to do.

Called by the trainer, the demo and the command line.
"""

from __future__ import annotations

import io
from typing import Any

from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from PIL import Image, UnidentifiedImageError

from .errors import InputError


def check_dataset(dataset: Dataset | IterableDataset, image_rows: int | None) -> None:
    """Every row has a prompt, and the first `image_rows` rows (None: all) have images that open.

    An iterable dataset has its first row checked only: reading further would consume it.
    """
    columns = dataset.column_names or []
    if isinstance(dataset, IterableDataset):
        first = next(iter(dataset.take(1)), None)
        if first is None:
            raise InputError("the training dataset is empty; give it at least one row")
        columns = list(first)
        _check_columns(columns)
        _check_prompt(0, first["prompt"])
        return
    if len(dataset) == 0:
        raise InputError("the training dataset is empty; give it at least one row")
    _check_columns(columns)
    for row, prompt in enumerate(dataset.select_columns(["prompt"])["prompt"]):
        _check_prompt(row, prompt)
    for column in ("image", "images"):
        if column in columns:
            _check_images(dataset, column, image_rows)


def _check_columns(columns: list[str]) -> None:
    if "prompt" not in columns:
        listing = ", ".join(repr(column) for column in columns)
        raise InputError(
            f"the training dataset has no column 'prompt' (it has {listing}); rename yours with dataset.rename_column"
        )


def _check_prompt(row: int, prompt: Any) -> None:
    if prompt is None or len(prompt) == 0:
        raise InputError(f"row {row} of the training dataset has no prompt; remove the row or fill it in")
    if isinstance(prompt, list):
        for message in prompt:
            if not isinstance(message, dict) or "role" not in message or message.get("content") is None:
                raise InputError(
                    f"row {row} of the training dataset has a message without 'role' and 'content'; "
                    "write prompts as [{'role': 'user', 'content': '...'}]"
                )


def _check_images(dataset: Dataset, column: str, image_rows: int | None) -> None:
    raw = dataset.select_columns([column])
    feature = raw.features[column]
    if isinstance(feature, ImageFeature):
        raw = raw.cast_column(column, ImageFeature(decode=False))
    elif isinstance(getattr(feature, "feature", None), ImageFeature):
        raw = raw.cast_column(column, SequenceFeature(ImageFeature(decode=False)))
    count = len(raw) if image_rows is None else min(image_rows, len(raw))
    for row in range(count):
        value = raw[row][column]
        for image in value if isinstance(value, list) else [value]:
            if image is not None:
                _check_image(row, image)


def _check_image(row: int, image: Any) -> None:
    """Open one image without decoding its pixels: a PIL image, a path, or datasets' {'bytes', 'path'}."""
    if isinstance(image, Image.Image):
        return
    source: Any = image
    if isinstance(image, dict):
        source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image.get("path")
    try:
        with Image.open(source) as opened:
            opened.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, AttributeError) as error:
        where = image.get("path") if isinstance(image, dict) else image
        named = f" ({where})" if isinstance(where, str) else ""
        raise InputError(
            f"row {row} of the training dataset has an image that cannot be opened{named}: {error}; "
            "remove the row or repair the file"
        ) from None
