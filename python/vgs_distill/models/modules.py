"""The parts of a multimodal model that a report tells apart."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ..inputs.modalities import AUDIO, IMAGE, Modality

_DECODER_LAYER = re.compile(r"layers\.(\d+)\.")


def parameters_by_module(
    model: PreTrainedModel, parameters: Iterable[nn.Parameter], modality: Modality = IMAGE
) -> dict[str, list[int]]:
    """Name of a part -> indices into `parameters`, in the order that a token meets them.

    The parts are the vision or audio tower, the connector, the embedding, every decoder layer, what else the decoder
    has, and the head where it is not tied to the embedding.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    encoder = model.get_encoder(modality=modality.name)  # the model itself where it knows of no tower
    inside = _ids(encoder) if encoder is not model else set()
    tower = "audio tower" if modality is AUDIO else "vision tower"
    decoder = _ids(model.get_decoder())
    embedding, head = _ids(model.get_input_embeddings()), _ids(model.get_output_embeddings())

    def part(parameter: nn.Parameter) -> str:
        key, name = id(parameter), names[id(parameter)]
        if key in embedding:
            return "embedding"
        if key in head:
            return "head"
        if key in inside and "merger" not in name:  # Qwen's connector is a part of its tower
            return tower
        if key in decoder:
            layer = _DECODER_LAYER.search(name)
            return f"decoder layer {layer[1]}" if layer else "decoder, other"
        return "connector"

    parts: dict[str, list[int]] = {tower: [], "connector": [], "embedding": []}
    for index, parameter in enumerate(parameters):
        parts.setdefault(part(parameter), []).append(index)
    return {name: indices for name, indices in parts.items() if indices}


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}
