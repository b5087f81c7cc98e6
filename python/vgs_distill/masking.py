"""What "the image is masked" means: turns the inputs of one batch into those of its masked view.

Three named choices (`VGSConfig.image_mask`): `drop`, `blank`, `attention`. Called by `loss.py`.
Adding a model family that marks its images otherwise: extend `ImageTokens.of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

# Names under which model configs keep the id that stands for one image (or video) feature, and those of its delimiters.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")
_DELIMITERS = ("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id")


class Batch(NamedTuple):
    """The inputs of one forward pass: prompts padded on the left, completions on the right."""

    prompt_ids: Tensor  # (rows, prompt)
    prompt_mask: Tensor  # (rows, prompt)
    completion_ids: Tensor  # (rows, completion)
    completion_mask: Tensor  # (rows, completion)
    multimodal: dict[str, Any]  # pixel_values and what belongs to it, as the processor named it

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)


@dataclass(frozen=True)
class ImageTokens:
    """The token ids that stand for image features, and those that fence them."""

    placeholders: tuple[int, ...]
    delimiters: tuple[int, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> ImageTokens:
        """Read them from a model's config; raises ValueError if it names no image placeholder."""

        def ids(names: tuple[str, ...]) -> tuple[int, ...]:
            values = (getattr(config, name, None) for name in names)
            return tuple(dict.fromkeys(value for value in values if isinstance(value, int)))

        placeholders = ids(_PLACEHOLDERS)
        if not placeholders:
            raise ValueError(
                f"the config of model type {config.model_type!r} names no image placeholder token "
                f"({', '.join(_PLACEHOLDERS)}); visual gradient steering needs a vision-language model"
            )
        return cls(placeholders, ids(_DELIMITERS))

    @property
    def banned_while_sampling(self) -> list[int]:
        """A student that samples one of these would promise image features that do not exist."""
        return sorted({*self.placeholders, *self.delimiters})

    def is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))

    def is_part_of_image(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.placeholders + self.delimiters, device=ids.device))


def rows_with_image(batch: Batch, tokens: ImageTokens) -> Tensor:
    """Which rows of the batch hold at least one image, (rows,) bool."""
    return tokens.is_placeholder(batch.prompt_ids).any(dim=1)


def drop_image(batch: Batch, tokens: ImageTokens) -> Batch:
    """Image tokens and their delimiters leave the prompts; what remains closes up against the completion."""
    kept = batch.prompt_mask.bool() & ~tokens.is_part_of_image(batch.prompt_ids)  # (rows, prompt)
    # A stable sort moves the dropped positions to the front, which is where left padding lives.
    order = torch.argsort(kept.int(), dim=1, stable=True)
    length = max(int(kept.sum(dim=1).max()), 1)
    prompt_ids = batch.prompt_ids.gather(1, order)[:, -length:]
    prompt_mask = kept.to(batch.prompt_mask.dtype).gather(1, order)[:, -length:]
    return batch._replace(prompt_ids=prompt_ids, prompt_mask=prompt_mask, multimodal={})


def blank_image(batch: Batch) -> Batch:
    """Every pixel takes the mean colour: 0 after the image processor's normalisation."""
    multimodal = dict(batch.multimodal)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in multimodal:
            multimodal[name] = torch.zeros_like(multimodal[name])
    return batch._replace(multimodal=multimodal)


def hide_image(batch: Batch, tokens: ImageTokens, model: PreTrainedModel) -> Batch:
    """Image tokens keep their places and positions, but no token attends to them."""
    positions = _positions(batch, model)
    visible = batch.prompt_mask * (~tokens.is_placeholder(batch.prompt_ids)).to(batch.prompt_mask.dtype)
    return batch._replace(prompt_mask=visible, multimodal={**batch.multimodal, "position_ids": positions})


def _positions(batch: Batch, model: PreTrainedModel) -> Tensor:
    """The positions of the unmasked view: models derive them from the attention mask, which is about to change."""
    backbone = model.base_model
    multimodal = batch.multimodal
    if hasattr(backbone, "get_rope_index") and "image_grid_thw" in multimodal:
        rope_index: Any = backbone.get_rope_index
        positions, _ = rope_index(
            batch.input_ids,
            mm_token_type_ids=multimodal["mm_token_type_ids"],
            image_grid_thw=multimodal["image_grid_thw"],
            attention_mask=batch.attention_mask,
        )
        return positions  # (3, rows, length)
    return (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (rows, length)


def masked_view(image_mask: str, batch: Batch, tokens: ImageTokens, model: PreTrainedModel) -> Batch:
    """The batch with its images masked in the way that `image_mask` names."""
    if image_mask == "drop":
        return drop_image(batch, tokens)
    if image_mask == "blank":
        return blank_image(batch)
    return hide_image(batch, tokens, model)
