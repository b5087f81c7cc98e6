"""`linear_reverse_kl` and `linear_decomposed_kl`: the public functions on hidden states and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_finite, check_vector
from ..decomposed_kl.decompositions import Decomposition, find_decomposition
from ..stream_kl.reference import ENTROPY, STANDARD
from ..types import (
    HiddenGradients,
    LinearDecomposedKL,
    LinearReverseKL,
    LMHead,
    RatioGuard,
    ReverseKL,
    SampledLogProbs,
    TokenSteering,
)
from .call import Options, Results, no_coefficients, prepare, run, weighted_sum, weights_of_tokens

Weight = float | Tensor  # a number, (), or (tokens,)


def linear_reverse_kl(
    student_hidden: Tensor,  # (tokens, student width)
    student_head: LMHead,
    teacher_hidden: Tensor,  # (tokens, teacher width)
    teacher_head: LMHead,
    *,
    token_weights: Tensor | None = None,  # (tokens,)
    sampled_tokens: Tensor | None = None,  # (tokens,), int64
    teacher_smoothing: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    accumulate_head_grad: bool = False,
    gradient_filter: float | None = None,
    max_chunk_bytes: int | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> LinearReverseKL:
    r"""Token-weighted reverse KL divergence of a student from its teacher straight from hidden states: the loss of
    on-policy distillation, for any trainer. `(tokens, vocab)` logits never exist.

    $$\text{kl} = \sum_t w_t \operatorname{KL}(p_t \,\Vert\, q_t)$$

    with $p$ and $q$ of `reverse_kl` on the logits ``softcap(scale * (hidden @ weight.T + bias))`` of each stream. It is
    a sum: for a mean over tokens pass ``token_weights=mask / mask.sum()``.

    The gradients are formed in the forward pass, chunk by chunk, and only scaled in ``backward``, which may run more
    than once and gives the same answer each time. The teacher is a constant.

    Args:
        student_hidden: Last hidden states of the student at the positions that predict the tokens, in the head's dtype
            and on its device.
        student_head: `LMHead` of the student. Its weight and bias get gradients if they require them; a frozen
            head costs no head gradient.
        teacher_hidden: Last hidden states of the teacher, at the same positions. Its width may differ.
        teacher_head: `LMHead` of the teacher.
        token_weights: Weight of every token, default 1. A token of weight 0 takes no part: its hidden states and
            logits may hold NaN.
        sampled_tokens: The token that each position predicts and that the student sampled. Given, the result holds its
            log-probability under student and teacher, at no further pass over the vocabulary: what a policy-gradient
            loss needs beside this one.
        teacher_smoothing: ε in [0, 1), as in `reverse_kl`.
        temperature: As in `reverse_kl`.
        vocab_size: As in `reverse_kl`; the heads may be padded differently.
        accumulate_head_grad: Add the head's gradient of ``kl`` straight into ``weight.grad`` and ``bias.grad`` of
            ``student_head`` (made where there are none), in the forward pass; ``backward`` then gives the head
            none. Saves a head-sized tensor. Hazards: the gradient is that of ``kl`` itself, so a factor applied later
            (loss scaling, division by accumulation steps) does not reach it and belongs into the token weights; it is
            added at every forward pass that records gradients, also where ``backward`` is never called or the forward
            is recomputed (checkpointing); gradient hooks, DDP and FSDP do not see it.
        gradient_filter: If given, a tolerance ε in (0, 1/6). In every chunk the smallest columns of the logit gradient
            G (tokens of the chunk × vocab) are left out of the product with the head, as many as keep ‖dropped‖ ≤ ε ‖G‖
            in the Frobenius norm, and of the product with the hidden states, as many as keep ‖dropped‖ ≤ 6 ε ‖G‖. So
            the hidden gradients of the chunk change by at most ε ‖G‖ ‖weight‖₂, its head gradient by at most
            6 ε ‖G‖ ‖hidden‖₂ (spectral norms) and its bias gradient by at most 6 ε ‖G‖ √rows. The head gets more
            because each column is one row of its gradient, while hidden gradients add up columns that cancel (rows of G
            sum to 0) and change by more than ε of their own size. Values are not changed. Pays where the student is
            peaked, because nearly all columns then vanish; costs one more look at the logit gradient where it is not.
            On a GPU the number of columns has to reach the host, so every chunk waits for the device, and CUDA graphs
            cannot capture the call.
        max_chunk_bytes: Upper bound on the logits and logit gradients held at a time, in bytes (at least one token's
            are held). Default 149 MiB on a CPU; on a GPU half of the free memory, which bounds them in any case.
        chunk_tokens: Tokens that a chunk has at least, where memory allows: those whose logit gradients are multiplied
            back into the head at once, which reads and writes the whole head gradient. Default 1,024 on a GPU, in
            multiples of 256 (`vgs_kernels.linear.rule` has the reasons); on a CPU as many as `max_chunk_bytes` holds.
            Where memory is short, logits of fewer tokens are held, and the gradients of a chunk collected in 16 bits.
        logits_dtype: The dtype of projected logits, float32 for 16-bit hidden states and that of the hidden states
            otherwise. A divergence lives on differences of logits: bf16 logits of size 30 are multiples of 1/8, which
            puts bf16 gradients off by tens of percent of their largest entry where float32 logits keep them within 1 %.
            Pass the 16-bit dtype where memory matters more.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        LinearReverseKL: the sum ``kl`` in nats, differentiable; ``per_token`` (unweighted, detached, 0 where the token
        weight is 0); ``sampled``; ``hidden_gradient``, formed in this call where ``student_hidden`` requires one.

    Numerics: as in `reverse_kl`. Deterministic. No host synchronisation on a GPU without ``gradient_filter``. On a GPU
    gradients of 16-bit heads and hidden states are summed in float32 and rounded once, in ``backward``;
    ``hidden_gradient`` is float32 there, and where memory is short the lengths of chunks, so the last digits, follow
    it. On a CPU the head gradient is summed over chunks in its own dtype. Under autocast, hidden states and heads are
    cast to autocast's dtype, as for a linear layer. No second derivative: asking for one raises.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: gradients in the forward pass after "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009,
    and the Liger kernels, arXiv 2410.10989.

    Examples:
        >>> import torch
        >>> from vgs_kernels import LMHead, linear_reverse_kl
        >>> hidden = torch.randn(6, 8, requires_grad=True)
        >>> head, teacher_head = LMHead(torch.randn(32, 8)), LMHead(torch.randn(32, 16))
        >>> result = linear_reverse_kl(hidden, head, torch.randn(6, 16), teacher_head)
        >>> result.kl.backward()
        >>> result.per_token.kl.shape
        torch.Size([6])
    """
    inputs = prepare(student_hidden, student_head, teacher_hidden, teacher_head)
    weights = weights_of_tokens(inputs, token_weights)
    nothing = no_coefficients(weights, 1)
    coefficients = nothing.clone()
    coefficients[0, :, STANDARD] = weights
    options = Options(
        temperature, vocab_size, teacher_smoothing, accumulate_head_grad, gradient_filter, max_chunk_bytes,
        chunk_tokens, logits_dtype, backend,
    )  # fmt: skip
    results = run(inputs, weights, coefficients, nothing, sampled_tokens, options)
    per_token = ReverseKL(results.values[:, STANDARD], results.values[:, ENTROPY])
    sampled = None if results.sampled is None else SampledLogProbs(results.sampled[:, 0], results.sampled[:, 1], None)
    kl = results.differentiable(0, weighted_sum(weights, per_token.kl))
    return LinearReverseKL(kl, per_token, sampled, results.hidden_gradient(0))


def linear_decomposed_kl(
    student_hidden: Tensor,  # (tokens, student width)
    student_head: LMHead,
    teacher_hidden: Tensor,  # (tokens, teacher width)
    teacher_head: LMHead,
    masked_teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_student_hidden: Tensor | None = None,  # (tokens, student width)
    *,
    decomposition: str,
    objective: tuple[Weight, Weight, Weight] | None = None,
    token_weights: Tensor | None = None,  # (tokens,)
    vis_weights: Tensor | None = None,  # (tokens,)
    sampled_tokens: Tensor | None = None,  # (tokens,), int64
    token_steering: TokenSteering | None = None,
    ratio_guard: RatioGuard | None = None,
    teacher_smoothing: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    accumulate_head_grad: bool = False,
    gradient_filter: float | None = None,
    max_chunk_bytes: int | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> LinearDecomposedKL:
    r"""Token-weighted parts of the reverse KL straight from hidden states; `(tokens, vocab)` logits never exist.

    With $\text{standard}_t$, $\text{vis}_t$ and $\text{lang}_t$ of `decomposed_kl` on the logits
    ``softcap(scale * (hidden @ weight.T + bias))`` of each stream,

    $$\text{standard} = \sum_t w_t\,\text{standard}_t \qquad \text{vis} = \sum_t w_t v_t\,\text{vis}_t \qquad
      \text{lang} = \sum_t w_t\,\text{lang}_t$$

    with the token weights $w_t$ and, for the visual part alone, $v_t$. With an ``objective``, one weighted sum of the
    three is formed and differentiated, at the price of one gradient:

    $$\text{objective} = \sum_t w_t\,(a_t\,\text{standard}_t + b_t v_t\,\text{vis}_t + c_t\,\text{lang}_t)$$

    The paper's update is ``decomposition="vgs"`` with ``objective=(eta, eta * gamma, 0)``. Without an objective two
    sums are differentiable, each by itself, at the price of two gradients: ``standard`` and ``vis`` in ``vgs``,
    ``lang`` and ``vis`` in ``teacher_prior``.

    **Only the student that sees the image gets a gradient.** ``lang`` of ``vgs`` compares constants; its gradient,
    wherever language is to be trained or preserved, is that of `linear_reverse_kl` on the masked hidden states.

    The gradients are formed in the forward pass, chunk by chunk, and only scaled in ``backward``, which may run more
    than once and gives the same answer each time.

    Args:
        student_hidden: Last hidden states of the student, in the head's dtype and on its device.
        student_head: `LMHead` of the student. Its weight and bias get gradients if they require them; a frozen
            head costs no head gradient.
        teacher_hidden: Last hidden states of the teacher that sees the image. Its width may differ.
        teacher_head: `LMHead` of the teacher. Both teacher contexts are projected in one product, and once where
            ``masked_teacher_hidden`` is ``teacher_hidden`` itself.
        masked_teacher_hidden: Last hidden states of the teacher with the image masked.
        masked_student_hidden: Last hidden states of the student with the image masked, a constant here. Needed by
            ``vgs``, refused by ``teacher_prior``.
        decomposition: ``"vgs"`` or ``"teacher_prior"``, as in `decomposed_kl`.
        objective: (a, b, c), the weights of standard, vis and lang, each a number, a tensor ``()`` or ``(tokens,)``.
            The weight of lang must be the number 0 in ``vgs``, where it would add a value without a gradient.
        token_weights: w, weight of every token, default 1. A token of weight 0 takes no part: its hidden states and
            logits may hold NaN.
        vis_weights: Factor of every token's visual part, default 1, in $v_t$. A token of factor 0 has no visual part,
            even where that is infinite.
        sampled_tokens: The token that each position predicts and that the student sampled. Given, the result holds its
            log-probability under student and both teachers, at no further pass over the vocabulary. What the teacher
            sees in it is ``sampled.teacher - sampled.masked_teacher``.
        token_steering: A further factor in $v_t$ from the sampled tokens; see `TokenSteering`. Needs
            ``sampled_tokens``. Nothing is normalised here, because a mean over tokens is known after the last chunk
            only: divide vis by the mean of the ``applied_vis_weights`` returned.
        ratio_guard: As in `decomposed_kl`.
        teacher_smoothing: ε in [0, 1), as in `decomposed_kl`; what is said of the sampled tokens is then of the
            smoothed teachers.
        temperature: As in `decomposed_kl`.
        vocab_size: As in `decomposed_kl`; the heads may be padded differently.
        accumulate_head_grad: As in `linear_reverse_kl`, for ``objective``, which it needs.
        gradient_filter: As in `linear_reverse_kl`; of every objective by itself.
        max_chunk_bytes: As in `linear_reverse_kl`.
        chunk_tokens: As in `linear_reverse_kl`.
        logits_dtype: As in `linear_reverse_kl`.
        backend: As in `decomposed_kl`.

    Returns:
        LinearDecomposedKL: sums in nats, per-token parts (unweighted, detached, 0 where the token weight is 0), the
        $v_t$ that were applied, and the gradients with respect to the hidden states, formed in this call where
        ``student_hidden`` requires one.

    Numerics: as in `linear_reverse_kl`.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: arXiv 2606.00564 for the parts; weights of sampled tokens after "Visual-Advantage On-Policy Distillation for
    Vision-Language Models", arXiv 2605.21924, which averages tokens of high and of low contribution apart; their
    plausibility after the constraint of contrastive decoding, arXiv 2210.15097.

    Examples:
        >>> import torch
        >>> from vgs_kernels import LMHead, linear_decomposed_kl
        >>> hidden, masked = torch.randn(2, 6, 8).unbind()
        >>> head = LMHead(torch.randn(32, 8, requires_grad=True))
        >>> teacher, masked_teacher = torch.randn(2, 6, 16).unbind()
        >>> result = linear_decomposed_kl(
        ...     hidden, head, teacher, LMHead(torch.randn(32, 16)), masked_teacher, masked,
        ...     decomposition="vgs", objective=(0.4, 0.8, 0),
        ... )
        >>> result.objective.backward()
        >>> tuple(head.weight.grad.shape)
        (32, 8)
    """
    named = find_decomposition(decomposition, masked_student_hidden is not None, "masked_student_hidden")
    if accumulate_head_grad and objective is None:
        raise ValueError("accumulate_head_grad adds the gradient of the objective: pass objective with it")
    inputs = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, masked_teacher_hidden, masked_student_hidden
    )
    weights = weights_of_tokens(inputs, token_weights)
    of_vis = weights
    if vis_weights is not None:
        check_vector("vis_weights", vis_weights, inputs.student_hidden)
        of_vis = weights * vis_weights.detach()
    own = {"standard": weights, "vis": of_vis, "lang": weights}  # (tokens,) each
    mixed = None if objective is None else _mixture(named, objective, own)
    # One set of weights for each gradient that is formed.
    sets = [{part: own[part]} for part in named.parts] if mixed is None else [mixed]
    coefficients, vis_coefficients = no_coefficients(weights, len(sets)), no_coefficients(weights, len(sets))
    for index, of_parts in enumerate(sets):
        for part, of_tokens in of_parts.items():
            target = vis_coefficients if part == "vis" else coefficients
            target[index] += named.coefficients(part, of_tokens)
    options = Options(
        temperature, vocab_size, teacher_smoothing, accumulate_head_grad, gradient_filter, max_chunk_bytes,
        chunk_tokens, logits_dtype, backend, token_steering, ratio_guard,
    )  # fmt: skip
    results = run(inputs, weights, coefficients, vis_coefficients, sampled_tokens, options)
    return _result(named, results, own, mixed, vis_weights)


def _mixture(
    named: Decomposition, objective: tuple[Weight, Weight, Weight], own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Part -> its weights in the objective, (tokens,), the token weights among them."""
    if len(objective) != 3:
        raise ValueError(f"objective must hold the weights of standard, vis and lang, got {len(objective)} of them")
    mixed = {}
    for (part, of_tokens), weight in zip(own.items(), objective, strict=True):
        if named.coefficients_of(part) is None:
            if isinstance(weight, Tensor) or weight != 0:
                raise ValueError(
                    f"{part} of decomposition {named.name!r} compares constants and has no gradient: give it weight 0 "
                    "in objective, and train it with linear_reverse_kl on the masked hidden states"
                )
            continue
        if isinstance(weight, Tensor):
            if weight.dim() > 0:
                check_vector(f"the weight of {part} in objective", weight, of_tokens)
            weight = weight.detach().to(of_tokens)
        else:
            check_finite(f"the weight of {part} in objective", weight)
        mixed[part] = of_tokens * weight
    return mixed


def _result(
    named: Decomposition,
    results: Results,
    own: dict[str, Tensor],  # part -> (tokens,), weights without those of an objective
    mixed: dict[str, Tensor] | None,  # with them
    vis_weights: Tensor | None,  # (tokens,)
) -> LinearDecomposedKL:
    factors = results.vis_factors if vis_weights is None else results.vis_factors * vis_weights
    applied = torch.where(own["standard"] == 0, 0.0, factors)
    per_token = named.per_token(results.values)

    def total(part: str, weights: Tensor) -> Tensor:
        return weighted_sum(weights * results.vis_factors if part == "vis" else weights, getattr(per_token, part))

    sums = {part: total(part, weights) for part, weights in own.items()}
    hidden: dict[str, Tensor | None] = dict.fromkeys(HiddenGradients._fields)
    objective = None
    if mixed is None:
        for index, part in enumerate(named.parts):
            sums[part], hidden[part] = results.differentiable(index, sums[part]), results.hidden_gradient(index)
    else:
        value = torch.stack([total(part, weights) for part, weights in mixed.items()]).sum()
        objective, hidden["objective"] = results.differentiable(0, value), results.hidden_gradient(0)
    sampled = None if results.sampled is None else SampledLogProbs._make(results.sampled.unbind(1))
    return LinearDecomposedKL(
        sums["standard"], sums["vis"], sums["lang"], objective, per_token, applied, sampled, HiddenGradients(**hidden)
    )
