"""The parts of a multimodal model: what a report tells apart, and where adapters go by default."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn
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
    part = _parts(model, modality)
    parts: dict[str, list[int]] = {_tower(modality): [], "connector": [], "embedding": []}
    for index, parameter in enumerate(parameters):
        parts.setdefault(part(parameter), []).append(index)
    return {name: indices for name, indices in parts.items() if indices}


def linear_layers(model: PreTrainedModel, modality: Modality = IMAGE) -> str:
    """A regular expression for the names of all linear layers of the decoder and the connector; the head is not one."""
    part = _parts(model, modality)
    left_out = (_tower(modality), "embedding", "head")
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part(module.weight) not in left_out
    }
    short = "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in layers}))
    matched = {name for name, _ in model.named_modules() if re.fullmatch(short, name)}
    return short if matched == layers else "|".join(sorted(map(re.escape, layers)))


def _tower(modality: Modality) -> str:
    return "audio tower" if modality is AUDIO else "vision tower"


def _parts(model: PreTrainedModel, modality: Modality) -> Callable[[Tensor], str]:
    """The name of the part that a parameter belongs to."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    encoder = model.get_encoder(modality=modality.name)  # the model itself where it knows of no tower
    inside = _ids(encoder) if encoder is not model else set()
    decoder = _ids(model.get_decoder())
    embedding, head = _ids(model.get_input_embeddings()), _ids(model.get_output_embeddings())

    def part(parameter: Tensor) -> str:
        key, name = id(parameter), names[id(parameter)]
        if key in embedding:
            return "embedding"
        if key in head:
            return "head"
        if key in inside and "merger" not in name:  # Qwen's connector is a part of its tower
            return _tower(modality)
        if key in decoder:
            layer = _DECODER_LAYER.search(name)
            return f"decoder layer {layer[1]}" if layer else "decoder, other"
        return "connector"

    return part


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}
