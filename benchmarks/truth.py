"""Losses and gradients in fp64 from the very inputs, widened, and how far a result is from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gates import BLOCK, relative_error
from benchmarks.inputs import Streams


class Objective(NamedTuple):
    """A loss of the four streams: its formula on logits, and which streams it reads."""

    losses: Callable[..., Tensor]  # logits by the streams' names, (tokens, vocab) each -> (tokens,)
    students: tuple[str, ...]  # streams that carry gradient
    constants: tuple[str, ...]
    log_ratios: float = 1.0  # that its gradient adds up, by weight: each is a difference of rounded logits


class Result(NamedTuple):
    """What every way from hidden states to gradients returns."""

    loss: Tensor  # (), the sum over the tokens
    losses: Tensor | None  # (tokens,); None where a way has no more than the sum
    hidden: Sequence[Tensor]  # (tokens, width), of the objective's students
    head: Tensor  # (vocab, width)


class Errors(NamedTuple):
    """Of the sum and, in the 2-norm, of the tokens' losses: relative. Of a gradient: its largest error over its largest
    entry, the worst of all hidden states'.
    """

    loss: float
    losses: float | None
    hidden_gradient: float
    head_gradient: float


class Truth:
    """The sums over the tokens of some objectives, and their gradients, for the given streams."""

    def __init__(self, streams: Streams, objectives: Mapping[str, Objective]) -> None:
        self.streams, self.objectives = streams, objectives
        names = {name for objective in objectives.values() for name in (*objective.students, *objective.constants)}
        logits = {name: _wide_logits(getattr(streams, name), streams.head_of(name)) for name in sorted(names)}
        self.largest_logit = max(stream.abs().max().item() for stream in logits.values())
        self.losses: dict[str, Tensor] = {}  # (tokens,)
        self.sensitivity: dict[str, float] = {}  # of its gradient: relative, for an absolute error of its log ratios
        self._logit_gradients: dict[str, list[Tensor]] = {}  # of the objective's students
        for name, objective in objectives.items():
            leaves = [logits[student].detach().requires_grad_() for student in objective.students]
            constants = {constant: logits[constant] for constant in objective.constants}
            losses = objective.losses(**dict(zip(objective.students, leaves, strict=True)), **constants)
            self._logit_gradients[name] = list(torch.autograd.grad(losses.sum(), leaves))
            self.losses[name] = losses.detach()
            # An entry of a logit gradient is p (d - mean d), and d errs as the logits do.
            heaviest = max(leaf.detach().softmax(-1).max().item() for leaf in leaves)
            largest = max(gradient.abs().max().item() for gradient in self._logit_gradients[name])
            self.sensitivity[name] = objective.log_ratios * heaviest / largest if largest else 1.0
        self._hidden_gradients = self._through_head()

    def _through_head(self) -> dict[str, list[Tensor]]:
        """Hidden gradients of all objectives in one pass over the head."""
        head = self.streams.student_head.detach()
        stacked = torch.cat([gradient for gradients in self._logit_gradients.values() for gradient in gradients])
        hidden = stacked.new_zeros(stacked.shape[0], head.shape[1])
        for start in range(0, head.shape[0], BLOCK):
            part = slice(start, start + BLOCK)
            hidden += stacked[:, part] @ head[part].double()
        pieces = iter(hidden.split(self.streams.tokens))
        return {name: [next(pieces) for _ in gradients] for name, gradients in self._logit_gradients.items()}

    def errors(self, name: str, result: Result) -> Errors:
        exact = self.losses[name]
        pairs = zip(result.hidden, self._hidden_gradients[name], strict=True)
        return Errors(
            relative_error(result.loss.reshape(1), exact.sum().reshape(1)),
            None if result.losses is None else relative_error(result.losses, exact),
            torch.tensor([_over_largest([_differences(mine, theirs)]) for mine, theirs in pairs]).max().item(),
            self._head_error(name, result.head),
        )

    def _head_error(self, name: str, result: Tensor) -> float:
        """In blocks of rows: the whole gradient in fp64 takes more than a gigabyte at the benchmarks' sizes."""
        hidden = torch.cat(
            [getattr(self.streams, student).detach().double() for student in self.objectives[name].students]
        )
        gradients = torch.cat(self._logit_gradients[name])
        blocks = []
        for start in range(0, result.shape[0], BLOCK):
            part = slice(start, start + BLOCK)
            blocks.append(_differences(result[part], gradients[:, part].t() @ hidden))
        return _over_largest(blocks)


def _differences(result: Tensor, exact: Tensor) -> Tensor:  # (2,)
    """The largest difference and the largest entry."""
    return torch.stack([(result.detach().double() - exact).abs().max(), exact.abs().max()])


def _over_largest(blocks: Sequence[Tensor]) -> float:
    """Of all blocks. NaN anywhere gives NaN, which `max` of Python would lose."""
    difference, largest = torch.stack(list(blocks)).amax(0).tolist()
    return difference / largest if largest else difference


def _wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    wide = hidden.detach().double()
    return torch.cat([wide @ block.double().t() for block in head.detach().split(BLOCK)], 1)
