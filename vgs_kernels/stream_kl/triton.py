"""Triton backend of `stream_kl`, for CUDA and ROCm: the two functions of `stream_kl/reference.py`.

`divergences` reads every stream once, once more with a guard, and the teachers once before where they are smoothed.
`logit_gradients` is a second look, in place where the caller wants it. fp32, bf16 and fp16 logits, fp32 inside; fp64
belongs to the reference backend. The kernels are in `triton_divergences.py` and `triton_gradients.py`.

Legend, inside kernels:
    p q r n         streams: student, teacher, masked teacher, masked student ("n": no image); t: what THIRD compares p
                    with, r or the visual target q*
    P Q R N         their pointers; suffix _s: row stride in elements, _w: width of an output
    z               transformed logits, softcap(scale * x) / temperature
    m s             running maximum of z, running sum of exp(z - m)
    zp zq ...       z of a stream; ap = zp - mp; ep = exp(ap)
    c_q c_r c_n     anchors: z of a stream where p has its maximum, 0 where that is not finite
    uq ur un ut     z - anchor; ut = uq + (un - ur) for the visual target; mt is relative to the anchors as well
    self            sum of ep * ap
    pq pt nr qr     a pair of streams: the sum of ep * (ap - uq), ep * (ap - ut), en * (un - ur), eq * (uq - ur)
    h_pq ...        hole: largest z of the first stream where the second is -inf; mass there makes the pair infinite
    tile            [LOADS, LANES, VECTOR] consecutive columns; reductions over the first and last axis stay in a thread

Per-thread accumulators are merged once, when the row (or the program's part of it) ends: a row has no barrier.

Determinism and races: every program writes only its own row's results, or its own line of the workspace, and nobody
reads what another program of the same launch writes. There are no atomics; the second stage sums in a fixed order.
In `logit_gradients` each element is loaded by the program that overwrites it, before it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_config as config
from .reference import NORMALIZER, STATISTICS, VALUES, Streams, teacher_normalizers
from .transform import LogitTransform
from .triton_divergences import WORKSPACE_STATES, divergences_kernel, merge_kernel
from .triton_gradients import gradients_kernel
from .triton_tiles import PLAIN_FORM, SCALED_FORM, SOFTCAP_FORM

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _form(scale: float, softcap: float, temperature: float) -> tuple[int, float, float]:
    """(form, multiplier, cap) of `_transform`; work that would change nothing is left out when compiling."""
    if softcap:
        return SOFTCAP_FORM, scale / softcap, softcap / temperature
    multiplier = scale / temperature
    return (PLAIN_FORM if multiplier == 1.0 else SCALED_FORM), multiplier, 0.0


def _kind(streams: Streams) -> int:
    return sum(stream is not None for stream in streams) - 2


def _settings(
    streams: Streams, transform: LogitTransform, device: config.Device
) -> tuple[tuple[float, ...], dict[str, int]]:
    """The kernels' trailing scalars and the constants that depend on the transform."""
    student_form, *of_student = _form(transform.student_scale, transform.student_softcap, transform.temperature)
    teacher_form, *of_teacher = _form(transform.teacher_scale, transform.teacher_softcap, transform.temperature)
    bound = transform.ratio_bound or math.inf
    log_floor = math.log(transform.ratio_floor) if transform.ratio_floor else -math.inf
    share = transform.teacher_smoothing / transform.vocab_size
    constants = {
        "KIND": _kind(streams),
        "GUARDED": int(transform.guarded and streams.masked_student is not None),
        "STUDENT_FORM": student_form,
        "TEACHER_FORM": teacher_form,
        "SMOOTHED": int(transform.teacher_smoothing > 0),
        "PTX": int(device.heuristics is config.NVIDIA),
    }
    return (*of_student, *of_teacher, bound, log_floor, share), constants


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _check(logits: tuple[Tensor | None, ...]) -> None:
    for tensor in logits:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"the Triton kernels take float32, bfloat16 and float16 logits, not {tensor.dtype}; "
                'use backend="reference" for it'
            )
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"logits need unit stride along the vocabulary, got strides {tensor.stride()}")


def _aligned(tensors: tuple[Tensor | None, ...], vector: int) -> bool:
    """Whether every row of every tensor starts at a multiple of `vector` elements, or of a full-width load."""
    for tensor in tensors:
        if tensor is not None:
            size = tensor.element_size()
            needed = min(vector * size, config.LOAD_BYTES)
            if tensor.data_ptr() % needed or tensor.stride(0) * size % needed:
                return False
    return True


def _tile(shape: config.Geometry, *columns: int) -> dict[str, int]:
    """The constants of a tile. TAIL keeps loads wide where rows end, when all rows end at whole vectors."""
    even = all(count % shape.vector == 0 for count in columns)
    return {
        "TAIL": shape.vector if even else 1, "LOADS": shape.loads, "LANES": shape.lanes, "VECTOR": shape.vector,
    }  # fmt: skip


_tuned_warps: dict[tuple[Any, ...], int] = {}


def _warps(launch: Callable[[int], None], key: tuple[Any, ...], device: torch.device) -> int | None:
    """The measured best number of warps when autotuning is asked for, else None. Never while a graph is captured."""
    if device.type == "cpu" or not config.autotune_requested() or torch.cuda.is_current_stream_capturing():
        return None
    if key not in _tuned_warps:
        from triton.testing import do_bench  # imports much that nothing else here needs

        timings = {warps: do_bench(lambda w=warps: launch(w)) for warps in config.CANDIDATE_WARPS}
        _tuned_warps[key] = min(timings, key=lambda warps: timings[warps])
    return _tuned_warps[key]


def divergences(
    streams: Streams,
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """`divergences` of `stream_kl/reference.py`: values (tokens, 5) and statistics (tokens, 15), float32.

    Raises:
        ValueError: float64 logits, or logits without unit stride along the vocabulary.
    """
    _check(streams)
    student = streams.student
    tokens, vocab = student.shape[0], transform.vocab_size
    values = student.new_empty((tokens, VALUES), dtype=torch.float32)
    statistics = student.new_empty((tokens, STATISTICS), dtype=torch.float32)
    if tokens == 0:
        return values, statistics
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    if transform.teacher_smoothing:
        statistics[:, NORMALIZER:] = teacher_normalizers(divergences, streams, transform, token_weights)
    device = config.describe_device(student.device)
    scalars, constants = _settings(streams, transform, device)
    vector = config.LOAD_BYTES // student.element_size()

    def launch(warps: int | None, guarded: int = 0) -> None:
        shape = config.geometry(device, student.element_size(), warps, aligned=_aligned(streams, vector))
        splits, tiles = config.split_row(device, shape, tokens, vocab)
        options = config.forward_options(device, shape, constants["KIND"])
        workspace = None
        if splits > 1:
            workspace = values.new_empty((tokens, splits, WORKSPACE_STATES))
        divergences_kernel[(tokens, splits)](
            *streams, token_weights, values, statistics, workspace, *map(_stride, streams), vocab, tiles, splits,
            *scalars, **(constants | {"GUARDED": guarded}), **_tile(shape, vocab), **options,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(tokens,)](
                workspace, token_weights, values, statistics, splits, KIND=constants["KIND"], GUARDED=guarded,
                SMOOTHED=constants["SMOOTHED"], PARTS=triton.next_power_of_2(splits), num_warps=1,
            )  # fmt: skip

    with torch.cuda.device_of(student):
        warps = _warps(launch, ("divergences", tokens, vocab, student.dtype, *constants.values()), student.device)
        launch(warps)
        if constants["GUARDED"]:  # again, with the normalisers of p0 and r known
            launch(warps, 1)
    return values, statistics


def logit_gradients(
    streams: Streams,
    values: Tensor,  # (tokens, 5), of `divergences`
    statistics: Tensor,  # (tokens, 15), of `divergences`
    coefficients: Tensor,  # (tokens, 3): d objective / d values
    transform: LogitTransform,
    *,
    out: Tensor,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 3): of a second objective of the same rows
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    column_squares: Tensor | None = None,  # (objectives, vocab), float32
) -> None:
    """`logit_gradients` of `stream_kl/reference.py`: writes the outputs, each of which may be an input.

    Raises:
        ValueError: float64 logits or outputs, or tensors without unit stride along the vocabulary.
    """
    outputs = (out, out_second)
    _check((*streams, *outputs))
    student = streams.student
    tokens, vocab = student.shape[0], transform.vocab_size
    if tokens == 0:
        if column_squares is not None:
            column_squares.zero_()
        return
    if second_coefficients is not None:
        second_coefficients = second_coefficients.contiguous()
    rows = (values.contiguous(), statistics.contiguous(), coefficients.contiguous(), second_coefficients)
    device = config.describe_device(student.device)
    scalars, constants = _settings(streams, transform, device)
    vector = config.LOAD_BYTES // student.element_size()
    widths = tuple(0 if tensor is None else tensor.shape[1] for tensor in outputs)

    def launch(warps: int | None, outputs: tuple[Tensor | None, ...] = outputs) -> None:
        shape = config.geometry(device, student.element_size(), warps, aligned=_aligned((*streams, *outputs), vector))
        splits, tiles = config.split_row(device, shape, tokens, max(widths))
        columns = (vocab, *(tensor.shape[1] for tensor in outputs if tensor is not None))
        gradients_kernel[(tokens, splits)](
            *streams, *rows, *outputs, *map(_stride, (*streams, *outputs)), *widths, vocab, max(widths), tiles,
            *scalars, **constants, **_tile(shape, *columns), num_warps=shape.warps,
        )  # fmt: skip

    def trial(warps: int) -> None:
        # Timing repeats the launch: into scratch, because outputs may be inputs.
        launch(warps, tuple(None if tensor is None else torch.empty_like(tensor) for tensor in outputs))

    with torch.cuda.device_of(student):
        key = ("gradients", tokens, max(widths), vocab, student.dtype, out.dtype, out_second is None,
               *constants.values())  # fmt: skip
        launch(_warps(trial, key, student.device))
    if column_squares is not None:
        # Read once more: a program has a part of a row, and columns would need atomics, whose order varies.
        written = [tensor[:, :vocab] for tensor in outputs if tensor is not None]
        for squares, tensor in zip(column_squares, written, strict=True):
            squares.copy_(torch.linalg.vector_norm(tensor, dim=0, dtype=torch.float32).square_())
