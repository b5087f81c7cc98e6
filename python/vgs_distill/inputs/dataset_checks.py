"""Checks of the rows a user hands in, before any training time is spent. Each failure is one sentence with its row.

Rows are read as training reads them: the conversations of all rows, the images of the first ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio as AudioFeature
from datasets import Dataset, IterableDataset, Json, List
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from PIL import Image
from transformers import PretrainedConfig

from ..errors import InputError, one_sentence
from ..steering.methods import METHODS
from .families import EvidenceTokens
from .formats import arrange, canonical_row, prompt_column
from .modalities import AUDIO, IMAGE, MODALITIES, Modality, pieces_of, read_piece, refuse_both

if TYPE_CHECKING:
    from ..config import VGSConfig

# Images beyond these are shown to the processor itself: Qwen's refuse ratios above 200.
_USUAL_RATIO = 20
_USUAL_SIDE = 32  # pixels
_AT_A_TIME = 64  # rows whose images are opened side by side
_IN_A_COLUMN = object()  # stands for a piece of evidence that is not looked at yet


@dataclass(frozen=True)
class RowCheck:
    """What the rows of a dataset must hold.

    Attributes:
        modality: What they hold besides text.
        processor: That of the student; None leaves unchecked what only it knows.
        reserved: Texts of the tokens that stand for an image, which no prompt may hold.
        need_evidence: Whether rows without a place for images are a mistake: steering would have nothing to steer by.
        opened: How many rows have their image opened; None for all, and at 0 nothing is checked but their number.
        at_least: Rows that one step takes.
        name: Of the rows, for messages.
    """

    modality: Modality = IMAGE
    processor: Any = None
    reserved: Collection[str] = ()
    need_evidence: bool = False
    opened: int | None = None
    at_least: int = 1
    name: str = "the training dataset"

    @classmethod
    def of(cls, settings: VGSConfig, model: PretrainedConfig, processor: Any) -> RowCheck:
        """What training with these settings asks of its rows; `model` is the student's config."""
        modality = MODALITIES[settings.modality]
        step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        return cls(
            modality,
            processor,
            reserved=() if processor is None else EvidenceTokens.of(model, processor, modality).texts(processor),
            need_evidence=METHODS[settings.method].masks_teacher,
            opened=settings.check_dataset_rows,
            at_least=step,
        )

    def check(self, dataset: Dataset | IterableDataset) -> None:
        """InputError for the first row that is wrong; of a stream, in the rows of its first step."""
        stream = isinstance(dataset, IterableDataset)
        length = 0 if stream else len(dataset)
        if self.opened != 0:
            _check_decodable(dataset.features or {}, self.modality)
            if stream or dataset.format["type"] == "custom":
                length = max(length, self._check_passing(dataset))
            else:
                self._check_stored(dataset)
        if length < self.at_least and (self.opened != 0 or not stream):
            raise InputError(
                f"{self.name} has {length} rows, but one step takes {self.at_least} (per_device_train_batch_size times "
                "gradient_accumulation_steps times processes), so nothing would be trained; lower them or add rows"
            )

    def check_evaluation(self, datasets: Dataset | IterableDataset | Mapping[str, Dataset] | None) -> None:
        """The same for one or several datasets to evaluate on, which may be small and without images."""
        if isinstance(datasets, Mapping):
            for dataset in datasets.values():
                self.check_evaluation(dataset)
        elif datasets is not None:
            replace(self, name="the evaluation dataset", at_least=1, need_evidence=False).check(datasets)

    # ------------------------------------------------------------------ the dataset as a whole

    def _check_stored(self, dataset: Dataset) -> None:
        self._check_columns(dataset.column_names, len(dataset))
        total = self._check_prompts(dataset)
        self._check_evidence(dataset)
        self._check_any(total, dataset.column_names)

    def _check_passing(self, dataset: Dataset | IterableDataset) -> int:
        """The rows that can be read one after the other only; return how many there were to see."""
        number = total = 0
        columns: list[str] = []
        for row in self._first_rows(dataset):
            columns = columns or list(row)
            self._check_columns(columns, 1)
            total += self._check_row(number, row)
            number += 1
        self._check_columns(columns, number)
        self._check_any(total, columns)
        return number

    def _check_columns(self, columns: list[str], rows: int) -> None:
        if rows == 0:
            raise InputError(f"{self.name} is empty; give it at least one row")
        try:
            prompt_column(columns)
        except InputError as error:
            raise InputError(f"{self.name} cannot be used: {error}") from None
        if self.modality is not IMAGE and (images := [name for name in IMAGE.columns if name in columns]):
            raise InputError(
                f"{self.name} has a column {images[0]!r}, but modality is {self.modality.name!r}, which takes no "
                "images beside; remove the column or set modality='image'"
            )

    def _check_any(self, found: int, columns: list[str]) -> None:
        one, several = self.modality.columns
        if self.need_evidence and not found and one not in columns and several not in columns:
            raise InputError(
                f"{self.name} holds no {self.modality.plural}, neither in a column {one!r} or {several!r} (it has "
                f"{', '.join(map(repr, columns))}) nor in its messages; name the column with image_column, or set "
                "modality or method='opd'"
            )

    # ------------------------------------------------------------------ rows that are stored

    def _check_prompts(self, dataset: Dataset) -> int:
        """All conversations; return how many pieces of evidence there are."""
        column = prompt_column(dataset.column_names)
        counts = self._counts(dataset)
        total = 0
        for number, prompt in enumerate(dataset.select_columns([column])[column]):
            held = [_IN_A_COLUMN] * next(counts)
            with self._row(number):
                messages, pieces = arrange(prompt, held, self.modality)
                self._check_text(messages)
                if self.opened is None or number < self.opened:
                    for piece in pieces:
                        if piece is not _IN_A_COLUMN:
                            self._check_piece(piece)
            total += len(pieces)
        return total

    def _counts(self, dataset: Dataset) -> Iterator[int]:
        """How many pieces of evidence the columns of every row hold, without reading what they are."""
        names = [name for name in self.modality.columns if name in dataset.column_names]
        rows = dataset.select_columns(names)
        lengths: Iterator[tuple[int, ...]] = iter([(0,)] * len(dataset))
        if any(isinstance(rows.features[name], Json) for name in names):  # paths, and lists of them
            lengths = (tuple(len(pieces_of({name: row[name]}, self.modality)) for name in names) for row in rows)
        elif names:
            lengths = (
                row
                for batch in rows.with_format("arrow").iter(1000)
                for row in zip(*(self._lengths(batch[name], name) for name in names), strict=True)
            )
        for number, row in enumerate(lengths):
            if sum(map(bool, row)) > 1:
                with self._row(number):
                    refuse_both(self.modality)
            yield sum(row)

    def _lengths(self, column: pa.ChunkedArray, name: str) -> list[int]:
        several = self.modality is IMAGE or name == self.modality.plural  # a list in the other column is one sound
        if several and not pa.types.is_struct(column.type) and pa.types.is_nested(column.type):
            return pc.fill_null(pc.list_value_length(column), 0).to_pylist()
        return column.is_valid().cast(pa.int8()).to_pylist()

    def _check_evidence(self, dataset: Dataset) -> None:
        """Open what the first rows hold in their columns. Pillow decodes outside of Python's lock: threads help."""
        names = [name for name in self.modality.columns if name in dataset.column_names]
        rows = _undecoded(dataset.select_columns(names), self.modality) if names else dataset
        if self.modality is AUDIO:
            rows = rows.with_format("numpy")  # lists of a million samples are slow
        end = len(rows) if self.opened is None else min(self.opened, len(rows))
        with ThreadPoolExecutor() as pool:
            for start in range(0, end if names else 0, _AT_A_TIME):
                numbers = range(start, min(start + _AT_A_TIME, end))
                for _ in pool.map(self._check_pieces, numbers, [rows[number] for number in numbers]):
                    pass

    def _check_pieces(self, number: int, row: Mapping[str, Any]) -> None:
        with self._row(number):
            for piece in pieces_of(row, self.modality):
                self._check_piece(piece)

    # ------------------------------------------------------------------ rows that pass by

    def _first_rows(self, dataset: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
        """Of a stream as many as one step takes: reading further would consume it."""
        stream = isinstance(dataset, IterableDataset)
        rows = iter(_undecoded(dataset, self.modality) if stream else dataset)
        for number in count():
            try:
                row = None if number == (self.at_least if stream else self.opened) else next(rows, None)
            except Exception as error:  # a transform of the user's, a connection, a file
                raise InputError(f"row {number} of {self.name} cannot be read: {one_sentence(error)}") from error
            if row is None:
                return
            yield row

    def _check_row(self, number: int, row: Mapping[str, Any]) -> int:
        with self._row(number):
            canonical = canonical_row(row, self.modality, self.processor)
            self._check_text(canonical["prompt"])
            for piece in canonical[self.modality.plural]:
                self._check_piece(piece)
        return len(canonical[self.modality.plural])

    # ------------------------------------------------------------------ one row

    @contextmanager
    def _row(self, number: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"row {number} of {self.name} is wrong: {error}") from error.__cause__

    def _check_text(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            for part in message["content"]:
                if found := next((token for token in self.reserved if token in part.get("text", "")), None):
                    name = self.modality.name
                    raise InputError(
                        f"its text holds the token {found!r}, which the processor writes where {name} belongs; write "
                        f"{{'type': {name!r}}} or '<{name}>' in its place"
                    )

    def _check_piece(self, piece: Any) -> None:
        value = read_piece(piece, self.modality, self.processor)
        if isinstance(value, Image.Image) and self.processor is not None:
            short, long = sorted(value.size)
            if long > _USUAL_RATIO * short or short < _USUAL_SIDE:
                try:
                    self.processor.image_processor(images=[value], return_tensors="pt")
                except Exception as error:
                    width, height = value.size
                    raise InputError(
                        f"the processor refuses an image of {width} x {height} pixels: {one_sentence(error)}; "
                        "resize it or remove the row"
                    ) from error


def _undecoded(dataset: Any, modality: Modality) -> Any:
    """The rows with images as they are stored, so that one which cannot be decoded is met where its row is known."""
    for name, feature in (dataset.features or {}).items():
        if modality is IMAGE and name in modality.columns:
            if isinstance(feature, ImageFeature):
                dataset = dataset.cast_column(name, ImageFeature(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
                dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset


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
