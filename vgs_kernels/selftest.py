"""Every op on every backend that runs here, against the plain-torch reference in float64. A few seconds, for `doctor`.

The rule is that of the tests: the error against float64 is at most twice that of plain torch in the same dtype, plus a
floor of four units in the last place. Errors are relative to the largest entry of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as backends
from .combine_gradients import combine_gradients
from .decomposed_kl import decomposed_kl
from .gradient_gramian import gradient_gramian
from .linear import linear_decomposed_kl, linear_reverse_kl, reference
from .types import LMHead, accumulation_dtype

_DTYPES = (torch.float32, torch.bfloat16)
_TOKENS, _VOCAB, _WIDTH = 17, 1031, 48  # no multiples of any block
_SHAPES = ((129, 33), (7,), (65537,))  # of gradients, one above the chunk of every kernel


@dataclass(frozen=True)
class SelfTestResult:
    """One op on one backend in one dtype."""

    op: str
    device: str
    backend: str
    dtype: str
    error: float  # relative, against float64
    plain_error: float  # that of plain torch in the same dtype
    passed: bool


def self_test() -> list[SelfTestResult]:
    """Run every op on every backend of this machine's devices."""
    checks = []
    for op, subject in _SUBJECTS.items():
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            for dtype in _DTYPES:
                given = [tensor.to(device, dtype) for tensor in subject.inputs()]
                exact = subject.plain([tensor.double() for tensor in given])
                plain = _error(subject.plain(given), exact)
                for name in backends.available(subject.kernels or op, device):
                    error = _error(subject.run(given, name), exact)
                    passed = error <= 2 * plain + 4 * torch.finfo(dtype).eps  # NaN fails
                    checks.append(
                        SelfTestResult(op, device, name, str(dtype).removeprefix("torch."), error, plain, passed)
                    )
    return checks


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _decomposed_kl(inputs: list[Tensor], backend: str) -> list[Tensor]:
    student, *others = inputs
    student = student.clone().requires_grad_()
    parts = decomposed_kl(student, *others, decomposition="vgs", backend=backend)
    assert parts.dependency is not None
    gradients = torch.autograd.grad(parts.standard.sum() + 2 * parts.vis.sum(), student)
    return [parts.standard, parts.vis, parts.lang, parts.entropy, parts.dependency, *gradients]


def _linear_reverse_kl(inputs: list[Tensor], backend: str) -> list[Tensor]:
    hidden, head, teacher, teacher_head = inputs[0], inputs[2], inputs[3], inputs[5]
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    result = linear_reverse_kl(hidden, LMHead(head), teacher, LMHead(teacher_head), backend=backend)
    return [result.kl, *torch.autograd.grad(result.kl, (hidden, head))]


def _plain_reverse_kl(inputs: list[Tensor]) -> list[Tensor]:
    hidden, head, teacher, teacher_head = (_widened(inputs[i]) for i in (0, 2, 3, 5))
    kl = reference.linear_reverse_kl(hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head).sum()
    return [kl, *torch.autograd.grad(kl, (hidden, head))]


def _linear_decomposed_kl(inputs: list[Tensor], backend: str) -> list[Tensor]:
    hidden, masked_hidden, head, teacher, masked_teacher, teacher_head = inputs
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    parts = linear_decomposed_kl(
        hidden, LMHead(head), teacher, LMHead(teacher_head), masked_teacher, masked_hidden, decomposition="vgs",
        backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(parts.standard + 2 * parts.vis, (hidden, head))
    return [parts.standard, parts.vis, parts.lang, *gradients]


def _plain_decomposed_kl(inputs: list[Tensor]) -> list[Tensor]:
    hidden, masked_hidden, head, teacher, masked_teacher, teacher_head = (_widened(tensor) for tensor in inputs)
    parts = reference.linear_decomposed_kl(
        hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, masked_teacher, masked_hidden
    )
    standard, vis, lang = (parts[name].sum() for name in ("standard", "vis", "lang"))
    return [standard, vis, lang, *torch.autograd.grad(standard + 2 * vis, (hidden, head))]


def _widened(tensor: Tensor) -> Tensor:
    """A copy with the digits that logits of 16-bit inputs are to have."""
    return tensor.detach().to(accumulation_dtype(tensor.dtype), copy=True)


def _gradient_gramian(inputs: list[Tensor], backend: str) -> list[Tensor]:
    half = len(inputs) // 2
    return [gradient_gramian(inputs[:half], inputs[half:], backend=backend)]


def _combine_gradients(inputs: list[Tensor], backend: str) -> list[Tensor]:
    half = len(inputs) // 2
    out = [torch.empty_like(tensor) for tensor in inputs[:half]]
    weights = torch.tensor([0.2, 0.8], device=inputs[0].device)
    norm = combine_gradients(inputs[:half], inputs[half:], weights, out=out, max_norm=1.0, backend=backend)
    return [norm, *out]


def _on_reference(run: Callable[[list[Tensor], str], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda inputs: run(inputs, "reference")


@dataclass(frozen=True)
class _Subject:
    run: Callable[[list[Tensor], str], list[Tensor]]  # on a backend
    plain: Callable[[list[Tensor]], list[Tensor]]  # in plain torch
    inputs: Callable[[], list[Tensor]]
    kernels: str | None = None  # the op whose backends run it, where it has none of its own


def _hidden_and_heads() -> list[Tensor]:
    return [part / 2 for part in _random(*[(_TOKENS, _WIDTH), (_TOKENS, _WIDTH), (_VOCAB, _WIDTH)] * 2)]


_SUBJECTS = {
    "stream_kl": _Subject(
        _decomposed_kl, _on_reference(_decomposed_kl), lambda: [3 * z for z in _random(*[(_TOKENS, _VOCAB)] * 4)]
    ),
    "linear_reverse_kl": _Subject(_linear_reverse_kl, _plain_reverse_kl, _hidden_and_heads, "stream_kl"),
    "linear_decomposed_kl": _Subject(_linear_decomposed_kl, _plain_decomposed_kl, _hidden_and_heads, "stream_kl"),
    "gradient_gramian": _Subject(_gradient_gramian, _on_reference(_gradient_gramian), lambda: _random(*_SHAPES * 2)),
    "combine_gradients": _Subject(_combine_gradients, _on_reference(_combine_gradients), lambda: _random(*_SHAPES * 2)),
}
