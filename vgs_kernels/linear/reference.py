"""What `linear_reverse_kl` and `linear_decomposed_kl` compute, on whole logits in plain torch, in the dtype given.

For finite logits without options. Autograd forms the gradients. Self-test and benchmarks compare with it.
"""

from __future__ import annotations

from torch import Tensor


def linear_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """KL(p || q) of every token, (tokens,)."""
    log_p = (student_hidden @ student_weight.t()).log_softmax(-1)  # (tokens, vocab)
    log_q = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear_decomposed_kl(
    student_hidden: Tensor,  # (tokens, student width)
    student_weight: Tensor,  # (vocab, student width)
    teacher_hidden: Tensor,  # (tokens, teacher width)
    teacher_weight: Tensor,  # (vocab, teacher width)
    masked_teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_student_hidden: Tensor | None,  # (tokens, student width); None: teacher_prior
) -> dict[str, Tensor]:
    """standard, vis, lang and, with a masked student, dependency of every token, (tokens,) each."""
    log_p = (student_hidden @ student_weight.t()).log_softmax(-1)  # (tokens, vocab)
    log_q, log_r = ((h @ teacher_weight.t()).log_softmax(-1) for h in (teacher_hidden, masked_teacher_hidden))
    p = log_p.exp()
    standard = (p * (log_p - log_q)).sum(-1)
    if masked_student_hidden is None:
        return {"standard": standard, "vis": (p * (log_r - log_q)).sum(-1), "lang": (p * (log_p - log_r)).sum(-1)}
    log_p0 = (masked_student_hidden @ student_weight.t()).detach().log_softmax(-1)
    target = (log_p0 + log_q - log_r).log_softmax(-1)
    return {
        "standard": standard,
        "vis": (p * (log_p - target)).sum(-1),
        "lang": (log_p0.exp() * (log_p0 - log_r)).sum(-1),
        "dependency": (log_q.exp() * (log_q - log_r)).sum(-1),
    }
