"""Rounding: errors of values and gradients against fp64 are at most twice those of plain autograd in the same dtype.

The inputs are those that cancel: logits with an offset, rows with nearly all mass on one entry, equal distributions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_formulas import DECOMPOSITIONS, textbook
from vgs_kernels import BackendUnavailableError, backend
from vgs_kernels import OldDecomposedKL as DecomposedKL
from vgs_kernels import old_decomposed_kl as decomposed_kl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/test_decomposed_kl_triton.py runs this file so
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {True: ["triton"], False: ["reference", "triton" if DEVICE == "cuda" else "native"]}[INTERPRETED]


def _streams(kind: str, vocab: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(8, vocab, generator=generator, dtype=torch.float64) * scale

    if kind == "deterministic":  # the same entry holds all but a millionth of every row's mass
        found = [noise(1) for _ in range(4)]
        for logits in found:
            logits[:, vocab // 3] += math.log(vocab) + 14
        return found
    if kind == "equal":
        common = noise(2)
        return [common + noise(1e-3) for _ in range(4)]
    scale, offset = {"random": (2, 0), "wide": (8, 0), "peaked": (1e4, 0), "offset": (2, 1000)}[kind]
    return [noise(scale) + offset for _ in range(4)]


def _values_and_gradients(parts: Callable[..., Any], streams: list[Tensor], decomposition: str) -> dict[str, Tensor]:
    student, teacher, masked_teacher, masked_student = streams
    leaves = {"student": student.clone().requires_grad_()}
    if decomposition != "teacher_prior":
        leaves["masked_student"] = masked_student.clone().requires_grad_()
    result = parts(leaves["student"], teacher, masked_teacher, leaves.get("masked_student"), decomposition)
    if isinstance(result, DecomposedKL):
        result = result._asdict()
    found = {name: result[name].detach() for name in ("lang", "vis")}
    for name in found.copy():
        gradients = torch.autograd.grad(
            result[name].sum(), list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found |= {f"d {name} / d {leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "wide", "peaked", "offset", "deterministic", "equal"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_error_is_at_most_twice_that_of_plain_torch(decomposition: str, kind: str, name: str) -> None:
    try:
        backend.resolve("decomposed_kl", torch.device(DEVICE), name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))

    if name == "triton" and INTERPRETED:
        from tests.triton_support import interpreter  # needs triton, which the other backends do not

        interpreter.install()

    def ours(*arguments: Any) -> DecomposedKL:
        return decomposed_kl(*arguments[:4], decomposition=arguments[4], backend=name)

    cases = [(torch.float32, 1000), (torch.bfloat16, 1031)]
    if not INTERPRETED:  # a minute each
        cases += [(torch.float32, 20011), (torch.bfloat16, 40009)]  # in bf16 maxima repeat
    for seed, (dtype, vocab) in enumerate(cases):
        streams = [logits.to(DEVICE, dtype) for logits in _streams(kind, vocab, seed)]
        exact = _values_and_gradients(textbook, [logits.double() for logits in streams], decomposition)
        plain = _values_and_gradients(textbook, streams, decomposition)
        for what, got in _values_and_gradients(ours, streams, decomposition).items():
            truth = exact[what]
            # Four roundings of the result, because plain torch may be exact by luck; and what vanishes in float32 may
            # vanish here.
            luck = 4 * torch.finfo(dtype).eps * truth.norm() + 1e-30
            allowed = 2 * (plain[what] - truth).norm() + luck
            error = (got - truth).norm()
            assert error <= allowed, f"{what}, {dtype}, {vocab}: {error / allowed:.3g} times what is allowed"
