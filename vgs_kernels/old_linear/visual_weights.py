"""What the image says about the sampled tokens, and the weights that their visual parts get from it.

With y the sampled token of a position, its contribution is log q(y) - log r(y): how much likelier the teacher finds y
with the image than without. No pass over the vocabulary is needed for it: `divergences` has looked at all logits, and
the normaliser of a teacher follows from what it wrote.

Layer: tensors in, tensors out. Called by `linear_decomposed_kl/op.py` only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..decomposed_kl.old_types import LogitTransform
from ..decomposed_kl.reference import ANCHOR, FULL, INVERSE_SUM, MASKED, MEAN, PRIOR, USES_PRIOR


class SampledTokens:
    """The sampled tokens of n positions in the eyes of both teachers. One outside the vocabulary has probability 0."""

    def __init__(
        self,
        tokens: Tensor,  # (n,), int64
        teacher: Tensor,  # (n, >= vocab), logits
        masked_teacher: Tensor,  # (n, >= vocab)
        values: Tensor,  # (n, 5), of `divergences`
        statistics: Tensor,  # (n, 13)
        transform: LogitTransform,
    ) -> None:
        self._transform = transform
        self._dtype = values.dtype
        self._logits = [logits[:, : transform.vocab_size] for logits in (teacher, masked_teacher)]
        inside = (tokens >= 0) & (tokens < transform.vocab_size)
        index = torch.where(inside, tokens, 0)[:, None]
        self._sampled = [  # (n,) each
            torch.where(inside, self._transformed(logits.gather(1, index).squeeze(1)), -math.inf)
            for logits in self._logits
        ]
        masked = (PRIOR, 0) if transform.decomposition in USES_PRIOR else (MASKED, 1)
        log_q, log_r = (
            z - _log_normaliser(values, statistics, *divergence)
            for z, divergence in zip(self._sampled, ((FULL, 0), masked), strict=True)
        )
        self.contribution = log_q - log_r  # (n,), nats; NaN where a divergence is infinite

    def weights(self, token_steering: float, plausibility: float) -> Tensor:
        """1 + token_steering * (1 - min(q, r) / max(q, r)); 0 where q < plausibility * max q and the same of r. (n,)"""
        hinges = -torch.expm1(-self.contribution.abs())
        # Not known: as if all hinged on the image, so that no broken position is weighted away.
        weights = 1.0 + token_steering * torch.where(hinges.isnan(), 1.0, hinges)
        if plausibility:
            below_q, below_r = (
                z - self._transformed(logits.amax(-1)) < math.log(plausibility)
                for z, logits in zip(self._sampled, self._logits, strict=True)
            )
            weights = torch.where(below_q & below_r, 0.0, weights)
        return weights

    def _transformed(self, logits: Tensor) -> Tensor:
        z = logits.to(self._dtype) * self._transform.teacher_scale
        if self._transform.teacher_softcap:
            z = self._transform.teacher_softcap * torch.tanh(z / self._transform.teacher_softcap)
        return z / self._transform.temperature


def _log_normaliser(values: Tensor, statistics: Tensor, divergence: int, base: int) -> Tensor:
    """Of the teacher that a divergence is from, (n,): the divergence is mean d + log p - log q at the maximum of p."""
    value = values[:, divergence]
    log_p = statistics[:, INVERSE_SUM + base].log()
    normaliser = statistics[:, ANCHOR + divergence - 1] - (statistics[:, MEAN + divergence] + log_p - value)
    return torch.where(torch.isinf(value), math.nan, normaliser)
