"""What a docstring says of each attribute: settings are described there once, and read from there by `--help`."""

from __future__ import annotations

import inspect
import re


def attribute_texts(docstring: str | None) -> dict[str, str]:
    """Name -> its entry under "Attributes", on one line and without markup; empty where there is no such section."""
    section = inspect.cleandoc(docstring or "").partition("Attributes:\n")[2]
    texts: dict[str, str] = {}
    for names, entry in re.findall(r"^    ([\w, ]+): (.*(?:\n     .*)*)", section, flags=re.MULTILINE):
        text = re.sub(r'``"(.*?)"``', r"'\1'", " ".join(entry.split())).replace("`", "")
        texts |= dict.fromkeys(names.split(", "), text)
    return texts
