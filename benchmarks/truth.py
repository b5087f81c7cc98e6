"""Losses and gradients in fp64 from the very inputs, widened, and how far a result is from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gates import BLOCK, relative_error
from benchmarks.inputs import Streams

STUDENTS = ("student", "masked_student")
# Logits of some of the four streams, (tokens, vocab) each, by name -> the loss of every token, (tokens,).
Losses = Callable[..., Tensor]


class Errors(NamedTuple):
    """The loss's relative error; a gradient's largest error over its largest entry, the worst of all hidden states'."""

    loss: float
    hidden_gradient: float
    head_gradient: float


class Result(NamedTuple):
    """What every way from hidden states to gradients returns."""

    loss: Tensor  # (), the sum over the tokens
    hidden: Sequence[Tensor]  # (tokens, width), of the students that carry gradient
    head: Tensor  # (vocab, width)


class Truth:
    """The sum over the tokens of `losses`, and its gradients, for the given streams."""

    def __init__(self, streams: Streams, losses: Losses, students: Sequence[str], teachers: Sequence[str]) -> None:
        """`students` carry gradient; `teachers` are the other streams that `losses` reads."""
        wide = {name: _wide_logits(getattr(streams, name), streams.student_head) for name in students}
        constant = {name: _wide_logits(getattr(streams, name), _head_of(streams, name)) for name in teachers}
        self.largest_logit = max(logits.abs().max().item() for logits in (wide | constant).values())
        self.loss = 0.0
        self._logit_gradients = {name: torch.empty_like(logits) for name, logits in wide.items()}
        for start in range(0, streams.tokens, 16):
            part = slice(start, start + 16)
            leaves = {name: logits[part].clone().requires_grad_() for name, logits in wide.items()}
            loss = losses(**leaves, **{name: logits[part] for name, logits in constant.items()}).sum()
            for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                self._logit_gradients[name][part] = gradient
            self.loss += loss.item()
        self._hidden = {name: getattr(streams, name).detach().double() for name in students}
        head = streams.student_head.detach()
        self._hidden_gradients = [torch.zeros_like(hidden) for hidden in self._hidden.values()]
        for start in range(0, head.shape[0], BLOCK):
            part = slice(start, start + BLOCK)
            block = head[part].double()
            for result, gradient in zip(self._hidden_gradients, self._logit_gradients.values(), strict=True):
                result += gradient[:, part] @ block

    def errors(self, result: Result) -> Errors:
        exact = torch.tensor(self.loss, dtype=torch.float64)
        pairs = zip(result.hidden, self._hidden_gradients, strict=True)
        return Errors(
            relative_error(result.loss.detach().reshape(1).cpu(), exact.reshape(1)),
            torch.tensor([_over_largest([_differences(mine, theirs)]) for mine, theirs in pairs]).max().item(),
            self._head_error(result.head),
        )

    def _head_error(self, result: Tensor) -> float:
        """In blocks of rows: the whole gradient in fp64 takes more than a gigabyte at the benchmarks' sizes."""
        blocks = []
        for start in range(0, result.shape[0], BLOCK):
            part = slice(start, start + BLOCK)
            exact = sum(
                gradient[:, part].t() @ hidden
                for gradient, hidden in zip(self._logit_gradients.values(), self._hidden.values(), strict=True)
            )
            assert isinstance(exact, Tensor)
            blocks.append(_differences(result[part], exact))
        return _over_largest(blocks)


def _differences(result: Tensor, exact: Tensor) -> Tensor:  # (2,)
    """The largest difference and the largest entry."""
    return torch.stack([(result.detach().double() - exact).abs().max(), exact.abs().max()])


def _over_largest(blocks: Sequence[Tensor]) -> float:
    """Of all blocks. NaN anywhere gives NaN, which `max` of Python would lose."""
    difference, largest = torch.stack(list(blocks)).amax(0).tolist()
    return difference / largest if largest else difference


def _head_of(streams: Streams, name: str) -> Tensor:
    return streams.student_head if name in STUDENTS else streams.teacher_head


def _wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    wide = hidden.detach().double()
    return torch.cat([wide @ block.double().t() for block in head.detach().split(BLOCK)], 1)
