"""A row that stands where there is nothing to run: nothing of it counts.

Processes that train together must run the same passes, the tower's among them. One whose rows have no image, or only
prompts that are too long, runs this row's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .modalities import Modality

_SIDE, _FRAMES, _SECONDS = 64, 4, 0.2  # small, and enough for every family that is known


def stand_in(modality: Modality, processor: Any) -> dict[str, Any]:
    """A canonical row (`inputs.formats`) with one small piece of evidence and one word.

    processor: knows the sampling rate of audio.
    """
    content = [{"type": modality.name}, {"type": "text", "text": "."}]
    return {"prompt": [{"role": "user", "content": content}], modality.plural: [_PIECES[modality.name](processor)]}


def _sound(processor: Any) -> np.ndarray:
    return np.zeros(int(_SECONDS * processor.feature_extractor.sampling_rate), dtype=np.float32)


_PIECES: dict[str, Any] = {
    "image": lambda processor: Image.new("RGB", (_SIDE, _SIDE), "grey"),
    "video": lambda processor: np.full((_FRAMES, _SIDE, _SIDE, 3), 128, dtype=np.uint8),
    "audio": _sound,
}
