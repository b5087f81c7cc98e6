"""What a teacher is given besides text: the evidence that the masked view leaves out. `VGSConfig.modality` names it.

A row per modality: where a dataset keeps it, which tokens stand for it, what the processor makes of it. Images go
through TRL; for the others this file reads the rows and lays the processor's output out by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from PIL import Image

from ..errors import InputError
from .images import open_image

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """One kind of evidence.

    Attributes:
        name: Of a part of a conversation, and of the dataset column that holds one per row.
        plural: Of the column that holds several per row.
        features: What the processor calls the tensor that the model's tower reads.
        layout: What comes with it and says how it is laid out; no model has all of them.
        placeholders: Names under which configs keep the tokens that stand for the features.
        tower: The part of a config that describes the tower.
        geometry: What decides how the evidence is cut up and how many tokens it takes, under its names in configs.
        masks: The values of `image_mask` that mean something.
        grid: The entry of `layout` whose rows count the features of one piece of evidence; None: each has one.
    """

    name: str
    plural: str
    features: str
    layout: tuple[str, ...]
    placeholders: tuple[str, ...]
    tower: str
    geometry: tuple[str, ...]
    masks: tuple[str, ...]
    grid: str | None = None

    @property
    def columns(self) -> tuple[str, str]:
        return self.name, self.plural

    @property
    def keys(self) -> tuple[str, ...]:
        return self.features, *self.layout

    def split_by_row(self, fields: Mapping[str, Tensor], counts: Sequence[int]) -> dict[str, list[Tensor]]:
        """What the processor made of a batch as lists with one entry per row, which can be shuffled and cut.

        counts: pieces of evidence of each row.
        """
        sizes = list(counts)
        if self.grid is not None:
            sizes = [int(row.sum()) for row in fields[self.grid].prod(dim=1).split(list(counts))]
        return {
            name: list(fields[name].split(sizes if name == self.features else list(counts)))
            for name in self.keys
            if name in fields
        }


_VISION_PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
_VISION_GEOMETRY = (
    "image_token_id", "patch_size", "spatial_merge_size", "temporal_patch_size", "image_size", "scale_factor",
    "downsample_ratio", "mm_tokens_per_image", "image_grid_pinpoints", "vision_feature_select_strategy",
)  # fmt: skip

IMAGE = Modality(
    "image",
    "images",
    features="pixel_values",
    layout=(
        "image_grid_thw",
        "pixel_attention_mask",
        "spatial_shapes",
        "image_sizes",
        "image_position_ids",
        "batch_num_images",
    ),
    placeholders=_VISION_PLACEHOLDERS,
    tower="vision_config",
    geometry=_VISION_GEOMETRY,
    masks=("drop", "blank", "attention"),
)
VIDEO = Modality(
    "video",
    "videos",
    features="pixel_values_videos",
    layout=("video_grid_thw", "second_per_grid_ts"),
    placeholders=_VISION_PLACEHOLDERS,
    tower="vision_config",
    geometry=_VISION_GEOMETRY,
    masks=("drop", "blank", "attention"),
    grid="video_grid_thw",
)
AUDIO = Modality(
    "audio",
    "audios",
    features="input_features",
    layout=("feature_attention_mask",),
    placeholders=("audio_token_id", "audio_token_index"),
    tower="audio_config",
    geometry=("audio_token_id", "num_mel_bins", "max_source_positions"),
    masks=("drop", "attention"),  # silence is not 0 in a log-mel spectrogram, so there is no blank one
)
MODALITIES = {modality.name: modality for modality in (IMAGE, VIDEO, AUDIO)}


def pieces_of(row: Mapping[str, Any], modality: Modality) -> list[Any]:
    """The pieces of evidence in a row's columns, as they are there; InputError where one of them is missing."""
    one: Any = row.get(modality.name)
    several: Any = row.get(modality.plural)
    if one is None and several is None:
        return []
    if one is not None and several is not None:
        if len(several):
            refuse_both(modality)
        several = None
    held = one if several is None else several
    # A list in the column of one image, or one image in that of several, can mean one thing only.
    many = isinstance(held, list | tuple) if modality is IMAGE else several is not None
    pieces = list(held) if many else [held]
    for number, piece in enumerate(pieces, 1):
        if piece is None:
            raise InputError(
                f"there is nothing in place {number} of its {len(pieces)} {modality.plural}; remove the empty one"
            )
    return pieces


def refuse_both(modality: Modality) -> NoReturn:
    raise InputError(f"there is something in both {modality.name!r} and {modality.plural!r}; leave one of them empty")


def read_piece(value: Any, modality: Modality, processor: Any = None) -> Any:
    """A piece of evidence as the processor takes it; InputError where it could not.

    processor: knows the sampling rate of audio; None leaves that unchecked.
    """
    return _READERS[modality.name](value, processor)


def _waveform(value: Any, processor: Any) -> np.ndarray:
    """(samples,) float32: from an array, or from one with its sampling rate (what `datasets.Audio` decodes to too)."""
    rate = None
    if not isinstance(value, np.ndarray | list):
        try:
            value, rate = value["array"], value["sampling_rate"]
        except (TypeError, KeyError):
            raise InputError(
                f"audio must be an array of samples or {{'array', 'sampling_rate'}}, got {type(value).__name__}; "
                "decode files with datasets.Audio"
            ) from None
    samples = _array(value, "f", "audio must be an array of samples, floats from -1 to 1")
    if samples.ndim != 1 or not samples.size:
        raise InputError(f"audio must be one channel, an array of shape (samples,), got {samples.shape}; average them")
    extractor: Any = getattr(processor, "feature_extractor", None)
    expected: Any = getattr(extractor, "sampling_rate", None)
    if expected is not None and rate is not None and int(rate) != expected:
        raise InputError(
            f"audio is sampled at {int(rate)} Hz, but the model hears {expected} Hz; resample it, for example with "
            f"dataset.cast_column('audio', Audio(sampling_rate={expected}))"
        )
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and len(samples) > longest:
        raise InputError(
            f"audio lasts {len(samples) / expected:.1f} s, of which the model would hear the first "
            f"{longest / expected:.1f} s; cut it or leave the row out"
        )
    return samples.astype(np.float32)


def _frames(value: Any, processor: Any) -> np.ndarray:
    """(frames, height, width, 3) uint8: from an array of that shape or a list of images, decoded or not."""
    if isinstance(value, list) and value and not isinstance(value[0], list | np.ndarray):
        value = [_frame(frame) for frame in value]
    frames = _array(value, "iu", "a video must be a list of images of one size, or whole numbers from 0 to 255")
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(
            f"a video must be a list of images or an array of shape (frames, height, width, 3), got {frames.shape}; "
            "decode files to frames"
        )
    return frames.astype(np.uint8)


def _frame(frame: Any) -> np.ndarray:  # (height, width, 3)
    if not isinstance(frame, dict | Image.Image):
        raise InputError(f"a video must be a list of images, its frames, got a list of {type(frame).__name__}")
    return np.asarray(open_image(frame))


def _array(value: Any, kinds: str, expected: str) -> np.ndarray:
    """The value as an array of these kinds of numpy's dtypes; InputError with what was expected."""
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        array = np.asarray(None)
    if array.dtype.kind not in kinds:
        found = f"{type(value).__name__} of {array.dtype.name}" if array.dtype.kind in "iufb" else type(value).__name__
        raise InputError(f"{expected}, got {found}")
    return array


_READERS: dict[str, Callable[[Any, Any], Any]] = {
    "image": lambda value, processor: open_image(value),
    "video": _frames,
    "audio": _waveform,
}
