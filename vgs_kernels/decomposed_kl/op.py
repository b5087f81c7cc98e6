"""The registered PyTorch operators of `decomposed_kl` and their autograd formula.

`vgs_kernels::divergences` and `vgs_kernels::divergences_backward` wrap the two functions of a backend module, so that
`torch.compile`, fake tensors, autocast and `opcheck` see one op with one schema whichever backend runs. Called by
`decomposed_kl/api.py` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from ..types import accumulation_dtype
from .old_types import LogitTransform
from .reference import STATISTICS, VALUES


@torch.library.custom_op("vgs_kernels::divergences", mutates_args=())
def divergences(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    decomposition: str,
    vocab_size: int,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    transform = LogitTransform(
        decomposition, vocab_size, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap
    )
    kernels = backends.load("decomposed_kl", backend)
    return kernels.divergences(student, teacher, masked_teacher, masked_student, transform)


@divergences.register_fake
def _(student, teacher, masked_teacher, masked_student, *_args):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(student.dtype)
    tokens = student.shape[0]
    return student.new_empty((tokens, VALUES), dtype=dtype), student.new_empty((tokens, STATISTICS), dtype=dtype)


@torch.library.custom_op("vgs_kernels::divergences_backward", mutates_args=())
def divergences_backward(
    student: Tensor,
    teacher: Tensor,
    masked_teacher: Tensor,
    masked_student: Tensor | None,
    values: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    decomposition: str,
    vocab_size: int,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    transform = LogitTransform(
        decomposition, vocab_size, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap
    )
    grad_student = torch.empty_like(student, memory_format=torch.contiguous_format)
    grad_masked = student.new_empty(0)
    if masked_student is not None:
        grad_masked = torch.empty_like(masked_student, memory_format=torch.contiguous_format)
    backends.load("decomposed_kl", backend).logit_gradients(
        student,
        teacher,
        masked_teacher,
        masked_student,
        values,
        statistics,
        coefficients,
        transform,
        out_student=grad_student,
        out_masked_student=grad_masked if masked_student is not None else None,
    )
    return grad_student, grad_masked


@divergences_backward.register_fake
def _(student, teacher, masked_teacher, masked_student, *_args):  # type: ignore[no-untyped-def]
    grad_student = torch.empty_like(student, memory_format=torch.contiguous_format)
    if masked_student is None:
        return grad_student, student.new_empty(0)
    return grad_student, torch.empty_like(masked_student, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    student, teacher, masked_teacher, masked_student, *settings = inputs
    values, statistics = output
    ctx.settings = settings
    ctx.has_masked_student = masked_student is not None
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(student, teacher, masked_teacher, masked_student, values, statistics)


def _backward(ctx, grad_values: Tensor, _grad_statistics: Tensor):  # type: ignore[no-untyped-def]
    grad_student, grad_masked = divergences_backward(*ctx.saved_tensors, grad_values.contiguous(), *ctx.settings)
    nothing = (None,) * len(ctx.settings)
    return grad_student, None, None, grad_masked if ctx.has_masked_student else None, *nothing


divergences.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *_grads: Tensor):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "vgs_kernels: decomposed_kl has no second derivative; call backward without create_graph=True, "
        "or write the loss with plain torch operations where you need one"
    )


divergences_backward.register_autograd(_no_double_backward)
