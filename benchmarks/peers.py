"""What the kernels are compared with, and they themselves: plain torch, compiled or not, TRL and Liger.

Every function takes the same inputs and returns gradients, so that one way of timing and one gate serve all of them.
Reverse KL everywhere: the expectation is under the student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.gates import accumulation_dtype
from benchmarks.inputs import USES_MASKED_STUDENT, Streams
from benchmarks.truth import Result
from vgs_kernels import LMHead
from vgs_kernels import OldLinearDecomposedKL as LinearDecomposedKL
from vgs_kernels import old_linear_decomposed_kl as linear_decomposed_kl


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


def standard(student: Tensor, teacher: Tensor) -> Tensor:  # (tokens, vocab) logits -> (tokens,)
    """KL(p || q)."""
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
    divergence = standard(_logits(streams.student, streams.student_head, widen), teacher).sum()
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


def reverse_kl(streams: Streams, logits_dtype: torch.dtype | None = None) -> Result:
    """KL(p || q) in plain torch over full logits: of that dtype, or of the inputs' own; the softmax in fp32."""
    with torch.no_grad():
        teacher = _projected(streams.teacher, streams.teacher_head, logits_dtype)
    student = _projected(streams.student, streams.student_head, logits_dtype)
    return _with_gradients(standard(student, teacher).sum(), streams)


def _projected(hidden: Tensor, head: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or hidden.dtype
    return (hidden.to(dtype) @ head.to(dtype).t()).to(accumulation_dtype(hidden.dtype))


def compiled_reverse_kl(logits_dtype: torch.dtype | None = None) -> Callable[[Streams], Result]:
    """`reverse_kl` under torch.compile; the first call compiles."""

    def divergence(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
        target = _projected(teacher, teacher_head, logits_dtype)
        return standard(_projected(student, student_head, logits_dtype), target).sum()

    compiled = torch.compile(divergence, dynamic=False)
    return lambda streams: _with_gradients(compiled(streams.student, streams.teacher, *streams.heads), streams)


def _with_gradients(loss: Tensor, streams: Streams) -> Result:
    hidden, head = torch.autograd.grad(loss, [streams.student, streams.student_head])
    return Result(loss.detach(), [hidden], head)


def trl_reverse_kl(streams: Streams) -> Result:
    """TRL's chunked divergence to one teacher, summed over the tokens."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _entropy = ChunkedDivergenceFunction.apply(
        streams.student, streams.student_head, None, streams.teacher, streams.teacher_head, None, 1.0
    )
    return _with_gradients(divergence.sum(), streams)


def liger_reverse_kl(streams: Streams, compiled: bool = True, chunk_size: int = 1024) -> Result:
    """Liger's chunked distillation loss to one teacher (JSD with beta 1: reverse KL), summed over the tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=chunk_size
    )
    labels = torch.zeros(streams.tokens, dtype=torch.long, device=streams.student.device)
    mean = loss(streams.student, streams.student_head, streams.teacher, streams.teacher_head, labels)
    return _with_gradients(mean * streams.tokens, streams)


def liger_fused_reverse_kl(streams: Streams) -> Result:
    """Liger's fused linear JSD with beta 1, summed over the tokens. Its kernel is Triton: it needs a GPU."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    mean = LigerFusedLinearJSDFunction.apply(
        streams.student, streams.student_head, streams.teacher, streams.teacher_head, None, 1.0
    )
    return _with_gradients(mean * streams.tokens, streams)


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


def ours_reverse_kl(streams: Streams) -> Result:
    """KL(p || q): the visual part of `matched`."""
    return _with_gradients(ours("matched", streams).vis, streams)
