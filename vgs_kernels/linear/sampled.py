"""What student and teachers say of the sampled tokens, and the weights that visual parts get from it.

No pass over the vocabulary is needed: `divergences` has looked at all logits, and its statistics hold every normaliser.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..stream_kl.reference import ANCHOR, INVERSE_SUM, LOG_SUM, MAXIMUM, NORMALIZER, TOP, Q, R, Streams
from ..stream_kl.transform import LogitTransform

STUDENT, TEACHER, MASKED_TEACHER = range(3)


def log_probs(
    tokens: Tensor,  # (n,), int64
    streams: Streams,  # (n, >= vocab) each
    statistics: Tensor,  # (n, 15), of `divergences`
    transform: LogitTransform,
) -> Tensor:
    """log p, log q, log r of the sampled tokens, (n, 3); -inf for one outside the vocabulary, 0 without that stream."""
    inside = (tokens >= 0) & (tokens < transform.vocab_size)
    index = torch.where(inside, tokens, 0)[:, None]
    narrow = transform._replace(vocab_size=1)  # of the one column that is gathered

    def of(z: Tensor, anchor: Tensor, log_sum: Tensor) -> Tensor:
        return torch.where(inside, (z.squeeze(1) - anchor) - log_sum, -math.inf)

    of_student = statistics[:, MAXIMUM], -statistics[:, INVERSE_SUM].log()
    found = [of(narrow.student(streams.student.gather(1, index)), *of_student)]
    for column, teacher in ((Q, streams.teacher), (R, streams.masked_teacher)):
        if teacher is None:
            found.append(torch.zeros_like(found[0]))
        else:
            of_teacher = statistics[:, ANCHOR + column], statistics[:, LOG_SUM + column]
            normalizer = statistics[:, NORMALIZER + column, None]
            z = transform.smooth(narrow.teacher(teacher.gather(1, index)), normalizer)
            found.append(of(z, *of_teacher))
    return torch.stack(found, 1)


def vis_weights(
    sampled: Tensor,  # (n, 3), of `log_probs`
    statistics: Tensor,  # (n, 15)
    strength: float,
    plausibility: float,
) -> Tensor:
    """1 + strength * (1 - min(q, r) / max(q, r)); 0 where q < plausibility * max q and the same of r. (n,)"""
    hinges = -torch.expm1(-(sampled[:, TEACHER] - sampled[:, MASKED_TEACHER]).abs())
    # Not known: as if all hinged on the image, so that no broken position is weighted away.
    weights = 1.0 + strength * torch.where(hinges.isnan(), 1.0, hinges)
    if plausibility:
        below = [
            sampled[:, stream] - (statistics[:, TOP + column] - statistics[:, LOG_SUM + column])
            < math.log(plausibility)
            for stream, column in ((TEACHER, Q), (MASKED_TEACHER, R))
        ]
        weights = torch.where(below[0] & below[1], 0.0, weights)
    return weights
