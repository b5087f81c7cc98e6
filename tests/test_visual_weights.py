"""Weights of the visual parts in `linear_decomposed_kl`: token steering, plausibility, smoothed teachers, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_formulas import DECOMPOSITIONS, log_probs, visual_weights
from tests.test_linear_decomposed_kl import (
    BACKENDS,
    HEADS,
    TOKENS,
    VOCAB,
    Problem,
    assert_all_close,
    chunk_bytes,
    gradients,
)
from vgs_kernels import LMHead
from vgs_kernels import OldLinearDecomposedKL as LinearDecomposedKL

SETTINGS: list[dict[str, float]] = [
    {"token_steering": 3.0},
    {"plausibility": 0.4},
    {"teacher_smoothing": 0.1},
    {"token_steering": 0.5, "plausibility": 0.2, "teacher_smoothing": 0.02},
]


@pytest.fixture(params=BACKENDS)
def chosen(request: pytest.FixtureRequest) -> str:
    return request.param


def sampled_tokens(tokens: int = TOKENS, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(7))


def teachers(
    problem: Problem, temperature: float = 1.0, vocab_size: int = VOCAB, smoothing: float = 0.0
) -> list[Tensor]:
    """log q and log r, (tokens, vocab)."""
    head = problem.teacher_head
    return [
        log_probs(hidden @ head.weight.t(), head.logit_scale, head.softcap, temperature, vocab_size, smoothing)
        for hidden in (problem.teacher_hidden, problem.masked_teacher_hidden)
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
@pytest.mark.parametrize("head", HEADS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_weights_values_and_gradients_are_those_of_the_textbook(
    decomposition: str, head: dict[str, Any], settings: dict[str, float], chosen: str
) -> None:
    problem = Problem(decomposition, vocab=64, teacher_vocab=70, **head)  # of which 61 are real
    options = {"temperature": 1.3, "vocab_size": VOCAB}
    sampled = sampled_tokens()
    smoothing = settings.get("teacher_smoothing", 0.0)
    log_q, log_r = teachers(problem, smoothing=smoothing, **options)
    weights = visual_weights(
        log_q, log_r, sampled, settings.get("token_steering", 0.0), settings.get("plausibility", 0)
    )
    assert ("plausibility" in settings) == bool((weights == 0).any())
    expected = problem.textbook(weights, teacher_smoothing=smoothing, **options)
    pair = torch.tensor([0.3, -1.7], dtype=torch.float64)
    for tokens in (1, 4, 100):  # per chunk: the result does not depend on it
        options |= {"backend": chosen, "max_chunk_bytes": chunk_bytes(problem, tokens), "sampled_tokens": sampled}
        got = problem.call(**settings, **options)
        torch.testing.assert_close(got.visual_weights, weights)
        torch.testing.assert_close(got.contribution, (log_q - log_r).gather(1, sampled[:, None]).squeeze(1))
        for part in ("lang", "vis"):
            value = getattr(got, part)
            torch.testing.assert_close(value, expected[part], rtol=1e-10, atol=1e-10)
            assert_all_close(gradients(value, problem.students), gradients(expected[part], problem.students))
        together = problem.call(steering_weights=pair, gradient_filter=1e-12, **settings, **options)
        assert together.objective is not None
        wanted = pair[0] * expected["lang"] + pair[1] * expected["vis"]
        assert_all_close(gradients(together.objective, problem.students), gradients(wanted, problem.students))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gramian_is_that_of_the_weighted_logit_gradients(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, width=VOCAB)
    with torch.no_grad():  # with the identity for a head, hidden states are logits
        problem.weight.copy_(torch.eye(VOCAB))
    got = problem.call(sampled_tokens=sampled_tokens(), token_steering=2.0, plausibility=0.3, backend=chosen)
    logits = [t for t in (problem.hidden, problem.masked_hidden) if t is not None]
    flat = [torch.cat([g.flatten() for g in gradients(part, logits)]) for part in (got.lang, got.vis)]
    torch.testing.assert_close(got.logit_gramian, torch.stack([torch.stack([a @ b for b in flat]) for a in flat]))


def everything(result: LinearDecomposedKL, problem: Problem) -> list[Tensor]:
    sums = [result.lang, result.vis] if result.objective is None else [result.objective]
    found = [gradient for value in sums for gradient in gradients(value, problem.students)]
    return [result.lang, result.vis, result.logit_gramian, *result.tokens, *found]


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_all_off_is_the_plain_loss_to_the_bit(decomposition: str, combined: bool, chosen: str) -> None:
    problem = Problem(decomposition, dtype=torch.float32)
    options: dict[str, Any] = {"backend": chosen, "steering_weights": torch.ones(2) if combined else None}
    plain = problem.call(**options)
    off = problem.call(
        sampled_tokens=sampled_tokens(), token_steering=0.0, plausibility=0.0, teacher_smoothing=0.0,
        visual_weights=torch.ones(TOKENS), **options,
    )  # fmt: skip
    for a, b in zip(everything(plain, problem), everything(off, problem), strict=True):
        assert torch.equal(a, b)
    assert plain.contribution is None
    assert torch.equal(plain.visual_weights, torch.ones(TOKENS))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_given_weights_multiply(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    given = torch.rand(TOKENS, dtype=torch.float64)
    given[[2, 5]] = 0.0
    settings: dict[str, Any] = {"sampled_tokens": sampled_tokens(), "token_steering": 2.0, "backend": chosen}
    weights = problem.call(**settings).visual_weights * given
    got, expected = problem.call(visual_weights=given, **settings), problem.textbook(weights)
    assert torch.equal(got.visual_weights, weights)
    assert_all_close(gradients(got.vis, problem.students), gradients(expected["vis"], problem.students))
    assert_all_close(gradients(got.lang, problem.students), gradients(expected["lang"], problem.students))
    assert not gradients(got.vis, problem.students)[0][[2, 5]].any()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_tokens_of_weight_zero_may_hold_anything(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    assert problem.token_weights is not None
    problem.token_weights[[1, 4]] = 0.0
    sampled = sampled_tokens()
    options: dict[str, Any] = {"backend": chosen, "token_steering": 2.0, "plausibility": 0.2, "teacher_smoothing": 0.1}
    clean = problem.call(sampled_tokens=sampled, **options)
    wanted = everything(clean, problem)
    sampled[[1, 4]] = -100
    with torch.no_grad():
        for hidden in (problem.hidden, problem.masked_hidden, problem.teacher_hidden, problem.masked_teacher_hidden):
            if hidden is not None:
                hidden[[1, 4]] = math.nan
    dirty = problem.call(sampled_tokens=sampled, **options)
    assert_all_close(everything(dirty, problem), wanted)
    for per_token in (dirty.visual_weights, dirty.contribution):
        assert per_token is not None
        assert not per_token[[1, 4]].any()


def without_some_tokens(problem: Problem) -> None:
    """The teacher gives the first three tokens no probability, with or without the image."""
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[:3] = -math.inf
    problem.teacher_head = LMHead(problem.teacher_head.weight, bias)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_where_a_teacher_has_no_mass(decomposition: str, chosen: str) -> None:
    """The student has some there: divergences are infinite, and normalisers cannot be known from them."""
    problem = Problem(decomposition)
    without_some_tokens(problem)
    sampled = torch.arange(TOKENS)
    got = problem.call(sampled_tokens=sampled, token_steering=2.0, backend=chosen)
    assert got.contribution is not None
    assert got.contribution.isnan().all()
    assert torch.equal(got.visual_weights, torch.full((TOKENS,), 3.0, dtype=torch.float64))
    assert got.vis == math.inf
    excluded = torch.arange(TOKENS) > 2
    guarded = problem.call(sampled_tokens=sampled, visual_weights=excluded.double(), plausibility=1e-9, backend=chosen)
    assert torch.equal(guarded.visual_weights != 0, excluded)
    none = problem.call(sampled_tokens=torch.zeros_like(sampled), plausibility=1e-9, backend=chosen)
    assert none.vis == 0  # infinite parts of weight 0
    assert not any(gradient.any() for gradient in gradients(none.vis, problem.students))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_smoothing_makes_every_divergence_from_a_teacher_finite(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    without_some_tokens(problem)
    got = problem.call(teacher_smoothing=0.01, sampled_tokens=torch.arange(TOKENS), token_steering=2.0, backend=chosen)
    expected = problem.textbook(got.visual_weights, teacher_smoothing=0.01)
    for part in ("lang", "vis"):
        value = getattr(got, part)
        torch.testing.assert_close(value, expected[part])
        assert_all_close(gradients(value, problem.students), gradients(expected[part], problem.students))
    assert got.contribution is not None
    torch.testing.assert_close(got.contribution[:3], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_token_outside_the_vocabulary_has_no_probability(chosen: str) -> None:
    problem = Problem("matched", vocab=64)
    for outside in (-1, 61, 64, 2**40):
        got = problem.call(
            sampled_tokens=torch.full((TOKENS,), outside), plausibility=1e-30, vocab_size=VOCAB, backend=chosen
        )
        assert not got.visual_weights.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_error_is_that_of_plain_torch(dtype: torch.dtype, smoothing: float, chosen: str) -> None:
    problem = Problem("matched", dtype=dtype, tokens=104, vocab=1003, width=32)
    sampled = sampled_tokens(104, 1003)
    wide = [
        h.double() @ problem.teacher_head.weight.double().t()
        for h in (problem.teacher_hidden, problem.masked_teacher_hidden)
    ]
    narrow = [h @ problem.teacher_head.weight.t() for h in (problem.teacher_hidden, problem.masked_teacher_hidden)]

    def contribution(logits: list[Tensor]) -> Tensor:
        log_q, log_r = (log_probs(z, smoothing=smoothing).gather(1, sampled[:, None]).squeeze(1) for z in logits)
        return (log_q - log_r).double()

    problem.token_weights = None
    got = problem.call(sampled_tokens=sampled, teacher_smoothing=smoothing, backend=chosen).contribution
    assert got is not None
    truth = contribution(wide)
    error, plain_error = ((x.double() - truth).square().mean().sqrt() for x in (got, contribution(narrow)))
    assert error <= 2 * plain_error + 4 * torch.finfo(torch.float32).eps * truth.square().mean().sqrt()


def test_weights_reach_the_accumulated_head_gradient(chosen: str) -> None:
    problem = Problem("matched", bias=True)
    options: dict[str, Any] = {
        "sampled_tokens": sampled_tokens(), "token_steering": 2.0, "backend": chosen, "steering_weights": torch.ones(2),
    }  # fmt: skip
    wanted = gradients(problem.call(**options).objective, problem.students)
    for repeat in (1, 2):
        problem.call(accumulate_head_grad=True, **options).objective.backward()
        assert_all_close([t.grad for t in problem.students], [repeat * g for g in wanted])


def test_wrong_arguments_say_what_is_wrong() -> None:
    problem, sampled = Problem("teacher_prior"), sampled_tokens()
    for options, message in (
        ({"token_steering": 1.0}, "pass sampled_tokens"),
        ({"plausibility": 0.1}, "pass sampled_tokens"),
        ({"token_steering": -1.0, "sampled_tokens": sampled}, "token_steering must be 0"),
        ({"token_steering": math.inf, "sampled_tokens": sampled}, "token_steering must be 0"),
        ({"plausibility": 1.0, "sampled_tokens": sampled}, "plausibility must be at least 0"),
        ({"teacher_smoothing": -0.1}, "teacher_smoothing must be at least 0"),
        ({"teacher_smoothing": math.nan}, "teacher_smoothing must be at least 0"),
        ({"sampled_tokens": sampled.int()}, "must be int64"),
        ({"sampled_tokens": sampled[1:]}, r"sampled_tokens must have shape \(11,\)"),
        ({"visual_weights": torch.ones(3)}, r"visual_weights must have shape \(11,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            problem.call(**options)
