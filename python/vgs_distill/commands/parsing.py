"""argparse that refuses in one sentence. Light: the standard library only."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from ..errors import InputError, nearest


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `InputError`, and names the nearest right word for a wrong one."""

    def __init__(self, *, prog: str, **options: object) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flag = unknown[1].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            raise InputError(f"{self.prog} has no flag {flag!r}{nearest(flag, known)}")
        raise refused(message)


def refused(message: str) -> InputError:
    """What argparse says of a value it does not take, without its usage text."""
    message = re.sub(r"^argument (?:--)?([\w-]+)\S*: ", r"\1: ", message)
    if choice := re.fullmatch(r"([\w-]+): invalid choice: '(.*)' \(choose from (.*)\)", message):
        name, value, listing = choice.groups()
        known = listing.replace("'", "").split(", ")  # which Python writes with or without quotes
        remedy = nearest(value, known) or f"; choose from {', '.join(known)}"
        return InputError(f"{name} cannot be {value!r}{remedy}")
    return InputError(message)
