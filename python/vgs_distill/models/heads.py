"""The backbone of a transformers model, in adapters or not. Its head: `vgs_kernels.language_head`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch._functorch.config
from torch import nn
from transformers import PreTrainedModel

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


def without_compile_wrapper(model: nn.Module) -> nn.Module:
    """The model inside accelerate's `torch.compile` wrapper, which would trace the loss: it runs in the forward."""
    return getattr(model, "_orig_mod", model)


def compile_backbone(model: PreTrainedModel | PeftModel, backend: str | None, mode: str | None) -> None:
    """Compile the backbone in place, which keeps the names of its parameters."""
    torch._functorch.config.donated_buffer = False  # exact steering runs back through one graph twice
    backbone(model).compile(backend=backend or "inductor", mode=mode)
