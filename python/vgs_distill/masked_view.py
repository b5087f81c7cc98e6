"""`MaskedView`: the image taken out of what a model reads, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .errors import InputError
from .inputs.families import EvidenceTokens, family_of
from .inputs.modalities import IMAGE, Modality
from .masking import blank_like, without_evidence

IGNORED = -100  # the label of a token that no loss counts


class MaskedView:
    """Makes the masked view of what a model reads: the same without its image, video or sound.

    Messages, where there are any, give the prompt that the chat template writes without an image (`messages`). Where
    an engine hands over tokens only, `drop_tokens` cuts the image out of them: the same for templates that write
    nothing else around one (Qwen), close to it for others. `blank` keeps the tokens and empties the picture.

    Args:
        config: Of the student; names its placeholder tokens.
        processor: Of the student, or its tokenizer: knows the tokens that fence an image.
        modality: ``vgs_distill.inputs.modalities.IMAGE``, `VIDEO` or `AUDIO`.

    Raises:
        InputError: neither config nor processor names a placeholder token.
    """

    def __init__(self, config: PretrainedConfig, processor: Any, modality: Modality = IMAGE) -> None:
        self.tokens = EvidenceTokens.of(config, processor, modality)
        self._family = family_of(config)
        self._pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None) or 0

    @staticmethod
    def messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation whose contents are lists of parts, without its images, videos and sounds."""
        return without_evidence(messages)

    def rows_with_evidence(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which rows hold at least one image, video or sound, (rows,) bool."""
        ids = inputs["input_ids"]
        if ids.is_nested:
            return torch.stack([self.tokens.is_placeholder(row).any() for row in ids.unbind()])
        return self.tokens.is_placeholder(ids).any(dim=1)

    def blank(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with every pixel at the mean colour, 0 after the processor's normalisation."""
        features = self.tokens.modality.features
        if "blank" not in self.tokens.modality.masks:
            raise InputError(f"there is no blank {self.tokens.modality.name}; use drop_tokens")
        if features not in inputs:
            return dict(inputs)
        return {**inputs, features: blank_like(inputs[features], self._family)}

    def drop_tokens(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs without the tokens of images and without their features; positions follow.

        Args:
            inputs: `input_ids` with whatever has their shape (`attention_mask`, `labels`, ...), padded, (rows, length),
                on either side; or jagged nested tensors without padding, of which `position_ids` may have planes,
                (rows, planes, length).
        """
        modality = self.tokens.modality
        gone = torch.tensor(self.tokens.banned_while_sampling, device=inputs["input_ids"].device)
        kept = {n: v for n, v in inputs.items() if n not in modality.keys and n != "mm_token_type_ids"}
        if inputs["input_ids"].is_nested:
            return _drop_jagged(kept, gone)
        return _drop_padded(kept, gone, {"input_ids": self._pad, "labels": IGNORED})


def _drop_padded(inputs: dict[str, Any], gone: Tensor, padding: Mapping[str, int]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    keep = mask.bool() & ~torch.isin(ids, gone)  # (rows, length)
    left = bool((~mask[:, 0].bool()).any())
    order = torch.argsort(keep.to(torch.uint8), dim=1, descending=not left, stable=True)
    length = int(keep.sum(dim=1).max())
    order = order[:, order.size(1) - length :] if left else order[:, :length]
    real = keep.gather(1, order)
    masked: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            masked[name] = value
        else:
            masked[name] = value.gather(1, order).masked_fill(~real, padding.get(name, 0))
    masked["attention_mask"] = real.to(mask.dtype)
    if "position_ids" in inputs:
        positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        masked["position_ids"] = positions.expand(*inputs["position_ids"].shape[:-1], length)
    return masked


def _drop_jagged(inputs: dict[str, Any], gone: Tensor) -> dict[str, Any]:
    rows = inputs["input_ids"].unbind()
    keep = [~torch.isin(row, gone) for row in rows]
    masked = dict(inputs)
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) and value.is_nested):
            continue
        parts = value.unbind()
        if any(part.shape[-1:] != row.shape for part, row in zip(parts, rows, strict=True)):
            continue  # of another length: responses, prompts
        if name == "position_ids":
            cut = [
                torch.arange(int(k.sum()), device=k.device).expand(*p.shape[:-1], -1).contiguous()
                for p, k in zip(parts, keep, strict=True)
            ]
        else:
            cut = [part[..., k] for part, k in zip(parts, keep, strict=True)]
        masked[name] = torch.nested.as_nested_tensor(cut, layout=torch.jagged)
    return masked
