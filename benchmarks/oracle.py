"""The fp64 truth that the gates compare with, from the very inputs, widened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.gates import BLOCK
from benchmarks.inputs import DECOMPOSITIONS, USES_MASKED_STUDENT, Streams
from benchmarks.peers import plain_parts


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
