"""What the kernels are compared with: plain torch, plain torch compiled, TRL, Liger; and the fp64 oracle of the gates.

Layer: benchmarks only. Every function takes the same inputs and returns values and gradients, so that one timing
harness and one gate serve all of them. Reverse KL everywhere: the expectation is under the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vgs_kernels import LinearDecomposedKL, LMHead, linear_decomposed_kl

USES_MASKED_STUDENT = ("bayes", "matched")
BLOCK = 8192  # vocabulary rows that the oracle widens to fp64 at a time


@dataclass
class Streams:
    """Hidden states of the four streams and the two heads. The student's require gradients."""

    student: Tensor  # (tokens, student width)
    masked_student: Tensor  # (tokens, student width)
    teacher: Tensor  # (tokens, teacher width)
    masked_teacher: Tensor  # (tokens, teacher width)
    student_head: Tensor  # (vocab, student width)
    teacher_head: Tensor  # (vocab, teacher width)

    def first(self, tokens: int) -> Streams:
        """The same heads with the first tokens only."""
        hidden = [
            h[:tokens].detach().clone() for h in (self.student, self.masked_student, self.teacher, self.masked_teacher)
        ]
        return Streams(hidden[0].requires_grad_(), hidden[1].requires_grad_(), *hidden[2:], *self.heads)

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        return self.student_head, self.teacher_head

    @property
    def tokens(self) -> int:
        return self.student.shape[0]

    def leaves(self, decomposition: str, component: str) -> list[Tensor]:
        """The tensors that a component's gradient reaches: hidden states, head."""
        masked = component == "lang" and decomposition in USES_MASKED_STUDENT
        return [self.masked_student if masked else self.student, self.student_head]

    def all_leaves(self, decomposition: str) -> list[Tensor]:
        masked = [self.masked_student] if decomposition in USES_MASKED_STUDENT else []
        return [self.student, *masked, self.student_head]


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


def plain_parts(
    decomposition: str,
    student: Tensor,  # (tokens, vocab) logits
    teacher: Tensor,
    masked_teacher: Tensor,
    masked_student: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # lang (tokens,), vis (tokens,)
    """The decomposition as one writes it in plain torch."""
    lp = F.log_softmax(student, -1)
    lq, lr = F.log_softmax(teacher, -1), F.log_softmax(masked_teacher, -1)
    p = lp.exp()
    if decomposition == "teacher_prior":
        return (p * (lp - lr)).sum(-1), (p * (lr - lq)).sum(-1)
    assert masked_student is not None
    l0 = F.log_softmax(masked_student, -1)
    lang = (l0.exp() * (l0 - lr)).sum(-1)
    if decomposition == "matched":
        return lang, (p * (lp - lq)).sum(-1)
    return lang, (p * ((lp - l0.detach()) - (lq - lr))).sum(-1)


def plain_divergence(student: Tensor, teacher: Tensor) -> Tensor:  # (tokens, vocab) logits -> (tokens,)
    lp, lq = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (lp.exp() * (lp - lq)).sum(-1)


def _logits(hidden: Tensor, head: Tensor, widen: bool) -> Tensor:
    logits = hidden @ head.t()
    return logits.float() if widen and logits.dtype in (torch.bfloat16, torch.float16) else logits


def naive_parts(decomposition: str, streams: Streams, widen: bool = True) -> tuple[Tensor, Tensor]:
    """Per-token parts from full logits. `widen`: the softmax of 16-bit logits in fp32, as a careful user has it."""
    with torch.no_grad():
        teacher = _logits(streams.teacher, streams.teacher_head, widen)
        masked_teacher = _logits(streams.masked_teacher, streams.teacher_head, widen)
    student = _logits(streams.student, streams.student_head, widen)
    masked = None
    if decomposition in USES_MASKED_STUDENT:
        masked = _logits(streams.masked_student, streams.student_head, widen)
    return plain_parts(decomposition, student, teacher, masked_teacher, masked)


def _component_gradients(decomposition: str, streams: Streams, lang: Tensor, vis: Tensor) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(lang, streams.leaves(decomposition, "lang"), retain_graph=True)
    return *first, *torch.autograd.grad(vis, streams.leaves(decomposition, "vis"))


def naive_decomposed(decomposition: str, streams: Streams, widen: bool = True) -> tuple[Tensor, ...]:
    """Both components and their gradients: hidden and head of lang, hidden and head of vis."""
    lang, vis = naive_parts(decomposition, streams, widen)
    return _component_gradients(decomposition, streams, lang.sum(), vis.sum())


def naive_objective(decomposition: str, streams: Streams, weights: Tensor) -> tuple[Tensor, ...]:
    lang, vis = naive_parts(decomposition, streams)
    objective = weights[0] * lang.sum() + weights[1] * vis.sum()
    return torch.autograd.grad(objective, streams.all_leaves(decomposition))


def naive_monolithic(streams: Streams, widen: bool = True) -> tuple[Tensor, ...]:
    """KL(p || q) forward and backward over full logits: what monolithic distillation costs in plain torch."""
    with torch.no_grad():
        teacher = _logits(streams.teacher, streams.teacher_head, widen)
    divergence = plain_divergence(_logits(streams.student, streams.student_head, widen), teacher).sum()
    return torch.autograd.grad(divergence, [streams.student, streams.student_head])


def compiled_decomposed(decomposition: str) -> Callable[[Streams], tuple[Tensor, ...]]:
    """`naive_decomposed` under torch.compile; the first call compiles."""
    import torch._functorch.config as functorch_config

    # Two gradients of one graph: its saved buffers must survive the first.
    functorch_config.donated_buffer = False

    def sums(student, masked_student, teacher, masked_teacher, student_head, teacher_head):  # type: ignore[no-untyped-def]
        streams = Streams(student, masked_student, teacher, masked_teacher, student_head, teacher_head)
        lang, vis = naive_parts(decomposition, streams)
        return lang.sum(), vis.sum()

    compiled = torch.compile(sums, dynamic=False)

    def call(streams: Streams) -> tuple[Tensor, ...]:
        lang, vis = compiled(
            streams.student, streams.masked_student, streams.teacher, streams.masked_teacher, *streams.heads
        )
        return _component_gradients(decomposition, streams, lang, vis)

    return call


def trl_divergence(streams: Streams) -> tuple[Tensor, ...]:
    """TRL's chunked reverse KL to one teacher, forward and backward; called once per teacher it gives lang and full."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _entropy = ChunkedDivergenceFunction.apply(
        streams.student, streams.student_head, None, streams.teacher, streams.teacher_head, None, 1.0
    )
    return torch.autograd.grad(divergence.sum(), [streams.student, streams.student_head])


def liger_divergence(streams: Streams, compiled: bool = True) -> tuple[Tensor, ...]:
    """Liger's chunked distillation loss to one teacher (JSD with beta 1: reverse KL), summed over the tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    labels = torch.zeros(streams.tokens, dtype=torch.long, device=streams.student.device)
    mean = loss(streams.student, streams.student_head, streams.teacher, streams.teacher_head, labels)
    return torch.autograd.grad(mean * streams.tokens, [streams.student, streams.student_head])


def ours(decomposition: str, streams: Streams, weights: Tensor | None = None, **options: object) -> LinearDecomposedKL:
    masked = streams.masked_student if decomposition in USES_MASKED_STUDENT else None
    return linear_decomposed_kl(
        streams.student,
        LMHead(streams.student_head),
        streams.teacher,
        LMHead(streams.teacher_head),
        masked_teacher_hidden=streams.masked_teacher,
        masked_student_hidden=masked,
        decomposition=decomposition,
        steering_weights=weights,
        **options,  # type: ignore[arg-type]
    )


def ours_decomposed(decomposition: str, streams: Streams, **options: object) -> tuple[Tensor, ...]:
    result = ours(decomposition, streams, **options)
    return _component_gradients(decomposition, streams, result.lang, result.vis)


def ours_objective(decomposition: str, streams: Streams, weights: Tensor, **options: object) -> tuple[Tensor, ...]:
    objective = ours(decomposition, streams, weights, **options).objective
    assert objective is not None
    return torch.autograd.grad(objective, streams.all_leaves(decomposition))


@dataclass
class Exact:
    """The fp64 truth of one decomposition on a few tokens, from the very inputs (widened, not regenerated)."""

    lang: Tensor  # (tokens,)
    vis: Tensor  # (tokens,)
    hidden: dict[str, Tensor]  # "lang", "vis" -> gradient of the hidden states that the component reaches
    head: dict[str, Tensor]  # "lang", "vis" -> gradient of the student head times `probes`


class Oracle:
    """fp64 values and gradients of all decompositions on one set of streams.

    Head gradients are (vocab, width) in fp64, gigabytes; they are compared through `probes`, a few random directions of
    the width, in which every entry takes part and the expected error is the Frobenius error.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        wide = {
            "student": (streams.student, streams.student_head),
            "masked_student": (streams.masked_student, streams.student_head),
            "teacher": (streams.teacher, streams.teacher_head),
            "masked_teacher": (streams.masked_teacher, streams.teacher_head),
        }
        self.logits = {name: _wide_logits(hidden, head) for name, (hidden, head) in wide.items()}
        self.largest_logit = max(logits.abs().max().item() for logits in self.logits.values())
        generator = torch.Generator(streams.student.device).manual_seed(2)
        self.probes = torch.empty(
            streams.student.shape[1], 4, dtype=torch.float64, device=streams.student.device
        ).normal_(generator=generator)

    def probe(self, head_gradient: Tensor) -> Tensor:
        """(vocab, width) -> (vocab, probes), in fp64."""
        return torch.cat([block.double() @ self.probes for block in head_gradient.detach().split(BLOCK)])

    def parts(self, decomposition: str) -> Exact:
        student = self.logits["student"].clone().requires_grad_()
        masked = self.logits["masked_student"].clone().requires_grad_()
        lang, vis = plain_parts(decomposition, student, self.logits["teacher"], self.logits["masked_teacher"], masked)
        lang_logits = masked if decomposition in USES_MASKED_STUDENT else student
        gradients = {
            "lang": torch.autograd.grad(lang.sum(), lang_logits, retain_graph=True)[0],
            "vis": torch.autograd.grad(vis.sum(), student)[0],
        }
        hidden, head = {}, {}
        for component, gradient in gradients.items():
            leaf, weight = self.streams.leaves(decomposition, component)
            blocks = zip(gradient.split(BLOCK, 1), weight.detach().split(BLOCK), strict=True)
            hidden[component] = sum(
                (left @ right.double() for left, right in blocks), torch.zeros_like(leaf, dtype=torch.float64)
            ).detach()
            head[component] = gradient.t() @ (leaf.detach().double() @ self.probes)
        return Exact(lang.detach(), vis.detach(), hidden, head)


def _wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    wide = hidden.detach().double()
    return torch.cat([wide @ block.double().t() for block in head.detach().split(BLOCK)], 1)
