"""The compiled CPU kernels against the reference in fp64.

Tolerance: the error against fp64 is at most twice that of the reference in the same dtype, plus a floor. The floor is
four units in the last place (of the accumulation dtype) of the largest number that enters a result, the logits'
magnitude included, and one rounding of the output dtype.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_formulas import DECOMPOSITIONS
from vgs_kernels import backend
from vgs_kernels import old_decomposed_kl as decomposed_kl
from vgs_kernels.decomposed_kl import reference
from vgs_kernels.decomposed_kl.old_types import LogitTransform
from vgs_kernels.types import accumulation_dtype

if backend._native_problem() is not None:
    pytest.skip(f"native backend: {backend._native_problem()}", allow_module_level=True)

from vgs_kernels.decomposed_kl import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "student_scale": 1.0,
    "teacher_scale": 1.0,
    "student_softcap": 0.0,
    "teacher_softcap": 0.0,
}


def make_streams(decomposition: str, rows: int, vocab: int, dtype: torch.dtype, scale: float, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    made = [(torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(4)]
    return [*made[:3], None if decomposition == "teacher_prior" else made[3]]


def run(
    kernels: Any,
    logits: list[Any],
    transform: LogitTransform,
    *,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    in_place: bool = False,
    squares: bool = False,
) -> dict[str, Tensor]:
    """Values and every gradient output, into NaN-filled buffers (or over the inputs)."""
    logits = [None if t is None else t.clone() for t in logits] if in_place else logits
    student, masked = logits[0], logits[3]
    rows = student.shape[0]
    values, statistics = kernels.divergences(*logits, transform, weights)
    generator = torch.Generator().manual_seed(rows)
    coefficients = torch.randn(rows, 5, generator=generator, dtype=torch.float64).to(values.dtype)
    if weights is not None:
        coefficients = coefficients * weights[:, None]
    second = coefficients.flip(1).contiguous() if transform.decomposition == "teacher_prior" else None
    if second is not None:
        coefficients[:, 3:] = 0
        second[:, 3:] = 0
    fresh = [torch.full(t.shape, math.nan, dtype=out_dtype or t.dtype) for t in (student,) * 3]
    outs = [student, masked, logits[2]] if in_place else fresh
    gramian = torch.full((rows, 3), math.nan, dtype=values.dtype)
    column_squares = torch.full((2 if masked is not None or second is not None else 1, transform.vocab_size), math.nan)
    kernels.logit_gradients(
        *logits, values, statistics, coefficients, transform,
        out_student=outs[0], out_masked_student=None if masked is None else outs[1], second_coefficients=second,
        out_second=None if second is None else outs[2], row_gramian=gramian,
        column_squares=column_squares if squares else None,
    )  # fmt: skip
    found = {"values": values, "gramian": gramian, "student": outs[0]}
    if masked is not None:
        found["masked"] = outs[1]
    if second is not None:
        found["second"] = outs[2]
    if squares:
        found["squares"] = column_squares
    return found


def check(
    logits: list[Any], decomposition: str, options: dict[str, Any] | None = None, vocab: int | None = None
) -> None:
    transform = LogitTransform(decomposition, vocab or logits[0].shape[1], **{**PLAIN, **(options or {})})
    dtype = logits[0].dtype
    exact = run(reference, [None if t is None else t.double() for t in logits], transform)
    plain, got = run(reference, logits, transform), run(native, logits, transform)
    magnitude = max(
        1.0, *(float(t.double().masked_fill(~t.isfinite(), 0).abs().max()) for t in logits if t is not None)
    )
    for name, truth in exact.items():
        a, b = got[name].double(), plain[name].double()
        assert torch.equal(a.isinf(), truth.isinf()), name
        assert not a.isnan().any(), name
        finite = truth.isfinite()
        truth, a, b = (t.masked_fill(~finite, 0) for t in (truth, a, b))
        ulp = torch.finfo(accumulation_dtype(dtype)).eps
        size = max(1.0, float(truth.abs().max()))
        # The Gramian holds squares of the gradients, whose factors are log ratios of the logits' magnitude.
        floor = 4 * ulp * magnitude * size + (torch.finfo(got[name].dtype).eps * size)
        error, plain_error = float((a - truth).abs().max()), float((b - truth).abs().max())
        assert error <= 2 * plain_error + floor, (name, error, plain_error, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_random_logits_of_odd_sizes(decomposition: str, dtype: torch.dtype, level: int) -> None:
    for vocab in (1, 2, 3, 17, 1000, 5003):
        check(make_streams(decomposition, 3, vocab, dtype, 3.0, vocab), decomposition)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_options(decomposition: str, level: int) -> None:
    scales = {"temperature": 1.7, "student_scale": 0.8, "teacher_scale": 1.3}
    options = scales | {"student_softcap": 20.0, "teacher_softcap": 30.0}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = make_streams(decomposition, 4, 2500, dtype, 8.0, 1)
        check(logits, decomposition, options)
        check(logits, decomposition, {"student_softcap": 5.0, "temperature": 0.6})


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_peaked_logits(decomposition: str, level: int) -> None:
    check(make_streams(decomposition, 6, 5003, torch.float32, 1e4, 2), decomposition)
    logits = make_streams(decomposition, 6, 5003, torch.float32, 1.0, 3)
    for index, stream in enumerate(t for t in logits if t is not None):
        stream[:, 7 * index] = 1e4
        stream[:, 100:300] = -1e4
    check(logits, decomposition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_minus_infinity(decomposition: str, dtype: torch.dtype, level: int) -> None:
    infinity = math.inf
    logits = make_streams(decomposition, 7, 5003, dtype, 3.0, 4)
    for stream in logits:
        if stream is not None:
            stream[:, 40:60] = -infinity  # in all streams: contributes nothing
    logits[0][1, :4900] = -infinity  # whole blocks of the student
    logits[1][2, 3] = -infinity  # a teacher's hole under student mass: +inf
    logits[2][3, 4999] = -infinity
    logits[0][4, 5] = -infinity  # a teacher's hole where the student has no mass: nothing
    logits[1][4, 5] = logits[2][4, 5] = -infinity
    if logits[3] is not None:
        logits[3][5, 6] = -infinity
        logits[3][6, :] = -infinity
        logits[3][6, 0] = 0.0
    check(logits, decomposition)


def test_a_hole_without_mass_in_an_early_block_is_no_infinity(level: int) -> None:
    """Mass is judged when the whole row is known: here the hole's block looks important until the last entry."""
    logits = make_streams("teacher_prior", 1, 5000, torch.float32, 1.0, 5)
    logits[1][0, 10] = -math.inf
    logits[0][0, 4999] = 500.0
    transform = LogitTransform("teacher_prior", 5000, **PLAIN)
    values, _ = native.divergences(*logits, transform)
    assert values.isfinite().all()
    check_values, _ = reference.divergences(*logits, transform)
    torch.testing.assert_close(values, check_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_padded_and_strided(decomposition: str, level: int) -> None:
    logits = make_streams(decomposition, 5, 300, torch.float32, 3.0, 6)
    padded = [None if t is None else t[:, : 290 + i] for i, t in enumerate(logits)]  # row strides of 300
    transform = LogitTransform(decomposition, 285, **PLAIN)
    expected, got = run(reference, padded, transform), run(native, padded, transform)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=2e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert not got["student"][:, 285:].any()
    expanded = [None if t is None else t[:1].expand(4, -1) for t in logits]
    check(expanded, decomposition)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_outputs_over_inputs(decomposition: str, level: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = make_streams(decomposition, 3, 20011, dtype, 3.0, 7)
        transform = LogitTransform(decomposition, 20000, **PLAIN)
        apart, over = run(native, logits, transform), run(native, logits, transform, in_place=True)
        for name in apart:
            assert torch.equal(apart[name], over[name]), name


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gradient_dtype_may_differ(out_dtype: torch.dtype, level: int) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = make_streams("teacher_prior", 3, 1003, dtype, 2.0, 8)
        transform = LogitTransform("teacher_prior", 1003, **PLAIN)
        wide, other = run(native, logits, transform), run(native, logits, transform, out_dtype=out_dtype)
        assert other["student"].dtype == out_dtype
        torch.testing.assert_close(other["student"], wide["student"].to(out_dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_skipped_rows_are_not_read(decomposition: str, level: int) -> None:
    logits = make_streams(decomposition, 6, 1003, torch.float32, 2.0, 9)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 0.0])
    transform = LogitTransform(decomposition, 1003, **PLAIN)
    clean = run(native, logits, transform, weights=weights)
    for stream in logits:
        if stream is not None:
            stream[weights == 0] = math.nan
    dirty = run(native, logits, transform, weights=weights)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
        assert not value[weights == 0].any(), name


def test_nan_logits_give_nan_not_a_number_that_looks_right(level: int) -> None:
    logits = make_streams("teacher_prior", 2, 5003, torch.float32, 2.0, 10)
    logits[0][0, 77] = math.nan
    values, _ = native.divergences(*logits, LogitTransform("teacher_prior", 5003, **PLAIN))
    assert values[0, :3].isnan().all()
    assert values[1].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_threads_do_not_change_results(decomposition: str, rows: int) -> None:
    """One row is split over its segments, nine are not; bit for bit the same, and the same from run to run."""
    logits = make_streams(decomposition, rows, 40007, torch.float32, 3.0, 11)
    transform = LogitTransform(decomposition, 40007, **PLAIN)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            results.append(run(native, logits, transform))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_row_offsets_past_two_to_the_31() -> None:
    """Rows 2^30 entries apart in one lazily mapped buffer: the third lies past 2^31, and only its pages are touched."""
    stride, vocab, rows = 2**30, 1003, 4
    buffer = torch.empty((rows - 1) * stride + vocab, dtype=torch.bfloat16)
    student = buffer.as_strided((rows, vocab), (stride, 1))
    small = make_streams("teacher_prior", rows, vocab, torch.bfloat16, 2.0, 12)
    student.copy_(small[0])
    transform = LogitTransform("teacher_prior", vocab, **PLAIN)
    expected = run(native, small, transform)
    got = run(native, [student, *small[1:]], transform)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    values, statistics = native.divergences(student, small[1], small[2], None, transform)
    coefficients = reference.component_coefficients("teacher_prior", torch.ones(rows), torch.ones(rows))[1]
    native.logit_gradients(
        student, small[1], small[2], None, values, statistics, coefficients, transform, out_student=student
    )
    wanted = torch.empty_like(small[0])
    native.logit_gradients(*small, values, statistics, coefficients, transform, out_student=wanted)
    assert torch.equal(student, wanted)


def test_many_tokens_of_an_expanded_row() -> None:
    """tokens * vocab past 2^31 with stride 0; weights leave two rows to compute."""
    tokens, vocab = 2**21, 1031
    row = make_streams("teacher_prior", 1, vocab, torch.float32, 2.0, 13)
    weights = torch.zeros(tokens)
    weights[[5, tokens - 1]] = 1.0
    transform = LogitTransform("teacher_prior", vocab, **PLAIN)
    values, _ = native.divergences(*(None if t is None else t.expand(tokens, -1) for t in row), transform, weights)
    single, _ = native.divergences(*row, transform)
    assert torch.equal(values[-1:], single)
    assert torch.equal(values[5:6], single)
    assert not values[6:-1].any()


def test_no_tokens() -> None:
    for decomposition in DECOMPOSITIONS:
        found = run(
            native,
            make_streams(decomposition, 0, 17, torch.float32, 1.0, 14),
            LogitTransform(decomposition, 17, **PLAIN),
        )
        assert found["values"].shape == (0, 5)


def test_errors_of_the_launcher_say_what_is_wrong() -> None:
    student, teacher, masked_teacher, _ = make_streams("teacher_prior", 2, 9, torch.float32, 1.0, 15)
    transform = LogitTransform("teacher_prior", 9, **PLAIN)
    with pytest.raises(RuntimeError, match="teacher must have 2 rows of at least 9 logits"):
        native.divergences(student, teacher[:1], masked_teacher, None, transform)
    with pytest.raises(RuntimeError, match="unit stride along the vocabulary"):
        native.divergences(student.t().contiguous().t(), teacher, masked_teacher, None, transform)
    with pytest.raises(RuntimeError, match="student's dtype"):
        native.divergences(student, teacher.double(), masked_teacher, None, transform)
    with pytest.raises(RuntimeError, match="float32, bfloat16, float16 or float64"):
        native.divergences(student.int(), teacher.int(), masked_teacher.int(), None, transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_column_squares(decomposition: str, dtype: torch.dtype, level: int) -> None:
    """They are those of the gradients, which are what they are without them, on any number of threads."""
    for rows, vocab in ((0, 5), (1, 1), (5, 2048), (9, 5003), (67, 2049)):
        logits = make_streams(decomposition, rows, vocab + 3, dtype, 3.0, vocab)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(rows)).to(accumulation_dtype(dtype))
        weights[1::3] = 0
        transform = LogitTransform(decomposition, vocab, **PLAIN)
        whole = run(native, logits, transform, weights=weights)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(run(native, logits, transform, weights=weights, squares=True))
        finally:
            torch.set_num_threads(before)
        for squared in found:
            squares = squared["squares"]
            assert torch.equal(squares, found[0]["squares"])
            torch.testing.assert_close(squared["gramian"], whole["gramian"])
            gradients = {name: t for name, t in whole.items() if name in ("student", "masked", "second")}
            assert squares.shape == (len(gradients), vocab)
            for row, (name, gradient) in zip(squares, gradients.items(), strict=True):
                assert torch.equal(squared[name], gradient)
                exact = gradient[:, :vocab].double().square().sum(0)  # of what was rounded to the output's dtype
                torch.testing.assert_close(
                    row.double(), exact, rtol=8 * torch.finfo(dtype).eps + 1e-5, atol=torch.finfo(dtype).tiny
                )
    values, statistics = native.divergences(*logits, transform)
    with pytest.raises(RuntimeError, match="column_squares must be contiguous float32, with"):
        native.logit_gradients(
            *logits, values, statistics, values, transform, out_student=logits[0], column_squares=torch.empty(3, vocab)
        )


def test_unknown_level_raises() -> None:
    operators = torch.ops.vgs_kernels_native
    for level in (-1, 7):
        with pytest.raises(RuntimeError, match=f"level {level} was asked for"):
            operators.set_cpu_level(level)
    assert operators.cpu_level() == operators.highest_cpu_level()


def test_level_in_force(level: int) -> None:
    assert torch.ops.vgs_kernels_native.cpu_level() == level


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_opcheck(decomposition: str) -> None:
    logits = make_streams(decomposition, 3, 21, torch.float32, 1.0, 16)
    transform = LogitTransform(decomposition, 21, **PLAIN)
    values, statistics = native.divergences(*logits, transform)
    coefficients = torch.ones_like(values)
    settings = native._settings(transform)
    operators = torch.ops.vgs_kernels_native
    torch.library.opcheck(
        operators.divergences.default,
        (*logits, None, *settings, torch.empty_like(values), torch.empty_like(statistics)),
    )
    outs = [torch.empty_like(logits[0]), None if logits[3] is None else torch.empty_like(logits[0])]
    torch.library.opcheck(
        operators.logit_gradients.default,
        (*logits, values, statistics, coefficients, None, *settings, *outs, None, torch.empty(3, 3), None),
    )


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_public_function(decomposition: str) -> None:
    logits = make_streams(decomposition, 6, 103, torch.float64, 1.0, 17)
    students = [logits[0].requires_grad_()] + ([] if logits[3] is None else [logits[3].requires_grad_()])

    def parts(*students: Tensor) -> tuple[Tensor, ...]:
        result = decomposed_kl(students[0], *logits[1:3], *students[1:], decomposition=decomposition, backend="native")
        # The stop gradient of bayes is no derivative of anything: leave its vis to the comparison with the reference.
        return (result.lang, result.full) if decomposition == "bayes" else tuple(result)[:3]

    assert torch.autograd.gradcheck(parts, students)
    result = decomposed_kl(*logits, decomposition=decomposition, backend="native")
    other = decomposed_kl(*logits, decomposition=decomposition, backend="reference")
    for a, b in zip(result, other, strict=True):
        torch.testing.assert_close(a, b)
    (first,) = torch.autograd.grad(result.vis.sum(), students[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), students[:1])
