"""What the calls compute, on whole logits in plain torch, in the dtype given: the textbook in ten lines.

For finite logits without options. Autograd forms the gradients. Benchmarks compare with it, in float64 and in float32.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:  # (tokens, vocab) logits
    """KL(p || q) of every token, (tokens,)."""
    log_p = student.log_softmax(-1)
    return (log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(-1)


def visual_target(teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor) -> Tensor:
    """log q*, up to a constant a token: q* is proportional to q p0 / r."""
    return masked_student.log_softmax(-1) + teacher.log_softmax(-1) - masked_teacher.log_softmax(-1)


def decomposed_kl(
    student: Tensor,  # (tokens, vocab) logits
    teacher: Tensor,
    masked_teacher: Tensor,
    masked_student: Tensor | None,  # None: teacher_prior
) -> dict[str, Tensor]:
    """standard, vis, lang and, with a masked student, dependency of every token, (tokens,) each."""
    standard = reverse_kl(student, teacher)
    if masked_student is None:
        lang = reverse_kl(student, masked_teacher)
        return {"standard": standard, "vis": standard - lang, "lang": lang}
    p0 = masked_student.detach()
    return {
        "standard": standard,
        "vis": reverse_kl(student, visual_target(teacher, masked_teacher, p0)),
        "lang": reverse_kl(p0, masked_teacher),
        "dependency": reverse_kl(teacher, masked_teacher),
    }


def linear_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """`reverse_kl` from hidden states (tokens, width) and heads (vocab, width)."""
    return reverse_kl(student_hidden @ student_weight.t(), teacher_hidden @ teacher_weight.t())


def linear_decomposed_kl(
    student_hidden: Tensor,  # (tokens, student width)
    student_weight: Tensor,  # (vocab, student width)
    teacher_hidden: Tensor,  # (tokens, teacher width)
    teacher_weight: Tensor,  # (vocab, teacher width)
    masked_teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_student_hidden: Tensor | None,  # (tokens, student width); None: teacher_prior
) -> dict[str, Tensor]:
    """`decomposed_kl` from hidden states and heads."""
    return decomposed_kl(
        student_hidden @ student_weight.t(),
        teacher_hidden @ teacher_weight.t(),
        masked_teacher_hidden @ teacher_weight.t(),
        None if masked_student_hidden is None else masked_student_hidden @ student_weight.t(),
    )
