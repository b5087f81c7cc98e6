"""The YAML file of `vgs train` and `vgs eval`, as text and as YAML understands it. Light: no library but yaml."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, one_sentence

_MOST_VALUES = 10_000  # of a configuration, which has some two hundred fields


def find_config(arguments: Sequence[str]) -> Path | None:
    """The file that `--config` names, if it is given."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", const="")
    config = finder.parse_known_args(arguments)[0].config
    return None if config is None else Path(config)


def read_settings(path: Path) -> dict[str, tuple[Any, Any]]:
    """Key -> its value as it was written, and as YAML understands it.

    Raises:
        InputError: it cannot be read, or holds something else than `field: value` lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        typed = yaml.safe_load(text)
        written = yaml.load(text, yaml.BaseLoader)  # scalars as they were written: 1e-4 and no stay what they are
    except OSError as error:
        raise InputError(f"cannot read the configuration {str(path)!r} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"the configuration {str(path)!r} is not text in UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not valid YAML: {one_sentence(error)}") from None
    except RecursionError:
        raise InputError(f"{str(path)!r} is nested too deeply; a field holds a value, a list or a mapping") from None
    if not isinstance(typed, dict):
        raise InputError(f"{str(path)!r} does not hold 'field: value' lines; write for example 'gamma: 0.8'")
    if _size(typed, {}) > _MOST_VALUES:
        raise InputError(
            f"{str(path)!r} stands for more than {_MOST_VALUES} values once its aliases are followed; write them out"
        )
    return {key: (scalar, value) for (key, scalar), value in zip(written.items(), typed.values(), strict=True)}


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are in this one. Aliases are one object, which is gone through once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        held = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(one, known) for one in held)
    return known[id(value)]
