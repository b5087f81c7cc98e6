"""Textbook formulas in plain autograd, and awkward inputs: the oracle of the kernel tests. Shares no code with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.places import here

KINDS = ("reverse_kl", "prior", "visual")  # two, three and four streams
STREAMS = {"reverse_kl": 2, "prior": 3, "visual": 4}
INPUTS = ("random", "peaked", "offset", "holes")


def log_probs(
    logits: Tensor,  # (tokens, >= vocab)
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    z = logits[..., :vocab_size] * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    found = (z / temperature).log_softmax(-1)
    return found if smoothing == 0 else ((1 - smoothing) * found.exp() + smoothing / z.shape[-1]).log()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def visual_target(
    log_p0: Tensor, log_q: Tensor, log_r: Tensor, ratio_bound: float = 0.0, ratio_floor: float = 0.0
) -> Tensor:
    """log q*, q* proportional to q p0 / r."""
    ratio = log_p0 - log_r
    if ratio_bound:
        ratio = ratio.clamp(-ratio_bound, ratio_bound)
    if ratio_floor:
        ratio = torch.where(log_q >= log_q.amax(-1, keepdim=True) + math.log(ratio_floor), ratio, 0.0)
    return (log_q + ratio).log_softmax(-1)


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


def numbers(
    streams: list[Tensor],  # (tokens, >= vocab): student, teacher and, where they are, masked teacher, masked student
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    teacher_smoothing: float = 0.0,
    ratio_bound: float = 0.0,
    ratio_floor: float = 0.0,
) -> Tensor:
    """(tokens, 5), of finite logits: H(p), KL(p || q), KL(p || r) or KL(p || q*), KL(p0 || r), KL(q || r)."""
    of_student = student_scale, student_softcap, temperature, vocab_size
    of_teacher = teacher_scale, teacher_softcap, temperature, vocab_size, teacher_smoothing
    log_p = log_probs(streams[0], *of_student)
    log_q = log_probs(streams[1], *of_teacher)
    nothing = torch.zeros_like(log_p[:, 0])
    found = [-(log_p.exp() * log_p).sum(-1), kl(log_p, log_q), nothing, nothing, nothing]
    if len(streams) > 2:
        log_r = log_probs(streams[2], *of_teacher)
        found[2] = kl(log_p, log_r)
    if len(streams) > 3:
        log_p0 = log_probs(streams[3], *of_student)
        found[2] = kl(log_p, visual_target(log_p0, log_q, log_r, ratio_bound, ratio_floor))
        found[3], found[4] = kl(log_p0, log_r), kl(log_q, log_r)
    return torch.stack(found, -1)


def logits(
    kind: str, tokens: int, width: int, inputs: str = "random", *, dtype: torch.dtype = torch.float64, seed: int = 0,
    scale: float = 3.0, distance: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """The streams of a kind, related as students and teachers are: `distance` apart around logits of size `scale`."""
    with torch.device("cpu"):
        streams = _drawn(kind, tokens, width, inputs, torch.Generator().manual_seed(seed * 7919 + tokens * 131 + width),
                         scale, distance)  # fmt: skip
    return [stream.to(here().device, dtype) for stream in streams]


def _drawn(
    kind: str, tokens: int, width: int, inputs: str, generator: torch.Generator, scale: float, distance: float
) -> list[Tensor]:
    def draw() -> Tensor:
        return torch.randn(tokens, width, generator=generator, dtype=torch.float64)

    common = draw() * scale
    streams = [common + draw() * distance for _ in range(STREAMS[kind])]
    for index, stream in enumerate(streams):
        if inputs == "peaked":  # probabilities of 1 and 0 beside others
            stream[torch.rand(tokens, width, generator=generator) < 0.1] += 60.0
            stream[torch.rand(tokens, width, generator=generator) < 0.1] -= 60.0
        elif inputs == "offset":  # what softmax does not see, and rounding does
            stream += 200.0 * (index + 1) * (-1) ** index
    if inputs == "holes":
        everywhere = torch.rand(tokens, width, generator=generator) < 0.2
        everywhere[:, 0] = False
        for stream in streams:
            stream[everywhere] = -math.inf
        streams[0][:, width // 2 :: 5] = -math.inf  # a student without mass where the teachers have some
        streams[0][:, 0] = 1.0
        for index, stream in enumerate(streams[1:], start=1):  # mass where another stream has none, in one row each
            if tokens > index:
                stream[index, width // (index + 2)] = -math.inf
    return streams
