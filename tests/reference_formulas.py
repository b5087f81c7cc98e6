"""Textbook formulas of the decomposed reverse KL in plain autograd, and awkward inputs: the oracle of the kernel tests.

Nothing here shares code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECOMPOSITIONS = ("teacher_prior", "bayes", "matched")


def log_probs(
    logits: Tensor,  # (tokens, >= vocab)
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    z = logits[..., :vocab_size] * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    found = (z / temperature).log_softmax(-1)
    return found if smoothing == 0 else ((1 - smoothing) * found.exp() + smoothing / z.shape[-1]).log()


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
    teacher_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """lang, vis, full and entropy per token, differentiable by plain autograd, for finite logits."""
    of_student = student_scale, student_softcap, temperature, vocab_size
    of_teacher = teacher_scale, teacher_softcap, temperature, vocab_size, teacher_smoothing
    lp = log_probs(student, *of_student)
    lq, lr = (log_probs(logits, *of_teacher) for logits in (teacher, masked_teacher))
    p = lp.exp()
    full = (p * (lp - lq)).sum(-1)
    entropy = -(p * lp).sum(-1)
    if decomposition == "teacher_prior":
        return {"lang": (p * (lp - lr)).sum(-1), "vis": (p * (lr - lq)).sum(-1), "full": full, "entropy": entropy}
    assert masked_student is not None
    l0 = log_probs(masked_student, *of_student)
    lang = (l0.exp() * (l0 - lr)).sum(-1)
    vis = full if decomposition == "matched" else (p * ((lp - l0.detach()) - (lq - lr))).sum(-1)
    return {"lang": lang, "vis": vis, "full": full, "entropy": entropy}


def visual_weights(
    log_q: Tensor,  # (tokens, vocab)
    log_r: Tensor,  # (tokens, vocab)
    sampled: Tensor,  # (tokens,)
    token_steering: float,
    plausibility: float,
) -> Tensor:
    """1 + s (1 - min(q, r) / max(q, r)) at the sampled token; 0 where it is implausible to both teachers. (tokens,)"""
    q, r = log_q.exp(), log_r.exp()
    q_sampled, r_sampled = (t.gather(1, sampled[:, None]).squeeze(1) for t in (q, r))
    ratio = torch.minimum(q_sampled, r_sampled) / torch.maximum(q_sampled, r_sampled)
    implausible = (q_sampled < plausibility * q.amax(-1)) & (r_sampled < plausibility * r.amax(-1))
    return torch.where(implausible, 0.0, 1 + token_steering * (1 - ratio))


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
