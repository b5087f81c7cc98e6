"""Takes a transformers model apart: its backbone, and its language-model head as the kernels want it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from vgs_kernels import LMHead

from ..errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


def backbone(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model up to its last hidden state; adapters live inside it, `PeftModel` only wraps it."""
    return without_adapters(model).base_model


def is_adapted(model: Any) -> TypeGuard[PeftModel]:
    """Whether it is a `PeftModel`: that alone has `get_base_model`, and peft may be missing where there is none."""
    return hasattr(model, "get_base_model")


def without_adapters(model: Any) -> Any:
    """The transformers model, inside a `PeftModel` or not."""
    return model.get_base_model() if is_adapted(model) else model


def unwrapped(model: nn.Module) -> Any:
    """The model, adapters included, without the wrappers of DDP, DeepSpeed and torch.compile."""
    inside: Any = model
    while not hasattr(inside, "get_output_embeddings"):
        inside = getattr(inside, "_orig_mod", None) or inside.module
    return inside


@contextmanager
def head_passes_through(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes of the model return its last hidden states, (..., width), in the place of logits.

    The states leave by the output of the forward pass, wrapped or not: FSDP2 gathers weights for the backward pass in
    hooks on that output, and states caught by a hook on the head meet freed storage there. Their logits come from
    `linear_reverse_kl` and its kin, chunk by chunk.

    Args:
        model: A transformers model with a language-model head, in the wrapper of its launcher or not.

    Raises:
        InputError: The model scales or caps its logits behind the head, which would meet the hidden states.
    """
    whole = unwrapped(model)
    config = whole.config.get_text_config()
    if logit_scale(config) != 1.0 or getattr(config, "final_logit_softcapping", None) is not None:
        raise InputError(
            f"model type {whole.config.model_type!r} scales or caps its logits behind the head, so its hidden states "
            "cannot leave in their place; run its base model and take last_hidden_state"
        )
    head = whole.get_output_embeddings()
    before = head.__dict__.get("forward")  # accelerate puts one there where weights travel
    head.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def without_compile_wrapper(model: nn.Module) -> nn.Module:
    """The model inside accelerate's `torch.compile` wrapper, which would trace the loss: it runs in the forward."""
    return getattr(model, "_orig_mod", model)


def compile_backbone(model: PreTrainedModel | PeftModel, backend: str | None, mode: str | None) -> None:
    """Compile the backbone in place, which keeps the names of its parameters."""
    torch._functorch.config.donated_buffer = False  # exact steering runs back through one graph twice
    backbone(model).compile(backend=backend or "inductor", mode=mode)


def language_head(model: PreTrainedModel, like: Tensor) -> LMHead:
    """The head of `model` in the dtype of `like`, with the logit scale and soft cap of its family."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(head, "bias", None)
    return LMHead(
        _whole(head.weight).to(like.dtype),
        None if bias is None else _whole(bias).to(like.dtype),
        logit_scale=logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def logit_scale(config: PretrainedConfig) -> float:
    """The multiplier of the logits, under the name each family gives it; 1.0 where a family has none."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered once, so that the chunks of the loss do not gather it again each.

    The loss reads the head's weight without calling the head, so FSDP2's hooks may leave it sharded. Every process then
    forms the gradient of its own tokens only: it is a partial sum, averaged over processes as FSDP2 does. Without the
    placements, `full_tensor` would take it for the same on all processes and keep one process's share.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
