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
from .linear_decomposed_kl import linear_decomposed_kl
from .types import LMHead

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
    for op, (run, inputs) in _OPS.items():
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            for dtype in _DTYPES:
                given = [tensor.to(device, dtype) for tensor in inputs()]
                exact = run([tensor.double() for tensor in given], "reference")
                plain = _error(run(given, "reference"), exact)
                for name in backends.available("decomposed_kl" if op == "linear_decomposed_kl" else op, device):
                    error = plain if name == "reference" else _error(run(given, name), exact)
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
    student, masked_student = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    teacher, masked_teacher = inputs[2:]
    parts = decomposed_kl(student, teacher, masked_teacher, masked_student, decomposition="bayes", backend=backend)
    return [*parts, *torch.autograd.grad(parts.lang.sum() + 2 * parts.vis.sum(), (student, masked_student))]


def _linear_decomposed_kl(inputs: list[Tensor], backend: str) -> list[Tensor]:
    hidden, masked_hidden, head = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    teacher, masked_teacher, teacher_head = inputs[3:]
    parts = linear_decomposed_kl(
        hidden,
        LMHead(head),
        teacher,
        LMHead(teacher_head),
        masked_teacher_hidden=masked_teacher,
        masked_student_hidden=masked_hidden,
        backend=backend,
    )
    gradients = torch.autograd.grad(parts.lang + 2 * parts.vis, (hidden, masked_hidden, head))
    return [parts.lang, parts.vis, parts.logit_gramian, *gradients]


def _gradient_gramian(inputs: list[Tensor], backend: str) -> list[Tensor]:
    half = len(inputs) // 2
    return [gradient_gramian(inputs[:half], inputs[half:], backend=backend)]


def _combine_gradients(inputs: list[Tensor], backend: str) -> list[Tensor]:
    half = len(inputs) // 2
    out = [torch.empty_like(tensor) for tensor in inputs[:half]]
    weights = torch.tensor([0.2, 0.8], device=inputs[0].device)
    norm = combine_gradients(inputs[:half], inputs[half:], weights, out=out, max_norm=1.0, backend=backend)
    return [norm, *out]


_OPS: dict[str, tuple[Callable[[list[Tensor], str], list[Tensor]], Callable[[], list[Tensor]]]] = {
    "decomposed_kl": (_decomposed_kl, lambda: [3 * logits for logits in _random(*[(_TOKENS, _VOCAB)] * 4)]),
    "linear_decomposed_kl": (
        _linear_decomposed_kl,
        lambda: [part / 2 for part in _random(*[(_TOKENS, _WIDTH), (_TOKENS, _WIDTH), (_VOCAB, _WIDTH)] * 2)],
    ),
    "gradient_gramian": (_gradient_gramian, lambda: _random(*_SHAPES * 2)),
    "combine_gradients": (_combine_gradients, lambda: _random(*_SHAPES * 2)),
}
