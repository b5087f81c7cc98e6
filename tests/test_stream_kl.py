"""The kernels of `stream_kl` in every place, against the textbook in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import textbook
from tests.places import here
from tests.stream_kl_checks import by_kernels, by_textbook, check, coefficients
from tests.textbook import INPUTS, KINDS, logits
from vgs_kernels import backend
from vgs_kernels.stream_kl import op, reference
from vgs_kernels.stream_kl.reference import (
    COEFFICIENTS,
    DEPENDENCY,
    LANGUAGE,
    STANDARD,
    THIRD,
    VALUES,
    Streams,
)  # fmt: skip
from vgs_kernels.stream_kl.transform import LogitTransform

BACKENDS = backend.available("stream_kl", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2.5, "student_scale": 1.7, "teacher_scale": 0.6},
    {"student_softcap": 5.0, "teacher_softcap": 30.0, "temperature": 1.3},
    {"ratio_bound": 0.5},
    {"ratio_floor": 0.1},
    {"ratio_bound": 1.0, "ratio_floor": 0.01, "temperature": 1.3, "teacher_softcap": 20.0},
    {"teacher_smoothing": 0.05, "temperature": 0.7, "teacher_scale": 0.6},
    {"teacher_smoothing": 0.01, "teacher_softcap": 20.0, "ratio_bound": 1.0, "ratio_floor": 0.1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients(kind: str, inputs: str, dtype: torch.dtype, module: Any) -> None:
    for tokens, width in ((5, 1000), (3, 4999)):
        check(module, logits(kind, tokens, width, inputs, dtype=dtype), LogitTransform(width), holes=inputs == "holes")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_textbook(kind: str) -> None:
    """Exactly, in float64: what the other tests compare with where the textbook has NaN."""
    for options in ({}, *OPTIONS):
        for tokens, width in ((1, 1), (3, 2), (5, 17), (4, 301)):
            streams, settings = logits(kind, tokens, width), LogitTransform(width, **options)
            for ours, exact in zip(
                by_kernels(reference, streams, settings, torch.float64),
                by_textbook(streams, settings, torch.float64),
                strict=True,
            ):
                torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("vocab", [1, 3, 17, 64, 1031])
@pytest.mark.parametrize("kind", KINDS)
def test_any_vocabulary(kind: str, vocab: int, module: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(module, logits(kind, 2, vocab, dtype=dtype), LogitTransform(vocab))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("kind", KINDS)
def test_scale_softcap_temperature_and_guards(kind: str, options: dict[str, float], module: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(module, logits(kind, 3, 1030, dtype=dtype), LogitTransform(1030, **options))


@pytest.mark.parametrize(
    "options", [{"ratio_bound": 0.5}, {"ratio_floor": 0.1}, {"ratio_bound": 1.0, "ratio_floor": 0.1}]
)
def test_guards_meet_holes(options: dict[str, float], module: Any) -> None:
    check(module, logits("visual", 5, 1030, "holes", dtype=torch.float32), LogitTransform(1030, **options), holes=True)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_smoothed_teachers(kind: str, inputs: str, module: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, here().dtype):
        streams = logits(kind, 5, 1030, inputs, dtype=dtype)
        check(module, streams, LogitTransform(1030, teacher_smoothing=0.01), holes=inputs == "holes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_without_mass_is_smoothed_to_the_uniform_distribution(kind: str, module: Any) -> None:
    streams = logits(kind, 3, 1030, dtype=torch.float32)
    streams[1][1] = -math.inf
    values, _ = module.divergences(Streams(*streams), LogitTransform(1030, teacher_smoothing=0.01))
    log_p = streams[0][1].double().log_softmax(-1)
    expected = textbook.kl(log_p, torch.full_like(log_p, -math.log(1030)))
    torch.testing.assert_close(values[1, STANDARD].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_uneven_padding(kind: str, module: Any) -> None:
    """Streams padded differently, rows far apart and misaligned; nothing outside `vocab_size` is touched."""
    for dtype in (torch.float32, torch.bfloat16):
        streams = logits(kind, 3, 1100, dtype=dtype)
        for index, (left, width) in enumerate([(0, 1100), (1, 1059), (8, 1051), (3, 1090)]):
            if index < len(streams):
                streams[index][:, left + width :] = math.nan
                streams[index] = streams[index][:, left : left + width]
        for stream in streams:
            stream[:, 1051:] = math.nan
        check(module, [stream[:, :1051] for stream in streams], LogitTransform(1051))
        gradient = by_kernels(module, streams, LogitTransform(1051), dtype)[1]
        assert gradient[:, :1051].isfinite().all()
        assert (gradient[:, 1051:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_another_dtype(kind: str, out_dtype: torch.dtype, module: Any) -> None:
    """float32 logits of 16-bit hidden states, whose gradients are rounded once."""
    check(module, logits(kind, 3, 1040, dtype=torch.float32), LogitTransform(1032), out_dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind: str, module: Any) -> None:
    """Each gradient may overwrite the logits of a stream."""
    settings = LogitTransform(1041)
    for dtype in (torch.float32, torch.bfloat16):
        apart = by_kernels(module, logits(kind, 3, 1048, dtype=dtype), settings, dtype)
        for first, second in ((0, 1), (-1, 0)):
            streams = logits(kind, 3, 1048, dtype=dtype)
            given = Streams(*streams)
            values, statistics = module.divergences(given, settings)
            weights = [coefficients(3, seed).to(values.dtype) for seed in (5, 6)]
            module.logit_gradients(
                given, values, statistics, weights[0], settings, out=streams[first], second_coefficients=weights[1],
                out_second=streams[second],
            )  # fmt: skip
            assert torch.equal(streams[first], apart[1])
            assert torch.equal(streams[second], apart[2])


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_rows_are_not_read(kind: str, module: Any) -> None:
    streams, settings = logits(kind, 3, 1031, dtype=torch.float32), LogitTransform(1031)
    for stream in streams:
        stream[1] = math.nan
    given, weights = Streams(*streams), torch.tensor([1.0, 0.0, 2.0])
    values, statistics = module.divergences(given, settings, weights)
    assert (values[1] == 0).all()
    assert (statistics[1] == 0).all()
    assert (values[[0, 2], STANDARD] > 0).all()
    out = torch.full_like(streams[0], math.nan)
    module.logit_gradients(given, values, statistics, weights[:, None].expand(3, 3), settings, out=out)
    assert (out[1] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_column_squares(kind: str, module: Any) -> None:
    settings = LogitTransform(1031)
    for tokens in (0, 3):
        streams = logits(kind, tokens, 1034, dtype=torch.float32)
        given, outs = Streams(*streams), [torch.empty_like(streams[0]) for _ in range(2)]
        values, statistics = module.divergences(given, settings)
        first, second = (coefficients(tokens, seed).float() for seed in (5, 6))
        squares = torch.full((2, 1031), math.nan)
        module.logit_gradients(
            given, values, statistics, first, settings, out=outs[0], second_coefficients=second, out_second=outs[1],
            column_squares=squares,
        )  # fmt: skip
        torch.testing.assert_close(squares, torch.stack([out[:, :1031].square().sum(0) for out in outs]))
        one = torch.full((1, 1031), math.nan)
        module.logit_gradients(given, values, statistics, first, settings, out=outs[1], column_squares=one)
        assert torch.equal(outs[0], outs[1])
        torch.testing.assert_close(one, squares[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_at_minus_infinity_in_every_stream_is_as_if_it_were_not_there(
    kind: str, dtype: torch.dtype, module: Any
) -> None:
    streams = logits(kind, 4, 40, dtype=dtype)
    kept = torch.tensor([i for i in range(40) if i not in (0, 7, 39)])
    small = [stream[:, kept].clone() for stream in streams]
    for stream in streams:
        stream[:, [0, 7, 39]] = -math.inf
    limit = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-6}
    (values, first, second, _), (expected, *gradients, _) = (
        by_kernels(module, given, LogitTransform(given[0].shape[1]), dtype) for given in (streams, small)
    )
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip((first, second), gradients, strict=True):
        torch.testing.assert_close(found[:, kept], wanted, **limit)
        assert (found[:, [0, 7, 39]] == 0).all()


# Which numbers become infinite where one stream alone has a hole at an entry that the others give mass.
INFINITE = {
    ("reverse_kl", 1): {STANDARD},
    ("prior", 1): {STANDARD},
    ("prior", 2): {THIRD},
    ("visual", 1): {STANDARD, THIRD},
    ("visual", 2): {THIRD, LANGUAGE, DEPENDENCY},  # q* is not a distribution
    ("visual", 3): {THIRD},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "hole"), INFINITE)
def test_mass_without_its_like_is_infinite_never_nan(kind: str, hole: int, dtype: torch.dtype, module: Any) -> None:
    streams = logits(kind, 3, 50, dtype=dtype)
    streams[hole][1, 5] = -math.inf
    values, statistics = module.divergences(Streams(*streams), LogitTransform(50))
    assert not values.isnan().any()
    assert values[[0, 2]].isfinite().all()
    assert {column for column in range(VALUES) if values[1, column].isinf()} == INFINITE[kind, hole]
    assert (values[1] > -math.inf).all()
    for column in range(COEFFICIENTS):  # no direction where a value is infinite, its own where it is not
        weights, out = torch.zeros(3, 3, dtype=dtype), torch.full_like(streams[0], math.nan)
        weights[:, column] = 1.0
        module.logit_gradients(Streams(*streams), values, statistics, weights, LogitTransform(50), out=out)
        assert out.isfinite().all()
        absent = column in INFINITE[kind, hole] or (kind == "reverse_kl" and column == THIRD)
        assert bool((out[1] == 0).all()) == absent


def test_a_target_that_is_no_distribution_is_infinite_even_where_the_student_has_no_mass(module: Any) -> None:
    streams = logits("visual", 2, 30, dtype=torch.float32)
    streams[2][0, 4] = streams[0][0, 4] = -math.inf
    values, _ = module.divergences(Streams(*streams), LogitTransform(30))
    assert values[0, THIRD] == math.inf
    assert values[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_probability_below_the_smallest_normal_number_is_no_mass(kind: str, dtype: torch.dtype, module: Any) -> None:
    """Whatever the teacher has there: a subnormal probability is 0 on some processors and not on others."""
    for inside, is_mass in ((5.0, True), (-2.0, False)):
        streams = logits(kind, 1, 20, dtype=dtype, scale=0.1, distance=0.1)
        streams[0][0, 3] = math.log(torch.finfo(dtype).tiny) + math.log(20.0) + inside
        streams[1][0, 3] = -math.inf
        values, statistics = module.divergences(Streams(*streams), LogitTransform(20))
        assert bool(values[0, STANDARD].isinf()) == is_mass
        out = torch.empty_like(streams[0])
        module.logit_gradients(
            Streams(*streams), values, statistics, torch.eye(3, dtype=dtype)[:1], LogitTransform(20), out=out
        )
        assert (out[0, 3] != 0) == is_mass  # of the entropy


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_stream_is_not_hidden(kind: str, module: Any) -> None:
    """NaN logits must not pass for a loss of 0; other rows do not hear of them."""
    for stream in range(textbook.STREAMS[kind]):
        streams = logits(kind, 3, 80, dtype=torch.float32)
        streams[stream][1, 20] = math.nan
        values, _ = module.divergences(Streams(*streams), LogitTransform(80))
        assert values[[0, 2]].isfinite().all()
        broken = {0: STANDARD, 1: STANDARD}.get(stream, THIRD)
        assert values[1, broken].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_mass(kind: str, module: Any) -> None:
    """-inf throughout, in every stream: nothing to sum."""
    streams = logits(kind, 2, 33, dtype=torch.float32)
    for stream in streams:
        stream[0] = -math.inf
    values, statistics = module.divergences(Streams(*streams), LogitTransform(33))
    assert (values[0] == 0).all()
    assert values[1].isfinite().all()
    out = torch.full_like(streams[0], math.nan)
    module.logit_gradients(Streams(*streams), values, statistics, torch.ones(2, 3), LogitTransform(33), out=out)
    assert (out[0] == 0).all()


# Properties of the paper's parts.


def test_vis_vanishes_at_its_target(module: Any) -> None:
    """p = p0 q / r: vis and its gradient are 0."""
    dtype = torch.float64 if module is reference else torch.float32
    _, q, r, p0 = logits("visual", 4, 200, dtype=dtype)
    p = p0 + q - r
    values, statistics = module.divergences(Streams(p, q, r, p0), LogitTransform(200))
    limit = 100 * torch.finfo(dtype).eps
    assert values[:, THIRD].abs().max() < limit
    out, only_vis = torch.empty_like(p), torch.zeros(4, 3, dtype=dtype)
    only_vis[:, THIRD] = 1.0
    module.logit_gradients(Streams(p, q, r, p0), values, statistics, only_vis, LogitTransform(200), out=out)
    assert out.abs().max() < limit


def test_the_target_is_the_teacher_where_prior_and_masked_teacher_agree(module: Any) -> None:
    p, q, r, _ = logits("visual", 4, 200, dtype=torch.float32)
    values, _ = module.divergences(Streams(p, q, r, r + 3.0), LogitTransform(200))
    torch.testing.assert_close(values[:, THIRD], values[:, STANDARD], rtol=1e-5, atol=1e-5)
    assert values[:, LANGUAGE].abs().max() < 1e-5


def test_nothing_depends_on_the_image_where_both_teachers_agree(module: Any) -> None:
    p, q, _, p0 = logits("visual", 4, 200, dtype=torch.float32)
    values, _ = module.divergences(Streams(p, q, q.clone(), p0), LogitTransform(200))
    assert values[:, DEPENDENCY].abs().max() < 1e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_the_update_is_distillation_towards_a_steered_teacher(per_token: bool, module: Any) -> None:
    """Its gradient is (1 + gamma) times that of KL(p || q~), q~ proportional to q (p0 / r)^(gamma / (1 + gamma))."""
    dtype = torch.float64 if module is reference else torch.float32
    streams = logits("visual", 5, 300, dtype=dtype)
    gamma = torch.linspace(0, 4, 5, dtype=dtype) if per_token else torch.full((5,), 2.0, dtype=dtype)
    values, statistics = module.divergences(Streams(*streams), LogitTransform(300))
    mixture, out = torch.zeros(5, 3, dtype=dtype), torch.empty_like(streams[0])
    mixture[:, STANDARD], mixture[:, THIRD] = 1.0, gamma
    module.logit_gradients(Streams(*streams), values, statistics, mixture, LogitTransform(300), out=out)
    leaf, (_, log_q, log_r, log_p0) = (
        streams[0].double().requires_grad_(),
        (s.double().log_softmax(-1) for s in streams),
    )
    share = (gamma / (1 + gamma))[:, None].double()
    steered = (log_q + share * (log_p0 - log_r)).log_softmax(-1)
    (((1 + gamma) * textbook.kl(leaf.log_softmax(-1), steered)).sum()).backward()
    torch.testing.assert_close(out.double(), leaf.grad, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


# The operators.


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    streams = logits(kind, 3, 7, scale=1.0)
    others = [*streams[1:], None, None][:3]
    settings = LogitTransform(7, temperature=0.8, student_softcap=4.0, ratio_bound=0.5 if kind == "visual" else 0.0)

    def of_student(student: Tensor) -> Tensor:
        return op.stream_kl(student, *others, *settings.arguments(), "reference")[0]

    assert torch.autograd.gradcheck(of_student, streams[0].requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, name: str) -> None:
    streams = logits(kind, 3, 9, dtype=torch.float32)
    others = [*streams[1:], None, None][:3]
    arguments = (streams[0].requires_grad_(), *others, *LogitTransform(9, temperature=1.1).arguments(), name)
    torch.library.opcheck(op.stream_kl, arguments)
    values, statistics = op.stream_kl(*arguments)
    inputs = (streams[0].detach(), *others, values.detach(), statistics, torch.randn(3, 3))
    torch.library.opcheck(
        op.stream_kl_backward, (*inputs, *arguments[4:]), test_utils=("test_schema", "test_faketensor")
    )
