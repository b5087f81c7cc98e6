"""Reference backend of `decomposed_kl`: plain torch, any dtype, any device.

This file is the specification of the kernel interface. Every backend module offers the same two functions, which take
2-D logits with unit stride in the last dimension and return new tensors:

* `divergences`: the five per-token numbers every decomposition is a combination of, and the log-normalisers.
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

Columns of `log_normalizers`: p, q, r, p0 (0 where the stream is absent).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import LogitTransform, accumulation_dtype

ENTROPY, FULL, PRIOR, SHIFT, MASKED = range(5)
VALUES = 5
STREAMS = 4

USES_PRIOR = ("teacher_prior", "bayes")  # decompositions that compare the student with the masked teacher
USES_MASKED_STUDENT = ("bayes", "matched")


def _transformed(logits: Tensor, scale: float, softcap: float, transform: LogitTransform) -> Tensor:
    z = logits[:, : transform.vocab_size].to(accumulation_dtype(logits.dtype)) * scale  # (tokens, vocab)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / transform.temperature


def _kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p || q) along the last dimension; entries with p = 0 contribute 0, p > 0 against q = 0 gives +inf."""
    p = lp.exp()
    return torch.where(p == 0, 0.0, p * (lp - lq)).sum(-1)  # p is NaN, not 0, where a student is broken


def _log_probs(z: Tensor) -> Tensor:
    """log_softmax; a row that is -inf throughout has no mass anywhere, where torch has NaN."""
    return torch.where((z == -math.inf).all(-1, keepdim=True), -math.inf, torch.log_softmax(z, -1))


def divergences(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """Return `values` (tokens, 5) and `log_normalizers` (tokens, 4), in the accumulation dtype."""
    tokens = student.shape[0]
    dtype = accumulation_dtype(student.dtype)
    values = torch.zeros(tokens, VALUES, dtype=dtype, device=student.device)
    log_normalizers = torch.zeros(tokens, STREAMS, dtype=dtype, device=student.device)
    if tokens == 0:
        return values, log_normalizers

    log_probs: list[Tensor | None] = []
    for column, (logits, scale, softcap) in enumerate(
        (
            (student, transform.student_scale, transform.student_softcap),
            (teacher, transform.teacher_scale, transform.teacher_softcap),
            (masked_teacher, transform.teacher_scale, transform.teacher_softcap),
            (masked_student, transform.student_scale, transform.student_softcap),
        )
    ):
        if logits is None:
            log_probs.append(None)
            continue
        z = _transformed(logits, scale, softcap, transform)
        log_normalizers[:, column] = torch.logsumexp(z, -1)
        log_probs.append(_log_probs(z))
    lp, lq, lr, l0 = log_probs
    assert lp is not None
    assert lq is not None
    assert lr is not None

    p = lp.exp()
    values[:, ENTROPY] = -torch.where(p == 0, 0.0, p * lp).sum(-1)
    values[:, FULL] = _kl(lp, lq)
    if transform.decomposition in USES_PRIOR:
        values[:, PRIOR] = _kl(lp, lr)
    if l0 is not None:
        values[:, MASKED] = _kl(l0, lr)
        if transform.decomposition == "bayes":
            values[:, SHIFT] = _kl(lp, l0)
    if token_weights is not None:
        skipped = (token_weights == 0)[:, None]
        values.masked_fill_(skipped, 0.0)
        log_normalizers.masked_fill_(skipped, 0.0)
    return values, log_normalizers


def logit_gradients(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    values: Tensor,  # (tokens, 5), of `divergences`
    log_normalizers: Tensor,  # (tokens, 4), of `divergences`
    coefficients: Tensor,  # (tokens, 5): d objective / d values
    transform: LogitTransform,
    *,
    out_student: Tensor,  # (tokens, >= vocab)
    out_masked_student: Tensor | None = None,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 5): of a second objective of the student's logits
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    row_gramian: Tensor | None = None,  # (tokens, 3)
) -> None:
    """Write d objective / d student logits into `out_student`, d / d masked student logits into `out_masked_student`.

    Each output may be the very tensor of one of the inputs (every element is read before it is written). A row whose
    coefficients are all 0 is not read and gets gradient 0; so do the columns past `vocab_size`. A coefficient that
    meets a value of +inf (student mass where the other distribution has none) counts as 0: there is no direction. NaN
    logits of a student show in its values; its gradient there is 0.

    `second_coefficients` and `out_second` form the gradient of a second objective of the student's logits in the same
    look (the two components of teacher_prior). `row_gramian` receives, per token, <lang, lang>, <lang, vis> and
    <vis, vis> of the unweighted logit gradients of the two components; rows with coefficients all 0 get 0.
    """
    student_z = _transformed(student, transform.student_scale, transform.student_softcap, transform)
    lp = student_z - log_normalizers[:, :1]
    lq = _transformed(teacher, transform.teacher_scale, transform.teacher_softcap, transform) - log_normalizers[:, 1:2]
    lr = (
        _transformed(masked_teacher, transform.teacher_scale, transform.teacher_softcap, transform)
        - log_normalizers[:, 2:3]
    )
    l0 = masked_z = None
    if masked_student is not None:
        masked_z = _transformed(masked_student, transform.student_scale, transform.student_softcap, transform)
        l0 = masked_z - log_normalizers[:, 3:4]

    def chain(z: Tensor) -> Tensor | float:
        """d transformed / d raw logit."""
        slope = transform.student_scale / transform.temperature
        if not transform.student_softcap:
            return slope
        return slope * (1.0 - (z * transform.temperature / transform.student_softcap).square())

    def term(weights: Tensor, column: int, log_ratio: Tensor, support: Tensor) -> Tensor:
        """weight * (log_ratio - its mean), 0 where the weight is 0, the value infinite, or the support empty."""
        value = values[:, column : column + 1]
        weight = torch.where(torch.isinf(value), 0.0, weights[:, column : column + 1])
        return torch.where(support & (weight != 0), weight * (log_ratio - value), 0.0)

    def student_gradient(weights: Tensor) -> Tensor:
        p = lp.exp()
        support = p > 0
        total = term(weights, ENTROPY, -lp, support) + term(weights, FULL, lp - lq, support)
        if transform.decomposition in USES_PRIOR:
            total = total + term(weights, PRIOR, lp - lr, support)
        if transform.decomposition == "bayes":
            assert l0 is not None
            total = total + term(weights, SHIFT, lp - l0, support)
        return torch.where(support & (total != 0), p * total * chain(student_z), 0.0)

    def masked_gradient(weights: Tensor) -> Tensor:
        assert l0 is not None
        assert masked_z is not None
        p0 = l0.exp()
        support = p0 > 0
        total = term(weights, MASKED, l0 - lr, support)
        return torch.where(support & (total != 0), p0 * total * chain(masked_z), 0.0)

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
        lang, vis = component_coefficients(transform.decomposition, active.to(values.dtype))
        if transform.decomposition == "teacher_prior":
            g_lang, g_vis = student_gradient(lang), student_gradient(vis)
            cross = (g_lang * g_vis).sum(-1)
        else:
            g_lang, g_vis = masked_gradient(lang), student_gradient(vis)
            cross = torch.zeros_like(values[:, 0])
        row_gramian.copy_(torch.stack([g_lang.square().sum(-1), cross, g_vis.square().sum(-1)], -1))
    for out, gradient in results:
        out[:, : transform.vocab_size] = gradient
        out[:, transform.vocab_size :] = 0


def component_coefficients(decomposition: str, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients (tokens, 5) of `weights`-weighted lang and vis on the five divergences."""
    lang = weights.new_zeros(weights.shape[0], VALUES)
    vis = torch.zeros_like(lang)
    vis[:, FULL] = weights
    if decomposition == "teacher_prior":
        lang[:, PRIOR] = weights
        vis[:, PRIOR] = -weights
    else:
        lang[:, MASKED] = weights
        if decomposition == "bayes":
            vis[:, PRIOR] = -weights
            vis[:, SHIFT] = weights
    return lang, vis
