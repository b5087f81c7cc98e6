"""The compiled CPU kernels of `stream_kl`: every instruction-set level, rows in parts, threads, addresses, errors.

The tolerance is that of `tests/stream_kl_checks.py`; `tests/test_stream_kl.py` holds all backends to the rest.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stream_kl_checks import by_kernels, check, coefficients
from tests.textbook import INPUTS, KINDS, logits
from vgs_kernels import backend
from vgs_kernels.stream_kl.reference import STANDARD, STATISTICS, VALUES, Streams
from vgs_kernels.stream_kl.transform import LogitTransform

if backend._native_problem() is not None:
    pytest.skip(f"native backend: {backend._native_problem()}", allow_module_level=True)

from vgs_kernels.stream_kl import native

operators = torch.ops.vgs_kernels_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GUARDS = {"ratio_bound": 0.7, "ratio_floor": 0.05}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_level(kind: str, dtype: torch.dtype, level: int) -> None:
    for inputs in INPUTS:
        check(native, logits(kind, 3, 2531, inputs, dtype=dtype), LogitTransform(2531), holes=inputs == "holes")
    for vocab in (1, 2, 17):
        check(native, logits(kind, 2, vocab, dtype=dtype), LogitTransform(vocab))


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_with_options(kind: str, level: int) -> None:
    streams = logits(kind, 3, 2531, dtype=torch.float32)
    for options in (
        {"temperature": 1.7, "student_scale": 0.8, "teacher_scale": 1.3},
        {"student_softcap": 20.0, "teacher_softcap": 5.0, "temperature": 0.6},
        {"teacher_smoothing": 0.01},
        GUARDS,
    ):
        check(native, streams, LogitTransform(2531, **options))
    for out_dtype in (torch.bfloat16, torch.float16):
        check(native, streams, LogitTransform(2531), out_dtype)


@pytest.mark.parametrize("guards", [{}, GUARDS], ids=["", "guarded"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_parts(kind: str, inputs: str, guards: dict[str, float]) -> None:
    """A row longer than a segment: the sums of its parts have maxima and anchors of their own until they are merged."""
    if guards and (kind != "visual" or inputs == "offset"):  # log sums are kept to the unit of the offset
        return
    for rows in (1, 9):  # split over the threads by segments, and by rows
        streams = logits(kind, rows, 40007, inputs, dtype=torch.float32)
        check(native, streams, LogitTransform(40007, **guards), holes=inputs == "holes")


@pytest.mark.parametrize("guards", [{}, GUARDS], ids=["", "guarded"])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_results(kind: str, rows: int, guards: dict[str, float]) -> None:
    """Bit for bit, and the same from run to run."""
    streams, transform = logits(kind, rows, 40007, dtype=torch.float32), LogitTransform(40007, **guards)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            found.append([*by_kernels(native, streams, transform, torch.float32), squares_of(streams, transform)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)


def squares_of(streams: list[Tensor], transform: LogitTransform) -> Tensor:
    given = Streams(*streams)
    values, statistics = native.divergences(given, transform)
    squares = torch.full((1, transform.vocab_size), math.nan)
    native.logit_gradients(
        given, values, statistics, coefficients(values.shape[0]).float(), transform,
        out=torch.empty_like(streams[0]), column_squares=squares,
    )  # fmt: skip
    return squares


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_without_mass_in_an_early_block_is_no_infinity(kind: str, level: int) -> None:
    """Mass is judged when the whole row is known: here the hole's block looks important until the last entry."""
    streams = logits(kind, 1, 5000, dtype=torch.float32)
    streams[1][0, 10] = -math.inf
    streams[0][0, 4999] = 500.0
    values, _ = native.divergences(Streams(*streams), LogitTransform(5000))
    assert values[0, STANDARD].isfinite()


def test_the_maximum_of_the_target_moves_with_the_anchors() -> None:
    """Every part of the row has its own place of the student's maximum, far from the others in the other streams."""
    streams = logits("visual", 2, 50001, dtype=torch.float32)
    for part, place in enumerate(range(100, 50001, 9000)):
        for index, stream in enumerate(streams):
            stream[:, place] += 20.0 + 3.0 * part + 7.0 * index * (-1) ** part
    check(native, streams, LogitTransform(50001))


def test_row_offsets_past_two_to_the_31() -> None:
    """Rows 2^30 entries apart in one lazily mapped buffer: the third lies past 2^31, and only its pages are touched."""
    stride, vocab, rows = 2**30, 1003, 4
    buffer = torch.empty((rows - 1) * stride + vocab, dtype=torch.bfloat16)
    student = buffer.as_strided((rows, vocab), (stride, 1))
    small = logits("prior", rows, vocab, dtype=torch.bfloat16)
    student.copy_(small[0])
    transform = LogitTransform(vocab)
    expected = by_kernels(native, small, transform, torch.bfloat16)
    far = [student, *small[1:]]
    for one, another in zip(expected, by_kernels(native, far, transform, torch.bfloat16), strict=True):
        assert torch.equal(one, another)
    outs = [student, torch.empty_like(small[0])]
    assert torch.equal(by_kernels(native, far, transform, torch.bfloat16, outs=outs)[1], expected[1])


def test_many_tokens_of_an_expanded_row() -> None:
    """tokens * vocab past 2^31 with stride 0; weights leave two rows to compute."""
    tokens, vocab = 2**21, 1031
    row = logits("visual", 1, vocab, dtype=torch.float32)
    weights = torch.zeros(tokens)
    weights[[5, tokens - 1]] = 1.0
    transform = LogitTransform(vocab)
    values, _ = native.divergences(Streams(*(stream.expand(tokens, -1) for stream in row)), transform, weights)
    single, _ = native.divergences(Streams(*row), transform)
    assert torch.equal(values[-1:], single)
    assert torch.equal(values[5:6], single)
    assert not values[6:-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    values, first, second, _ = by_kernels(
        native, logits(kind, 0, 17, dtype=torch.float32), LogitTransform(17), torch.float32
    )
    assert values.shape == (0, VALUES)
    assert first.shape == second.shape == (0, 17)


def test_errors_of_the_launcher_say_what_is_wrong() -> None:
    p, q, r, p0 = logits("visual", 2, 9, dtype=torch.float32)
    transform = LogitTransform(9)
    with pytest.raises(RuntimeError, match="teacher must have 2 rows of at least 9 logits"):
        native.divergences(Streams(p, q[:1]), transform)
    with pytest.raises(RuntimeError, match="unit stride along the vocabulary"):
        native.divergences(Streams(p.t().contiguous().t(), q), transform)
    with pytest.raises(RuntimeError, match="masked_teacher must have the student's dtype"):
        native.divergences(Streams(p, q, r.double()), transform)
    with pytest.raises(RuntimeError, match="float32, bfloat16, float16 or float64"):
        native.divergences(Streams(p.int(), q.int()), transform)
    with pytest.raises(RuntimeError, match="masked_student needs masked_teacher"):
        native.divergences(Streams(p, q, None, p0), transform)
    values, statistics = native.divergences(Streams(p, q), transform)
    ones = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="out_second and second_coefficients must be given together"):
        native.logit_gradients(Streams(p, q), values, statistics, ones, transform, out=p, second_coefficients=ones)
    with pytest.raises(RuntimeError, match="column_squares must be contiguous float32, with 1 rows of 9 entries"):
        native.logit_gradients(
            Streams(p, q), values, statistics, ones, transform, out=p, column_squares=torch.empty(2, 9)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    streams: list[Any] = logits(kind, 3, 21, dtype=torch.float32)
    settings = LogitTransform(21)
    values, statistics = native.divergences(Streams(*streams), settings)
    streams += [None] * (4 - len(streams))
    torch.library.opcheck(
        operators.stream_divergences.default,
        (*streams, None, *settings, torch.empty(3, VALUES), torch.empty(3, STATISTICS)),
    )
    torch.library.opcheck(
        operators.stream_gradients.default,
        (*streams, values, statistics, torch.ones(3, 3), None, *settings, torch.empty(3, 21), None, None),
    )
