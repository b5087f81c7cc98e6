"""Student, teacher and processor from their names: cheap checks of all three first, weights afterwards.

A name may be that of an adapter: config and weights are then those of the model it belongs to, with the adapter beside.

The command line and `VGSTrainer` load through here alone: weights are read from safetensors only, and code that a
repository ships runs only where `trust_remote_code` says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import (
    find_adapter_config_file,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_liger_kernel_available,
)
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..config import OFFLOAD, VGSConfig
from ..errors import InputError, one_sentence
from ..inputs.families import placeholder_ids
from ..inputs.modalities import Modality
from .modules import linear_layers
from .sampling import prepare_for_sampling
from .weights import with_adapter

_PROBE = "What is in the picture? 1 + 1 = 2, naïve façade"


@dataclass(frozen=True)
class ModelSource:
    """Where one model comes from and how it is loaded; or a model that is there already."""

    role: str  # for messages: student or teacher
    name: str
    revision: str | None
    trust_remote_code: bool
    options: dict[str, Any]  # further arguments of from_pretrained
    model: PreTrainedModel | None = None

    @property
    def hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def base(self) -> ModelSource | None:
        """The model that an adapter belongs to; None where the name is a model's own."""
        if self.model is not None or (found := find_adapter_config_file(self.name, revision=self.revision)) is None:
            return None
        try:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
            name, revision = settings["base_model_name_or_path"], settings.get("revision")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read the adapter {self.name!r}: {one_sentence(error)}") from error
        if not name:
            raise InputError(f"the adapter {self.name!r} does not name its model (base_model_name_or_path)")
        return replace(self, role="adapter's base", name=name, revision=revision)

    def check(self, modality: Modality | None = None) -> PretrainedConfig:
        """Its config; InputError unless it has weights in safetensors and names a placeholder of the modality."""
        if self.model is not None:
            return self.model.config
        if not Path(self.name).exists() and self.name.startswith((".", "/", "~")):
            raise InputError(f"there is no {self.role} model at {self.name!r}; give a folder or a name of the hub")
        if self.base is not None:
            self._check_weights()
            return self.base.check(modality)
        config: PretrainedConfig = self._read(AutoConfig)
        if not config.architectures:
            raise InputError(f"the config of the {self.role} {self.name!r} names no architecture; save it again")
        try:
            if modality is not None:
                placeholder_ids(config, modality=modality)
        except ValueError as error:
            raise InputError(f"the {self.role} {self.name!r} cannot be used: {error}") from None
        self._check_weights()
        return config

    def _check_weights(self) -> None:
        folder = Path(self.name)
        if folder.is_dir() and not list(folder.glob("*.safetensors")):
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f"pickled weights ({pickled[0]}), which are never loaded" if pickled else "no weights"
            raise InputError(
                f"the {self.role} {self.name!r} holds {found}; save it with save_pretrained, which writes safetensors"
            )

    def processor(self) -> ProcessorMixin:
        """The processor, which pads on the left as generation needs."""
        processor = self._beside(AutoProcessor, padding_side="left", truncation_side="left")
        if not isinstance(processor, ProcessorMixin):
            raise InputError(f"the {self.role} {self.name!r} has a tokenizer but no processor; save that beside it")
        return processor

    def processor_to_sample(self, config: PretrainedConfig, own: Any = None) -> Any:
        """The processor, or the one a user brings, with all that sampling needs; `config` is the model's."""
        processor = self.processor() if own is None else own
        generation = None if self.model is None else self.model.generation_config
        if self.model is None:
            with suppress(InputError):  # many models have none
                generation = self._beside(GenerationConfig)
        prepare_for_sampling(processor, config, generation)
        return processor

    def tokenizer(self) -> Any:
        return self._beside(AutoTokenizer)

    def load(self, device: torch.device | None = None, **more: Any) -> PreTrainedModel:
        """The model with its weights, on `device` or where TRL puts it; an adapter works inside its layers.

        `more` goes to from_pretrained.
        """
        if self.model is not None:
            return self.model
        if self.base is None:
            return self._load(device, more)
        model: Any = with_adapter(self.base.load(device, **more), self.name, self.revision).get_base_model()
        return model

    def load_merged(self) -> PreTrainedModel:
        """The model with its adapter added to its weights, as one that needs no adapter."""
        assert self.base is not None
        return with_adapter(self.base.load(torch.device("cpu")), self.name, self.revision).merge_and_unload()

    def _load(self, device: torch.device | None, more: dict[str, Any]) -> PreTrainedModel:
        place: dict[str, Any] = {} if device is None else {"device_map": device}
        if device is None and PartialState().num_processes > 1:
            place = {"device_map": None}  # by default TRL spreads a model over all GPUs, which are other processes'
        options = {**self.hub, **place, **self.options, **more, "use_safetensors": True}
        try:
            with nullcontext() if self.role == "student" else _weights_on_every_process():
                return create_model_from_path(self.name, **options)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the {self.role} {self.name!r}: {one_sentence(error)}") from error

    def _beside(self, kind: Any, **options: Any) -> Any:
        """Of an adapter its own, where it has one, or that of its model."""
        try:
            return self._read(kind, **options)
        except InputError:
            if self.base is None:
                raise
            return self.base._beside(kind, **options)

    def _read(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.name, **self.hub, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"the {self.role} {self.name!r} ships code of its own; read it, then pass trust_remote_code=true"
                ) from error
            raise InputError(f"cannot read the {self.role} {self.name!r}: {one_sentence(error)}") from error


@contextmanager
def _weights_on_every_process() -> Iterator[None]:
    """transformers gives the first process alone real weights where accelerate hands them on; it does so for the
    student, and leaves a teacher of nothing on the others."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    asked = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if asked is not None:
            os.environ[name] = asked


def student_source(model: str | PreTrainedModel, settings: Any, arguments: ModelConfig | None = None) -> ModelSource:
    """The student. `settings` hold trust_remote_code and, of a run, model_init_kwargs, which win over `arguments`."""
    options = _shared_options(arguments)
    if arguments is not None:
        options["revision"] = arguments.model_revision
        if (quantization := get_quantization_config(arguments)) is not None:
            options["quantization_config"] = quantization
    return _source("student", model, settings, options | (getattr(settings, "model_init_kwargs", None) or {}))


def teacher_source(model: str | PreTrainedModel, settings: Any, arguments: ModelConfig | None = None) -> ModelSource:
    """The teacher: dtype and attention of the student, but in a run bf16 where it gets to a GPU that has it. What
    teacher_model_init_kwargs of `settings` say wins.
    """
    options = _shared_options(arguments) | {"revision": settings.teacher_model_revision}
    if isinstance(settings, VGSConfig):
        where = settings.teacher_device
        if where is not None:  # not to the student's device first, where it may not fit
            options["device_map"] = "cpu" if where == OFFLOAD else where
        device = settings.device if where in (None, OFFLOAD) else torch.device(where)
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            options["dtype"] = torch.bfloat16
    return _source("teacher", model, settings, options | (getattr(settings, "teacher_model_init_kwargs", None) or {}))


def _shared_options(arguments: ModelConfig | None) -> dict[str, Any]:
    """What the command line tells from_pretrained of student and teacher alike."""
    if arguments is None:
        return {}
    return {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}


def _source(role: str, model: str | PreTrainedModel, settings: Any, options: dict[str, Any]) -> ModelSource:
    trust, revision = options.pop("trust_remote_code", settings.trust_remote_code), options.pop("revision", None)
    if isinstance(model, str):
        return ModelSource(role, model, revision, trust, options)
    return ModelSource(role, str(model.config.name_or_path), revision, trust, options, model)


def adapter_config(arguments: ModelConfig, student: PreTrainedModel, modality: Modality) -> Any:
    """peft's config of the LoRA asked for, if any: by default in all linear layers of the decoder and the connector."""
    config: Any = get_peft_config(arguments)
    if config is not None and config.target_modules is None and not arguments.lora_target_parameters:
        config.target_modules = linear_layers(student, modality)
    return config


def check_installed(attn_implementation: str | None, use_liger_kernel: bool) -> None:
    """InputError if an optional library was asked for and is not there."""
    for name, present in (
        ("flash_attention_2", is_flash_attn_2_available),
        ("flash_attention_3", is_flash_attn_3_available),
    ):
        if attn_implementation == name and not present():
            raise InputError(
                f"attn_implementation={name!r} needs a GPU and the flash-attn package, which are not here; "
                "`pip install 'vgs-kernels[flash]'`, or use 'sdpa'"
            )
    if use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs liger-kernel; `pip install liger-kernel`, or leave it off")


def check_no_adapter(student: ModelSource) -> None:
    """InputError if the student is an adapter: one trained on top of it would belong to a model that no file holds."""
    if student.base is not None:
        raise InputError(
            f"the student {student.name!r} is an adapter, and what is trained on it would not name it; merge it first: "
            f"vgs export {student.name} --merge --output MODEL"
        )


def check_tokenizers(student: ProcessorMixin, teacher: ModelSource) -> None:
    """InputError unless the teacher reads and writes the same tokens: it judges the student's token by token."""
    ours: Any = student.tokenizer
    theirs = teacher.tokenizer()
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    if vocabulary != other:
        different = sorted(dict(vocabulary.items() ^ other.items()))
        raise InputError(
            f"student and teacher have different vocabularies ({len(vocabulary)} and {len(other)} tokens, first "
            f"difference {different[0]!r}); the teacher judges token by token, so choose one of the student's family"
        )
    if ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
        raise InputError(
            "the tokenizers of student and teacher share a vocabulary but split text differently; the teacher judges "
            "token by token, so choose one of the student's family"
        )
