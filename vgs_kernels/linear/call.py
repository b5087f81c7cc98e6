"""One linear call, from checked arguments to results: what both public functions of `api.py` share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from ..checks import (
    DTYPES,
    check_fraction,
    check_hidden,
    check_like,
    check_vector,
    resolve_vocab_size,
    transform_of_heads,
)
from ..stream_kl.reference import COEFFICIENTS
from ..types import LMHead, RatioGuard, TokenSteering, accumulation_dtype
from . import op
from .column_filter import HEAD_MULTIPLE
from .products import HALF_DTYPES


class Options(NamedTuple):
    """Arguments of the public functions that do not depend on the tensors."""

    temperature: float
    vocab_size: int | None
    teacher_smoothing: float
    accumulate_head_grad: bool
    gradient_filter: float | None
    max_chunk_bytes: int | None
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    backend: str | None
    token_steering: TokenSteering | None = None
    ratio_guard: RatioGuard | None = None


class Inputs(NamedTuple):
    """Hidden states and heads, cast as autocast would cast those of a linear layer, and checked."""

    student_hidden: Tensor
    student: LMHead
    teacher_hidden: Tensor
    teacher: LMHead
    masked_teacher_hidden: Tensor | None
    masked_student_hidden: Tensor | None
    given_head: LMHead  # the student's before autocast: gradients are added to its tensors


class Results(NamedTuple):
    """What the operator formed. Gradients have an entry per objective."""

    values: Tensor  # (tokens, 5)
    vis_factors: Tensor  # (tokens,)
    sampled: Tensor | None  # (tokens, 3)
    inputs: Inputs
    gradients: list[Tensor]  # hidden, weight, bias of the first objective, then of the second

    def differentiable(self, objective: int, value: Tensor) -> Tensor:
        """The value of an objective, tied to its gradients."""
        gradients = self.gradients[3 * objective : 3 * objective + 3]
        if not gradients:
            return value
        student = self.inputs.student
        return op.attach_gradient(value, self.inputs.student_hidden, student.weight, student.bias, *gradients)

    def hidden_gradient(self, objective: int) -> Tensor | None:
        gradient = self.gradients[3 * objective] if self.gradients else None
        return None if gradient is None or gradient.dim() == 1 else gradient


def prepare(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    masked_teacher_hidden: Tensor | None = None,
    masked_student_hidden: Tensor | None = None,
) -> Inputs:
    """Cast under autocast, and check that everything fits."""
    hidden = [student_hidden, teacher_hidden, masked_teacher_hidden, masked_student_hidden]
    heads = [student_head, teacher_head]
    device = student_hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden = [None if h is None else h.to(dtype) for h in hidden]
        heads = [_cast(head, dtype) for head in heads]
    student_hidden, teacher_hidden, masked_teacher_hidden, masked_student_hidden = hidden  # type: ignore[assignment]
    check_hidden("student", student_hidden, heads[0], student_hidden)
    check_hidden("teacher", teacher_hidden, heads[1], student_hidden)
    if masked_teacher_hidden is not None:
        check_like("masked_teacher_hidden", masked_teacher_hidden, "teacher_hidden", teacher_hidden)
    if masked_student_hidden is not None:
        check_like("masked_student_hidden", masked_student_hidden, "student_hidden", student_hidden)
    return Inputs(
        student_hidden, heads[0], teacher_hidden, heads[1], masked_teacher_hidden, masked_student_hidden, student_head
    )


def weights_of_tokens(inputs: Inputs, token_weights: Tensor | None) -> Tensor:
    """(tokens,), detached, in the accumulation dtype."""
    hidden = inputs.student_hidden
    dtype = accumulation_dtype(hidden.dtype)
    if token_weights is None:
        return torch.ones(hidden.shape[0], dtype=dtype, device=hidden.device)
    check_vector("token_weights", token_weights, hidden)
    return token_weights.detach().to(dtype)


def run(
    inputs: Inputs,
    token_weights: Tensor,  # (tokens,)
    coefficients: Tensor,  # (objectives, tokens, 3)
    vis_coefficients: Tensor,  # (objectives, tokens, 3): the part of them that token steering scales
    sampled_tokens: Tensor | None,  # (tokens,)
    options: Options,
) -> Results:
    """Check the options and call the operator. The gradients are formed here, where something requires one."""
    student, teacher, hidden = inputs.student, inputs.teacher, inputs.student_hidden
    sizes = {"student head": student.weight.shape[0], "teacher head": teacher.weight.shape[0]}
    vocab_size = resolve_vocab_size(sizes, options.vocab_size)
    transform = transform_of_heads(
        vocab_size, options.temperature, student, teacher, options.ratio_guard, options.teacher_smoothing
    )
    steering = options.token_steering or TokenSteering()
    _check_steering(steering, sampled_tokens, hidden)
    steered = bool(steering.strength or steering.plausibility)

    recorded = torch.is_grad_enabled()
    needs_hidden = recorded and hidden.requires_grad
    needs_weight = recorded and student.weight.requires_grad
    needs_bias = recorded and student.bias is not None and student.bias.requires_grad
    weight_grad = bias_grad = None
    if options.accumulate_head_grad:
        weight_grad = _existing_grad(inputs.given_head.weight) if needs_weight else None
        bias_grad = (
            _existing_grad(inputs.given_head.bias) if needs_bias and inputs.given_head.bias is not None else None
        )
    values, factors, sampled, *gradients = op.linear_kl(
        hidden.detach(),
        _detached(inputs.masked_student_hidden),
        inputs.teacher_hidden.detach(),
        _detached(inputs.masked_teacher_hidden),
        student.weight.detach(),
        _detached(student.bias),
        teacher.weight.detach(),
        _detached(teacher.bias),
        token_weights,
        coefficients if steered else coefficients + vis_coefficients,
        vis_coefficients if steered else None,
        sampled_tokens,
        weight_grad,
        bias_grad,
        needs_hidden,
        needs_weight,
        needs_bias,
        _or_zero("max_chunk_bytes", options.max_chunk_bytes),
        _or_zero("chunk_tokens", options.chunk_tokens),
        _tolerance(options.gradient_filter),
        steering.strength,
        steering.plausibility,
        _logits_dtype(options.logits_dtype, hidden),
        *transform.arguments(),
        backends.resolve("stream_kl", hidden.device, options.backend, hidden.dtype),
    )
    wanted = needs_hidden or needs_weight or needs_bias
    return Results(values, factors, None if sampled_tokens is None else sampled, inputs, gradients if wanted else [])


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum of weight * value, (); a weight of 0 switches a value off, even one that is infinite."""
    weights = weights.to(values.dtype)
    return torch.where(weights == 0, 0.0, weights * values).sum()


def no_coefficients(token_weights: Tensor, objectives: int) -> Tensor:
    return token_weights.new_zeros((objectives, token_weights.shape[0], COEFFICIENTS))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _cast(head: LMHead, dtype: torch.dtype) -> LMHead:
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _existing_grad(parameter: Tensor) -> Tensor:
    """The gradient to be added to, made where there is none."""
    if not parameter.is_leaf:
        raise ValueError("accumulate_head_grad needs a head whose weight and bias are leaf tensors (parameters)")
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _check_steering(steering: TokenSteering, sampled_tokens: Tensor | None, hidden: Tensor) -> None:
    if sampled_tokens is not None:
        check_vector("sampled_tokens", sampled_tokens, hidden)
        if sampled_tokens.dtype != torch.int64:
            raise ValueError(f"sampled_tokens must be int64, got {sampled_tokens.dtype}")
    elif steering.strength or steering.plausibility:
        raise ValueError("token_steering looks at the sampled tokens: pass sampled_tokens with it")
    if not 0.0 <= steering.strength < math.inf:
        raise ValueError(
            f"the strength of token_steering must be 0 or a positive finite number, got {steering.strength}"
        )
    check_fraction("the plausibility of token_steering", steering.plausibility)


def _or_zero(name: str, given: int | None) -> int:
    if given is None:
        return 0
    if given <= 0:
        raise ValueError(f"{name} must be positive, got {given}")
    return given


def _tolerance(gradient_filter: float | None) -> float:
    if gradient_filter is None:
        return 0.0
    if not 0.0 < HEAD_MULTIPLE * gradient_filter < 1.0:
        raise ValueError(f"gradient_filter must be between 0 and 1/{HEAD_MULTIPLE}, or None, got {gradient_filter}")
    return gradient_filter


def _logits_dtype(given: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    default = torch.float32 if hidden.dtype in HALF_DTYPES else hidden.dtype
    if given is None or given == default:
        return default
    if given != hidden.dtype or given not in DTYPES:
        raise ValueError(f"logits_dtype must be {default} or that of the hidden states, {hidden.dtype}, got {given}")
    return given
