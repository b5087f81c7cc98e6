"""What a user is told when the input is wrong. Light: the command line and the demo import it before torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What was handed in cannot work; the message is one sentence that says what was wrong and what to do."""


class TrainingStopped(RuntimeError):
    """A run that had begun cannot go on; the message is one sentence that says why and what to do."""


def one_sentence(error: BaseException) -> str:
    """The first sentence of an error's message on one line, its type where it has no message."""
    first = re.split(r"(?<=[\w'\")`])\. (?=[A-Z])", " ".join(str(error).split()))[0]
    return first or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'gamma'?` for the most similar of the known names, or nothing where none is similar."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
