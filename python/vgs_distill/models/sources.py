"""Student, teacher and processor from their names: cheap checks of all three first, weights afterwards.

Weights are read from safetensors only, and code that a repository ships runs only where `trust_remote_code` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available
from trl import ModelConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..errors import InputError, one_sentence
from ..inputs.families import placeholder_ids
from ..inputs.modalities import IMAGE, Modality

_PROBE = "What is in the picture? 1 + 1 = 2, naïve façade"


@dataclass(frozen=True)
class ModelSource:
    """Where one model comes from and how it is loaded."""

    role: str  # for messages: student or teacher
    name: str
    revision: str | None
    trust_remote_code: bool
    options: dict[str, Any]  # further arguments of from_pretrained

    @property
    def hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def check(self, modality: Modality = IMAGE) -> PretrainedConfig:
        """Read its config; InputError unless it is a model that reads the modality, with safetensors weights."""
        if not Path(self.name).exists() and self.name.startswith((".", "/", "~")):
            raise InputError(f"there is no {self.role} model at {self.name!r}; give a folder or a name of the hub")
        config: PretrainedConfig = self._read(AutoConfig)
        if not config.architectures:
            raise InputError(f"the config of the {self.role} {self.name!r} names no architecture; save it again")
        try:
            placeholder_ids(config, modality=modality)
        except ValueError as error:
            raise InputError(f"the {self.role} {self.name!r} cannot be used: {error}") from None
        folder = Path(self.name)
        if folder.is_dir() and not list(folder.glob("*.safetensors")):
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f"pickled weights ({pickled[0]}), which are never loaded" if pickled else "no weights"
            raise InputError(
                f"the {self.role} {self.name!r} holds {found}; save it with save_pretrained, which writes safetensors"
            )
        return config

    def processor(self) -> ProcessorMixin:
        """The processor, which pads on the left as generation needs."""
        processor = self._read(AutoProcessor, padding_side="left", truncation_side="left")
        if not isinstance(processor, ProcessorMixin):
            raise InputError(f"the {self.role} {self.name!r} has a tokenizer but no processor; save that beside it")
        return processor

    def tokenizer(self) -> Any:
        return self._read(AutoTokenizer)

    def load(self, device: torch.device | None = None) -> PreTrainedModel:
        """The model with its weights, on `device` or where TRL puts it."""
        place: dict[str, Any] = {} if device is None else {"device_map": device}
        if device is None and PartialState().num_processes > 1:
            place = {"device_map": None}  # by default TRL spreads a model over all GPUs, which are other processes'
        try:
            return create_model_from_path(self.name, **self.hub, **place, use_safetensors=True, **self.options)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the {self.role} {self.name!r}: {one_sentence(error)}") from error

    def _read(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.name, **self.hub, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"the {self.role} {self.name!r} ships code of its own; read it, then pass trust_remote_code=true"
                ) from error
            raise InputError(f"cannot read the {self.role} {self.name!r}: {one_sentence(error)}") from error


def student_source(arguments: ModelConfig, settings: Any) -> ModelSource:
    """The student as TRL's `ModelConfig` describes it; `settings` holds trust_remote_code and model_init_kwargs."""
    options: dict[str, Any] = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    if (quantization := get_quantization_config(arguments)) is not None:
        options["quantization_config"] = quantization
    options |= getattr(settings, "model_init_kwargs", None) or {}
    assert arguments.model_name_or_path is not None
    return ModelSource(
        "student", arguments.model_name_or_path, arguments.model_revision, settings.trust_remote_code, options
    )


def teacher_source(arguments: ModelConfig, settings: Any) -> ModelSource:
    """The teacher: dtype and attention of the student, unless teacher_model_init_kwargs says otherwise."""
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    options |= getattr(settings, "teacher_model_init_kwargs", None) or {}
    name, revision = settings.teacher_model_name_or_path, settings.teacher_model_revision
    return ModelSource("teacher", name, revision, settings.trust_remote_code, options)


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
