"""Checks of arguments that the public functions share. Each ends in one sentence: what is wrong and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .stream_kl.transform import LogitTransform
from .types import LMHead, RatioGuard

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return value


def check_finite(name: str, value: float) -> float:
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def check_fraction(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 (off) and below 1, got {value}")
    return value


def checked_transform(
    vocab_size: int,
    temperature: float,
    student: tuple[float, float | None],  # scale, soft cap
    teacher: tuple[float, float | None],
    ratio_guard: RatioGuard | None = None,
    teacher_smoothing: float = 0.0,
) -> LogitTransform:
    """The transform of numbers that are checked."""
    check_positive("temperature", temperature)
    scales, caps = [], []
    for name, (scale, softcap) in (("student", student), ("teacher", teacher)):
        scales.append(check_finite(f"the logit scale of the {name}", scale))
        caps.append(0.0 if softcap is None else check_positive(f"the soft cap of the {name}", softcap))
    bound, floor = 0.0, 0.0
    if ratio_guard is not None:
        bound = 0.0 if ratio_guard.bound is None else check_positive("the bound of ratio_guard", ratio_guard.bound)
        floor = check_fraction("the floor of ratio_guard", ratio_guard.floor)
    smoothing = check_fraction("teacher_smoothing", teacher_smoothing)
    return LogitTransform(vocab_size, temperature, scales[0], scales[1], caps[0], caps[1], bound, floor, smoothing)


def transform_of_heads(
    vocab_size: int,
    temperature: float,
    student: LMHead,
    teacher: LMHead,
    ratio_guard: RatioGuard | None,
    teacher_smoothing: float,
) -> LogitTransform:
    of_student, of_teacher = ((head.logit_scale, head.softcap) for head in (student, teacher))
    return checked_transform(vocab_size, temperature, of_student, of_teacher, ratio_guard, teacher_smoothing)


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, leading: bool = False) -> None:
    """Shapes (of all but the last dimension if `leading`), dtypes and devices agree."""
    stop = -1 if leading else None
    for what, a, b in (
        ("leading shape" if leading else "shape", tuple(tensor.shape[:stop]), tuple(other.shape[:stop])),
        ("dtype", tensor.dtype, other.dtype),
        ("device", tensor.device, other.device),
    ):
        if a != b:
            raise ValueError(f"{name} has {what} {a}, but {other_name} has {b}; they must agree")


def check_logits(streams: dict[str, Tensor]) -> None:
    """Leading shapes, dtypes and devices of the logits agree, and the dtype is one that the kernels take."""
    (first_name, first), *rest = streams.items()
    check_dtype(first_name, first)
    if first.dim() < 1:
        raise ValueError(f"{first_name} must have a vocabulary dimension, got a scalar")
    for name, tensor in rest:
        check_like(name, tensor, first_name, first, leading=True)


def check_hidden(name: str, hidden: Tensor, head: LMHead, like: Tensor) -> None:
    """Hidden states, (tokens, width), and their head fit each other and `like`, the student's hidden states."""
    if hidden.dim() != 2:
        raise ValueError(
            f"{name}_hidden must have shape (tokens, width), got {tuple(hidden.shape)}; "
            "flatten batch and sequence first, for example with hidden.flatten(0, 1)"
        )
    if hidden.shape[0] != like.shape[0]:
        raise ValueError(f"{name}_hidden has {hidden.shape[0]} tokens, but student_hidden has {like.shape[0]}")
    if not isinstance(head, LMHead):
        raise ValueError(f"{name}_head must be an LMHead(weight, bias, ...), got {type(head).__name__}")
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}_head.weight must have shape (vocab, {hidden.shape[1]}) to fit {name}_hidden, "
            f"got {tuple(head.weight.shape)}"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{name}_head.bias must have shape ({head.weight.shape[0]},), got {tuple(head.bias.shape)}")
    for what, tensor in ((f"{name}_hidden", hidden), (f"{name}_head.weight", head.weight)):
        if tensor.dtype != like.dtype:
            raise ValueError(f"{what} is {tensor.dtype}, but student_hidden is {like.dtype}; convert one of them")
        if tensor.device != like.device:
            raise ValueError(f"{what} is on {tensor.device}, but student_hidden is on {like.device}; move one of them")
    check_dtype(f"{name}_hidden", hidden)


def check_vector(name: str, tensor: Tensor, like: Tensor) -> None:
    """One entry per token of `like`, the student's hidden states, on its device."""
    if tuple(tensor.shape) != (like.shape[0],):
        raise ValueError(f"{name} must have shape ({like.shape[0]},), got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but student_hidden is on {like.device}; move it there")


def resolve_vocab_size(sizes: dict[str, int], vocab_size: int | None) -> int:
    """The number of real tokens; `sizes` are the (possibly padded) vocabulary sizes of the streams or heads."""
    smallest = min(sizes.values())
    listing = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if vocab_size is None:
        if smallest != max(sizes.values()):
            raise ValueError(
                f"the vocabularies differ in size ({listing}): if the tokens are the same and the rest is padding, "
                "pass vocab_size=<number of real tokens>"
            )
        vocab_size = smallest
    if isinstance(vocab_size, bool | float):
        raise ValueError(f"vocab_size must be a whole number, got {vocab_size!r}")
    if not 0 < vocab_size <= smallest:
        raise ValueError(f"vocab_size must be between 1 and the smallest vocabulary, got {vocab_size} ({listing})")
    return vocab_size


def as_rows(logits: Tensor) -> Tensor:
    """View as (tokens, vocab) with unit stride along the vocabulary; copies only where no such view exists."""
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
