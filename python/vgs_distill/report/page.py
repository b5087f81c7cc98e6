"""What every report page shares: templates that escape everything, readable text, pictures, and one colour scale.

Words written by a model or a dataset are data from an untrusted source. They reach a page through the templates only,
which escape them and show what cannot be seen.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
SATURATION = 3.0  # nats at which the scale of contributions ends: the image makes a token 20 times as likely

TIME_PARTS = {
    "rollout": "student writes",
    "teacher": "teacher reads",
    "student": "student learns",
    "steering": "steering",
}
OTHER_TIME = "everything else"

_MEDIA_TYPES = {".png": "image/png", ".jpeg": "image/jpeg"}
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


def data_uri(path: Path) -> str | None:
    """A picture file as a URL that holds it; None where it is gone or is no picture of ours."""
    media_type = _MEDIA_TYPES.get(path.suffix)
    if media_type is None or not path.is_file():
        return None
    return embedded(path.read_bytes(), media_type)


def embedded(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def strength(value: float, saturation: float) -> int:
    """How far a diverging colour is from the page, 0 to 100; its side is the sign of the value."""
    return round(100 * min(abs(value) / saturation, 1.0))


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
