"""Checks of a dataset before any training time is spent. Each failure is one sentence that says what to do."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from datasets import Audio as AudioFeature
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from datasets import Video as VideoFeature
from PIL import Image, UnidentifiedImageError

from ..errors import InputError
from .modalities import AUDIO, IMAGE, Modality, evidence_of


def check_dataset(
    dataset: Dataset | IterableDataset,
    rows: int | None,
    modality: Modality = IMAGE,
    processor: Any = None,
) -> None:
    """Every row has a prompt, and the first `rows` rows (None: all) have evidence that can be read.

    An iterable dataset has its first row checked only: reading further would consume it.
    """
    columns = dataset.column_names or []
    if modality is not IMAGE:
        _check_decodable(dataset.features or {}, modality)
    if isinstance(dataset, IterableDataset):
        first = next(iter(dataset.take(1)), None)
        if first is None:
            raise InputError("the training dataset is empty; give it at least one row")
        columns = list(first)
        _check_columns(columns)
        _check_prompt(0, first["prompt"])
        if modality is not IMAGE:
            _check_evidence_columns(columns, modality)
            _check_evidence(0, first, modality, processor)
        return
    if len(dataset) == 0:
        raise InputError("the training dataset is empty; give it at least one row")
    _check_columns(columns)
    for row, prompt in enumerate(dataset.select_columns(["prompt"])["prompt"]):
        _check_prompt(row, prompt)
    if modality is IMAGE:
        for column in IMAGE.columns:
            if column in columns:
                _check_images(dataset, column, rows)
        return
    _check_evidence_columns(columns, modality)
    arrays = dataset.select_columns([name for name in modality.columns if name in columns])
    if modality is AUDIO:
        arrays = arrays.with_format("numpy")  # lists of a million samples are slow
    for row in range(len(arrays) if rows is None else min(rows, len(arrays))):
        _check_evidence(row, arrays[row], modality, processor)


def _check_columns(columns: list[str]) -> None:
    if "prompt" not in columns:
        listing = ", ".join(repr(column) for column in columns)
        raise InputError(
            f"the training dataset has no column 'prompt' (it has {listing}); rename yours with dataset.rename_column"
        )


def _check_evidence_columns(columns: list[str], modality: Modality) -> None:
    listing = ", ".join(repr(column) for column in columns)
    one, several = modality.columns
    if not {one, several} & set(columns):
        raise InputError(
            f"the training dataset has neither a column {one!r} nor {several!r} (it has {listing}), but modality is "
            f"{modality.name!r}; add one or set modality"
        )
    if images := [column for column in IMAGE.columns if column in columns]:
        raise InputError(
            f"the training dataset has a column {images[0]!r}, but modality is {modality.name!r}, which takes no "
            "images beside; remove the column or set modality='image'"
        )


def _check_decodable(features: Mapping[str, Any], modality: Modality) -> None:
    for column in modality.columns:
        kind = getattr(features.get(column), "feature", features.get(column))
        if isinstance(kind, AudioFeature) and find_spec("torchcodec") is None:
            raise InputError(
                f"the column {column!r} holds audio files, which datasets decodes with torchcodec; "
                "`pip install torchcodec`, or give {'array', 'sampling_rate'}"
            )
        if isinstance(kind, VideoFeature):
            raise InputError(
                f"the column {column!r} holds video files, which are not decoded here; give each as a list of images, "
                "its frames"
            )


def _check_evidence(number: int, row: Mapping[str, Any], modality: Modality, processor: Any) -> None:
    try:
        evidence_of(row, modality, processor)
    except InputError as error:
        raise InputError(f"row {number} of the training dataset is wrong: {error}") from None


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
