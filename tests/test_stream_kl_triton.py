"""The Triton kernels of `stream_kl` against float64, on a GPU or in Triton's interpreter.

On a machine with a GPU these tests run on it. Everywhere, `test_in_the_interpreter` runs this file once more in a
process where TRITON_INTERPRET=1 (it must be set before triton is imported), on CPU tensors, under the bounds guard.
What the interpreter cannot show: speed, races between programs, and the rounding of the GPU's exp2.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tests import stream_kl_checks, textbook  # noqa: E402
from tests.textbook import KINDS  # noqa: E402
from tests.triton_support import interpreter  # noqa: E402
from vgs_kernels import BackendUnavailableError, backend, decomposed_kl, reverse_kl  # noqa: E402
from vgs_kernels.stream_kl import reference  # noqa: E402
from vgs_kernels.stream_kl import triton as kernels  # noqa: E402
from vgs_kernels.stream_kl import triton_divergences as forward  # noqa: E402
from vgs_kernels.stream_kl.reference import STANDARD, THIRD, Streams  # noqa: E402
from vgs_kernels.stream_kl.transform import LogitTransform  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU here; test_in_the_interpreter runs it"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" and torch.cuda.is_available() else []


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """Runs every test of this file in the interpreter."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            str(Path(__file__).with_name("test_accuracy.py")),
        ],
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


def logits(kind: str, tokens: int, width: int, dtype: torch.dtype, inputs: str = "random") -> list[Tensor]:
    return [stream.to(DEVICE) for stream in textbook.logits(kind, tokens, width, inputs, dtype=dtype)]


def check(streams: list[Tensor], settings: LogitTransform, **options: Any) -> None:
    """Under the bounds guard, which must know of every tensor that the kernels may touch."""
    guarded = _Guarded(kernels) if INTERPRETED else kernels
    stream_kl_checks.check(guarded, streams, settings, **options)


class _Guarded:
    """The backend module, every call of which stands under the guard for its own arguments."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def divergences(self, streams: Streams, *arguments: Any) -> Any:
        with guard(*streams):
            return self._module.divergences(streams, *arguments)

    def logit_gradients(self, streams: Streams, *arguments: Any, **outputs: Any) -> None:
        with guard(*streams, *(a for a in (*arguments, *outputs.values()) if isinstance(a, Tensor))):
            self._module.logit_gradients(streams, *arguments, **outputs)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", ["random", "peaked", "offset", "holes"])
def test_against_float64(kind: str, dtype: torch.dtype, inputs: str) -> None:
    check(logits(kind, 5, 1000, dtype, inputs), LogitTransform(1000), holes=inputs == "holes")


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 3, 17, 1024, 4999])
def test_any_vocabulary(kind: str, vocab: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(logits(kind, 2, vocab, dtype), LogitTransform(vocab))


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_scale_softcap_and_temperature(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        streams = logits(kind, 5, 1030, dtype, "holes")
        options = {"temperature": 1.7, "student_scale": 0.3, "teacher_scale": 1.9}
        check(streams, LogitTransform(1030, **options), holes=True)
        options = {"temperature": 0.6, "student_softcap": 5.0, "teacher_softcap": 30.0}
        check(streams, LogitTransform(1030, **options), holes=True)


@runs_kernels
@pytest.mark.parametrize("inputs", ["random", "offset", "holes"])
@pytest.mark.parametrize(
    "options", [{"ratio_bound": 0.5}, {"ratio_floor": 0.1}, {"ratio_bound": 1.0, "ratio_floor": 0.01}]
)
def test_guards_of_the_ratio(inputs: str, options: dict[str, float]) -> None:
    check(logits("visual", 5, 1030, torch.float32, inputs), LogitTransform(1030, **options), holes=inputs == "holes")


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", ["random", "offset", "holes"])
def test_smoothed_teachers(kind: str, inputs: str) -> None:
    for options in ({}, {"temperature": 0.7, "teacher_softcap": 20.0, "ratio_bound": 0.5}):
        settings = LogitTransform(1030, teacher_smoothing=0.01, **options)
        check(logits(kind, 5, 1030, torch.float32, inputs), settings, holes=inputs == "holes")


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", ["random", "peaked", "offset", "holes"])
def test_split_rows(kind: str, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are shared by several programs; the merged result is held to the same tolerance."""
    many = kernels.config.Device(kernels.config.INTERPRETER, processors=64, warp_size=32)
    if INTERPRETED:
        monkeypatch.setattr(kernels.config, "describe_device", lambda _device: many)
        assert kernels.config.split_row(many, kernels.config.geometry(many, 2), 2, 4999)[0] == 5
    for dtype in (torch.float32, torch.bfloat16):
        check(logits(kind, 5, 4999, dtype, inputs), LogitTransform(4999), holes=inputs == "holes")
    if kind == "visual":
        streams = logits(kind, 5, 4999, torch.float32, inputs)
        check(streams, LogitTransform(4999, ratio_bound=0.5, ratio_floor=0.1), holes=inputs == "holes")


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_uneven_padding(kind: str) -> None:
    """Streams padded differently, rows far apart, one stream misaligned; nothing outside `vocab_size` is touched."""
    streams = logits(kind, 2, 1100, torch.bfloat16)
    for index, (left, width) in enumerate([(0, 1100), (1, 1059), (8, 1051), (3, 1090)]):
        if index < len(streams):
            streams[index][:, left + 1051 :] = math.nan
            streams[index] = streams[index][:, left : left + width]
    given, settings = Streams(*streams), LogitTransform(1051)
    check([stream[:, :1051] for stream in streams], settings)
    values, statistics = kernels.divergences(given, settings)
    assert values.isfinite().all()
    out = torch.full_like(streams[0], math.nan)
    kernels.logit_gradients(given, values, statistics, torch.ones(2, 3, device=DEVICE), settings, out=out)
    assert out[:, :1051].isfinite().all()
    assert (out[:, 1051:] == 0).all()


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_another_dtype(kind: str) -> None:
    """float32 logits of 16-bit hidden states, as the linear calls have them."""
    for out_dtype in (torch.bfloat16, torch.float16):
        check(logits(kind, 2, 1040, torch.float32), LogitTransform(1032), out_dtype=out_dtype)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind: str) -> None:
    """Every output may be an input: one gradient over the student's logits, one over those of the last stream."""
    settings = LogitTransform(1041)
    streams = logits(kind, 3, 1048, torch.bfloat16)
    first, second = (stream_kl_checks.coefficients(3, seed).float().to(DEVICE) for seed in (5, 6))
    values, statistics = kernels.divergences(Streams(*streams), settings)

    def run(inputs: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
        kernels.logit_gradients(
            Streams(*inputs), values, statistics, first, settings, out=outs[0], second_coefficients=second,
            out_second=outs[1],
        )  # fmt: skip
        return outs

    apart = run(streams, [torch.full_like(streams[0], math.nan) for _ in range(2)])
    copies = [stream.clone() for stream in streams]
    for expected, got in zip(apart, run(copies, [copies[-1], copies[0]]), strict=True):
        assert torch.equal(expected, got)
        assert (got[:, 1041:] == 0).all()


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_rows_are_not_read(kind: str) -> None:
    settings = LogitTransform(1031, ratio_bound=1.0 if kind == "visual" else 0.0)
    streams = logits(kind, 3, 1031, torch.float32)
    for stream in streams:
        stream[1] = math.nan
    weights = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    values, statistics = kernels.divergences(Streams(*streams), settings, weights)
    assert (values[1] == 0).all()
    assert (statistics[1] == 0).all()
    assert (values[[0, 2], STANDARD] > 0).all()
    out = torch.full_like(streams[0], math.nan)
    coefficients = weights[:, None].expand(3, 3).contiguous()
    kernels.logit_gradients(Streams(*streams), values, statistics, coefficients, settings, out=out)
    assert (out[1] == 0).all()
    assert out.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_column_squares(kind: str) -> None:
    settings = LogitTransform(1031)
    for tokens in (0, 3):
        streams = logits(kind, tokens, 1034, torch.float32)
        values, statistics = kernels.divergences(Streams(*streams), settings)
        first, second = (stream_kl_checks.coefficients(tokens, seed).float().to(DEVICE) for seed in (5, 6))
        outs = [torch.empty_like(streams[0]) for _ in range(2)]
        squares = torch.full((2, 1031), math.nan, device=DEVICE)
        kernels.logit_gradients(
            Streams(*streams), values, statistics, first, settings, out=outs[0], second_coefficients=second,
            out_second=outs[1], column_squares=squares,
        )  # fmt: skip
        for row, out in zip(squares, outs, strict=True):
            torch.testing.assert_close(row, out[:, :1031].square().sum(0))


@runs_kernels
def test_a_stream_without_coefficient_is_not_read() -> None:
    """The third number alone leaves the teacher that sees the image unread in `prior`: it may hold anything."""
    settings = LogitTransform(1029)
    student, teacher, masked = logits("prior", 2, 1029, torch.float32)
    values, statistics = kernels.divergences(Streams(student, teacher, masked), settings)
    coefficients = torch.zeros(2, 3, device=DEVICE)
    coefficients[:, THIRD] = 1.0
    out, expected = torch.empty_like(student), torch.empty_like(student)
    arguments = (values, statistics, coefficients, settings)
    kernels.logit_gradients(Streams(student, torch.full_like(teacher, math.nan), masked), *arguments, out=out)
    reference.logit_gradients(Streams(student, teacher, masked), *arguments, out=expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-8)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_probability_below_the_smallest_normal_number_is_no_mass(kind: str) -> None:
    for inside, is_mass in ((5.0, True), (-2.0, False)):
        streams = [s.to(DEVICE) for s in textbook.logits(kind, 1, 20, dtype=torch.float32, scale=0.1, distance=0.1)]
        streams[0][0, 3] = math.log(2.0**-126) + math.log(20.0) + inside
        streams[1][0, 3] = -math.inf
        values, _ = kernels.divergences(Streams(*streams), LogitTransform(20))
        assert bool(values[0, STANDARD].isinf()) == is_mass


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    streams, settings = logits(kind, 0, 40, torch.float32), LogitTransform(40)
    values, statistics = kernels.divergences(Streams(*streams), settings)
    assert values.shape == (0, reference.VALUES)
    assert statistics.shape == (0, reference.STATISTICS)
    coefficients = torch.zeros(0, 3, device=DEVICE)
    kernels.logit_gradients(Streams(*streams), values, statistics, coefficients, settings, out=streams[0])


@runs_kernels
def test_row_offsets_past_32_bits() -> None:
    """Two rows 2^31 elements apart, and three 2^30 apart: a 32-bit row * stride would be negative.

    The memory between the rows is never touched, so it costs nothing on CPU; a GPU must have 5 GB free.
    """
    for tokens, stride in ((2, 2**31), (3, 2**30)):
        student, *others = logits("visual", tokens, 40, torch.bfloat16)
        space = torch.empty((tokens - 1) * stride + 40, dtype=torch.bfloat16, device=DEVICE)
        far = space.as_strided((tokens, 40), (stride, 1))
        far.copy_(student)
        settings = LogitTransform(40)
        values, statistics = kernels.divergences(Streams(student, *others), settings)
        coefficients = torch.ones(tokens, 3, device=DEVICE)
        near_out = torch.empty_like(student)
        arguments = (values, statistics, coefficients, settings)
        kernels.logit_gradients(Streams(student, *others), *arguments, out=near_out)
        with guard(far, *others, coefficients, values, statistics):
            far_values, _ = kernels.divergences(Streams(far, *others), settings)
            kernels.logit_gradients(Streams(far, *others), *arguments, out=far)
        assert torch.equal(far_values, values)
        assert torch.equal(far, near_out)


@runs_kernels
def test_repeated_calls_agree_bit_for_bit() -> None:
    streams = Streams(*logits("visual", 2, 3001, torch.float16))
    first, second = (kernels.divergences(streams, LogitTransform(3001)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_through_the_public_function(kind: str) -> None:
    """Selection by name, the registered op and its backward."""
    streams = logits(kind, 4, 301, torch.float32)
    gradients = []
    for name in ("triton", "reference"):
        student = streams[0].clone().requires_grad_()
        if kind == "reverse_kl":
            total = reverse_kl(student, streams[1], temperature=1.3, backend=name).kl.sum()
        else:
            decomposition = "vgs" if kind == "visual" else "teacher_prior"
            options: dict[str, Any] = {"decomposition": decomposition, "temperature": 1.3, "backend": name}
            parts = decomposed_kl(student, *streams[1:], **options)
            total = parts.standard.sum() + 2 * parts.vis.sum()
        gradients.append(torch.autograd.grad(total, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@runs_kernels
def test_float64_is_refused_by_name_and_left_to_the_reference() -> None:
    streams = logits("prior", 2, 9, torch.float64)
    with pytest.raises(BackendUnavailableError, match='backend="reference"'):
        reverse_kl(*streams[:2], backend="triton")
    with pytest.raises(ValueError, match='backend="reference"'):
        kernels.divergences(Streams(*streams), LogitTransform(9))
    assert reverse_kl(*streams[:2]).kl.dtype == torch.float64
    assert backend.resolve("stream_kl", torch.device("cuda"), dtype=torch.float64) == "reference"


def walks(streams: list[Tensor], settings: LogitTransform, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Whole tiles that programs take without care and with it."""
    grown: list[bool] = []
    original = forward._grow

    def grow(*arguments: Any) -> Any:
        grown.append(bool(getattr(arguments[-1], "value", arguments[-1])))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "_grow", grow)
        kernels.divergences(Streams(*streams), settings)
    return grown.count(False), grown.count(True)


@pytest.mark.skipif(not INTERPRETED, reason="kernels cannot be watched on a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_that_are_not_finite_are_walked_with_care(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of two whole tiles and a part of one, which always takes care."""
    tile = kernels.config.geometry(kernels.config.describe_device(torch.device("cpu")), 4).tile
    settings = LogitTransform(2 * tile + 10)
    streams = logits(kind, 2, 2 * tile + 10, torch.float32, "peaked")
    assert walks(streams, settings, monkeypatch) == (4, 2)
    for stream in streams:
        for hole in (-math.inf, math.nan):
            stream[1, tile + 1], kept = hole, stream[1, tile + 1].clone()
            assert walks(streams, settings, monkeypatch) == (4, 2 + 2)
            stream[1, tile + 1] = kept


@triton.jit
def _planted_trust(state):  # type: ignore[no-untyped-def]
    return True


@pytest.mark.skipif(not INTERPRETED, reason="kernels cannot be patched on a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_that_trusts_every_row_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = logits(kind, 5, 2100, torch.float32, "holes")
    check(streams, LogitTransform(2100), holes=True)
    monkeypatch.setattr(forward, "_all_finite", _planted_trust)
    with pytest.raises(AssertionError):
        check(streams, LogitTransform(2100), holes=True)


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
    student, teacher, masked = logits("prior", 2, 1001, torch.float32)
    if planted == "missing mask":
        monkeypatch.setattr(forward, "_inside", _planted_mask)
    else:
        monkeypatch.setattr(forward, "_row", _planted_row)
        space = torch.empty(2**31 + 1001, dtype=torch.float32)
        student = space.as_strided((2, 1001), (2**31, 1)).copy_(student)
    with (
        guard(student, teacher, masked),
        pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBounds"),
    ):
        kernels.divergences(Streams(student, teacher, masked), LogitTransform(1001))
