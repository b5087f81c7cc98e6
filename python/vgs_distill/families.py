"""What the engine must know of a model family, in one table. To add a family, add a row (CONTRIBUTING.md says how).

Most of what differs between families is answered by their own configs and processors and needs no row: the ids of the
placeholder tokens, how an image becomes tokens, what a prompt looks like without its image. A row holds the rest.
Read by `masking.py` and the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .errors import InputError

THIS_FILE = "python/vgs_distill/families.py"


@dataclass(frozen=True)
class Family:
    """What a family does that its config and processor do not tell.

    Attributes:
        model_types: `config.model_type` of its members.
        wrapping_tokens: Special tokens that fence an image in a prompt. With the placeholders they are never sampled:
            a completion that holds one promises an image that does not exist.
        grid_positions: Positions follow the image's grid and are derived from the attention mask (M-RoPE), so
            `image_mask="attention"` must fix them before it changes that mask.
        bidirectional_prompt: The prompt attends to itself in both directions, and `token_type_ids` must be 1 where the
            completion begins, or completion tokens would see those that follow them.
        needs_image: The processor takes no prompt without an image.
        one_prompt_at_a_time: The processor fails on prompts of different length that it is not to pad.
        pads_images: Pixel tensors hold one entry per row, (rows, images, channels, height, width), instead of one per
            image, and an image whose pixels are all 0 is padding, so a blank one must not be exactly 0.
        counts_images: The forward pass wants the number of images of every row, as `batch_num_images`.
        attention_mask: Whether `image_mask="attention"` is known to hide the image and to leave positions alone.
    """

    model_types: tuple[str, ...]
    wrapping_tokens: tuple[str, ...] = ()
    grid_positions: bool = False
    bidirectional_prompt: bool = False
    needs_image: bool = False
    one_prompt_at_a_time: bool = False
    pads_images: bool = False
    counts_images: bool = False
    attention_mask: bool = True


FAMILIES = (
    Family(
        ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl"),
        wrapping_tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        grid_positions=True,
    ),
    Family(
        ("idefics3", "smolvlm"),
        wrapping_tokens=(
            "<fake_token_around_image>",
            "<global-img>",
            "<video>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ),
        pads_images=True,
    ),
    Family(("llava_onevision",), wrapping_tokens=("<video>",), counts_images=True),
    Family(("llava_next",)),
    Family(("gemma3",), wrapping_tokens=("<start_of_image>", "<end_of_image>")),
    Family(("internvl",), wrapping_tokens=("<img>", "</img>", "<video>")),
    Family(("paligemma",), bidirectional_prompt=True, needs_image=True, one_prompt_at_a_time=True),
)

# A family without a row: what its config and processor say, and nothing that would have to be taken on trust.
_UNKNOWN = Family((), attention_mask=False)


def family_of(config: PretrainedConfig) -> Family:
    """The row of a model's family, or that of an unknown one."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), _UNKNOWN)


def check_image_mask(config: PretrainedConfig, image_mask: str) -> None:
    """InputError, naming the masks that work, where `image_mask` is not known to work for the model's family."""
    if image_mask == "attention" and not family_of(config).attention_mask:
        raise InputError(
            f"image_mask='attention' is not known to hide the image of model type {config.model_type!r}; choose 'drop' "
            f"or 'blank', or add the family to {THIS_FILE}"
        )


# What decides how pixels are cut up and how many tokens an image takes, under the names that configs give it.
_IMAGE_GEOMETRY = (
    "image_token_id", "patch_size", "spatial_merge_size", "temporal_patch_size", "image_size", "scale_factor",
    "downsample_ratio", "mm_tokens_per_image", "image_grid_pinpoints", "vision_feature_select_strategy",
)  # fmt: skip


def check_teacher_reads_same_images(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """InputError where the teacher could not read the tokens and pixels that the student's processor makes."""
    differs = [] if _relatives(student, teacher) else ["model_type"]
    for name in () if differs else _IMAGE_GEOMETRY:
        mine, theirs = (
            [getattr(part, name, None) for part in (config, config.vision_config)] for config in (student, teacher)
        )
        if mine != theirs:
            differs.append(name)
    if differs:
        raise InputError(
            f"the teacher ({teacher.model_type}) reads images in another way than the student ({student.model_type}): "
            f"they differ in {', '.join(differs)}; both read what the student's processor makes, so choose a teacher "
            "of the same family and patch size"
        )


def _relatives(first: PretrainedConfig, second: PretrainedConfig) -> bool:
    return first.model_type == second.model_type or second.model_type in family_of(first).model_types


def placeholder_ids(config: PretrainedConfig, processor: Any = None) -> tuple[int, ...]:
    """The tokens that stand for one image or video feature each; InputError if there are none."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    for source in (config, processor):  # the config first: Gemma 3's processor means the token before the image
        found = (getattr(source, name, None) for name in names)
        placeholders = tuple(dict.fromkeys(value for value in found if isinstance(value, int)))
        if placeholders:
            return placeholders
    raise InputError(
        f"the config of model type {config.model_type!r} names no image placeholder token ({', '.join(names)}), nor "
        "does its processor; visual gradient steering needs a vision-language model"
    )


@dataclass(frozen=True)
class ImageTokens:
    """The token ids that stand for image features, and all that a student must never sample."""

    placeholders: tuple[int, ...]
    banned_while_sampling: tuple[int, ...]

    @classmethod
    def of(cls, config: PretrainedConfig, processor: Any) -> ImageTokens:
        """Read them from a model's config and its processor; InputError if neither names a placeholder."""
        placeholders = placeholder_ids(config, processor)
        wrapping = _ids_of(family_of(config).wrapping_tokens, getattr(processor, "tokenizer", processor))
        return cls(placeholders, tuple(sorted({*placeholders, *wrapping})))

    def is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))


def _ids_of(tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of those tokens that the tokenizer knows: not every member of a family has all of them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]
