"""Native backend of `decomposed_kl`: launches the compiled kernels of `csrc/*/decomposed_kl.*`.

Offers the interface of `reference.py`. The kernels write into tensors that this file allocates; rows are split over the
threads of `torch.set_num_threads`, and results do not depend on how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C as _registers_the_operators  # type: ignore[attr-defined]  # noqa: F401
from ..types import accumulation_dtype
from .old_types import DECOMPOSITIONS, LogitTransform
from .reference import STATISTICS, VALUES

_ops = torch.ops.vgs_kernels_native


def problem(device_type: str) -> str | None:
    """Why these kernels cannot run on a device type; None when they can."""
    if device_type == "cpu":
        return None
    return f"the compiled extension has no {device_type} kernels of decomposed_kl"


def divergences(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,)
) -> tuple[Tensor, Tensor]:
    """`values` (tokens, 5) and `statistics` (tokens, 13), as in `reference.divergences`."""
    dtype = accumulation_dtype(student.dtype)
    values = student.new_empty((student.shape[0], VALUES), dtype=dtype)
    statistics = student.new_empty((student.shape[0], STATISTICS), dtype=dtype)
    if token_weights is not None:
        token_weights = token_weights.to(dtype).contiguous()
    _ops.divergences(
        student, teacher, masked_teacher, masked_student, token_weights, *_settings(transform), values, statistics
    )
    return values, statistics


def logit_gradients(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    values: Tensor,  # (tokens, 5)
    statistics: Tensor,  # (tokens, 13)
    coefficients: Tensor,  # (tokens, 5)
    transform: LogitTransform,
    *,
    out_student: Tensor,  # (tokens, >= vocab)
    out_masked_student: Tensor | None = None,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 5)
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    row_gramian: Tensor | None = None,  # (tokens, 3)
    column_squares: Tensor | None = None,  # (outputs, vocab), float32
) -> None:
    """Write the logit gradients into the outputs, as `reference.logit_gradients` does."""
    gramian = None if row_gramian is None else row_gramian.new_empty(row_gramian.shape)
    _ops.logit_gradients(
        student,
        teacher,
        masked_teacher,
        masked_student,
        values.contiguous(),
        statistics.contiguous(),
        coefficients.to(values.dtype).contiguous(),
        None if second_coefficients is None else second_coefficients.to(values.dtype).contiguous(),
        *_settings(transform),
        out_student,
        out_masked_student,
        out_second,
        gramian,
        column_squares,
    )
    if row_gramian is not None and gramian is not None:
        row_gramian.copy_(gramian)


def _settings(transform: LogitTransform) -> tuple[int, int, float, float, float, float, float]:
    """The settings in the order of the schemas."""
    return (
        DECOMPOSITIONS.index(transform.decomposition),
        transform.vocab_size,
        transform.temperature,
        transform.student_scale,
        transform.teacher_scale,
        transform.student_softcap,
        transform.teacher_softcap,
    )


@torch.library.register_fake("vgs_kernels_native::divergences")
@torch.library.register_fake("vgs_kernels_native::logit_gradients")
def _(*_args):  # type: ignore[no-untyped-def]
    return None
