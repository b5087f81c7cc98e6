"""What crosses processes when gradients are steered, by torch.distributed and accelerate.

* DDP averages gradients in hooks of the first backward pass of a step and is silent about others, so every pass runs
  without hooks, and the gradients are averaged once at the end of the step.
* FSDP2 reduces in every backward pass, into shards that can be kept apart, but defers that (and would mix them) where
  accumulation turns its reduction off; where they are kept apart it is turned on again here.
* FSDP2 gathers weights and reduces gradients in every pass of a layer, so all processes run the same passes: what a
  micro-batch runs follows from the rows of all of them (`on_any_process`).
* DeepSpeed steps inside `backward`: there is one pass, and no place to combine gradients, which `VGSConfig` says at
  start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError


def allow_fsdp_on_cpu(state: PartialState) -> None:
    """Before the accelerator is made: let FSDP run on CPUs with gloo, as torch does.

    accelerate 1.15 turns FSDP on for the device types it lists and silently runs DDP on CPUs. It asks this one field.
    """
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU


def use_one_gpu(args: Any) -> None:
    """Of a `TrainingArguments` without a launcher: train on the first GPU, where another one is the teacher's.

    transformers would run the student on all that are visible by `DataParallel`, which the loss does not go through.

    Raises:
        InputError: several GPUs are visible to the one process, and no other is the teacher's.
    """
    if args.n_gpu < 2:
        return
    if args.teacher_device is None:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process, which trains on one; start a process for each with "
            f"`accelerate launch --num_processes {args.n_gpu} -m vgs_distill train ...`, give another one to the "
            "teacher with teacher_device='cuda:1', or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    args._n_gpu = 1


@contextmanager
def several_backward_passes(model: nn.Module, apart: bool) -> Iterator[None]:
    """Around the passes of a micro-batch; `apart`: the gradients of its backward passes are not to be added up."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    if apart and isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)  # accelerate sets its own value again after the micro-batch
    yield


def is_replicated(model: nn.Module) -> bool:
    """Whether every process holds whole gradients of its own part of the batch."""
    return isinstance(model, DistributedDataParallel)


def average_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Mean over all processes, in place. A gradient missing here may exist elsewhere, so it takes part as zero."""
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    pending = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in whole]
    for work, gradient in zip(pending, whole, strict=True):
        work.wait()
        gradient.div_(torch.distributed.get_world_size())
    return list(whole)


def average_grad(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter the mean over all processes of its `.grad`."""
    found = average_gradients(parameters, [parameter.grad for parameter in parameters])
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def process_count() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if _is_distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def on_any_process(flags: Sequence[Tensor], alone: bool = False) -> list[bool]:  # () each
    """Which of the flags hold on any process: what all of them run follows from it, or FSDP2 would wait for ever.

    `alone`: do not ask the others. One wait for the device brings all of them.
    """
    together = torch.stack(list(flags)).to(torch.int32)
    if _is_distributed() and not alone:
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
