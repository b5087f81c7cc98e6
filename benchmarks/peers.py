"""What the kernels are compared with: plain torch, compiled or not, TRL and Liger, each as its authors publish it.

Every way takes the same streams and returns loss and gradients, so that one way of timing and one gate serve all.
TRL: `trl.kernels`, chunks of 4096 tokens and 32768 entries, fp32 tiles. Liger, chunked: compiled, chunks of 1024
tokens; Liger, fused: its Triton kernel. Both with beta 1, which is the reverse KL.

Cross entropy from hidden states is another loss, without a teacher: three of our four products. Its best kernels show
how near to their products others come, so they stand beside ours on a GPU where they are installed: CCE as its README
calls it, quack's with the chunks that it chooses, torch's own with its options left at "auto".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.gates import accumulation_dtype
from benchmarks.inputs import Streams
from benchmarks.methods import OBJECTIVES
from benchmarks.truth import Objective, Result

Way = Callable[[Streams], Result]


def plain(objective: Objective, streams: Streams, logits_dtype: torch.dtype | None = None) -> Result:
    """Plain torch over full logits: of that dtype, or of the inputs' own; the softmax in fp32."""
    hidden = [getattr(streams, name) for name in (*objective.students, *objective.constants)]
    return _result(_losses(objective, logits_dtype, *hidden, *streams.heads), objective, streams)


def compiled_plain(objective: Objective, logits_dtype: torch.dtype | None = None) -> Way:
    """`plain` under torch.compile; the first call compiles."""
    compiled = torch.compile(_losses, dynamic=False)

    def call(streams: Streams) -> Result:
        hidden = [getattr(streams, name) for name in (*objective.students, *objective.constants)]
        return _result(compiled(objective, logits_dtype, *hidden, *streams.heads), objective, streams)

    return call


def _losses(objective: Objective, logits_dtype: torch.dtype | None, *tensors: Tensor) -> Tensor:
    """`tensors`: hidden states of the objective's students and constants, student head, teacher head."""
    *hidden, student_head, teacher_head = tensors
    names = (*objective.students, *objective.constants)
    logits = {}
    for name, states in zip(names, hidden, strict=True):
        head = student_head if name in ("student", "masked_student") else teacher_head
        if name in objective.constants:
            states, head = states.detach(), head.detach()
        dtype = logits_dtype or states.dtype
        logits[name] = (states.to(dtype) @ head.to(dtype).t()).to(accumulation_dtype(states.dtype))
    return objective.losses(**logits)


def _result(losses: Tensor, objective: Objective, streams: Streams) -> Result:
    """`losses`: of the tokens, or their sum."""
    loss = losses.sum()
    leaves = [getattr(streams, name) for name in objective.students]
    *hidden, head = torch.autograd.grad(loss, [*leaves, streams.student_head])
    return Result(loss.detach(), losses.detach() if losses.dim() else None, hidden, head)


def trl_reverse_kl(streams: Streams) -> Result:
    """TRL's chunked divergence, summed over the tokens."""
    return _result(_trl_losses(*_of_two(streams)), OBJECTIVES["standard"], streams)


def compiled_trl_reverse_kl() -> Way:
    """The same under torch.compile."""
    compiled = torch.compile(_trl_losses, dynamic=False)
    return lambda streams: _result(compiled(*_of_two(streams)), OBJECTIVES["standard"], streams)


def _trl_losses(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _entropy = ChunkedDivergenceFunction.apply(
        student, student_head, None, teacher, teacher_head, None, 1.0
    )  # fmt: skip
    return divergence


def liger_reverse_kl(streams: Streams, compiled: bool = True, chunk_size: int = 1024) -> Result:
    """Liger's chunked distillation loss (JSD with beta 1: reverse KL), summed over the tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=chunk_size
    )
    labels = torch.zeros(streams.tokens, dtype=torch.long, device=streams.student.device)
    mean = loss(*_of_two(streams), labels)
    return _result(mean * streams.tokens, OBJECTIVES["standard"], streams)


def liger_fused_reverse_kl(streams: Streams) -> Result:
    """Liger's fused linear JSD with beta 1, summed over the tokens. Its kernel is Triton: it needs a GPU."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    mean = LigerFusedLinearJSDFunction.apply(*_of_two(streams), None, 1.0)
    return _result(mean * streams.tokens, OBJECTIVES["standard"], streams)


def _of_two(streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return streams.student, streams.student_head, streams.teacher, streams.teacher_head


def cross_entropies(streams: Streams) -> dict[str, tuple[str, Callable[[], list[Tensor]]]]:
    """Label and call of each: gradients of hidden states and head of the cross entropy with tokens drawn at random."""
    generator = torch.Generator(streams.student.device).manual_seed(2)
    vocab = streams.student_head.shape[0]
    tokens = torch.randint(vocab, (streams.tokens,), generator=generator, device=streams.student.device)

    def gradients(loss: Callable[[Streams, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        leaves = [streams.student, streams.student_head]
        return lambda: list(torch.autograd.grad(loss(streams, tokens), leaves))

    return {name: (label, gradients(loss)) for name, (label, loss) in CROSS_ENTROPIES.items()}


def _cce(streams: Streams, tokens: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(streams.student, streams.student_head, tokens, reduction="sum")


def _quack(streams: Streams, tokens: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(streams.student, streams.student_head, tokens, reduction="sum")


def _torch_cross_entropy(streams: Streams, tokens: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13 and newer
    return functional.linear_cross_entropy(
        streams.student, streams.student_head, tokens, reduction="sum", options=options
    )


CROSS_ENTROPIES: dict[str, tuple[str, Callable[[Streams, Tensor], Tensor]]] = {
    "cross_entropy_cce": ("another loss: cross entropy of the student, CCE", _cce),
    "cross_entropy_quack": ("another loss: cross entropy of the student, quack", _quack),
    "cross_entropy_torch": ("another loss: cross entropy of the student, torch", _torch_cross_entropy),
}
