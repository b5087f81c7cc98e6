"""`linear_decomposed_kl`: the public function on hidden states and heads. Validates and puts the results together.

Layer: public API. Calls `linear_decomposed_kl/op.py`; chooses through `vgs_kernels.backend`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend as backends
from ..decomposed_kl.old_api import (
    check_decomposition,
    check_fraction,
    check_positive,
    check_softcap,
    combine_parts,
    resolve_vocab_size,
)
from ..decomposed_kl.old_types import DecomposedKL, HiddenGradients, LinearDecomposedKL
from ..linear.column_filter import HEAD_MULTIPLE
from ..types import LMHead
from . import op

# CPU: 128 tokens of three bf16 streams at a vocabulary of 151,936, with scratch below 128 MiB. The head gradient
# is read and written once per chunk, so that longer chunks are faster. GPU: every product of a chunk reads the head, so
# few rows would leave the processors waiting for memory; this value is reasoned, not measured.
DEFAULT_MAX_CHUNK_BYTES = {"cpu": 112 * 2**20, "cuda": 512 * 2**20}


def linear_decomposed_kl(
    student_hidden: Tensor,  # (tokens, student width)
    student_head: LMHead,
    teacher_hidden: Tensor,  # (tokens, teacher width)
    teacher_head: LMHead,
    *,
    masked_teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_student_hidden: Tensor | None = None,  # (tokens, student width)
    token_weights: Tensor | None = None,  # (tokens,)
    visual_weights: Tensor | None = None,  # (tokens,)
    sampled_tokens: Tensor | None = None,  # (tokens,), int64
    token_steering: float = 0.0,
    plausibility: float = 0.0,
    teacher_smoothing: float = 0.0,
    decomposition: str = "matched",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    steering_weights: Tensor | None = None,  # (2,)
    accumulate_head_grad: bool = False,
    max_chunk_bytes: int | None = None,
    gradient_filter: float | None = None,
    backend: str | None = None,
) -> LinearDecomposedKL:
    r"""Token-weighted decomposed reverse KL straight from hidden states; `(tokens, vocab)` logits never exist.

    With $\text{lang}_t$ and $\text{vis}_t$ of `decomposed_kl` on the logits
    ``softcap(scale * (hidden @ weight.T + bias))`` of each stream,

    $$\text{lang} = \sum_t w_t\,\text{lang}_t \qquad \text{vis} = \sum_t w_t v_t\,\text{vis}_t$$

    with the token weights $w_t$ and, for the visual part alone, the visual weights $v_t$. They are 1, or with $y_t$ the
    sampled token of the position and its probabilities under both teachers

    $$v_t = 1 + s\,\Bigl(1 - \frac{\min(q(y_t), r(y_t))}{\max(q(y_t), r(y_t))}\Bigr)
        = 1 + s\,\bigl(1 - e^{-\lvert\log q(y_t) - \log r(y_t)\rvert}\bigr)$$

    where $s$ is ``token_steering``: a token to which the image makes no difference keeps weight 1, one that hinges on
    it gets up to $1 + s$.

    Reverse KL: every expectation is under the student. The gradients are formed in the forward pass, chunk by chunk,
    and only scaled in ``backward``, which may run more than once and gives the same answer each time.

    Args:
        student_hidden: Last hidden states of the student, in the head's dtype and on its device.
        student_head: `LMHead` of the student. Its weight and bias get gradients if they require them; a frozen
            head costs no head gradient.
        teacher_hidden: Last hidden states of the teacher that sees the image. Its width may differ.
        teacher_head: `LMHead` of the teacher. Both teacher contexts are projected in one product.
        masked_teacher_hidden: Last hidden states of the teacher with the image masked.
        masked_student_hidden: Last hidden states of the student with the image masked (``bayes`` and ``matched``).
        token_weights: Weight of every token, default 1. A token of weight 0 takes no part: its hidden states and
            logits may hold NaN.
        visual_weights: Factor of every token's visual part, default 1, beside what the next three make of it. A token
            of factor 0 has no visual part, even where that is infinite.
        sampled_tokens: y, the token that each position predicts and that the student sampled; int64. Given, the result
            holds the ``contribution`` log q(y) − log r(y) of each, at no further pass over the vocabulary.
        token_steering: s ≥ 0, 0 for none. Needs ``sampled_tokens``. Nothing is normalised here, because a mean over
            tokens is known only after the last chunk: divide vis by the mean of the ``visual_weights`` returned.
        plausibility: α in [0, 1), 0 for none: a sampled token that both teachers find implausible, q(y) < α max q and
            r(y) < α max r, has no visual part. Needs ``sampled_tokens``.
        teacher_smoothing: ε in [0, 1), as in `decomposed_kl`; the weights above are then of the smoothed teachers.
        decomposition: As in `decomposed_kl`.
        temperature: As in `decomposed_kl`.
        vocab_size: As in `decomposed_kl`.
        backend: As in `decomposed_kl`.
        steering_weights: Weights of lang and vis, shape (2,), on the device. Given, only
            ``objective = weights[0] * lang + weights[1] * vis`` is differentiable, at the price of one component.
        accumulate_head_grad: Add the head's gradient of ``objective`` straight into ``weight.grad`` and ``bias.grad``
            of ``student_head`` (made where there are none), in the forward pass; ``backward`` then gives the head
            none. Saves a head-sized tensor. Needs ``steering_weights``. Hazards: the gradient is that of
            ``objective`` itself, so a factor applied later (loss scaling, division by accumulation steps) does not
            reach it and belongs into the weights; it is added at every forward pass that records gradients, also
            where ``backward`` is never called or the forward is recomputed (checkpointing); gradient hooks, DDP and
            FSDP do not see it.
        max_chunk_bytes: Upper bound on the logits held at a time, in bytes (at least one token's are held). Default
            112 MiB on a CPU, 512 MiB on a GPU.
        gradient_filter: If given, a tolerance ε in (0, 1/6). In every chunk the smallest columns of the logit gradient
            G (tokens of the chunk × vocab, one for each component) are left out of the product with the head, as many
            as keep ‖dropped‖ ≤ ε ‖G‖ in the Frobenius norm, and of the product with the hidden states, as many as keep
            ‖dropped‖ ≤ 6 ε ‖G‖. So the hidden gradients of the chunk change by at most ε ‖G‖ ‖weight‖₂, its head
            gradient by at most 6 ε ‖G‖ ‖hidden‖₂ (spectral norms) and its bias gradient by at most 6 ε ‖G‖ √rows. The
            head gets more because each column is one row of its gradient, while hidden gradients add up columns that
            cancel (rows of G sum to 0) and change by more than ε of their own size. Values are not changed. Pays where
            the student is peaked, because nearly all columns then vanish; costs one more look at the logit gradient
            where it is not. On a GPU the number of columns has to reach the host, so every
            chunk waits for the device, and CUDA graphs cannot capture the call.

    Returns:
        LinearDecomposedKL: sums in nats, per-token parts (unweighted, detached, 0 where the token weight is 0) and
        the 2×2 Gramian of the weighted logit gradients of (lang, vis), detached. Its off-diagonal is 0 in
        ``bayes`` and ``matched``, where the two live on different logits, and all of it is 0 when nothing requires a
        gradient. ``hidden_gradients``: those of the sums with respect to the hidden states, formed in this call where
        hidden states require one. ``visual_weights``: $v_t$. ``contribution``: NaN where the divergence that its
        teacher is in is infinite; $v_t$ is then $1 + s$.

    Numerics: as in ``decomposed_kl``. Deterministic. No host synchronisation on a GPU without ``gradient_filter``. On a
    CPU the head gradient is summed over chunks in its own dtype, so that in bf16 it is rounded once per chunk. Under
    autocast, hidden states and heads are cast to autocast's dtype, as for a linear layer. No second derivative: asking
    for one raises.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: arXiv 2606.00564 for the decomposition; gradients in the forward pass after "Cut Your Losses in
    Large-Vocabulary Language Models", arXiv 2411.09009, and the Liger kernels, arXiv 2410.10989. Weights by the
    contribution after "Visual-Advantage On-Policy Distillation for Vision-Language Models", arXiv 2605.21924, which
    averages tokens of high and of low contribution apart; ``plausibility`` after the constraint of contrastive
    decoding, arXiv 2210.15097.

    Examples:
        >>> import torch
        >>> from vgs_kernels import LMHead, linear_decomposed_kl
        >>> hidden, masked = torch.randn(2, 6, 8).unbind()
        >>> head = LMHead(torch.randn(32, 8, requires_grad=True))
        >>> teacher, masked_teacher = torch.randn(2, 6, 16).unbind()
        >>> result = linear_decomposed_kl(
        ...     hidden, head, teacher, LMHead(torch.randn(32, 16)),
        ...     masked_teacher_hidden=masked_teacher, masked_student_hidden=masked,
        ... )
        >>> result.vis.backward()
        >>> tuple(head.weight.grad.shape)
        (32, 8)
    """
    check_decomposition(decomposition, masked_student_hidden is not None, "masked_student_hidden")
    check_positive("temperature", temperature)
    if torch.is_autocast_enabled(student_hidden.device.type):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.to(dtype)
        masked_teacher_hidden = masked_teacher_hidden.to(dtype)
        masked_student_hidden = None if masked_student_hidden is None else masked_student_hidden.to(dtype)
        student, teacher = _cast(student_head, dtype), _cast(teacher_head, dtype)
    else:
        student, teacher = student_head, teacher_head
    _check_stream("student", student_hidden, student, student_hidden)
    _check_stream("teacher", teacher_hidden, teacher, student_hidden)
    _check_like("masked_teacher_hidden", masked_teacher_hidden, "teacher_hidden", teacher_hidden)
    if masked_student_hidden is not None:
        _check_like("masked_student_hidden", masked_student_hidden, "student_hidden", student_hidden)
    if max_chunk_bytes is None:
        max_chunk_bytes = DEFAULT_MAX_CHUNK_BYTES.get(student_hidden.device.type, DEFAULT_MAX_CHUNK_BYTES["cpu"])
    if max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes must be positive, got {max_chunk_bytes}")
    if gradient_filter is not None and not 0.0 < HEAD_MULTIPLE * gradient_filter < 1.0:
        raise ValueError(f"gradient_filter must be between 0 and 1/{HEAD_MULTIPLE}, or None, got {gradient_filter}")
    sizes = {"student head": student.weight.shape[0], "teacher head": teacher.weight.shape[0]}
    vocab_size = resolve_vocab_size(sizes, vocab_size)
    tokens = student_hidden.shape[0]
    if token_weights is None:
        token_weights = torch.ones(tokens, device=student_hidden.device)
    _check_vector("token_weights", token_weights, tokens, student_hidden)
    if visual_weights is not None:
        _check_vector("visual_weights", visual_weights, tokens, student_hidden)
    if sampled_tokens is not None:
        _check_vector("sampled_tokens", sampled_tokens, tokens, student_hidden)
        if sampled_tokens.dtype != torch.int64:
            raise ValueError(f"sampled_tokens must be int64, got {sampled_tokens.dtype}")
    elif token_steering or plausibility:
        raise ValueError("token_steering and plausibility look at the sampled tokens: pass sampled_tokens with them")
    if not 0.0 <= token_steering < math.inf:
        raise ValueError(f"token_steering must be 0 (off) or a positive finite number, got {token_steering}")
    check_fraction("plausibility", plausibility)
    check_fraction("teacher_smoothing", teacher_smoothing)
    if steering_weights is not None:
        _check_vector("steering_weights", steering_weights, 2, student_hidden)
    elif accumulate_head_grad:
        raise ValueError("accumulate_head_grad adds the gradient of the objective: pass steering_weights with it")

    grad = torch.is_grad_enabled()
    needs_hidden = grad and any(t is not None and t.requires_grad for t in (student_hidden, masked_student_hidden))
    needs_weight = grad and student.weight.requires_grad
    needs_bias = grad and student.bias is not None and student.bias.requires_grad
    weight_grad = bias_grad = None
    if accumulate_head_grad:
        weight_grad = _existing_grad(student_head.weight) if needs_weight else None
        bias_grad = _existing_grad(student_head.bias) if needs_bias and student_head.bias is not None else None
    lang, vis, objective, values, gramian, visual, contribution, *gradients = op.linear_decomposed_kl(
        student_hidden.detach(),
        None if masked_student_hidden is None else masked_student_hidden.detach(),
        teacher_hidden.detach(),
        masked_teacher_hidden.detach(),
        student.weight.detach(),
        None if student.bias is None else student.bias.detach(),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        token_weights.detach(),
        None if visual_weights is None else visual_weights.detach(),
        sampled_tokens,
        None if steering_weights is None else steering_weights.detach(),
        weight_grad,
        bias_grad,
        needs_hidden,
        needs_weight,
        needs_bias,
        op.chunk_length(student_hidden, masked_student_hidden is not None, sizes.values(), max_chunk_bytes),
        gradient_filter or 0.0,
        float(token_steering),
        float(plausibility),
        float(teacher_smoothing),
        decomposition,
        vocab_size,
        float(temperature),
        float(student.logit_scale),
        float(teacher.logit_scale),
        check_softcap("student_head.softcap", student.softcap),
        check_softcap("teacher_head.softcap", teacher.softcap),
        backends.resolve("decomposed_kl", student_hidden.device, backend, student_hidden.dtype),
    )
    if needs_hidden or needs_weight or needs_bias:
        lang, vis, objective = op.attach_gradients(
            lang,
            vis,
            objective,
            student_hidden,
            masked_student_hidden,
            student.weight,
            student.bias,
            *gradients,
            steering_weights is not None,
        )
    parts = DecomposedKL(*combine_parts(decomposition, values))
    per_token = parts, visual, None if sampled_tokens is None else contribution
    first, second = (gradients[0], gradients[3]) if needs_hidden else (None, None)
    if steering_weights is None:
        return LinearDecomposedKL(lang, vis, None, *per_token, gramian, HiddenGradients(first, second, None))
    hidden = HiddenGradients(None, None, second)
    return LinearDecomposedKL(lang.detach(), vis.detach(), objective, *per_token, gramian, hidden)


def _cast(head: LMHead, dtype: torch.dtype) -> LMHead:
    """What autocast does to the operands of a linear layer."""
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _existing_grad(parameter: Tensor) -> Tensor:
    """The gradient to be added to, made where there is none."""
    if not parameter.is_leaf:
        raise ValueError("accumulate_head_grad needs a head whose weight and bias are leaf tensors (parameters)")
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _check_stream(name: str, hidden: Tensor, head: LMHead, like: Tensor) -> None:
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
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"{name}_hidden must be floating point, got {hidden.dtype}")


def _check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for what, a, b in (
        ("shape", tuple(tensor.shape), tuple(other.shape)),
        ("dtype", tensor.dtype, other.dtype),
        ("device", tensor.device, other.device),
    ):
        if a != b:
            raise ValueError(f"{name} has {what} {a}, but {other_name} has {b}; they must agree")


def _check_vector(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but student_hidden is on {like.device}; move it there")
