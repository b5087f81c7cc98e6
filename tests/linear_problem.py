"""One problem of the linear calls, its textbook answer in plain autograd, and small helpers of their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import textbook
from tests.places import here
from vgs_kernels import LinearReverseKL, LMHead, linear_reverse_kl
from vgs_kernels.linear import linear_decomposed_kl
from vgs_kernels.types import LinearDecomposedKL

DECOMPOSITIONS = ("vgs", "teacher_prior")
TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 11, 8, 12, 61
HEADS: list[dict[str, Any]] = [{}, {"bias": True, "logit_scale": 0.7}, {"softcap": 4.0, "bias": True}]


class Problem:
    """Inputs of one call; `requires_grad` on everything of the student that sees."""

    def __init__(
        self,
        decomposition: str | None = None,  # None: reverse KL alone
        *,
        dtype: torch.dtype | None = None,  # None: the widest of the place
        tokens: int = TOKENS,
        vocab: int = VOCAB,
        teacher_vocab: int | None = None,
        width: int = WIDTH,
        bias: bool = False,
        seed: int = 0,
        scale: float = 1.0,
        **head: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        device, dtype = here().device, dtype or here().dtype

        def normal(*shape: int, factor: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
            return (drawn * factor).to(device, dtype)

        self.decomposition = decomposition
        self.hidden = normal(tokens, width).requires_grad_()
        self.masked_hidden = normal(tokens, width) if decomposition == "vgs" else None
        self.teacher_hidden = normal(tokens, TEACHER_WIDTH)
        self.masked_teacher_hidden = normal(tokens, TEACHER_WIDTH) if decomposition else None
        self.weight = normal(vocab, width, factor=scale).requires_grad_()
        self.bias = normal(vocab).requires_grad_() if bias else None
        self.head = LMHead(self.weight, self.bias, **head)
        self.teacher_head = LMHead(normal(teacher_vocab or vocab, TEACHER_WIDTH), **head)
        weights = torch.rand(tokens, generator=generator, device="cpu")
        self.token_weights: Tensor | None = weights.to(device, torch.float64)

    @property
    def students(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def all_hidden(self) -> list[Tensor]:
        given = (self.hidden, self.masked_hidden, self.teacher_hidden, self.masked_teacher_hidden)
        return [t for t in given if t is not None]

    def call(self, **options: Any) -> LinearDecomposedKL:
        assert self.decomposition is not None
        assert self.masked_teacher_hidden is not None
        options = {"token_weights": self.token_weights, "decomposition": self.decomposition} | options
        return linear_decomposed_kl(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.masked_teacher_hidden,
            self.masked_hidden, **options,
        )  # fmt: skip

    def reverse_kl(self, **options: Any) -> LinearReverseKL:
        options = {"token_weights": self.token_weights} | options
        return linear_reverse_kl(self.hidden, self.head, self.teacher_hidden, self.teacher_head, **options)

    def logits(self) -> list[Tensor]:
        """Student, teacher, masked teacher, masked student, as far as they are given."""

        def project(hidden: Tensor, head: LMHead) -> Tensor:
            z = hidden @ head.weight.t()
            return z if head.bias is None else z + head.bias

        found = [project(self.hidden, self.head), project(self.teacher_hidden, self.teacher_head)]
        if self.masked_teacher_hidden is not None:
            found.append(project(self.masked_teacher_hidden, self.teacher_head))
        if self.masked_hidden is not None:
            found.append(project(self.masked_hidden, self.head).detach())
        return found

    def textbook(self, **options: Any) -> dict[str, Tensor]:
        """Every part of every token, (tokens,)."""
        found = textbook.numbers(
            self.logits(), student_scale=self.head.logit_scale, teacher_scale=self.teacher_head.logit_scale,
            student_softcap=self.head.softcap or 0.0, teacher_softcap=self.teacher_head.softcap or 0.0, **options,
        )  # fmt: skip
        entropy, standard, third, language, dependency = found.unbind(1)
        if self.decomposition == "teacher_prior":
            return {"standard": standard, "vis": standard - third, "lang": third, "entropy": entropy}
        if self.decomposition is None:
            return {"kl": standard, "entropy": entropy}
        return {"standard": standard, "vis": third, "lang": language, "entropy": entropy, "dependency": dependency}

    def teacher_log_probs(self, **options: Any) -> list[Tensor]:
        """log q and log r, (tokens, vocab)."""
        head = self.teacher_head
        return [textbook.log_probs(z, head.logit_scale, head.softcap or 0.0, **options) for z in self.logits()[1:3]]


def gradients(value: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True, **options)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


def assert_all_close(got: list[Any], expected: list[Any], **tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-10} | tolerance))


def chunk_bytes(problem: Problem, tokens: int) -> int:
    """So many that `tokens` rows have their logits in memory at a time."""
    itemsize = 4 if problem.hidden.element_size() == 2 else problem.hidden.element_size()
    vocab = max(problem.head.weight.shape[0], problem.teacher_head.weight.shape[0])
    return tokens * len(problem.all_hidden) * vocab * itemsize
