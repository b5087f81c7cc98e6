"""What the engine must know of a model family, in one table. To add a family, add a row (CONTRIBUTING.md says how).

Most of what differs between families is answered by their own configs and processors and needs no row: the ids of the
placeholder tokens, how an image or a sound becomes tokens, what a prompt looks like without it. A row holds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError
from .modalities import IMAGE, Modality

THIS_FILE = "python/vgs_distill/inputs/families.py"


@dataclass(frozen=True)
class Family:
    """What a family does that its config and processor do not tell.

    Attributes:
        model_types: `config.model_type` of its members.
        wrapping_tokens: Special tokens that fence an image or a sound in a prompt. With the placeholders they are
            never sampled: a completion that holds one promises evidence that does not exist.
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
        modalities: What it is known to read besides text, under the names of `modalities.py`.
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
    modalities: tuple[str, ...] = ("image",)


FAMILIES = (
    Family(
        ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl"),
        wrapping_tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        grid_positions=True,
        modalities=("image", "video"),
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
    Family(("qwen2_audio",), wrapping_tokens=("<|audio_bos|>", "<|audio_eos|>"), modalities=("audio",)),
)

# A family without a row: what its config and processor say, and nothing that would have to be taken on trust.
_UNKNOWN = Family((), attention_mask=False)


def family_of(config: PretrainedConfig) -> Family:
    """The row of a model's family, or that of an unknown one."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), _UNKNOWN)


def check_modality(config: PretrainedConfig, modality: Modality) -> None:
    """InputError, naming what the model's family reads, where that is not the modality."""
    known = family_of(config).modalities
    if modality.name not in known:
        raise InputError(
            f"model type {config.model_type!r} is not known to read {modality.plural}; set modality={known[0]!r}, "
            f"choose another model, or add the family to {THIS_FILE}"
        )


def check_image_mask(config: PretrainedConfig, image_mask: str) -> None:
    """InputError, naming the masks that work, where `image_mask` is not known to work for the model's family."""
    if image_mask == "attention" and not family_of(config).attention_mask:
        raise InputError(
            f"image_mask='attention' is not known to hide the image of model type {config.model_type!r}; choose 'drop' "
            f"or 'blank', or add the family to {THIS_FILE}"
        )


def check_teacher_reads_the_same(
    student: PretrainedConfig, teacher: PretrainedConfig, modality: Modality = IMAGE
) -> None:
    """InputError where the teacher could not read the tokens and features that the student's processor makes."""
    differs = [] if _relatives(student, teacher) else ["model_type"]
    for name in () if differs else modality.geometry:
        mine, theirs = (
            [getattr(part, name, None) for part in (config, getattr(config, modality.tower))]
            for config in (student, teacher)
        )
        if mine != theirs:
            differs.append(name)
    if differs:
        raise InputError(
            f"the teacher ({teacher.model_type}) reads {modality.plural} in another way than the student "
            f"({student.model_type}): they differ in {', '.join(differs)}; both read what the student's processor "
            "makes, so choose a teacher of the same family and resolution"
        )


def _relatives(first: PretrainedConfig, second: PretrainedConfig) -> bool:
    return first.model_type == second.model_type or second.model_type in family_of(first).model_types


def placeholder_ids(config: PretrainedConfig, processor: Any = None, modality: Modality = IMAGE) -> tuple[int, ...]:
    """The tokens that stand for one feature of the modality each; InputError if there are none."""
    for source in (config, processor):  # the config first: Gemma 3's processor means the token before the image
        found = (getattr(source, name, None) for name in modality.placeholders)
        placeholders = tuple(dict.fromkeys(value for value in found if isinstance(value, int)))
        if placeholders:
            return placeholders
    raise InputError(
        f"the config of model type {config.model_type!r} names no {modality.name} placeholder token "
        f"({', '.join(modality.placeholders)}), nor does its processor; steering needs a model that reads "
        f"{modality.plural}"
    )


@dataclass(frozen=True)
class EvidenceTokens:
    """The token ids that stand for the features of a modality, and all that a student must never sample."""

    modality: Modality
    placeholders: tuple[int, ...]
    banned_while_sampling: tuple[int, ...]

    @classmethod
    def of(cls, config: PretrainedConfig, processor: Any, modality: Modality = IMAGE) -> EvidenceTokens:
        """Read them from a model's config and its processor; InputError if neither names a placeholder."""
        placeholders = placeholder_ids(config, processor, modality)
        wrapping = _ids_of(family_of(config).wrapping_tokens, getattr(processor, "tokenizer", processor))
        return cls(modality, placeholders, tuple(sorted({*placeholders, *wrapping})))

    def texts(self, processor: Any) -> tuple[str, ...]:
        """What these tokens look like where somebody writes them."""
        return tuple(getattr(processor, "tokenizer", processor).convert_ids_to_tokens(self.banned_while_sampling))

    def is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))


def _ids_of(tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of those tokens that the tokenizer knows: not every member of a family has all of them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]
