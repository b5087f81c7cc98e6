"""Sizes of a model from its config alone: parameters by part, and what its decoder keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText, PretrainedConfig

from ..inputs.modalities import Modality

_TRACED = (2, 64)  # rows and tokens: what is kept grows in proportion to both
_SCORES = "transformers.integrations.sdpa_attention.use_gqa_in_sdpa"


@dataclass(frozen=True)
class ModelSize:
    """Of one model; bytes are those of its own dtype, counts are parameters."""

    parameters: int
    trained: int
    bytes: int
    trained_bytes: int
    largest_layer: int  # bytes of the largest layer of its decoder
    outside_layers: int  # bytes
    decoder: int  # parameters of matrix products that a token of text passes through, the head left out
    tower: int  # the same of a patch
    head: int
    width: int
    vocabulary: int
    inner: int  # of the feed-forward
    layers: int
    attention: int  # width of all heads together
    cached: int  # entries that a token leaves in the cache of keys and values
    kept: float  # bytes that one token leaves in the decoder for its backward pass
    kept_by_patch: float  # the same of a patch in the tower, if the tower is trained


def model_size(
    config: PretrainedConfig,
    dtype: torch.dtype,
    modality: Modality,
    *,
    adapter: Callable[[Any], Any] = lambda model: None,
    autocast: torch.dtype | None = None,
) -> ModelSize:
    """Read from a model that has shapes and no weights. `adapter`: peft's config of the LoRA to train, if any."""
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    whole.tie_weights()  # which a model on no device is not
    if (lora := adapter(whole)) is not None:
        whole = get_peft_model(whole, lora)
    model: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    text, vision = config.get_text_config(), getattr(config, modality.tower, None)
    decoder, encoder = model.get_decoder(), model.get_encoder(modality=modality.name)
    tower = [] if encoder is model else list(encoder.parameters())
    head = model.get_output_embeddings().weight
    layers = [_bytes(layer.parameters()) for layer in decoder.layers]
    parameters = list(whole.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        parameters=_count(parameters),
        trained=_count(trained),
        bytes=_bytes(parameters),
        trained_bytes=_bytes(trained),
        largest_layer=max(layers),
        outside_layers=_bytes(parameters) - sum(layers),
        decoder=_count(parameter for layer in decoder.layers for parameter in layer.parameters()),
        tower=_count(tower),
        head=head.numel(),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        inner=text.intermediate_size,
        layers=len(layers),
        attention=heads * head_width,
        cached=2 * len(layers) * (getattr(text, "num_key_value_heads", None) or heads) * head_width,
        kept=_kept(decoder, text.hidden_size, dtype, autocast),
        kept_by_patch=_kept_by_patch(vision, autocast or dtype) if any(p.requires_grad for p in tower) else 0.0,
    )


def _kept(decoder: nn.Module, width: int, dtype: torch.dtype, autocast: torch.dtype | None) -> float:
    """Bytes a token, counted in a forward pass over tensors without memory."""
    parameters = {tensor.untyped_storage()._cdata for tensor in [*decoder.parameters(), *decoder.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    inputs = torch.empty(*_TRACED, width, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.ones(_TRACED[0], 1, _TRACED[1], _TRACED[1], dtype=torch.bool, device="meta")
    decoder.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _as_trained(autocast):
        decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()) / (_TRACED[0] * _TRACED[1])


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep: inputs, output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query[..., 0].float().contiguous())
        return output


class _Autocast(TorchFunctionMode):
    """What autocast does to the products, which it does not do to tensors without memory; weights are cast once."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            # A cast weight is kept once for all tokens: a few of them would be charged with it here.
            parts: Any = (part if part is None else part.to(self._dtype) for part in args)
            inputs, weight, *bias = parts
            return _Product.apply(inputs, weight.detach(), *bias)
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inputs)
        return F.linear(inputs, weight, bias)


@contextmanager
def _as_trained(autocast: torch.dtype | None) -> Iterator[None]:
    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if autocast is not None:
            query, key, value = (part.to(autocast) for part in (query, key, value))
        return _Attention.apply(query, key, value)

    # Batches are padded, and with a mask the heads of keys and values are repeated.
    with patch("torch.nn.functional.scaled_dot_product_attention", attention), patch(_SCORES, lambda *args: False):
        if autocast is None:
            yield
        else:
            with _Autocast(autocast):
                yield


def _kept_by_patch(vision: Any, dtype: torch.dtype) -> float:
    """Bytes a patch, by the form that towers have: two norms, queries, keys and values, attention, two products."""
    width = vision.hidden_size
    inner = getattr(vision, "intermediate_size", 4 * width)
    layers = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 0)
    return float(layers * (11 * width + 2 * inner) * dtype.itemsize)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in parameters)
