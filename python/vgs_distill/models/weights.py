"""The weights of a checkpoint or an adapter, into a model that is there.

`save_pretrained` names weights as the hub does, which in most families is not what the model calls its parameters, and
may split or join them. `from_pretrained` knows the way back.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from ..errors import InputError, one_sentence
from .heads import is_adapted

if TYPE_CHECKING:
    from peft import PeftModel


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Replace the weights of `model`, or of its adapters, by those that its `save_pretrained` wrote into `folder`.

    Raises:
        InputError: a weight is missing, is none of the model's or has another shape, or the files cannot be read.
    """
    try:
        wrong = _load_adapters(model, folder) if is_adapted(model) else _load_model(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load the weights in {str(folder)!r}: {one_sentence(error)}") from error
    for what, names in wrong.items():
        if names:
            raise InputError(
                f"the weights in {str(folder)!r} are not those of this model: {len(names)} {what}, first "
                f"{min(names)!r}; resume with the model that they were saved from"
            )


def with_adapter(model: PreTrainedModel, name: str, revision: str | None = None) -> PeftModel:
    """The model with the adapter of a folder, or of a name of the hub, beside its own weights.

    Raises:
        InputError: as `load_weights`, or it is no adapter that peft knows.
    """
    from peft import PeftConfig, get_peft_model

    try:
        file: Any = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, revision=revision)  # peft takes pickled ones
        config = PeftConfig.from_pretrained(name, revision=revision)
        wrapped: PeftModel = get_peft_model(model, config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot use the adapter {name!r}: {one_sentence(error)}") from error
    load_weights(wrapped, Path(file).parent)
    return wrapped


def _load_model(model: Any, folder: Path) -> dict[str, set[str]]:
    """Names of weights by what is wrong with them. Takes the memory of a second model, on the CPU."""
    kind: Any = type(model)
    read, found = kind.from_pretrained(
        folder,
        config=model.config,
        attn_implementation="eager",  # never run; others ask for a device or a dtype
        dtype=reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()}),
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
    )
    wrong = {
        "have another shape": {name for name, *_ in found["mismatched_keys"]},
        "are missing": found["missing_keys"],
        "are unknown": found["unexpected_keys"],
    }
    if not any(wrong.values()):
        model.load_state_dict(read.state_dict())
    return wrong


def _load_adapters(model: PeftModel, folder: Path) -> dict[str, set[str]]:
    wrong: dict[str, set[str]] = {"are missing": set(), "are unknown": set()}
    for name in list(model.peft_config):
        where = folder if name == "default" else folder / name  # as peft saves them
        found = model.load_adapter(str(where), name, is_trainable=name in model.active_adapters, torch_device="cpu")
        wrong["are missing"] |= set(found.missing_keys)
        wrong["are unknown"] |= set(found.unexpected_keys)
    return wrong
