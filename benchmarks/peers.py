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

DECOMPOSITIONS = ("teacher_prior", "bayes", "matched")
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
    head: dict[str, Tensor]  # "lang", "vis" -> `Oracle.probe` of the gradient of the student head


class Oracle:
    """fp64 values and gradients of all decompositions on one set of streams.

    Head gradients are (vocab, width) in fp64, gigabytes. They are compared on every fourth row and the last 256, which
    meet every block of any kernel, through `probes`, a few random directions of the width, in which every entry takes
    part and the expected error is the Frobenius error.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        student, masked = _wide_logits([streams.student, streams.masked_student], streams.student_head)
        teacher, masked_teacher = _wide_logits([streams.teacher, streams.masked_teacher], streams.teacher_head)
        self.largest_logit = max(t.abs().max().item() for t in (student, masked, teacher, masked_teacher))
        device = student.device
        generator = torch.Generator(device).manual_seed(2)
        self.probes = torch.empty(streams.student.shape[1], 4, dtype=torch.float64, device=device)
        self.probes.normal_(generator=generator)
        vocab = student.shape[1]
        self.rows = torch.arange(vocab, device=device)
        self.rows = self.rows[(self.rows % 4 == 0) | (self.rows >= vocab - 256)]

        student, masked = student.requires_grad_(), masked.requires_grad_()
        values: dict[str, tuple[Tensor, Tensor]] = {}
        gradients: dict[tuple[str, str], Tensor] = {}
        for decomposition in DECOMPOSITIONS:
            lang, vis = plain_parts(decomposition, student, teacher, masked_teacher, masked)
            values[decomposition] = lang.detach(), vis.detach()
            lang_logits = masked if decomposition in USES_MASKED_STUDENT else student
            gradients[decomposition, "lang"] = torch.autograd.grad(lang.sum(), lang_logits, retain_graph=True)[0]
            gradients[decomposition, "vis"] = torch.autograd.grad(vis.sum(), student)[0]
        stacked = torch.cat(list(gradients.values()))  # one pass over the head serves all
        blocks = zip(stacked.split(BLOCK, 1), streams.student_head.detach().split(BLOCK), strict=True)
        hidden = torch.zeros(stacked.shape[0], streams.student.shape[1], dtype=torch.float64, device=device)
        for logit_block, head_block in blocks:
            hidden += logit_block @ head_block.double()
        hidden_of = dict(zip(gradients, hidden.split(streams.tokens), strict=True))
        self._exact = {}
        for decomposition, (lang, vis) in values.items():
            head = {}
            for component in ("lang", "vis"):
                leaf = streams.leaves(decomposition, component)[0].detach().double()
                head[component] = gradients[decomposition, component][:, self.rows].t() @ (leaf @ self.probes)
            of_hidden = {component: hidden_of[decomposition, component] for component in ("lang", "vis")}
            self._exact[decomposition] = Exact(lang, vis, of_hidden, head)

    def probe(self, head_gradient: Tensor) -> Tensor:
        """(vocab, width) -> (rows, probes), in fp64."""
        chosen = head_gradient.detach()[self.rows]
        return torch.cat([block.double() @ self.probes for block in chosen.split(BLOCK)])

    def parts(self, decomposition: str) -> Exact:
        return self._exact[decomposition]


def _wide_logits(hidden: list[Tensor], head: Tensor) -> tuple[Tensor, ...]:
    wide = torch.cat(hidden).detach().double()
    logits = torch.cat([wide @ block.double().t() for block in head.detach().split(BLOCK)], 1)
    return logits.split(hidden[0].shape[0])
