"""Prompts and images from wherever they are: the hub, a folder, a file; whole or streamed.

Rows stay as they are stored, but for names of columns and paths of files; `formats.py` turns them into the one form
that training and evaluation know. Whatever cannot be read ends in one sentence, before a model is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, Json, List, Value, load_dataset, load_from_disk

from ..errors import InputError, nearest, one_sentence
from .formats import PAYLOADS, PROMPT_COLUMNS
from .images import is_path
from .modalities import IMAGE, Modality

_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    prompt_column: str | None = None,
    image_column: str | None = None,
    modality: Modality = IMAGE,
) -> Dataset | IterableDataset:
    """The rows of one split as they are stored, with paths of images made absolute.

    Args:
        name: a folder of `save_to_disk`, any other folder `load_dataset` reads (an image folder with its metadata,
            Parquet or JSON Lines files), a .jsonl or .parquet file, or a dataset of the hub.
        split: None for all of a dataset without splits (a file, a saved `Dataset`); others need one.
        prompt_column: column to be read as `prompt`; by default the first of those there are in `PROMPT_COLUMNS`.
        image_column: column to be read as `image`, or as that of the modality.

    Raises:
        InputError: nothing is there, it cannot be read, it is empty, or it has no such split or column.
    """
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or path.suffix in _FILES):
        raise InputError(f"there is no dataset at {name!r}; check dataset_name")
    if path.is_file() and path.suffix not in _FILES:
        raise InputError(f"cannot read {name!r} as a dataset; give a {', '.join(_FILES)} file, a folder, or a hub name")
    if not has_splits(name) and not re.match(r"train\b", split or "train"):  # the name datasets gives to such rows
        raise InputError(f"the dataset {name!r} has no splits, so there is no {split!r}; leave it out to read all rows")
    if split is None and has_splits(name):
        raise InputError(f"the dataset {name!r} has splits; name the one to read")
    if path.is_file() and _is_blank(path):
        raise InputError(f"the dataset {name!r} is empty; give it at least one row")
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows: Any = _saved(path, split, streaming)
        elif path.is_file():
            rows = load_dataset(_FILES[path.suffix], data_files=str(path), split=split or "train", streaming=streaming)
        else:
            rows = load_dataset(str(path) if path.exists() else name, config, split=split, streaming=streaming)
        if rows.features is None:  # streamed JSON Lines say what they hold only when they are read
            rows = rows._resolve_features()
        rows = _named(rows, prompt_column, "prompt", PROMPT_COLUMNS)
        rows = _named(rows, image_column, modality.name, modality.columns)
        return _with_absolute_paths(rows, path.parent if path.is_file() else path, modality)
    except InputError:
        raise
    except Exception as error:  # every builder raises its own kinds, pyarrow's and fsspec's among them
        raise InputError(f"cannot read the dataset {name!r}: {one_sentence(error.__cause__ or error)}") from error


def has_splits(name: str) -> bool:
    """Whether a part of the dataset can be asked for by name: not of one file, nor of a `Dataset` saved alone."""
    path = Path(name).expanduser()
    return not path.is_file() and not (path / "state.json").exists()


def where(name: str, split: str | None) -> str:
    """For people: which rows of a dataset are meant."""
    return f"split {split!r} of {name}" if has_splits(name) else f"all rows of {name}"


def is_same_source(name: str, split: str | None, other: str, other_split: str | None) -> bool:
    """Whether two names and splits mean the same rows, as far as names can tell."""
    places = [str(path.resolve()) if (path := Path(one).expanduser()).exists() else one for one in (name, other)]
    splits = [part or "train" for part in (split, other_split)]
    return places[0] == places[1] and splits[0] == splits[1]


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix != ".parquet" and not any(line.strip() for line in file)


def _saved(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(f"the dataset {str(path)!r} has no split {split!r}; choose one of {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _named(rows: Any, column: str | None, name: str, others: tuple[str, ...]) -> Any:
    """The column under the name by which it is read, and none of the others that could be read in its place."""
    if column is None or rows.features is None:
        return rows
    if column not in rows.features:
        listing = ", ".join(map(repr, rows.features))
        raise InputError(f"the dataset has no column {column!r} (it has {listing}){nearest(column, rows.features)}")
    rows = rows.remove_columns([other for other in others if other in rows.features and other != column])
    return rows if column == name else rows.rename_column(column, name)


def _with_absolute_paths(rows: Any, folder: Path, modality: Modality) -> Dataset | IterableDataset:
    """Relative paths are relative to the folder of the file, in columns of images and in messages that name theirs."""
    features = rows.features or {}
    columns = [name for name in (*modality.columns, *PROMPT_COLUMNS) if name in features]
    evidence = [name for name in columns if name in modality.columns and _may_hold_paths(features[name], True)]
    prompts = [name for name in columns if name in PROMPT_COLUMNS and _may_hold_paths(features[name], False)]
    if not evidence and not prompts:
        return rows
    # A streamed dataset forgets its features in `map` unless it is told them.
    arguments = {"evidence": evidence, "prompts": prompts, "folder": str(folder.absolute())}
    return rows.map(_absolute_row, fn_kwargs=arguments, features=rows.features)


def _may_hold_paths(feature: Any, texts: bool) -> bool:
    """Whether there can be a path in the feature: in any text of it, or in those of a part that holds its image."""
    if isinstance(feature, Json):
        return True
    if isinstance(feature, List):
        return _may_hold_paths(feature.feature, texts)
    if isinstance(feature, dict):
        return any(_may_hold_paths(value, name in PAYLOADS) for name, value in feature.items())
    return texts and isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _absolute_row(row: dict[str, Any], evidence: list[str], prompts: list[str], folder: str) -> dict[str, Any]:
    changed = {column: _absolute(row[column], folder) for column in evidence}
    return changed | {column: _absolute_prompt(row[column], folder) for column in prompts}


def _absolute(value: Any, folder: str) -> Any:
    if isinstance(value, list):
        return [_absolute(one, folder) for one in value]
    if isinstance(value, dict):
        return {name: _absolute(one, folder) if name in ("path", "url") else one for name, one in value.items()}
    return str(Path(folder) / value) if isinstance(value, str) and is_path(value) else value


def _absolute_prompt(prompt: Any, folder: str) -> Any:
    """A conversation in which the parts that name their images do so in full."""

    def part(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: _absolute(held, folder) if name in PAYLOADS else held for name, held in value.items()}

    def message(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [part(one) for one in held] if isinstance(held, list) else held for name, held in value.items()}

    return [message(value) for value in prompt] if isinstance(prompt, list) else prompt
