"""What every report page shares: templates that escape everything, readable text, pictures, and one colour scale.

Words written by a model or a dataset are data from an untrusted source. They reach a page through the templates only,
which escape them and show what cannot be seen.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
RUN_COLORS = (2, 1, 3, 5, 4, 6, 7, 0)  # of the page's eight, the order in which runs take them
SATURATION = 3.0  # nats at which the scale of contributions ends: the image makes a token 20 times as likely

PART_NAMES = {"standard": "whole", "lang": "language", "vis": "visual"}  # of the loss, as readers know them
NEED_SATURATION = 1.0  # nats at which the scale of dependency ends

TIME_PARTS = {
    "rollout": "student writes",
    "teacher": "teacher reads",
    "student": "student learns",
    "steering": "steering",
}
OTHER_TIME = "everything else"

_MEDIA_TYPES = {".png": ("image/png", b"\x89PNG\r\n"), ".jpeg": ("image/jpeg", b"\xff\xd8\xff")}  # and how they begin
# Controls except tab and newline, marks that turn the direction of the text around them, and halves of characters,
# which UTF-8 cannot encode.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def environment(*folders: Path) -> Environment:
    """Templates of `folders` and the shared ones; all text is escaped and made visible."""
    return Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is a str, and ours
        trim_blocks=True,
        lstrip_blocks=True,
    )


def visible(text: str) -> str:
    """`text` with a sign for every character that cannot be seen or that HTML cannot hold."""
    return _INVISIBLE.sub(_sign, text.replace("\r\n", "\n"))


def _sign(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match[0]):04X}⟩"


def data_uri(path: Path, folder: Path) -> str | None:
    """A picture file as a URL that holds it; None where it is gone, is no picture of ours, or leads out of `folder`."""
    media_type, begins = _MEDIA_TYPES.get(path.suffix, ("", b""))
    try:
        if not begins or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return None
        content = path.read_bytes()
    except OSError:  # a name that no file can have, or a file that may not be read
        return None
    return embedded(content, media_type) if content.startswith(begins) else None


def embedded(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def color_of_run(index: int) -> tuple[int, bool]:
    """The colour of the run at this place and whether its line is dashed, as those are for which no colour is left."""
    return RUN_COLORS[index % len(RUN_COLORS)], index >= len(RUN_COLORS)


def strength(value: float, saturation: float) -> int:
    """How far a diverging colour is from the page, 0 to 100; its side is the sign of the value."""
    return round(100 * min(abs(value) / saturation, 1.0))


def tint(value: float | None, saturation: float) -> dict[str, Any]:
    """A value with its colour; None has none."""
    if value is None:
        return {"value": None, "side": "none", "strength": 0}
    return {"value": value, "side": "raised" if value > 0 else "lowered", "strength": strength(value, saturation)}


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """The first, the last and evenly spaced ones between."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def time_bar(label: str, seconds: Mapping[str, float], total: float, longest: float) -> dict[str, Any]:
    """A step of `total` seconds and the parts of it, each with its share of the longest step on the page."""
    # A part keeps its colour whether or not a step has the parts before it.
    shades = {name: shade for shade, name in enumerate([*TIME_PARTS.values(), OTHER_TIME])}
    parts = {name: seconds[key] for key, name in TIME_PARTS.items() if key in seconds}
    parts[OTHER_TIME] = max(0.0, total - sum(parts.values()))
    return {
        "label": label,
        "total": total,
        "parts": [
            {"label": name, "shade": shades[name], "seconds": value, "share": 100 * value / (longest or 1.0)}
            for name, value in parts.items()
        ],
    }
