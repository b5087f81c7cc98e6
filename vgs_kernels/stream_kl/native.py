"""Native backend of `stream_kl`: launches the compiled kernels of `csrc/cpu/stream_kl.cpp`.

Offers the interface of `reference.py`. The kernels write into tensors that this file allocates; rows are split over the
threads of `torch.set_num_threads`, and results do not depend on how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C as _registers_the_operators  # type: ignore[attr-defined]  # noqa: F401
from ..types import accumulation_dtype
from .reference import NORMALIZER, STATISTICS, VALUES, Streams, teacher_normalizers
from .transform import LogitTransform

_ops = torch.ops.vgs_kernels_native
DEVICES = ("cpu",)  # device types with kernels


def divergences(
    streams: Streams,
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,)
) -> tuple[Tensor, Tensor]:
    """`values` (tokens, 5) and `statistics` (tokens, 15), as in `reference.divergences`."""
    student = streams.student
    dtype = accumulation_dtype(student.dtype)
    values = student.new_empty((student.shape[0], VALUES), dtype=dtype)
    statistics = student.new_empty((student.shape[0], STATISTICS), dtype=dtype)
    if token_weights is not None:
        token_weights = token_weights.to(dtype).contiguous()
    statistics[:, NORMALIZER:] = (
        teacher_normalizers(divergences, streams, transform, token_weights) if transform.teacher_smoothing else 0.0
    )
    _ops.stream_divergences(*streams, token_weights, *transform, values, statistics)
    return values, statistics


def logit_gradients(
    streams: Streams,
    values: Tensor,  # (tokens, 5)
    statistics: Tensor,  # (tokens, 15)
    coefficients: Tensor,  # (tokens, 3)
    transform: LogitTransform,
    *,
    out: Tensor,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 3)
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    column_squares: Tensor | None = None,  # (objectives, vocab), float32
) -> None:
    """Write the logit gradients into the outputs, as `reference.logit_gradients` does."""
    _ops.stream_gradients(
        *streams,
        values.contiguous(),
        statistics.contiguous(),
        coefficients.to(values.dtype).contiguous(),
        None if second_coefficients is None else second_coefficients.to(values.dtype).contiguous(),
        *transform,
        out,
        out_second,
        column_squares,
    )


@torch.library.register_fake("vgs_kernels_native::stream_divergences")
@torch.library.register_fake("vgs_kernels_native::stream_gradients")
def _(*_args):  # type: ignore[no-untyped-def]
    return None
