"""The registered operators of the linear calls: projection, numbers and gradients, a chunk of tokens at a time.

`(tokens, vocab)` logits never exist as a whole. A slice of tokens is projected (`products.py`, `gpu_products.py`),
`stream_kl` forms its numbers and its logit gradients (`chunks.py` says where, `rule.py` of how many tokens), and those
of a chunk are multiplied back into hidden and head gradients at once (`gradients.py`). Cost in units of one tokens x
width x vocab product: one projection a stream, then a hidden and a head gradient for each objective.

Two operators: `vgs_kernels::linear_kl` computes numbers and gradients and knows nothing of autograd;
`vgs_kernels::attach_gradient` ties a scalar to the gradients that belong to it, which `backward` only scales and rounds
(out of place, so that it can run twice).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import backend as backends
from ..stream_kl.reference import VALUES
from ..stream_kl.transform import LogitTransform
from ..types import accumulation_dtype
from . import rule
from . import sampled as of_samples
from .chunks import (
    GradientBuffer,
    Layout,
    LogitBuffer,
    Logits,
    Rows,
    bytes_of_row,
    can_overwrite,
    chunks,
    gather,
    is_same,
    slices,
)  # fmt: skip
from .gpu_products import GpuProducts
from .gradients import Gradients, Wanted, gradient_dtype
from .products import Products


@torch.library.custom_op("vgs_kernels::linear_kl", mutates_args=("weight_grad", "bias_grad"))
def linear_kl(
    student_hidden: Tensor,  # (tokens, student width)
    masked_student_hidden: Tensor | None,  # (tokens, student width)
    teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_teacher_hidden: Tensor | None,  # (tokens, teacher width)
    student_weight: Tensor,  # (>= vocab, student width)
    student_bias: Tensor | None,  # (>= vocab,)
    teacher_weight: Tensor,  # (>= vocab, teacher width)
    teacher_bias: Tensor | None,  # (>= vocab,)
    token_weights: Tensor,  # (tokens,): tokens of weight 0 are not read
    coefficients: Tensor,  # (objectives, tokens, 3), of the numbers; the token weights are in them
    vis_coefficients: Tensor | None,  # (objectives, tokens, 3): the part of them that token steering scales
    sampled_tokens: Tensor | None,  # (tokens,)
    weight_grad: Tensor | None,  # (>= vocab, student width): the head's gradient is added to it
    bias_grad: Tensor | None,  # (>= vocab,): the same
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
    needs_bias_grad: bool,
    max_chunk_bytes: int,  # 0: the rule's
    chunk_tokens: int,  # 0: the rule's
    gradient_filter: float,
    token_steering: float,
    plausibility: float,
    logits_dtype: torch.dtype,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the numbers (tokens, 5), the factor of every token's visual part (tokens,), log p, log q and log r of the
    sampled tokens (tokens, 3), and the gradients with respect to hidden states, head weight and head bias, of the first
    objective and then of the second, as `gradients.py` sums them up. What does not apply is an empty tensor."""
    transform = LogitTransform(
        vocab_size, temperature.item(), student_scale, teacher_scale, student_softcap, teacher_softcap, ratio_bound,
        ratio_floor, teacher_smoothing,
    )  # fmt: skip
    kernels = backends.load("stream_kl", backend)
    tokens, objectives = student_hidden.shape[0], coefficients.shape[0]
    dtype = accumulation_dtype(student_hidden.dtype)
    values = student_hidden.new_zeros((tokens, VALUES), dtype=dtype)
    factors = values.new_ones(tokens)
    sampled = values.new_zeros((0 if sampled_tokens is None else tokens, 3))
    facts = rule.facts_of(student_hidden.device)
    products = (
        GpuProducts(student_hidden.dtype)
        if facts.is_gpu
        else Products(student_hidden.device, student_hidden.dtype, backend == "native")
    )
    wanted = Wanted(objectives, needs_hidden_grad, needs_weight_grad, needs_bias_grad, weight_grad, bias_grad)
    vocabs = student_weight.shape[0], teacher_weight.shape[0]
    teachers = [teacher_hidden]  # what is projected: rows that are the same, as without an image, once
    if masked_teacher_hidden is not None and not is_same(masked_teacher_hidden, teacher_hidden):
        teachers.append(masked_teacher_hidden)
    streams = 1 + (masked_student_hidden is not None), len(teachers)
    layouts = Layout.of(vocabs[0], logits_dtype, facts), Layout.of(vocabs[1], logits_dtype, facts)
    of_gradients = Layout.of(vocabs[0], products.gradient_dtype, facts)
    apart = wanted.any() and not can_overwrite(logits_dtype, products.gradient_dtype, vocabs, objectives)
    a_row = rule.Bytes(
        bytes_of_row(layouts, streams, logits_dtype.itemsize),
        objectives * of_gradients.stride * products.gradient_dtype.itemsize if apart else 0,
        objectives * student_weight.numel() * dtype.itemsize if needs_weight_grad else 0,
    )
    plan = rule.rule_of(facts).plan(facts, a_row, max_chunk_bytes or None, chunk_tokens or None)
    walk = list(chunks(token_weights, plan, facts))
    longest = max((n for _, n in walk), default=0)
    logits = LogitBuffer(
        student_hidden, logits_dtype, layouts, streams, max((max(plan.slices(n)) for _, n in walk), default=0)
    )
    memory = GradientBuffer(
        logits, student_hidden, products.gradient_dtype, of_gradients, objectives, longest if apart else 0
    )
    unit = _unit(coefficients, vis_coefficients, token_steering) if products.gradient_dtype == torch.float16 else None
    gradients = Gradients(
        wanted, student_hidden, student_weight, student_bias, products, gradient_filter, unit, len(walk)
    )

    def project(rows: Rows, weights: Tensor, hidden: Tensor) -> Logits:
        chunk = logits.of(weights.shape[0], masked_teacher_hidden is not None)
        masked = [] if masked_student_hidden is None else [gather(masked_student_hidden, rows, weights)]
        products.project(torch.cat([hidden, *masked]), student_weight, student_bias, chunk.students)
        of_teachers = torch.cat([gather(hidden, rows, weights) for hidden in teachers])
        products.project(of_teachers, teacher_weight, teacher_bias, chunk.teachers)
        return chunk

    for chunk, n in walk:
        chunk_weights = token_weights[chunk].to(dtype)
        chunk_hidden = gather(student_hidden, chunk, chunk_weights)
        squares = gradients.squares(vocab_size)
        for rows, place in slices(chunk, n, plan):
            weights = chunk_weights[place]
            part = project(rows, weights, chunk_hidden[place])
            numbers, statistics = kernels.divergences(part.streams, transform, weights)
            values[rows] = numbers
            mixture = coefficients[:, rows].to(dtype)  # (objectives, rows, 3)
            if sampled_tokens is not None:
                found = of_samples.log_probs(sampled_tokens[rows], part.streams, statistics, transform)
                sampled[rows] = torch.where(weights[:, None] == 0, 0.0, found)
                if vis_coefficients is not None:
                    factors[rows] = of_samples.vis_weights(found, statistics, token_steering, plausibility)
                    mixture = mixture + factors[rows][:, None] * vis_coefficients[:, rows].to(dtype)
            if wanted.any():
                outs = [gradient[place] for gradient in memory.of(n).split(n)]
                mixture = mixture if unit is None else mixture / unit
                _write_gradients(kernels, part, numbers, statistics, mixture, transform, outs, squares)
        if wanted.any():
            gradients.add(chunk, memory.of(n), chunk_hidden, squares)
    return values, factors, sampled, *gradients.finish()  # type: ignore[return-value]


def _unit(coefficients: Tensor, vis_coefficients: Tensor | None, strength: float) -> Tensor:
    """A power of two, (), near the largest coefficient: float16 has no entries below 6e-8, and token weights are one
    over the tokens of a batch. On the device: nothing waits for it."""
    largest = coefficients.abs().amax() if coefficients.numel() else coefficients.new_ones(())
    if vis_coefficients is not None and vis_coefficients.numel():
        largest = largest + (1.0 + strength) * vis_coefficients.abs().amax()
    usable = largest.isfinite() & (largest > 0)
    return torch.exp2(torch.where(usable, largest, 1.0).log2().round())


def _write_gradients(
    kernels: ModuleType,
    logits: Logits,
    values: Tensor,  # (n, 5)
    statistics: Tensor,  # (n, 15)
    mixture: Tensor,  # (objectives, n, 3)
    transform: LogitTransform,
    outs: list[Tensor],  # (n, >= vocab) of each objective
    squares: Tensor | None,  # (objectives, vocab), added to
) -> None:
    second = {"second_coefficients": mixture[1], "out_second": outs[1]} if len(outs) == 2 else {}
    own = None if squares is None else torch.empty_like(squares)
    kernels.logit_gradients(
        logits.streams, values, statistics, mixture[0], transform, out=outs[0], **second, column_squares=own
    )
    if squares is not None and own is not None:
        squares += own


@linear_kl.register_fake
def _(  # type: ignore[no-untyped-def]
    student_hidden, _masked, _teacher, _masked_teacher, student_weight, student_bias, _teacher_weight, _teacher_bias,
    _token_weights, coefficients, _vis_coefficients, sampled_tokens, weight_grad, bias_grad, needs_hidden, needs_weight,
    needs_bias, *_settings,
):  # fmt: skip
    tokens, dtype = student_hidden.shape[0], accumulation_dtype(student_hidden.dtype)
    values = student_hidden.new_empty((tokens, VALUES), dtype=dtype)
    sampled = values.new_empty((0 if sampled_tokens is None else tokens, 3))
    wide = gradient_dtype(student_hidden.dtype, rule.is_gpu(student_hidden.device))
    forms = (
        (student_hidden.shape, wide) if needs_hidden else (0, wide),
        (student_weight.shape, wide) if needs_weight and weight_grad is None else (0, student_weight.dtype),
        (student_weight.shape[:1], dtype) if needs_bias and bias_grad is None else (0, student_weight.dtype),
    )
    absent = ((0, student_weight.dtype),) * (6 - 3 * coefficients.shape[0])
    gradients = [student_weight.new_empty(shape, dtype=of) for shape, of in forms * coefficients.shape[0] + absent]
    return values, values.new_empty(tokens), sampled, *gradients


@torch.library.custom_op("vgs_kernels::attach_gradient", mutates_args=())
def attach_gradient(
    value: Tensor,  # ()
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_gradient: Tensor,  # gradients of the value, of the shapes of the three above; empty for none
    weight_gradient: Tensor,
    bias_gradient: Tensor,
) -> Tensor:
    """A copy of the value, whose gradients are those given."""
    return value.clone()


@attach_gradient.register_fake
def _(value, *_others):  # type: ignore[no-untyped-def]
    return torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[4:], inputs[1])
    ctx.dtypes = [inputs[1].dtype, *([inputs[2].dtype] * 2)]


def _backward(ctx, upstream):  # type: ignore[no-untyped-def]
    *gradients, source = ctx.saved_tensors
    scaled = [_scaled(upstream, gradient, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True
        scaled = [None if g is None else first_order_only(g, source) for g in scaled]
    return None, *scaled, None, None, None


attach_gradient.register_autograd(_backward, setup_context=_setup_context)

_ROWS_AT_A_TIME = 4096  # of a product on a CPU, which makes float32 copies of 16-bit operands


def _scaled(scale: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor | None:
    """scale * gradient, multiplied in the accumulation dtype and rounded once; None where there is no gradient."""
    if gradient.shape == (0,):  # that of no tokens has a width
        return None
    # Head-sized: a copy costs a tenth of a projection.
    if _is_one(scale):
        return gradient.to(dtype)
    scale = scale.to(accumulation_dtype(dtype))
    if gradient.dtype == scale.dtype == dtype:
        return gradient * scale
    if torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(scale):  # neither may write into a tensor
        return (gradient * scale.reshape((1,) * gradient.dim())).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = _ROWS_AT_A_TIME if gradient.device.type == "cpu" else max(1, gradient.shape[0])
    for part, result in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(part, scale.reshape(1), out=result)
    return out


def _is_one(scale: Tensor) -> bool:
    """Whether a scalar is known to be 1 without a wait: reading it on a GPU would be one."""
    if scale.device.type != "cpu" or is_in_torch_dispatch_mode():
        return False
    try:
        return scale.item() == 1.0
    except RuntimeError:  # one of a batch (vmap): there is nothing to read
        return False


@torch.library.custom_op("vgs_kernels::first_order_only", mutates_args=())
def first_order_only(gradient: Tensor, source: Tensor) -> Tensor:
    """A copy of `gradient` that says so when it is differentiated again."""
    return gradient.clone()


@first_order_only.register_fake
def _(gradient, source):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient)


def _no_double_backward(ctx, *_grads: Tensor):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "vgs_kernels: these divergences have no second derivative; call backward without create_graph=True, "
        "or write the loss with plain torch operations where you need one"
    )


first_order_only.register_autograd(_no_double_backward)
