"""Textbook formulas of the decomposed reverse KL in plain autograd, and awkward inputs: the oracle of the kernel tests.

Nothing here shares code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECOMPOSITIONS = ("teacher_prior", "bayes", "matched")


def transformed(logits: Tensor, scale: float, softcap: float | None, temperature: float, vocab_size: int) -> Tensor:
    z = logits[..., :vocab_size] * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def textbook(
    student: Tensor,  # (tokens, vocab)
    teacher: Tensor,
    masked_teacher: Tensor,
    masked_student: Tensor | None,
    decomposition: str,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> dict[str, Tensor]:
    """lang, vis, full and entropy per token, differentiable by plain autograd, for finite logits."""
    vocab_size = vocab_size or student.shape[-1]
    lp = transformed(student, student_scale, student_softcap, temperature, vocab_size).log_softmax(-1)
    lq = transformed(teacher, teacher_scale, teacher_softcap, temperature, vocab_size).log_softmax(-1)
    lr = transformed(masked_teacher, teacher_scale, teacher_softcap, temperature, vocab_size).log_softmax(-1)
    p = lp.exp()
    full = (p * (lp - lq)).sum(-1)
    entropy = -(p * lp).sum(-1)
    if decomposition == "teacher_prior":
        return {"lang": (p * (lp - lr)).sum(-1), "vis": (p * (lr - lq)).sum(-1), "full": full, "entropy": entropy}
    assert masked_student is not None
    l0 = transformed(masked_student, student_scale, student_softcap, temperature, vocab_size).log_softmax(-1)
    lang = (l0.exp() * (l0 - lr)).sum(-1)
    vis = full if decomposition == "matched" else (p * ((lp - l0.detach()) - (lq - lr))).sum(-1)
    return {"lang": lang, "vis": vis, "full": full, "entropy": entropy}


def streams(
    decomposition: str,
    tokens: int,
    vocab: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 2.0,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """Random logits of the three or four streams; the students require gradients."""
    generator = torch.Generator().manual_seed(seed)
    count = 3 if decomposition == "teacher_prior" else 4
    found = []
    for index in range(count):
        logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * scale
        logits = logits.to(device=device, dtype=dtype)
        found.append(logits.requires_grad_(index in (0, 3)))
    return found
