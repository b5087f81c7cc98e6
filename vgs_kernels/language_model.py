"""What a loss on hidden states takes from a language model, wrapped or not: its last hidden states and its head.

By the names that transformers gives things; the library itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .types import LMHead


def unwrapped_model(model: nn.Module) -> Any:
    """The model, adapters included, without the wrappers of DDP, DeepSpeed and torch.compile."""
    inside: Any = model
    while not hasattr(inside, "get_output_embeddings"):
        inside = getattr(inside, "_orig_mod", None) or inside.module
    return inside


@contextmanager
def head_passes_through(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes of the model return its last hidden states, (..., width), in the place of logits.

    The states leave by the output of the forward pass, wrapped or not: FSDP2 gathers weights for the backward pass in
    hooks on that output, and states caught by a hook on the head meet freed storage there. `linear_reverse_kl` and its
    kin take them with `language_head`.

    Args:
        model: A transformers model with a language-model head, in the wrapper of its launcher or not.

    Raises:
        ValueError: The model scales or caps its logits behind the head, which would meet the hidden states.
    """
    whole = unwrapped_model(model)
    if changes_logits(whole.config):
        raise ValueError(
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


def language_head(model: Any, like: Tensor) -> LMHead:
    """The head of a transformers model in the dtype of `like`, with the logit scale and soft cap of its family.

    A sharded weight is gathered (FSDP2), and its gradient averaged over processes as FSDP2 does.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(head, "bias", None)
    return LMHead(
        whole_parameter(head.weight).to(like.dtype),
        None if bias is None else whole_parameter(bias).to(like.dtype),
        logit_scale=logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def changes_logits(config: Any) -> bool:
    """Whether the model does anything to its logits behind the head."""
    text = config.get_text_config()
    return logit_scale(text) != 1.0 or getattr(text, "final_logit_softcapping", None) is not None


def logit_scale(config: Any) -> float:
    """The multiplier of the logits, under the name each family gives it; 1.0 where a family has none."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def whole_parameter(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered once, so that the chunks of the loss do not gather it again each.

    The loss reads the head's weight without calling the head, so FSDP2's hooks may leave it sharded. Every process then
    forms the gradient of its own tokens only: it is a partial sum, averaged over processes as FSDP2 does. Without the
    placements, `full_tensor` would take it for the same on all processes and keep one process's share.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
