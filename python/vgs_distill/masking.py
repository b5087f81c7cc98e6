"""Makes the masked view of a batch: what it means that the image, the video or the audio is masked.

Three named choices (`VGSConfig.image_mask`): `drop`, `blank`, `attention`. What a model family needs for them is in
`inputs/families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .inputs.families import EvidenceTokens, Family
from .inputs.modalities import IMAGE, MODALITIES, Modality
from .models.heads import backbone

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_MULTIMODAL_KEYS = (*(key for modality in MODALITIES.values() for key in modality.keys), *TOKEN_TYPES)

# Far below any real pixel, and above 0 in every dtype that models run in.
_NOT_ZERO = torch.finfo(torch.float16).tiny


class Batch(NamedTuple):
    """The inputs of one forward pass: prompts padded on the left, completions on the right."""

    prompt_ids: Tensor  # (rows, prompt)
    prompt_mask: Tensor  # (rows, prompt)
    completion_ids: Tensor  # (rows, completion)
    completion_mask: Tensor  # (rows, completion)
    multimodal: dict[str, Any]  # what the processor made of images, videos or audio, under its names
    text_prompt_ids: Tensor | None = None  # (rows, text prompt), the prompts without their evidence; `drop` needs them
    text_prompt_mask: Tensor | None = None  # (rows, text prompt)

    @classmethod
    def of(cls, rollout: Mapping[str, Any]) -> Batch:
        """The part of a rollout that models read."""
        return cls(
            rollout["prompt_ids"],
            rollout["prompt_mask"],
            rollout["completion_ids"],
            rollout["completion_mask"],
            multimodal_inputs(rollout),
            rollout.get("text_prompt_ids"),
            rollout.get("text_prompt_mask"),
        )

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)


def multimodal_inputs(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward pass reads besides tokens, under the names of the processor."""
    return {name: rollout[name] for name in _MULTIMODAL_KEYS if name in rollout}


def rows_with_evidence(batch: Batch, tokens: EvidenceTokens) -> Tensor:
    """Which rows of the batch hold at least one image, video or sound, (rows,) bool."""
    return tokens.is_placeholder(batch.prompt_ids).any(dim=1)


def with_evidence(row: Mapping[str, Any], modality: Modality = IMAGE) -> list[dict[str, Any]]:
    """The prompt of a canonical row (`inputs.formats`) with every piece of its evidence in its place."""
    pieces = iter(row[modality.plural])
    return [
        {
            **message,
            "content": [
                {**part, modality.name: next(pieces)} if part["type"] == modality.name else part
                for part in message["content"]
            ],
        }
        for message in row["prompt"]
    ]


def without_evidence(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without the images, videos and sounds in it: rendered by the chat template, the prompt of `drop`.

    Rendering anew, instead of cutting tokens out, leaves the very prompt that the template writes without an image:
    some templates and processors also write spaces, line breaks, tile numbers or times around one.
    """
    return [
        message
        if not isinstance(message.get("content"), list)
        else {**message, "content": [part for part in message["content"] if part["type"] not in MODALITIES]}
        for message in prompt
    ]


def drop_evidence(batch: Batch) -> Batch:
    """The prompts without their evidence; positions follow."""
    assert batch.text_prompt_ids is not None
    assert batch.text_prompt_mask is not None
    multimodal = {}
    types = batch.multimodal.get("token_type_ids")
    if types is not None:  # they also say where the completion begins
        completion = types[:, types.size(1) - batch.completion_ids.size(1) :]
        multimodal["token_type_ids"] = torch.cat([torch.zeros_like(batch.text_prompt_ids), completion], dim=1)
    return batch._replace(prompt_ids=batch.text_prompt_ids, prompt_mask=batch.text_prompt_mask, multimodal=multimodal)


def blank_pixels(batch: Batch, tokens: EvidenceTokens, family: Family) -> Batch:
    """Every pixel takes the mean colour: 0 after the processor's normalisation."""
    features = tokens.modality.features
    return batch._replace(multimodal={**batch.multimodal, features: blank_like(batch.multimodal[features], family)})


def blank_like(pixels: Tensor, family: Family) -> Tensor:
    blank = torch.zeros_like(pixels)
    if family.pads_images:
        real = (pixels != 0).flatten(2).any(2)[..., None, None, None]  # (rows, images, 1, 1, 1)
        blank = blank.masked_fill(real, _NOT_ZERO)
    return blank


def hide_evidence(batch: Batch, tokens: EvidenceTokens, family: Family, model: PreTrainedModel) -> Batch:
    """Placeholder tokens keep their places and positions, but no token attends to them."""
    multimodal = dict(batch.multimodal)
    if family.grid_positions:
        multimodal["position_ids"] = _grid_positions(batch, tokens, model)
    visible = batch.prompt_mask * (~tokens.is_placeholder(batch.prompt_ids)).to(batch.prompt_mask.dtype)
    return batch._replace(prompt_mask=visible, multimodal=multimodal)


def _grid_positions(batch: Batch, tokens: EvidenceTokens, model: PreTrainedModel) -> Tensor:
    """The positions of the unmasked view, (3, rows, length): models derive them from the attention mask."""
    rope_index: Any = backbone(model).get_rope_index
    positions, _ = rope_index(
        batch.input_ids,
        mm_token_type_ids=batch.multimodal["mm_token_type_ids"],
        attention_mask=batch.attention_mask,
        **{name: batch.multimodal[name] for name in tokens.modality.layout if name in batch.multimodal},
    )
    return positions


def stack_views(first: Batch, second: Batch) -> Batch:
    """The rows of two batches as one; prompts may differ in length, and either batch may have no evidence."""
    total = max(batch.prompt_ids.size(1) for batch in (first, second)) + first.completion_ids.size(1)
    multimodal = {}
    for name in dict.fromkeys([*first.multimodal, *second.multimodal]):
        mine, other = first.multimodal.get(name), second.multimodal.get(name)
        if name == "position_ids":  # (3, rows, length), those of the same rows with their evidence
            multimodal[name] = second.multimodal[name].repeat(1, 2, 1)
        elif name.endswith("token_type_ids"):
            mine = torch.zeros_like(first.input_ids) if mine is None else mine
            other = torch.zeros_like(second.input_ids) if other is None else other
            multimodal[name] = _left_padded(mine, other, total)
        else:
            multimodal[name] = torch.cat([value for value in (mine, other) if value is not None])
    return Batch(
        _left_padded(first.prompt_ids, second.prompt_ids),
        _left_padded(first.prompt_mask, second.prompt_mask),
        torch.cat([first.completion_ids, second.completion_ids]),
        torch.cat([first.completion_mask, second.completion_mask]),
        multimodal,
    )


def with_row(batch: Batch, row: Batch) -> Batch:
    """A batch without evidence and below it the prompt of another row, which has some; its completion is padding."""
    empty = torch.zeros_like(batch.completion_ids[:1])
    types = {
        name: F.pad(value, (0, empty.size(1))) if name.endswith("token_type_ids") else value
        for name, value in row.multimodal.items()
    }
    row = row._replace(completion_ids=empty, completion_mask=empty.to(batch.completion_mask), multimodal=types)
    both = stack_views(batch, row)
    if row.text_prompt_ids is None or row.text_prompt_mask is None:
        return both
    without = (batch.prompt_ids, batch.prompt_mask)  # a prompt without evidence is its own text
    ids, mask = (own if text is None else text for own, text in zip(without, batch[-2:], strict=True))
    return both._replace(
        text_prompt_ids=_left_padded(ids, row.text_prompt_ids),
        text_prompt_mask=_left_padded(mask, row.text_prompt_mask),
    )


def _left_padded(first: Tensor, second: Tensor, length: int = 0) -> Tensor:
    """Rows of different length below each other, (rows of both, length), zeros on the left."""
    length = max(length, first.size(1), second.size(1))
    return torch.cat([F.pad(rows, (length - rows.size(1), 0)) for rows in (first, second)])


def masked_view(image_mask: str, batch: Batch, tokens: EvidenceTokens, family: Family, model: PreTrainedModel) -> Batch:
    """The batch with its evidence masked in the way that `image_mask` names."""
    if image_mask == "drop":
        return drop_evidence(batch)
    if image_mask == "blank":
        return blank_pixels(batch, tokens, family)
    return hide_evidence(batch, tokens, family, model)
