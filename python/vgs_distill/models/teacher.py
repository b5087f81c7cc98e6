"""The teacher of a run: checked against the student, and put where `teacher_device` and `teacher_sharding` say.

The head of the teacher always stays beside that of the student, or is gathered there, because the loss projects both
chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ..config import OFFLOAD, SHARD
from ..errors import InputError
from .heads import backbone, without_compile_wrapper


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator, where: str | None, sharding: str) -> Any:
    """Put the teacher on its device; where it stays with the student, whole or a shard on each process."""
    launcher = accelerator.distributed_type
    if where is not None:
        if launcher in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(
                f"teacher_device={where!r} does not go with FSDP or DeepSpeed, which place the teacher themselves; "
                "leave it out"
            )
        if accelerator.num_processes > 1 and torch.device("cpu" if where == OFFLOAD else where).index is not None:
            raise InputError(
                f"teacher_device={where!r} is one device, where each of {accelerator.num_processes} processes would "
                "put a teacher of its own; use teacher_sharding='shard', teacher_device='offload', or leave both out"
            )
        return _place_elsewhere(teacher, accelerator.device, where)
    if sharding == SHARD:
        if launcher == DistributedType.DEEPSPEED or accelerator.num_processes == 1:
            raise InputError(
                "teacher_sharding='shard' splits the teacher between several processes under DDP or FSDP2; leave it out"
            )
        return _shard(teacher, accelerator)
    if launcher == DistributedType.DEEPSPEED:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(teacher, accelerator)
    teacher.requires_grad_(False).eval()
    if launcher == DistributedType.FSDP:  # accelerate would leave it where it is
        whole: Any = teacher
        return whole.to(accelerator.device)
    return without_compile_wrapper(accelerator.prepare_model(teacher, evaluation_mode=True))


def _shard(teacher: PreTrainedModel, accelerator: Accelerator) -> Any:
    """Layer by layer, over the processes that the student is split between.

    What is outside of the layers is one group, the head in it, so that it may be tied. All of it is freed after a pass:
    the loss gathers the head when it needs it (`vgs_kernels.language_head`).
    """
    teacher.requires_grad_(False).eval()
    mesh: Any = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    layers = tuple(teacher._no_split_modules or ())
    for module in list(teacher.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(teacher, mesh=mesh, reshard_after_forward=True)


def _place_elsewhere(teacher: PreTrainedModel, device: torch.device, where: str) -> PreTrainedModel:
    teacher.requires_grad_(False).eval()
    head = teacher.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().to(device), requires_grad=False)  # no longer tied
    if where == OFFLOAD:
        cpu_offload(backbone(teacher), execution_device=device)
    else:
        backbone(teacher).to(where)
    return teacher
