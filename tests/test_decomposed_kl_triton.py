"""The Triton kernels of `decomposed_kl` against float64, on a GPU or in Triton's interpreter.

On a machine with a GPU these tests run on it. Everywhere, `test_in_the_interpreter` runs this file once more in a
process where TRITON_INTERPRET=1 (it must be set before triton is imported), on CPU tensors, under the bounds guard.
What the interpreter cannot show: speed, races between programs, and the rounding of the GPU's exp2.

Tolerance: error against float64 at most twice that of plain torch (the reference backend) in the same dtype, plus FLOOR
times the magnitude.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tests.triton_support import interpreter  # noqa: E402
from vgs_kernels import BackendUnavailableError, backend  # noqa: E402
from vgs_kernels import old_decomposed_kl as decomposed_kl  # noqa: E402
from vgs_kernels.decomposed_kl import reference  # noqa: E402
from vgs_kernels.decomposed_kl import triton as kernels  # noqa: E402
from vgs_kernels.decomposed_kl.old_types import LogitTransform  # noqa: E402
from vgs_kernels.old_linear.visual_weights import SampledTokens  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU here; test_in_the_interpreter runs it"
)
FLOOR = 4e-6  # of the result's magnitude: a few float32 roundings of sums of up to 5000 terms
DECOMPOSITIONS = ("teacher_prior", "bayes", "matched")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """Runs every test of this file, and those of the rounding, in the interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "tests/test_accuracy.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " skipped" not in result.stdout.splitlines()[-1].replace("1 skipped", ""), result.stdout[-500:]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers are NaN, and known to the bounds guard."""
    if not INTERPRETED:
        yield
        return
    interpreter.install()
    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        fresh = original(self, *arguments, **named)
        if fresh.dtype.is_floating_point:
            fresh.fill_(math.nan)
        return interpreter.register(fresh)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield


def guard(*tensors: Tensor | None) -> Any:
    return interpreter.guard(*tensors) if INTERPRETED else nullcontext()


def transform(decomposition: str, vocab: int, **options: float) -> LogitTransform:
    settings = {"temperature": 1.0, "student_scale": 1.0, "teacher_scale": 1.0, "student_softcap": 0.0}
    settings |= {"teacher_softcap": 0.0} | options
    return LogitTransform(decomposition, vocab, **settings)


def logits(decomposition: str, tokens: int, width: int, dtype: torch.dtype, kind: str = "random") -> list[Any]:
    """Four streams (None for the one that is not used), related as students and teachers are."""
    generator = torch.Generator().manual_seed(tokens * 7919 + width)
    common = torch.randn(tokens, width, generator=generator) * 3
    streams = [common + torch.randn(tokens, width, generator=generator) for _ in range(4)]
    if kind == "peaked":
        for stream in streams:
            stream[torch.rand(tokens, width, generator=generator) < 0.2] = 1e4
            stream[torch.rand(tokens, width, generator=generator) < 0.2] = -1e4
    if kind == "holes":
        everywhere = torch.rand(tokens, width, generator=generator) < 0.2
        everywhere[:, 0] = False
        for stream in streams:
            stream[everywhere] = -math.inf
        streams[0][:, width // 2 :: 5] = -math.inf  # a student without mass where the teachers have some
        streams[0][:, 0] = 1.0
        if tokens > 1:
            streams[1][1, width // 3] = -math.inf  # student mass where the teacher has none, in some rows only
            streams[2][-1, width // 4] = -math.inf
            streams[3][-1, width // 3] = -math.inf
    if decomposition == "teacher_prior":
        streams[3] = None  # type: ignore[call-overload]
    return [None if s is None else s.to(dtype).to(DEVICE) for s in streams]


def double(streams: list[Any]) -> list[Any]:
    return [None if stream is None else stream.double() for stream in streams]


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """The tolerance of this file; infinities and NaN must be where plain torch has them."""
    ours, plain = ours.double(), plain.double()
    assert torch.equal(ours.isfinite(), plain.isfinite()), f"{what}: {ours} against {plain}"
    both = ours.isfinite() & exact.isfinite()
    zero = torch.zeros_like(exact)
    ours, plain, exact = (torch.where(both, x, zero) for x in (ours, plain, exact))
    if exact.numel() == 0:
        return
    magnitude = exact.abs().amax(-1, keepdim=True).clamp_min(1.0)
    error, allowed = (ours - exact).abs(), 2 * (plain - exact).abs().amax() + FLOOR * magnitude
    assert (error <= allowed).all(), f"{what}: error {(error / allowed).max():.3g} times what is allowed"


def check(streams: list[Any], settings: LogitTransform, out_dtype: torch.dtype | None = None) -> None:
    """Values, gradients, second gradient, Gramian and what normalisers follow from the statistics, of one problem."""
    tokens, device = streams[0].shape[0], streams[0].device
    generator = torch.Generator().manual_seed(5)
    coefficients = torch.randn(tokens, 5, generator=generator).to(device)
    second = torch.randn(tokens, 5, generator=generator).to(device) if streams[3] is None else None
    results: list[list[Tensor]] = []
    for module, inputs in ((kernels, streams), (reference, streams), (reference, double(streams))):
        dtype = out_dtype or inputs[0].dtype
        if inputs[0].dtype == torch.float64:
            dtype = torch.float64
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        outs = [None if s is None else torch.full(s.shape, math.nan, dtype=dtype, device=device) for s in inputs]
        out_second = None if second is None else torch.full_like(outs[0], math.nan)
        gramian = torch.full((tokens, 3), math.nan, dtype=accumulated, device=device)
        weights = coefficients.to(accumulated)
        seconds = None if second is None else second.to(accumulated)
        with guard(*inputs, *outs, out_second, gramian, weights, seconds):
            values, statistics = module.divergences(*inputs, settings)
            module.logit_gradients(
                *inputs, values, statistics, weights, settings, out_student=outs[0], out_masked_student=outs[3],
                second_coefficients=seconds, out_second=out_second, row_gramian=gramian,
            )  # fmt: skip
        sampled = torch.arange(tokens, device=device) * 7 % settings.vocab_size
        contribution = SampledTokens(sampled, inputs[1], inputs[2], values, statistics, settings).contribution
        found = [values, outs[0], gramian, contribution[:, None]]
        results.append(found + [out for out in (outs[3], out_second) if out is not None])
    names = ("values", "student gradient", "Gramian", "log q - log r", "other gradient")
    for name, ours, plain, exact in zip(names, *results, strict=True):
        assert_close(ours, plain, exact, f"{settings.decomposition} {name}")


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "peaked", "holes"])
def test_against_float64(decomposition: str, dtype: torch.dtype, kind: str) -> None:
    check(logits(decomposition, 3, 1000, dtype, kind), transform(decomposition, 1000))


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("vocab", [1, 3, 17, 1024, 4999])
def test_any_vocabulary(decomposition: str, vocab: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(logits(decomposition, 2, vocab, dtype), transform(decomposition, vocab))


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_scale_softcap_and_temperature(decomposition: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        streams = logits(decomposition, 2, 1030, dtype, "holes")
        check(streams, transform(decomposition, 1030, temperature=1.7, student_scale=0.3, teacher_scale=1.9))
        check(streams, transform(decomposition, 1030, temperature=0.6, student_softcap=5.0, teacher_softcap=30.0))


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", ["random", "peaked", "holes"])
def test_split_rows(decomposition: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are shared by several programs; the merged result is held to the same tolerance."""
    many = kernels.config.Device(kernels.config.INTERPRETER, processors=64, warp_size=32)
    if INTERPRETED:
        monkeypatch.setattr(kernels.config, "describe_device", lambda _device: many)
        assert kernels.config.split_row(many, kernels.config.geometry(many, 2), 2, 4999)[0] == 5
    for dtype in (torch.float32, torch.bfloat16):
        check(logits(decomposition, 2, 4999, dtype, kind), transform(decomposition, 4999))


@runs_kernels
def test_strided_rows_and_uneven_padding() -> None:
    """Streams padded differently, rows far apart, one stream misaligned; nothing outside `vocab_size` is touched."""
    for decomposition in DECOMPOSITIONS:
        streams = logits(decomposition, 2, 1100, torch.bfloat16)
        for index, (left, width) in enumerate([(0, 1100), (1, 1059), (8, 1051), (3, 1090)]):
            if streams[index] is not None:
                streams[index] = streams[index][:, left : left + width]
        check(streams, transform(decomposition, 1051))


@runs_kernels
def test_gradients_in_another_dtype() -> None:
    """float32 logits of bf16 hidden states, as `linear_decomposed_kl` has them on GPUs."""
    for decomposition in DECOMPOSITIONS:
        streams = logits(decomposition, 2, 1040, torch.float32)
        check(streams, transform(decomposition, 1032), torch.bfloat16)


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_in_place(decomposition: str) -> None:
    """Every output may be an input: the student's gradient over its logits, the second over the masked teacher's."""
    settings = transform(decomposition, 1041)
    streams = logits(decomposition, 3, 1048, torch.bfloat16)
    coefficients = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    second = coefficients.flip(0).contiguous() if decomposition == "teacher_prior" else None
    values, statistics = kernels.divergences(*streams, settings)

    def run(inputs: list[Any], apart: bool) -> list[Tensor]:
        outs = [None if s is None else torch.full_like(s, math.nan) if apart else s for s in inputs]
        kernels.logit_gradients(
            *inputs, values, statistics, coefficients, settings, out_student=outs[0], out_masked_student=outs[3],
            second_coefficients=second, out_second=outs[2] if second is not None else None,
        )  # fmt: skip
        return [outs[0], outs[3] if second is None else outs[2]]

    apart, over = run(streams, True), run([None if s is None else s.clone() for s in streams], False)
    for expected, got in zip(apart, over, strict=True):
        assert torch.equal(expected, got)
        assert (got[:, 1041:] == 0).all()


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_skipped_rows_are_not_read(decomposition: str) -> None:
    settings = transform(decomposition, 1031)
    streams = logits(decomposition, 3, 1031, torch.float32)
    for stream in streams:
        if stream is not None:
            stream[1] = math.nan
    weights = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    values, statistics = kernels.divergences(*streams, settings, weights)
    assert (values[1] == 0).all()
    assert (statistics[1] == 0).all()
    assert (values[[0, 2], reference.FULL] > 0).all()
    outs = [None if s is None else torch.full_like(s, math.nan) for s in streams]
    gramian = torch.full((3, 3), math.nan, device=DEVICE)
    coefficients = weights[:, None].expand(3, 5).contiguous()
    kernels.logit_gradients(
        *streams, values, statistics, coefficients, settings, out_student=outs[0], out_masked_student=outs[3],
        row_gramian=gramian,
    )  # fmt: skip
    for out in (outs[0], outs[3], gramian):
        if out is not None:
            assert (out[1] == 0).all()
            assert out.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_column_squares(decomposition: str, module: Any) -> None:
    for tokens in (0, 3):
        settings = transform(decomposition, 1031)
        streams = logits(decomposition, tokens, 1034, torch.float32)
        values, statistics = module.divergences(*streams, settings)
        coefficients = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        outs = [torch.empty_like(streams[0]) for _ in range(2)]
        other = (
            {"second_coefficients": coefficients.flip(0), "out_second": outs[1]}
            if streams[3] is None
            else {"out_masked_student": outs[1]}
        )
        squares = torch.full((2, 1031), math.nan, device=DEVICE)
        module.logit_gradients(
            *streams, values, statistics, coefficients, settings, out_student=outs[0], **other, column_squares=squares
        )
        for row, out in zip(squares, outs, strict=True):
            torch.testing.assert_close(row, out[:, :1031].square().sum(0))


@runs_kernels
def test_a_stream_without_coefficient_is_not_read() -> None:
    """The language part alone leaves the teacher that sees the image unread: it may hold anything."""
    settings = transform("teacher_prior", 1029)
    student, teacher, masked, _ = logits("teacher_prior", 2, 1029, torch.float32)
    values, statistics = kernels.divergences(student, teacher, masked, None, settings)
    coefficients = torch.zeros(2, 5, device=DEVICE)
    coefficients[:, reference.PRIOR] = 1.0
    out, expected = torch.empty_like(student), torch.empty_like(student)
    arguments = (masked, None, values, statistics, coefficients, settings)
    kernels.logit_gradients(student, torch.full_like(teacher, math.nan), *arguments, out_student=out)
    reference.logit_gradients(student, teacher, *arguments, out_student=expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-8)


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_no_tokens(decomposition: str) -> None:
    streams = logits(decomposition, 0, 40, torch.float32)
    settings = transform(decomposition, 40)
    values, statistics = kernels.divergences(*streams, settings)
    assert values.shape == (0, 5)
    assert statistics.shape == (0, reference.STATISTICS)
    kernels.logit_gradients(*streams, values, statistics, values.clone(), settings, out_student=streams[0])


@runs_kernels
def test_row_offsets_past_32_bits() -> None:
    """Two rows 2^31 elements apart, and three 2^30 apart: a 32-bit row * stride would be negative.

    The memory between the rows is never touched, so it costs nothing on CPU; a GPU must have 5 GB free.
    """
    for tokens, stride in ((2, 2**31), (3, 2**30)):
        student, teacher, masked, _ = logits("teacher_prior", tokens, 40, torch.bfloat16)
        space = torch.empty((tokens - 1) * stride + 40, dtype=torch.bfloat16, device=DEVICE)
        far = space.as_strided((tokens, 40), (stride, 1))
        far.copy_(student)
        settings = transform("teacher_prior", 40)
        values, statistics = kernels.divergences(student, teacher, masked, None, settings)
        coefficients = torch.ones_like(values)
        near_out = torch.empty_like(student)
        arguments = (teacher, masked, None, values, statistics, coefficients, settings)
        kernels.logit_gradients(student, *arguments, out_student=near_out)
        with guard(far, teacher, masked, coefficients, values, statistics):
            far_values, _ = kernels.divergences(far, teacher, masked, None, settings)
            kernels.logit_gradients(far, *arguments, out_student=far)
        assert torch.equal(far_values, values)
        assert torch.equal(far, near_out)


@runs_kernels
def test_repeated_calls_agree_bit_for_bit() -> None:
    streams = logits("bayes", 2, 3001, torch.float16)
    first, second = (kernels.divergences(*streams, transform("bayes", 3001)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@runs_kernels
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_through_the_public_function(decomposition: str) -> None:
    """Selection by name, the registered op and its backward."""
    streams = logits(decomposition, 4, 301, torch.float32)
    gradients = []
    for name in ("triton", "reference"):
        inputs = [None if s is None else s.clone().requires_grad_(i in (0, 3)) for i, s in enumerate(streams)]
        parts = decomposed_kl(*inputs, decomposition=decomposition, temperature=1.3, backend=name)
        (parts.lang.sum() + 2 * parts.vis.sum()).backward()
        gradients.append([x.grad for x in inputs if x is not None and x.requires_grad])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@runs_kernels
def test_float64_is_refused_by_name_and_left_to_the_reference() -> None:
    streams = logits("teacher_prior", 2, 9, torch.float64)
    with pytest.raises(BackendUnavailableError, match='backend="reference"'):
        decomposed_kl(*streams[:3], decomposition="teacher_prior", backend="triton")
    with pytest.raises(ValueError, match='backend="reference"'):
        kernels.divergences(*streams, transform("teacher_prior", 9))
    assert decomposed_kl(*streams[:3], decomposition="teacher_prior").full.dtype == torch.float64
    assert backend.resolve("decomposed_kl", torch.device("cuda"), dtype=torch.float64) == "reference"


@triton.jit
def _planted_mask(columns, V, TAIL: tl.constexpr):  # type: ignore[no-untyped-def]
    return columns >= 0


@triton.jit
def _planted_row(X, row, stride, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    return X + (row * stride).to(tl.int32)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the lanes would really go astray")
@pytest.mark.parametrize("planted", ["missing mask", "32-bit row offset"])
def test_the_guard_finds_planted_errors(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests: kernels with a fault planted in them must not pass."""
    student, teacher, masked, _ = logits("teacher_prior", 2, 1001, torch.float32)
    if planted == "missing mask":
        monkeypatch.setattr(kernels, "_inside", _planted_mask)
    else:
        monkeypatch.setattr(kernels, "_row", _planted_row)
        space = torch.empty(2**31 + 1001, dtype=torch.float32)
        student = space.as_strided((2, 1001), (2**31, 1)).copy_(student)
    with (
        guard(student, teacher, masked),
        pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBounds"),
    ):
        kernels.divergences(student, teacher, masked, None, transform("teacher_prior", 1001))
