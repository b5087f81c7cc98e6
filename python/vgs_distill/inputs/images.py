"""One image, however a row holds it, as an RGB picture. Training, evaluation and the checks all read images here.

What cannot be read, or has pixels whose black and white nobody knows, ends in one sentence.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image
from transformers.utils import logging

from ..errors import InputError, one_sentence

logger = logging.get_logger(__name__)

_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LONGEST_NAME = 255  # of a file, in every usual file system; an image in base64 is longer, or begins as its format does
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP


def open_image(value: Any) -> Image.Image:
    """The picture, decoded, in RGB and upright.

    Args:
        value: a PIL image; the path of a file; the bytes of one, also in base64 or as a `data:` URL; what `datasets`
            keeps of an image, `{'bytes', 'path'}`; or an array of whole numbers from 0 to 255, (height, width[, 3]).

    Raises:
        InputError: it is none of these, a URL, a file that is damaged, or has pixels of an unknown range.
    """
    if isinstance(value, Image.Image):
        return _rgb(_decoded(value, ""))
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return _rgb(_decoded(value, ""))
    if isinstance(value, str):
        value = {"bytes": None, "path": value} if (content := base64_content(value)) is None else {"bytes": content}
    elif isinstance(value, bytes):
        value = {"bytes": value}
    if not isinstance(value, dict) or (value.get("bytes") is None and not isinstance(value.get("path"), str)):
        kind = (
            f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a value of type {type(value).__name__}"
        )
        raise InputError(f"{kind} is no image; give a path, the bytes of a file, or a PIL image")
    path = value.get("path") or ""
    if value.get("bytes") is None and re.match("https?://", path, re.IGNORECASE):
        raise InputError(f"an image is a URL ({_short(path)}), which is not downloaded; download it and give its path")
    return _rgb(_decoded({"path": path or None, "bytes": value.get("bytes")}, f" ({_short(path)})" if path else ""))


def is_path(text: str) -> bool:
    """Whether a text names a file here, and neither is a URL nor holds the image itself."""
    likely = len(text) > _LONGEST_NAME or text.startswith(_BEGINNINGS)
    return not re.match(r"\w+://|data:", text) and not (likely and _BASE64.fullmatch(text))


def base64_content(text: str) -> bytes | None:
    """The bytes that a `data:` URL or a text in base64 stands for, or None where the text is a path."""
    url = _DATA_URL.match(text)
    if url is None and is_path(text):
        return None
    try:
        content = base64.b64decode("".join(text[url.end() if url else 0 :].split()), validate=True)
    except binascii.Error:
        if url is None:
            return None
        raise InputError("an image is a data: URL whose base64 is damaged; write it again, or give a path") from None
    logger.warning_once("images in base64 are decoded anew every time a row is read; files are quicker")
    return content


def _short(path: str) -> str:
    return path if len(path) <= 120 else f"{path[:80]}…"


def _decoded(value: Any, named: str) -> Image.Image:
    """All of the file, since what is cut off is noticed at its end only."""
    try:
        if isinstance(value, np.ndarray):
            return Image.fromarray(value)
        image = ImageFeature().decode_example(value)
        image.load()
        return image
    except Exception as error:  # Pillow's plugins raise what they like, and its error of a bomb is an Exception alone
        raise InputError(
            f"an image cannot be opened{named}: {one_sentence(error).rstrip('.')}; remove the row or repair the file"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel. Pillow would cut pixels beyond 255 off, and show what is transparent as black."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image)
        logger.warning_once(
            "images of 16 bits are read with 0 as black and 65535 as white (the first one holds %d to %d); write them "
            "with 8 bits where another range is meant",
            pixels.min(),
            pixels.max(),
        )
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_from_unit_range(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _from_unit_range(pixels: np.ndarray) -> np.ndarray:  # (height, width)
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:  # NaN is neither
        logger.warning_once("images of fractions are read with 0 as black and 1 as white")
        return np.rint(255 * pixels).astype(np.uint8)
    kind = "fractions" if pixels.dtype.kind == "f" else "32-bit whole numbers"
    raise InputError(
        f"an image holds {kind} from {pixels.min():g} to {pixels.max():g}, and which of them are black and "
        "white is not known; write it with 8 bits, or as fractions from 0 to 1"
    )


def _on_white(image: Image.Image) -> Image.Image:
    if image.getchannel("A").getextrema() == (255, 255):
        return image
    logger.warning_once("transparent images are seen on white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
