"""Types of the calls that `vgs_kernels.linear` and `vgs_kernels.stream_kl` replace; they go with them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

DECOMPOSITIONS = ("teacher_prior", "bayes", "matched")
"""The ways to split a divergence; their equations are those of `vgs_kernels.decomposed_kl`."""


class DecomposedKL(NamedTuple):
    """The per-token parts of the reverse KL divergence, in nats.

    All have shape `(tokens,)` (or the leading shape of the logits) and dtype float32, float64 for float64 inputs.
    Equations: `vgs_kernels.decomposed_kl`.
    """

    lang: Tensor  # language-prior part
    vis: Tensor  # visual-grounding part
    full: Tensor  # KL(student || teacher), the monolithic objective
    entropy: Tensor  # of the student


class HiddenGradients(NamedTuple):
    """Gradients of the sums of `LinearDecomposedKL` with respect to the student's hidden states, detached.

    Shape `(tokens, width)`; None where a sum is not differentiable, or nothing asked for hidden gradients.
    """

    lang: Tensor | None  # with respect to masked_student_hidden where it is given, else student_hidden
    vis: Tensor | None  # with respect to student_hidden
    objective: Tensor | None  # with respect to student_hidden


class LinearDecomposedKL(NamedTuple):
    """What `vgs_kernels.old_linear` returns; sums over tokens, in nats.

    What belongs to tokens, of shape `(tokens,)`, is detached and 0 where the token weight is 0.
    """

    lang: Tensor  # (), token-weighted sum, differentiable unless `objective` is given
    vis: Tensor  # (), token-weighted sum, differentiable unless `objective` is given
    objective: Tensor | None  # (), steering_weights[0] * lang + steering_weights[1] * vis; None without them
    tokens: DecomposedKL  # per token, unweighted
    visual_weights: Tensor  # (tokens,), what vis weighs each token by, beside the token weight
    contribution: Tensor | None  # (tokens,), log q - log r of the sampled tokens, in nats; None without them
    logit_gramian: Tensor  # (2, 2), of the token-weighted logit gradients of lang and vis; detached
    hidden_gradients: HiddenGradients  # those that `backward` scales: read them, do not write to them


class LogitTransform(NamedTuple):
    """How raw logits become log-probabilities: `log_softmax(softcap(scale * logits)[:vocab_size] / temperature)`."""

    decomposition: str
    vocab_size: int
    temperature: float
    student_scale: float
    teacher_scale: float
    student_softcap: float  # 0 means none
    teacher_softcap: float  # 0 means none
