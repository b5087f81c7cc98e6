"""The losses that the benchmarks measure: textbook formulas, our calls of the same, and what the products alone cost.

p and p0 are the student with and without the image, q and r the teacher. Sums over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gates import accumulation_dtype
from benchmarks.inputs import Streams
from benchmarks.truth import Objective, Result
from vgs_kernels import LinearDecomposedKL, linear_decomposed_kl, linear_reverse_kl
from vgs_kernels.linear.reference import reverse_kl, visual_target

GAMMA = 2.0
PRESERVATION = 1.0  # lambda
DEPENDENT_SHARE = 0.3  # of the tokens, by KL(q || r): those that language preservation looks at
MATCHED_GAMMA = 0.8
PRIOR_WEIGHTS = (0.3, 1.7)  # of lang and vis


def visual(student: Tensor, teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor) -> Tensor:
    return reverse_kl(student, visual_target(teacher, masked_teacher, masked_student.detach()))


def vgs(student: Tensor, teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor) -> Tensor:
    return reverse_kl(student, teacher) + GAMMA * visual(student, teacher, masked_teacher, masked_student)


def vgs_preserving(student: Tensor, teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor) -> Tensor:
    """With lambda KL(p0 || r) on the tokens that depend on the image most."""
    rows = dependent_rows(reverse_kl(teacher, masked_teacher))
    language = reverse_kl(masked_student[rows], masked_teacher[rows])
    steered = vgs(student, teacher, masked_teacher, masked_student)
    return steered.index_add(0, rows, PRESERVATION * language)


def dependent_rows(dependency: Tensor) -> Tensor:
    return dependency.detach().topk(math.ceil(DEPENDENT_SHARE * dependency.shape[0])).indices


def matched(student: Tensor, teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor) -> Tensor:
    language = reverse_kl(masked_student, masked_teacher)
    return MATCHED_GAMMA * reverse_kl(student, teacher) + (1 - MATCHED_GAMMA) * language


def prior_lang(student: Tensor, masked_teacher: Tensor) -> Tensor:
    return reverse_kl(student, masked_teacher)


def prior_vis(student: Tensor, teacher: Tensor, masked_teacher: Tensor) -> Tensor:
    return reverse_kl(student, teacher) - reverse_kl(student, masked_teacher)


def prior(student: Tensor, teacher: Tensor, masked_teacher: Tensor) -> Tensor:
    lang, vis = PRIOR_WEIGHTS
    return (lang - vis) * reverse_kl(student, masked_teacher) + vis * reverse_kl(student, teacher)


_ALL = ("teacher", "masked_teacher", "masked_student")
OBJECTIVES = {
    "standard": Objective(reverse_kl, ("student",), ("teacher",)),
    "vis": Objective(visual, ("student",), _ALL, 2.0),
    "vgs": Objective(vgs, ("student",), _ALL, 1 + 2 * GAMMA),
    "vgs_preserving": Objective(
        vgs_preserving, ("student", "masked_student"), ("teacher", "masked_teacher"), 1 + 2 * GAMMA
    ),
    "matched": Objective(matched, ("student", "masked_student"), ("teacher", "masked_teacher")),
    "prior_lang": Objective(prior_lang, ("student",), ("masked_teacher",)),
    "prior_vis": Objective(prior_vis, ("student",), ("teacher", "masked_teacher"), 2.0),
    "prior": Objective(prior, ("student",), ("teacher", "masked_teacher"), 3.0),
}


class Cost(NamedTuple):
    """How often a call multiplies tokens x width x vocabulary."""

    student_projections: float
    teacher_projections: float
    gradients: float  # a hidden and a head product each

    @property
    def products(self) -> float:
        return self.student_projections + self.teacher_projections + 2 * self.gradients


class Method(NamedTuple):
    """One of our calls. `ours` returns a result for each of the objectives."""

    label: str
    objectives: tuple[str, ...]  # of `OBJECTIVES`
    cost: Cost
    ours: Callable[..., list[Result]]  # (streams, options of the call)


def our_reverse_kl(streams: Streams, **options: object) -> list[Result]:
    student, teacher = streams.lm_heads
    result = linear_reverse_kl(streams.student, student, streams.teacher, teacher, **options)  # type: ignore[arg-type]
    return [_result(result.kl, result.per_token.kl, [streams.student], streams)]


def our_vgs(streams: Streams, **options: object) -> list[Result]:
    result = _decomposed(streams, "vgs", objective=(1.0, GAMMA, 0.0), **options)
    losses = result.per_token.standard + GAMMA * result.per_token.vis
    return [_result(result.objective, losses, [streams.student], streams)]


def our_standard_and_vis(streams: Streams, **options: object) -> list[Result]:
    """Both gradients of the same rows: what measuring the ratio of their norms takes."""
    result = _decomposed(streams, "vgs", **options)
    parts = (result.standard, result.per_token.standard), (result.vis, result.per_token.vis)
    return [_result(*part, [streams.student], streams, keep=True) for part in parts]


def our_vgs_preserving(streams: Streams, **options: object) -> list[Result]:
    """Language preservation is a reverse KL on the rows of highest KL(q || r), which the first call returns.

    The head's gradients of both calls are added to one tensor.
    """
    student, teacher = streams.lm_heads
    streams.student_head.grad = None
    steered = _decomposed(streams, "vgs", objective=(1.0, GAMMA, 0.0), accumulate_head_grad=True, **options)
    assert steered.objective is not None
    assert steered.per_token.dependency is not None
    rows = dependent_rows(steered.per_token.dependency)
    language = linear_reverse_kl(
        streams.masked_student[rows],
        student,
        streams.masked_teacher[rows],
        teacher,
        token_weights=torch.full((rows.shape[0],), PRESERVATION, device=rows.device),
        accumulate_head_grad=True,
        **options,  # type: ignore[arg-type]
    )
    loss = steered.objective + language.kl
    hidden = torch.autograd.grad(loss, [streams.student, streams.masked_student])
    head, streams.student_head.grad = streams.student_head.grad, None
    assert head is not None
    losses = steered.per_token.standard + GAMMA * steered.per_token.vis
    losses = losses.index_add(0, rows, PRESERVATION * language.per_token.kl)
    return [Result(loss.detach(), losses, hidden, head)]


def our_matched(streams: Streams, **options: object) -> list[Result]:
    """Both views as rows of one reverse KL."""
    student, teacher = streams.lm_heads
    dtype = accumulation_dtype(streams.student.dtype)
    weights = torch.tensor([MATCHED_GAMMA, 1 - MATCHED_GAMMA], dtype=dtype, device=streams.student.device)
    weights = weights.repeat_interleave(streams.tokens)
    result = linear_reverse_kl(
        torch.cat([streams.student, streams.masked_student]),
        student,
        torch.cat([streams.teacher, streams.masked_teacher]),
        teacher,
        token_weights=weights,
        **options,  # type: ignore[arg-type]
    )
    losses = (weights * result.per_token.kl).view(2, -1).sum(0)
    return [_result(result.kl, losses, [streams.student, streams.masked_student], streams)]


def our_prior(streams: Streams, **options: object) -> list[Result]:
    lang, vis = PRIOR_WEIGHTS
    result = _decomposed(streams, "teacher_prior", objective=(0.0, vis, lang), **options)
    losses = lang * result.per_token.lang + vis * result.per_token.vis
    return [_result(result.objective, losses, [streams.student], streams)]


def our_prior_parts(streams: Streams, **options: object) -> list[Result]:
    result = _decomposed(streams, "teacher_prior", **options)
    parts = (result.lang, result.per_token.lang), (result.vis, result.per_token.vis)
    return [_result(*part, [streams.student], streams, keep=True) for part in parts]


def student_entropy(streams: Streams) -> float:
    """Mean over the tokens, in nats."""
    student, teacher = streams.lm_heads
    with torch.no_grad():
        return linear_reverse_kl(streams.student, student, streams.teacher, teacher).per_token.entropy.mean().item()


def _decomposed(streams: Streams, decomposition: str, **options: object) -> LinearDecomposedKL:
    student, teacher = streams.lm_heads
    return linear_decomposed_kl(
        streams.student,
        student,
        streams.teacher,
        teacher,
        streams.masked_teacher,
        streams.masked_student if decomposition == "vgs" else None,
        decomposition=decomposition,
        **options,  # type: ignore[arg-type]
    )


def _result(loss: Tensor | None, losses: Tensor, hidden: list[Tensor], streams: Streams, keep: bool = False) -> Result:
    """`keep`: the graph, which another part of the same call needs, too."""
    assert loss is not None
    *gradients, head = torch.autograd.grad(loss, [*hidden, streams.student_head], retain_graph=keep)
    return Result(loss.detach(), losses, gradients, head)


METHODS = {
    "opd": Method("OPD: KL(p‖q)", ("standard",), Cost(1, 1, 1), our_reverse_kl),
    "vgs": Method("VGS, objective", ("vgs",), Cost(2, 2, 1), our_vgs),
    "vgs_preserving": Method(
        "VGS, objective, and LP on 30 % of the rows", ("vgs_preserving",),
        Cost(2 + DEPENDENT_SHARE, 2 + DEPENDENT_SHARE, 1 + DEPENDENT_SHARE), our_vgs_preserving,
    ),
    "vgs_parts": Method("VGS, standard and vis apart", ("standard", "vis"), Cost(2, 2, 2), our_standard_and_vis),
    "matched": Method("matched", ("matched",), Cost(2, 2, 2), our_matched),
    "prior": Method("teacher_prior, objective", ("prior",), Cost(1, 2, 1), our_prior),
    "prior_parts": Method(
        "teacher_prior, lang and vis apart", ("prior_lang", "prior_vis"), Cost(1, 2, 2), our_prior_parts
    ),
}  # fmt: skip
