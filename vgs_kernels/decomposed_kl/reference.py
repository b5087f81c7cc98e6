"""Reference backend of `decomposed_kl`: plain torch, any dtype, any device.

This file is the specification of the kernel interface. Every backend module offers the same two functions, which take
2-D logits with unit stride in the last dimension and return new tensors:

* `divergences`: the five per-token numbers every decomposition is a combination of, and the statistics of every row.
* `logit_gradients`: the gradient of any weighted sum of those five with respect to the student logits.

Called by `decomposed_kl/op.py` and `linear_decomposed_kl/op.py` only.

Streams: p student, q teacher, r masked teacher, p0 masked student; lp, lq, lr, l0 their log-probabilities.

| column of `values` | name    | value         | gradient flows to                         |
|--------------------|---------|---------------|-------------------------------------------|
| 0                  | ENTROPY | H(p)          | p                                         |
| 1                  | FULL    | KL(p || q)    | p                                         |
| 2                  | PRIOR   | KL(p || r)    | p  (teacher_prior and bayes, else 0)      |
| 3                  | SHIFT   | KL(p || p0)   | p, p0 is a constant here  (bayes, else 0) |
| 4                  | MASKED  | KL(p0 || r)   | p0 (bayes and matched, else 0)            |

Columns of `statistics`, what the gradient needs of a row (0 where it does not apply):

| 0, 1    | maximum of z_p, of z_p0                                                                                    |
| 2, 3    | 1 / sum exp(z - maximum) of p, p0                                                                          |
| 4 to 7  | anchors: z_q, z_r, z_p0 where z_p has its maximum, z_r where z_p0 has it; 0 where that is not finite       |
| 8 to 12 | by column of `values` the mean, under p (or p0), of the difference d (of z_p - maximum for ENTROPY)        |

with d = (z_p - its maximum) - (z_q - its anchor). A divergence is mean d + log p - log q, the logs at the maximum of p;
its gradient is p * (d - mean d). Both terms of d are 0 at the entry with most mass, so that neither the offset of the
logits nor a large normaliser is rounded into the gradient. Centred by the value, which holds the normalisers, it would
be rounded to their units where few entries hold the mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import accumulation_dtype
from .old_types import LogitTransform

ENTROPY, FULL, PRIOR, SHIFT, MASKED = range(5)
VALUES = 5
STREAMS = 4
MAXIMUM, INVERSE_SUM, ANCHOR, MEAN, STATISTICS = 0, 2, 4, 8, 13  # first columns of `statistics`, and how many

USES_PRIOR = ("teacher_prior", "bayes")  # decompositions that compare the student with the masked teacher
USES_MASKED_STUDENT = ("bayes", "matched")


def _transformed(logits: Tensor, scale: float, softcap: float, transform: LogitTransform) -> Tensor:
    z = logits[:, : transform.vocab_size].to(accumulation_dtype(logits.dtype)) * scale  # (tokens, vocab)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / transform.temperature


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """sum p x along the last dimension; entries with p = 0 contribute 0, whatever x is there."""
    return torch.where(p == 0, 0.0, p * x).sum(-1)  # p is NaN, not 0, where a student is broken


class _Stream:
    """One stream: transformed logits z, their maximum and its place, log-probabilities."""

    def __init__(self, z: Tensor) -> None:  # (tokens, vocab)
        self.z = z
        top, self.place = z.max(-1, keepdim=True)
        self.top = torch.where(top == -math.inf, 0.0, top)  # (tokens, 1), like the two below
        self.distance = z - self.top  # (tokens, vocab)
        self.sum = self.distance.exp().sum(-1, keepdim=True)
        # A row that is -inf throughout has no mass anywhere, where torch has NaN.
        self.log_probs = torch.where(self.sum == 0, -math.inf, torch.log_softmax(z, -1))

    def inverse_sum(self) -> Tensor:
        return torch.where(self.sum == 0, 0.0, 1 / self.sum)


def divergences(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """Return `values` (tokens, 5) and `statistics` (tokens, 13), in the accumulation dtype."""
    tokens = student.shape[0]
    dtype = accumulation_dtype(student.dtype)
    values = torch.zeros(tokens, VALUES, dtype=dtype, device=student.device)
    statistics = torch.zeros(tokens, STATISTICS, dtype=dtype, device=student.device)
    if tokens == 0:
        return values, statistics

    def stream(logits: Tensor, scale: float, softcap: float) -> _Stream:
        return _Stream(_transformed(logits, scale, softcap, transform))

    def distribution(base: _Stream, index: int) -> Tensor:
        statistics[:, MAXIMUM + index] = base.top[:, 0]
        statistics[:, INVERSE_SUM + index] = base.inverse_sum()[:, 0]
        return base.distance.exp() * base.inverse_sum()

    def divergence(column: int, p: Tensor, base: _Stream, other: _Stream) -> None:
        anchor = other.z.gather(-1, base.place)
        anchor = torch.where(torch.isfinite(anchor), anchor, 0.0)
        values[:, column] = _mean(base.log_probs.exp(), base.log_probs - other.log_probs)
        statistics[:, ANCHOR + column - 1] = anchor[:, 0]
        statistics[:, MEAN + column] = _mean(p, base.distance - (other.z - anchor))

    student_form = transform.student_scale, transform.student_softcap
    teacher_form = transform.teacher_scale, transform.teacher_softcap
    seeing, prior = stream(student, *student_form), stream(masked_teacher, *teacher_form)
    p = distribution(seeing, 0)
    values[:, ENTROPY] = -_mean(seeing.log_probs.exp(), seeing.log_probs)
    statistics[:, MEAN + ENTROPY] = _mean(p, seeing.distance)
    divergence(FULL, p, seeing, stream(teacher, *teacher_form))
    if transform.decomposition in USES_PRIOR:
        divergence(PRIOR, p, seeing, prior)
    if masked_student is not None:
        blind = stream(masked_student, *student_form)
        divergence(MASKED, distribution(blind, 1), blind, prior)
        if transform.decomposition == "bayes":
            divergence(SHIFT, p, seeing, blind)
    if token_weights is not None:
        skipped = (token_weights == 0)[:, None]
        values.masked_fill_(skipped, 0.0)
        statistics.masked_fill_(skipped, 0.0)
    return values, statistics


def logit_gradients(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    values: Tensor,  # (tokens, 5), of `divergences`
    statistics: Tensor,  # (tokens, 13), of `divergences`
    coefficients: Tensor,  # (tokens, 5): d objective / d values
    transform: LogitTransform,
    *,
    out_student: Tensor,  # (tokens, >= vocab)
    out_masked_student: Tensor | None = None,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 5): of a second objective of the student's logits
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    row_gramian: Tensor | None = None,  # (tokens, 3)
    column_squares: Tensor | None = None,  # (outputs, vocab), float32
) -> None:
    """Write d objective / d student logits into `out_student`, d / d masked student logits into `out_masked_student`.

    Each output may be the very tensor of one of the inputs (every element is read before it is written). A row whose
    coefficients are all 0 is not read and gets gradient 0; so do the columns past `vocab_size`. A coefficient that
    meets a value of +inf (student mass where the other distribution has none) counts as 0: there is no direction. NaN
    logits of a student show in its values; its gradient there is 0.

    `second_coefficients` and `out_second` form the gradient of a second objective of the student's logits in the same
    look (the two components of teacher_prior). `row_gramian` receives, per token, <lang, lang>, <lang, vis> and
    <vis, vis> of the unweighted logit gradients of the two components; rows with coefficients all 0 get 0.
    `column_squares` receives, per output in the order of the arguments, the sums over the tokens of the squares.
    """
    teacher_form = transform.teacher_scale, transform.teacher_softcap, transform
    student_form = transform.student_scale, transform.student_softcap, transform
    zp, zq = _transformed(student, *student_form), _transformed(teacher, *teacher_form)
    zr = _transformed(masked_teacher, *teacher_form)
    z0 = None if masked_student is None else _transformed(masked_student, *student_form)

    def column(first: int, offset: int) -> Tensor:
        return statistics[:, first + offset : first + offset + 1]

    def chain(z: Tensor) -> Tensor | float:
        """d transformed / d raw logit."""
        slope = transform.student_scale / transform.temperature
        if not transform.student_softcap:
            return slope
        return slope * (1.0 - (z * transform.temperature / transform.student_softcap).square())

    def distribution(z: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Distances from the maximum, and probabilities."""
        distance = z - column(MAXIMUM, index)
        return distance, distance.exp() * column(INVERSE_SUM, index)

    def term(weights: Tensor, divergence: int, distance: Tensor, other: Tensor, support: Tensor) -> Tensor:
        """weight * (d - its mean), 0 where the weight is 0, the value infinite, or the support empty."""
        infinite = torch.isinf(values[:, divergence : divergence + 1])
        weight = torch.where(infinite, 0.0, weights[:, divergence : divergence + 1])
        difference = distance - (other - column(ANCHOR, divergence - 1)) - column(MEAN, divergence)
        return torch.where(support & (weight != 0), weight * difference, 0.0)

    def student_gradient(weights: Tensor) -> Tensor:
        distance, p = distribution(zp, 0)
        support = p > 0
        weight = weights[:, ENTROPY : ENTROPY + 1]
        total = torch.where(support & (weight != 0), weight * (column(MEAN, ENTROPY) - distance), 0.0)
        total = total + term(weights, FULL, distance, zq, support)
        if transform.decomposition in USES_PRIOR:
            total = total + term(weights, PRIOR, distance, zr, support)
        if transform.decomposition == "bayes":
            assert z0 is not None
            total = total + term(weights, SHIFT, distance, z0, support)
        return torch.where(support & (total != 0), p * total * chain(zp), 0.0)

    def masked_gradient(weights: Tensor) -> Tensor:
        assert z0 is not None
        distance, p0 = distribution(z0, 1)
        support = p0 > 0
        total = term(weights, MASKED, distance, zr, support)
        return torch.where(support & (total != 0), p0 * total * chain(z0), 0.0)

    results = [(out_student, student_gradient(coefficients))]
    if out_masked_student is not None:
        results.append((out_masked_student, masked_gradient(coefficients)))
    if second_coefficients is not None:
        assert out_second is not None
        results.append((out_second, student_gradient(second_coefficients)))
    if row_gramian is not None:
        active = (coefficients != 0).any(-1)
        if second_coefficients is not None:
            active |= (second_coefficients != 0).any(-1)
        ones = active.to(values.dtype)
        lang, vis = component_coefficients(transform.decomposition, ones, ones)
        if transform.decomposition == "teacher_prior":
            g_lang, g_vis = student_gradient(lang), student_gradient(vis)
            cross = (g_lang * g_vis).sum(-1)
        else:
            g_lang, g_vis = masked_gradient(lang), student_gradient(vis)
            cross = torch.zeros_like(values[:, 0])
        row_gramian.copy_(torch.stack([g_lang.square().sum(-1), cross, g_vis.square().sum(-1)], -1))
    if column_squares is not None:
        for squares, (_, gradient) in zip(column_squares, results, strict=True):
            squares.copy_(gradient.square().sum(0))
    for out, gradient in results:
        out[:, : transform.vocab_size] = gradient
        out[:, transform.vocab_size :] = 0


def component_coefficients(decomposition: str, lang_weights: Tensor, vis_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients (tokens, 5) of the weighted lang and of the weighted vis on the five divergences."""
    lang = lang_weights.new_zeros(lang_weights.shape[0], VALUES)
    vis = torch.zeros_like(lang)
    vis[:, FULL] = vis_weights
    if decomposition == "teacher_prior":
        lang[:, PRIOR] = lang_weights
        vis[:, PRIOR] = -vis_weights
    else:
        lang[:, MASKED] = lang_weights
        if decomposition == "bayes":
            vis[:, PRIOR] = -vis_weights
            vis[:, SHIFT] = vis_weights
    return lang, vis
