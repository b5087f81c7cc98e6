"""The registered PyTorch operators of `stream_kl` and their autograd formula.

`vgs_kernels::stream_kl` and `vgs_kernels::stream_kl_backward` wrap the two functions of a backend module, so that
`torch.compile`, fake tensors, autocast and `opcheck` see one op with one schema whichever backend runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from ..types import accumulation_dtype
from .reference import COEFFICIENTS, STATISTICS, VALUES, Streams
from .transform import LogitTransform


@torch.library.custom_op("vgs_kernels::stream_kl", mutates_args=())
def stream_kl(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor | None,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    vocab_size: int,
    temperature: Tensor,  # (), on the CPU
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    ratio_bound: float,
    ratio_floor: float,
    teacher_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values (tokens, 5) and statistics (tokens, 15) of `reference.divergences`; the student alone gets a gradient."""
    transform = LogitTransform(
        vocab_size, temperature.item(), student_scale, teacher_scale, student_softcap, teacher_softcap, ratio_bound,
        ratio_floor, teacher_smoothing,
    )  # fmt: skip
    kernels = backends.load("stream_kl", backend)
    return kernels.divergences(Streams(student, teacher, masked_teacher, masked_student), transform)


@stream_kl.register_fake
def _(student, *_args):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(student.dtype)
    tokens = student.shape[0]
    return student.new_empty((tokens, VALUES), dtype=dtype), student.new_empty((tokens, STATISTICS), dtype=dtype)


@torch.library.custom_op("vgs_kernels::stream_kl_backward", mutates_args=())
def stream_kl_backward(
    student: Tensor,
    teacher: Tensor,
    masked_teacher: Tensor | None,
    masked_student: Tensor | None,
    values: Tensor,  # (tokens, 5)
    statistics: Tensor,  # (tokens, 15)
    coefficients: Tensor,  # (tokens, 3)
    vocab_size: int,
    temperature: Tensor,  # (), on the CPU
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    ratio_bound: float,
    ratio_floor: float,
    teacher_smoothing: float,
    backend: str,
) -> Tensor:
    """The gradient of sum(coefficients * values[:, :3]) with respect to the student's logits."""
    transform = LogitTransform(
        vocab_size, temperature.item(), student_scale, teacher_scale, student_softcap, teacher_softcap, ratio_bound,
        ratio_floor, teacher_smoothing,
    )  # fmt: skip
    streams = Streams(student, teacher, masked_teacher, masked_student)
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    kernels = backends.load("stream_kl", backend)
    kernels.logit_gradients(streams, values, statistics, coefficients, transform, out=out)
    return out


@stream_kl_backward.register_fake
def _(student, *_args):  # type: ignore[no-untyped-def]
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@stream_kl_backward.register_vmap
def _(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """Several upstream gradients of one forward pass (`torch.autograd.grad(..., is_grads_batched=True)`), in turn."""
    batch = (
        [argument if dim is None else argument.select(dim, i) for argument, dim in zip(arguments, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    return torch.stack([stream_kl_backward(*one) for one in batch]), 0


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *streams, ctx.vocab_size, temperature = inputs[:6]
    ctx.settings = inputs[6:]
    values, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(*streams, values, statistics, temperature)


def _backward(ctx, grad_values: Tensor, _grad_statistics: Tensor):  # type: ignore[no-untyped-def]
    coefficients = grad_values[:, :COEFFICIENTS].contiguous()
    *tensors, temperature = ctx.saved_tensors
    gradient = stream_kl_backward(*tensors, coefficients, ctx.vocab_size, temperature, *ctx.settings)
    return gradient, *(None,) * (5 + len(ctx.settings))


stream_kl.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *_grads: Tensor):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "vgs_kernels: these divergences have no second derivative; call backward without create_graph=True, "
        "or write the loss with plain torch operations where you need one"
    )


stream_kl_backward.register_autograd(_no_double_backward)
