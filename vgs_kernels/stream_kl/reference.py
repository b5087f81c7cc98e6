"""Reference backend of `stream_kl`: plain torch, any dtype, any device. The specification of every backend.

**One student stream, which carries gradient, against one, two or three constant streams.** Which are given says what is
computed, token by token:

| streams                                          | kind       | the third number                      |
|--------------------------------------------------|------------|---------------------------------------|
| student p, teacher q                             | reverse KL | none, 0                               |
| p, q, masked teacher r                           | prior      | KL(p || r)                            |
| p, q, r, masked student p0                       | visual     | KL(p || q*) with q* proportional to q p0 / r |

A backend module offers two functions, which take 2-D logits with unit stride in the last dimension:

* `divergences`: the numbers of every token, and the statistics of its row that the gradient needs.
* `logit_gradients`: the gradient of any weighted sum of the first three numbers with respect to the student's logits.

Columns of `values`, in nats; 0 where a stream is missing:

| 0 ENTROPY | 1 STANDARD | 2 THIRD        | 3 LANGUAGE          | 4 DEPENDENCY       |
|-----------|------------|----------------|---------------------|--------------------|
| H(p)      | KL(p || q) | as above       | KL(p0 || r), visual | KL(q || r), visual |

Columns of `statistics`:

| 0, 1     | MAXIMUM of z_p; INVERSE_SUM: 1 / sum exp(z_p - maximum)                                   |
| 2 to 4   | ANCHOR: z_q, z_r, z_p0 where z_p has its maximum; 0 where that is not finite              |
| 5 to 7   | MEAN under p of the distance a = z_p - maximum, of d_standard and of d_third              |
| 8 to 10  | LOG_SUM: log sum exp (z - anchor) of q, r, p0                                             |
| 11, 12   | TOP: maximum of z - anchor of q, r                                                        |
| 13, 14   | NORMALIZER of q, r where they are smoothed: what `LogitTransform.smooth` subtracts        |

with d = a - (z_t - its anchor) for t = q, r, or q*, whose distance from its anchor is
(z_q - anchor) + ((z_p0 - anchor) - (z_r - anchor)). The gradient of a divergence is p * (d - mean d). All terms are 0
at the entry with most mass, so that neither the offset of the logits nor a large normaliser is rounded into it. With a
guard the bracket is log p0 - log r, clamped and cut as `LogitTransform` says.

Mass: a probability below the smallest normal number of the accumulation dtype counts as none. Mass where the other
distribution has none makes a divergence +inf, never NaN. q* has no mass where q or p0 has none; where r has none and
both others some, it is not a distribution, and KL(p || q*) is +inf. NaN logits show in the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import accumulation_dtype
from .transform import LogitTransform

ENTROPY, STANDARD, THIRD, LANGUAGE, DEPENDENCY = range(5)
VALUES = 5
COEFFICIENTS = 3  # only the first three numbers depend on p
MAXIMUM, INVERSE_SUM, ANCHOR, MEAN, LOG_SUM, TOP, NORMALIZER, STATISTICS = 0, 1, 2, 5, 8, 11, 13, 15
Q, R, P0 = range(3)  # order of the constant streams in the statistics


class Streams(NamedTuple):
    """Logits, (tokens, >= vocab) each, of one dtype."""

    student: Tensor  # p
    teacher: Tensor  # q
    masked_teacher: Tensor | None = None  # r
    masked_student: Tensor | None = None  # p0, given with r only


def divergences(
    streams: Streams,
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """Return `values` (tokens, 5) and `statistics` (tokens, 15), in the accumulation dtype."""
    tokens = streams.student.shape[0]
    dtype = accumulation_dtype(streams.student.dtype)
    values = streams.student.new_zeros((tokens, VALUES), dtype=dtype)
    statistics = streams.student.new_zeros((tokens, STATISTICS), dtype=dtype)
    if tokens == 0:
        return values, statistics

    z = transform.student(streams.student)  # (tokens, vocab)
    top, place = z.max(-1, keepdim=True)  # (tokens, 1), like all that is kept of a row
    top = torch.where(top == -math.inf, 0.0, top)
    total = (z - top).exp().sum(-1, keepdim=True)
    statistics[:, MAXIMUM] = top[:, 0]
    statistics[:, INVERSE_SUM] = torch.where(total == 0, 0.0, 1 / total)[:, 0]
    if transform.teacher_smoothing:
        statistics[:, NORMALIZER:] = teacher_normalizers(divergences, streams, transform)
    constants = _constants(streams, transform, statistics)
    for index, other in enumerate(constants):
        anchor = other.gather(-1, place)
        anchor = torch.where(anchor.isfinite(), anchor, 0.0)
        statistics[:, ANCHOR + index] = anchor[:, 0]
        statistics[:, LOG_SUM + index] = _log_sum(other - anchor)
        if index != P0:
            statistics[:, TOP + index] = (other - anchor).amax(-1)

    log_p = _log_probs(z)
    p = _mass(log_p)
    target = _third(constants, statistics, transform)  # by its distance from its anchor
    differences = _differences(z, constants, target, statistics)
    for column, difference in enumerate(differences):
        statistics[:, MEAN + column] = _mean(p, difference)
    values[:, ENTROPY] = -_mean(p, log_p)
    values[:, STANDARD] = _divergence(log_p, _log_probs(constants[Q]))
    if target is not None:
        improper = (target == math.inf).any(-1)
        values[:, THIRD] = torch.where(improper, math.inf, _divergence(log_p, _log_probs(target)))
    if len(constants) == 3:
        log_q, log_r, log_p0 = (_log_probs(other) for other in constants)
        values[:, LANGUAGE], values[:, DEPENDENCY] = _divergence(log_p0, log_r), _divergence(log_q, log_r)
    if token_weights is not None:
        skipped = (token_weights == 0)[:, None]
        values.masked_fill_(skipped, 0.0)
        statistics.masked_fill_(skipped, 0.0)
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
    """Write d objective / d student logits into `out`, and that of the second objective into `out_second`.

    Each output may be the very tensor of one of the inputs (every element is read before it is written). A row whose
    coefficients are all 0 is not read and gets gradient 0; so do the columns past `vocab_size`. A coefficient that
    meets a value of +inf counts as 0: there is no direction. NaN logits of a student show in its values; its gradient
    there is 0. `column_squares` receives, per objective, the sums over the tokens of the squares of what is written.
    """
    z = transform.student(streams.student)
    constants = _constants(streams, transform, statistics)
    target = _third(constants, statistics, transform)
    differences = _differences(z, constants, target, statistics)
    p = (z - _column(statistics, MAXIMUM)).exp() * _column(statistics, INVERSE_SUM)
    support = p >= torch.finfo(p.dtype).tiny
    mass = p * transform.student_slope(z)

    def gradient(weights: Tensor) -> Tensor:
        total = torch.zeros_like(p)
        for column, difference in enumerate(differences):
            weight = torch.where(values[:, column].isinf(), 0.0, weights[:, column])[:, None]
            centred = difference - _column(statistics, MEAN + column)
            # The gradient of the entropy is that of -mean log p.
            total += torch.where(support & (weight != 0), (-weight if column == ENTROPY else weight) * centred, 0.0)
        return torch.where(support & (total != 0), mass * total, 0.0)

    results = [(out, gradient(coefficients))]
    if second_coefficients is not None:
        assert out_second is not None
        results.append((out_second, gradient(second_coefficients)))
    if column_squares is not None:
        column_squares.copy_(torch.stack([result.square().sum(0) for _, result in results]))
    for written, result in results:
        written[:, : transform.vocab_size] = result
        written[:, transform.vocab_size :] = 0


def teacher_normalizers(
    divergences: Callable[..., tuple[Tensor, Tensor]],  # of a backend
    streams: Streams,
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,)
) -> Tensor:  # (tokens, 2)
    """NORMALIZER of q and r, before anything else is known: from the statistics of q against r, the raw ones."""
    teacher, other = streams.teacher, streams.masked_teacher
    statistics = divergences(
        Streams(teacher, teacher if other is None else other), transform.of_teachers(), token_weights
    )[1]
    of_q = statistics[:, MAXIMUM] - statistics[:, INVERSE_SUM].log()
    of_r = statistics[:, ANCHOR + Q] + statistics[:, LOG_SUM + Q]
    log_sums = torch.stack([of_q, of_r], 1)
    # A row without mass has 0: nothing is its share whatever is subtracted, but -inf - -inf would be NaN.
    return torch.where(log_sums.isinf(), 0.0, log_sums) - math.log1p(-transform.teacher_smoothing)


def _constants(streams: Streams, transform: LogitTransform, statistics: Tensor) -> list[Tensor]:
    """z of q, r and p0, as far as they are given."""
    teachers = [t for t in (streams.teacher, streams.masked_teacher) if t is not None]
    found = [
        transform.smooth(transform.teacher(t), _column(statistics, NORMALIZER + i)) for i, t in enumerate(teachers)
    ]
    if streams.masked_student is not None:
        found.append(transform.student(streams.masked_student))
    return found


def _third(constants: list[Tensor], statistics: Tensor, transform: LogitTransform) -> Tensor | None:
    """What the third number compares p with, by its distance from its anchor: r or q*; None for a reverse KL alone."""
    if len(constants) == 1:
        return None
    distances = [z - _column(statistics, ANCHOR + index) for index, z in enumerate(constants)]
    if len(constants) == 2:
        return distances[R]
    ratio = distances[P0] - distances[R]
    if transform.guarded:  # then it is log p0 - log r, and q* has the anchor of q alone
        offset = _column(statistics, LOG_SUM + P0) - _column(statistics, LOG_SUM + R)
        ratio = ratio - torch.where(offset.isinf(), 0.0, offset)  # a stream without mass has -inf everywhere anyway
    # No mass in p0: none in q*, whatever r has there.
    ratio = torch.where(constants[P0] == -math.inf, -math.inf, ratio)
    if transform.ratio_bound:
        ratio = ratio.clamp(-transform.ratio_bound, transform.ratio_bound)
    if transform.ratio_floor:
        plausible = distances[Q] >= _column(statistics, TOP + Q) + math.log(transform.ratio_floor)
        ratio = torch.where(plausible, ratio, 0.0)
    return torch.where(constants[Q] == -math.inf, -math.inf, distances[Q] + ratio)


def _differences(z: Tensor, constants: list[Tensor], target: Tensor | None, statistics: Tensor) -> list[Tensor]:
    """What the first numbers are means of, under p: a, d_standard, d_third."""
    distance = z - _column(statistics, MAXIMUM)
    others = [constants[Q] - _column(statistics, ANCHOR + Q)] + ([] if target is None else [target])
    return [distance] + [distance - other for other in others]


def _column(statistics: Tensor, index: int) -> Tensor:
    return statistics[:, index : index + 1]


def _log_sum(z: Tensor) -> Tensor:
    top = z.amax(-1)
    return top + (z - torch.where(top == -math.inf, 0.0, top)[:, None]).exp().sum(-1).log()


def _log_probs(z: Tensor) -> Tensor:
    """log_softmax; -inf throughout for a row that has no mass anywhere, where torch has NaN."""
    return torch.where((z == -math.inf).all(-1, keepdim=True), -math.inf, z.log_softmax(-1))


def _mass(log_probs: Tensor) -> Tensor:
    p = log_probs.exp()
    return torch.where(p < torch.finfo(p.dtype).tiny, 0.0, p)  # NaN stays


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """sum p x along the last dimension; entries without mass contribute 0, whatever x is there."""
    return torch.where(p == 0, 0.0, p * x).sum(-1)


def _divergence(log_p: Tensor, log_t: Tensor) -> Tensor:
    return _mean(_mass(log_p), log_p - log_t)
