"""Prompts and images from wherever they are: the hub, a folder, a file; whole or streamed.

Whatever cannot be read ends in one sentence, before a model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, List, Value, load_dataset, load_from_disk
from datasets import Image as ImageFeature

from ..errors import InputError, one_sentence
from .modalities import IMAGE, Modality

_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(
    name: str, *, split: str, config: str | None = None, streaming: bool = False, need: Modality | None = IMAGE
) -> Dataset | IterableDataset:
    """The rows of one split, with images as `datasets.Image`.

    Args:
        name: a folder of `save_to_disk`, any other folder `load_dataset` reads (an image folder with its metadata,
            Parquet or JSON Lines files), a .jsonl or .parquet file, or a dataset of the hub.
        need: what the rows must hold; None: text alone will do.

    Raises:
        InputError: nothing is there, it cannot be read, or its images are no images.
    """
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or path.suffix in _FILES):
        raise InputError(f"there is no dataset at {name!r}; check dataset_name")
    if path.is_file() and path.suffix not in _FILES:
        raise InputError(f"cannot read {name!r} as a dataset; give a {', '.join(_FILES)} file, a folder, or a hub name")
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = _saved(path, split, streaming)
        elif path.is_file():
            # A single file has no splits of its own: datasets calls it "train".
            rows = load_dataset(_FILES[path.suffix], data_files=str(path), split="train", streaming=streaming)
        else:
            rows = load_dataset(name, config, split=split, streaming=streaming)
        return _with_images(rows, path.parent if path.is_file() else path, need)
    except InputError:
        raise
    except Exception as error:  # every builder raises its own kinds, pyarrow's and fsspec's among them
        raise InputError(f"cannot read the dataset {name!r}: {one_sentence(error.__cause__ or error)}") from error


def _saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(f"the dataset {str(path)!r} has no split {split!r}; choose one of {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _with_images(rows: Any, folder: Path, need: Modality | None) -> Dataset | IterableDataset:
    """Image columns of paths become images; relative paths are relative to the folder of the file."""
    features = rows.features
    if features is None:  # streamed JSON Lines say what they hold only when they are read
        rows = rows._resolve_features()
        features = rows.features
    if need is not None and features and not any(column in features for column in need.columns):
        listing = ", ".join(repr(column) for column in features)
        one, several = need.columns
        raise InputError(
            f"the dataset has neither a column {one!r} nor {several!r} (it has {listing}); add one, or set "
            "steering='none'"
        )
    columns = [column for column in IMAGE.columns if column in (features or {})]
    for column in columns:
        feature = features[column]
        nested = isinstance(feature, List)
        kind = feature.feature if nested else feature
        if isinstance(kind, ImageFeature):
            continue
        if not (isinstance(kind, Value) and kind.dtype in ("string", "null")):
            named = kind.dtype if isinstance(kind, Value) else type(kind).__name__
            raise InputError(
                f"the column {column!r} holds {named}, not images; give image files, their paths, or a datasets.Image"
            )
        # A streamed dataset forgets its features in `map` unless it is told them.
        rows = rows.map(_absolute_paths, fn_kwargs={"column": column, "folder": str(folder)}, features=features)
        rows = rows.cast_column(column, List(ImageFeature()) if nested else ImageFeature())
    return rows


def _absolute_paths(row: dict[str, Any], column: str, folder: str) -> dict[str, Any]:
    def absolute(path: str | None) -> str | None:
        return None if path is None else path if "://" in path else str(Path(folder) / path)

    value = row[column]
    return {column: [absolute(path) for path in value] if isinstance(value, list) else absolute(value)}
