"""The teacher of a run: checked against the student, and put where `VGSConfig.teacher_device` says.

The head of the teacher always stays beside that of the student, because the loss projects both chunk by chunk.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedType
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import OFFLOAD
from ..errors import InputError
from .heads import backbone, without_compile_wrapper


def shared_vocabulary(student: PretrainedConfig, teacher: PretrainedConfig, tokens: int) -> int:
    """How many entries of the vocabulary both models have. They may be padded differently beyond the real `tokens`.

    InputError where the vocabularies cannot be the same.
    """
    sizes = [config.get_text_config().vocab_size for config in (student, teacher)]
    if sizes[0] == sizes[1]:
        return sizes[0]
    if min(sizes) < tokens:
        raise InputError(
            f"the student has {sizes[0]} entries in its vocabulary and the teacher {sizes[1]}, but the tokenizer has "
            f"{tokens} tokens; the teacher judges token by token, so choose one of the student's family"
        )
    return min(sizes)


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator, where: str | None) -> Any:
    """Put the teacher on its device, and wrap it as the launcher asks where it stays with the student."""
    if where is None:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from trl.models import prepare_deepspeed

            return prepare_deepspeed(teacher, accelerator)
        return without_compile_wrapper(accelerator.prepare_model(teacher, evaluation_mode=True))
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise InputError(
            f"teacher_device={where!r} does not go with FSDP or DeepSpeed, which place the teacher themselves; leave "
            "it out"
        )
    teacher.requires_grad_(False).eval()
    head = teacher.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().to(accelerator.device), requires_grad=False)  # no longer tied
    if where == OFFLOAD:
        cpu_offload(backbone(teacher), execution_device=accelerator.device)
    else:
        backbone(teacher).to(where)
    return teacher
