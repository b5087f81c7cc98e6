"""Takes a transformers model apart: its backbone, and its language-model head as the kernels want it."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from vgs_kernels import LMHead


def backbone(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model up to its last hidden state; adapters live inside it, `PeftModel` only wraps it."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return whole.base_model


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
