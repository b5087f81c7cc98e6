"""The values that the public functions take and return. No computation lives here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LMHead(NamedTuple):
    """A language-model head: `softcap(logit_scale * (hidden @ weight.T + bias))`.

    The scale is the multiplier some families put before the softmax (Cohere, Granite), the soft cap is Gemma's
    `cap * tanh(logits / cap)`; both are applied before the temperature.
    """

    weight: Tensor  # (vocab, width)
    bias: Tensor | None = None  # (vocab,)
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RatioGuard:
    r"""Bounds on $\log p_0 - \log r$ within the visual target $q^* \propto q\,p_0 / r$ of ``vgs``.

    In the tails of the vocabulary, where neither model means anything, the ratio is wild. With a guard the target is
    $q \cdot e^{\rho}$, normalised, where $\rho = \log p_0 - \log r$ is clamped to ± ``bound`` and counts as 0 where
    $q < \text{floor} \cdot \max q$.
    """

    bound: float | None = None  # nats; None for none
    floor: float = 0.0  # in [0, 1); 0 for none


@dataclass(frozen=True)
class TokenSteering:
    r"""Weights of the sampled tokens $y_t$ in the visual part, from their probabilities under both teachers.

    $$v_t = 1 + s\,\Bigl(1 - \frac{\min(q(y_t), r(y_t))}{\max(q(y_t), r(y_t))}\Bigr)
        = 1 + s\,\bigl(1 - e^{-\lvert\log q(y_t) - \log r(y_t)\rvert}\bigr)$$

    with $s$ the ``strength``: a token to which the image makes no difference keeps weight 1, one that hinges on it gets
    up to $1 + s$. A token that both teachers find implausible, $q(y_t) < \alpha \max q$ and $r(y_t) < \alpha \max r$
    with $\alpha$ the ``plausibility``, has no visual part.
    """

    strength: float = 0.0  # s >= 0
    plausibility: float = 0.0  # alpha in [0, 1)


class ReverseKL(NamedTuple):
    """Reverse KL divergence and entropy of every token, in nats: `vgs_kernels.reverse_kl`.

    Shape `(tokens,)`, or the leading shape of the logits; float32, float64 for float64 inputs.
    """

    kl: Tensor  # KL(student || teacher)
    entropy: Tensor  # of the student


class DecomposedKL(NamedTuple):
    """The parts of every token, in nats: `vgs_kernels.decomposed_kl` has the equations.

    Shape `(tokens,)`, or the leading shape of the logits; float32, float64 for float64 inputs.
    """

    standard: Tensor  # KL(student || teacher), on-policy distillation
    vis: Tensor  # visual part
    lang: Tensor  # language part
    entropy: Tensor  # of the student
    dependency: Tensor | None  # KL(teacher || masked teacher), the visual dependency score; None in teacher_prior


class SampledLogProbs(NamedTuple):
    """Log-probability of the sampled token of every position, (tokens,), in nats; detached.

    0 where the token weight is 0. A sampled token that is no entry of the vocabulary has -inf.
    """

    student: Tensor
    teacher: Tensor
    masked_teacher: Tensor | None  # None where there is none


class LinearReverseKL(NamedTuple):
    """What `vgs_kernels.linear_reverse_kl` returns, in nats. What belongs to tokens is detached."""

    kl: Tensor  # (), token-weighted sum, differentiable
    per_token: ReverseKL  # (tokens,) each, unweighted; 0 where the token weight is 0
    sampled: SampledLogProbs | None  # None without sampled_tokens
    hidden_gradient: Tensor | None  # (tokens, width), of kl with respect to student_hidden; read it, do not write to it


class HiddenGradients(NamedTuple):
    """Gradients of the sums of `LinearDecomposedKL` with respect to student_hidden, (tokens, width), detached.

    None where a sum is not differentiable, or nothing asked for hidden gradients. Read them, do not write to them.
    """

    standard: Tensor | None
    vis: Tensor | None
    lang: Tensor | None
    objective: Tensor | None


class LinearDecomposedKL(NamedTuple):
    """What `vgs_kernels.linear_decomposed_kl` returns, in nats. What belongs to tokens is detached.

    Without an objective two sums are differentiable, each by itself: standard and vis in ``vgs``, lang and vis in
    ``teacher_prior``. With one, only the objective is.
    """

    standard: Tensor  # (), token-weighted sum
    vis: Tensor  # (), token-weighted sum
    lang: Tensor  # (), token-weighted sum
    objective: Tensor | None  # (), differentiable; None without an objective
    per_token: DecomposedKL  # (tokens,) each, unweighted; 0 where the token weight is 0
    applied_vis_weights: Tensor  # (tokens,), what vis weighed each token by, beside the token weight
    sampled: SampledLogProbs | None  # None without sampled_tokens
    hidden_gradients: HiddenGradients


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every other floating dtype accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
