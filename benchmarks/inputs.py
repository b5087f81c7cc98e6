"""Hidden states and heads that the benchmarks from hidden states share: spread-out, peaked and nearly converged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gates import BLOCK
from vgs_kernels import LMHead

STUDENTS = ("student", "masked_student")
TARGET_SHAPE = {"tokens": 512, "width": 1024, "teacher_width": 1024, "vocab": 151936}  # what targets are stated for


@dataclass
class Streams:
    """Hidden states of the four streams and the two heads. The student's require gradients."""

    student: Tensor  # (tokens, student width)
    masked_student: Tensor  # (tokens, student width)
    teacher: Tensor  # (tokens, teacher width)
    masked_teacher: Tensor  # (tokens, teacher width)
    student_head: Tensor  # (vocab, student width)
    teacher_head: Tensor  # (vocab, teacher width)

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        return self.student_head, self.teacher_head

    @property
    def lm_heads(self) -> tuple[LMHead, LMHead]:
        return LMHead(self.student_head), LMHead(self.teacher_head)

    @property
    def tokens(self) -> int:
        return self.student.shape[0]

    def head_of(self, name: str) -> Tensor:
        return self.student_head if name in STUDENTS else self.teacher_head


def random_heads(
    width: int, teacher_width: int, vocab: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher head with rows of norm 1 on average."""
    generator = torch.Generator(device).manual_seed(seed)
    student, teacher = (
        torch.empty(vocab, columns, dtype=dtype, device=device).normal_(0, columns**-0.5, generator=generator)
        for columns in (width, teacher_width)
    )
    return student.requires_grad_(), teacher


def random_streams(tokens: int, heads: tuple[Tensor, Tensor], seed: int = 1) -> Streams:
    """Logits of standard deviation 2, independent between the streams."""
    generator = torch.Generator(heads[0].device).manual_seed(seed)
    hidden = [
        torch.empty(tokens, head.shape[1], dtype=head.dtype, device=head.device).normal_(0, 2, generator=generator)
        for head in (heads[0], heads[0], heads[1], heads[1])
    ]
    return Streams(hidden[0].requires_grad_(), hidden[1].requires_grad_(), *hidden[2:], *heads)


def peaked_streams(tokens: int, heads: tuple[Tensor, Tensor], seed: int = 1) -> Streams:
    """Logits like a trained model's: sixteen candidates a token hold nearly all mass, mean entropy below 2 nats.

    The candidates' probabilities fall as 1 / rank², they are drawn from a Zipf law over the vocabulary (as tokens of
    text are) and shared by the streams, whose candidate logits differ by N(0, 1); everything else is background noise
    with a hundredth of the mass.
    """
    candidates = 16
    vocab = heads[0].shape[0]
    device = heads[0].device
    generator = torch.Generator(device).manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocab + 1, device=device, dtype=torch.float64)
    chosen = torch.multinomial(frequencies, tokens * candidates, replacement=True, generator=generator)
    chosen = chosen.reshape(tokens, candidates)
    # A candidate drawn twice would get twice the logit and all of the mass.
    repeated = (chosen[:, :, None] == chosen[:, None, :]).tril(-1).any(-1)
    ranks = torch.arange(1, candidates + 1, device=device)
    background = 2.0  # standard deviation of the other logits, so their log-sum-exp is about log(vocab) + 2
    heights = math.log(vocab) + background**2 / 2 + math.log(100) - 2 * ranks.log()
    hidden = []
    for head in (heads[0], heads[0], heads[1], heads[1]):
        width = head.shape[1]
        noise = torch.empty(tokens, candidates, device=device).normal_(generator=generator)
        peaks = torch.einsum("tc,tcw->tw", (heights + noise).masked_fill(repeated, 0), head.detach()[chosen].float())
        # The peaks' own projection on other rows is noise too; top it up to the background's deviation.
        missing = (background**2 - peaks.square().sum(1, keepdim=True) / width).clamp_min(0).sqrt()
        peaks += missing * torch.empty(tokens, width, device=device).normal_(generator=generator)
        hidden.append(peaks.to(head.dtype))
    return Streams(hidden[0].requires_grad_(), hidden[1].requires_grad_(), *hidden[2:], *heads)


class Rotation(NamedTuple):
    """A teacher's head that gives the student's logits for hidden states that went through `turn`."""

    student_head: Tensor  # (vocab, student width)
    teacher_head: Tensor  # (vocab, teacher width)
    turn: Tensor  # (teacher width, student width), orthonormal columns


def rotate_head(head: Tensor, teacher_width: int, seed: int = 3) -> Rotation:
    """Both heads round their own numbers, and no product is shared."""
    width = head.shape[1]
    generator = torch.Generator(head.device).manual_seed(seed)
    square = torch.empty(teacher_width, teacher_width, device=head.device).normal_(generator=generator)
    turn = torch.linalg.qr(square).Q[:, :width].contiguous()
    blocks = [(block.float() @ turn.t()).to(head.dtype) for block in head.detach().split(BLOCK)]
    return Rotation(head, torch.cat(blocks), turn)


def converging_streams(tokens: int, rotation: Rotation, deviation: float, divergence: float, seed: int = 1) -> Streams:
    """A student close to its teacher: KL(p || q) and KL(p0 || r) of every token near `divergence`, in nats.

    Logits have the given standard deviation over the vocabulary. What the image changes is a move of the hidden states
    by a tenth of their size; what the student has not learnt is a move in a random direction, as large as it takes.
    """
    student_head, teacher_head, turn = rotation
    generator = torch.Generator(student_head.device).manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.empty(tokens, turn.shape[1], device=turn.device).normal_(0, scale, generator=generator)

    masked = noise(deviation)
    seeing = masked + noise(deviation / 10)
    teachers, students = [], []
    for view in (seeing, masked):
        teachers.append((view @ turn.t()).to(student_head.dtype))
        student = _at_divergence(view, noise(1.0), student_head, teachers[-1], teacher_head, divergence)
        students.append(student.requires_grad_())
    return Streams(*students, *teachers, student_head, teacher_head)


def _at_divergence(
    view: Tensor, direction: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, divergence: float
) -> Tensor:
    """view + s * direction in the head's dtype, with s per token so that KL(student || teacher) is `divergence`.

    Bisection, before the hidden states are rounded to the head's dtype, which moves the divergence once more.
    """
    target = logits_fp32(teacher, teacher_head).log_softmax(-1)
    start, step = logits_fp32(view, head), logits_fp32(direction, head)
    low, high = (torch.full((view.shape[0], 1), exponent, device=view.device) for exponent in (-4.0, 0.5))
    for _ in range(20):
        middle = (low + high) / 2
        found = (start + 10**middle * step).log_softmax(-1)
        below = (found.exp() * (found - target)).sum(-1, keepdim=True) < divergence
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (view + 10**low * direction).to(head.dtype)


def logits_fp32(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head.T with fp32 operands, without an fp32 copy of the head."""
    wide = hidden.detach().float()
    return torch.cat([wide @ block.float().t() for block in head.detach().split(BLOCK)], 1)
