"""`reverse_kl` and `decomposed_kl`: the public functions on logits, in every place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import textbook
from tests.places import here
from vgs_kernels import DecomposedKL, RatioGuard, ReverseKL, decomposed_kl, reverse_kl

KINDS = ("reverse_kl", "teacher_prior", "vgs")
DIFFERENTIABLE = {
    "reverse_kl": ("kl", "entropy"),
    "teacher_prior": ("standard", "vis", "lang", "entropy"),
    "vgs": ("standard", "vis", "entropy"),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5, "student_scale": 1.7, "teacher_scale": 0.6},
    {"student_softcap": 3.0, "teacher_softcap": 5.0, "temperature": 1.3},
    {"teacher_smoothing": 0.1, "teacher_scale": 0.6, "teacher_softcap": 5.0, "temperature": 1.3},
]


def streams(kind: str, tokens: int, vocab: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The student requires a gradient. In the widest dtype of the place."""
    dtype = dtype or here().dtype
    found = textbook.logits({"vgs": "visual", "teacher_prior": "prior"}.get(kind, kind), tokens, vocab, dtype=dtype)
    found[0].requires_grad_()
    return found


def call(kind: str, inputs: list[Tensor], **options: Any) -> Any:
    names = {"student_scale": "student_logit_scale", "teacher_scale": "teacher_logit_scale"}
    options = {names.get(name, name): value for name, value in options.items()}
    if kind == "reverse_kl":
        return reverse_kl(*inputs, **options)
    return decomposed_kl(*inputs, decomposition=kind, **options)


def expected_parts(kind: str, inputs: list[Tensor], **options: Any) -> dict[str, Tensor]:
    entropy, standard, third, language, dependency = textbook.numbers(inputs, **options).unbind(-1)
    if kind == "reverse_kl":
        return {"kl": standard, "entropy": entropy}
    if kind == "teacher_prior":
        return {"standard": standard, "vis": standard - third, "lang": third, "entropy": entropy}
    return {"standard": standard, "vis": third, "lang": language, "entropy": entropy, "dependency": dependency}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_textbook(kind: str, options: dict[str, Any], chosen: str) -> None:
    for tokens, vocab in ((1, 1), (3, 2), (5, 17), (4, 301)):
        inputs = streams(kind, tokens, vocab)
        got, wanted = call(kind, inputs, backend=chosen, **options), expected_parts(kind, inputs, **options)
        for part, value in wanted.items():
            found = getattr(got, part)
            torch.testing.assert_close(found, value, atol=1e-10, rtol=1e-10)
            if part not in DIFFERENTIABLE[kind]:
                assert not found.requires_grad
                continue
            weights = torch.linspace(-1.0, 2.0, tokens, dtype=torch.float64)
            pair = [torch.autograd.grad((x * weights).sum(), inputs[0], retain_graph=True)[0] for x in (found, value)]
            torch.testing.assert_close(*pair, atol=1e-10, rtol=1e-10)


def test_a_ratio_guard_is_that_of_the_textbook(chosen: str) -> None:
    inputs = streams("vgs", 4, 301)
    for guard, options in (
        (RatioGuard(bound=0.5), {"ratio_bound": 0.5}),
        (RatioGuard(floor=0.1), {"ratio_floor": 0.1}),
        (RatioGuard(bound=1.0, floor=0.01), {"ratio_bound": 1.0, "ratio_floor": 0.01}),
    ):
        got = call("vgs", inputs, ratio_guard=guard, backend=chosen)
        torch.testing.assert_close(got.vis, expected_parts("vgs", inputs, **options)["vis"])
        assert not torch.allclose(got.vis, call("vgs", inputs, backend=chosen).vis)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_are_kept(kind: str) -> None:
    inputs = streams(kind, 12, 9)
    flat, folded = call(kind, inputs), call(kind, [t.reshape(3, 4, 9) for t in inputs])
    for a, b in zip(flat, folded, strict=True):
        if a is not None:
            assert b.shape == (3, 4)
            assert torch.equal(a, b.flatten())
    single = call(kind, [t[0] for t in inputs])
    assert single[0].shape == ()
    assert torch.equal(single[0], flat[0][0])


def test_parts_of_teacher_prior_add_up_and_constants_have_no_gradient() -> None:
    got = call("teacher_prior", streams("teacher_prior", 6, 40))
    torch.testing.assert_close(got.lang + got.vis, got.standard, atol=1e-12, rtol=1e-12)
    assert got.dependency is None
    inputs = [t.detach().requires_grad_() for t in streams("vgs", 6, 40)]
    parts = call("vgs", inputs)
    gradients = torch.autograd.grad(parts.standard.sum() + parts.vis.sum(), inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_float32_and_gradients_have_the_dtype_of_the_logits(
    kind: str, dtype: torch.dtype, chosen: str
) -> None:
    inputs = streams(kind, 8, 401, dtype)
    got = call(kind, inputs, backend=chosen)
    assert isinstance(got, ReverseKL if kind == "reverse_kl" else DecomposedKL)
    assert all(part is None or part.dtype == torch.float32 for part in got)
    got[0].sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.dtype == dtype


@pytest.mark.parametrize("hole", [1, 2])
def test_a_visual_part_that_reads_an_infinite_divergence_is_infinite(hole: int, chosen: str) -> None:
    """Never NaN, nor minus infinity, which would call a missing token a gain."""
    inputs = streams("teacher_prior", 3, 11)
    inputs[hole][1, 5] = -math.inf
    got = call("teacher_prior", inputs, backend=chosen)
    assert got.vis[1] == math.inf
    assert got.vis[[0, 2]].isfinite().all()
    (got.standard + got.vis + got.lang).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_take_no_part_may_hold_nan(kind: str, chosen: str) -> None:
    inputs = streams(kind, 4, 13)
    with torch.no_grad():
        for t in inputs:
            t[2] = math.nan
    got = call(kind, inputs, backend=chosen)
    got[0][torch.tensor([True, True, False, True])].sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.isfinite().all()
    assert (inputs[0].grad[2] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padded_vocabularies(kind: str, chosen: str) -> None:
    inputs = streams(kind, 4, 10)
    padded = [
        torch.cat([t.detach(), torch.full((4, 3 + index), 50.0, dtype=t.dtype)], 1) for index, t in enumerate(inputs)
    ]
    padded[0].requires_grad_()
    with pytest.raises(ValueError, match="pass vocab_size"):
        call(kind, padded)
    for smoothing in (0.0, 0.1):
        options = {"teacher_smoothing": smoothing, "backend": chosen}
        got, expected = call(kind, padded, vocab_size=10, **options), call(kind, inputs, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12) if a is not None else None
        gradient = torch.autograd.grad(got[1].sum(), padded[0])[0]
        torch.testing.assert_close(gradient[:, :10], torch.autograd.grad(expected[1].sum(), inputs[0])[0])
        assert (gradient[:, 10:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_strided_and_empty_inputs(kind: str, chosen: str) -> None:
    inputs = streams(kind, 6, 15)
    expected = call(kind, inputs, backend=chosen)
    views = [torch.stack([t, t], 1)[:, 0] for t in inputs]
    for variant in (views, [t.t().contiguous().t() for t in inputs]):
        for a, b in zip(call(kind, variant, backend=chosen), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12) if a is not None else None
    empty = call(kind, [t[:0] for t in inputs], backend=chosen)
    assert all(part is None or part.shape == (0,) for part in empty)
    empty[0].sum().backward()
    assert inputs[0].grad is not None
    assert (inputs[0].grad == 0).all()


def test_backward_twice_gives_the_same_answer_twice_and_a_second_derivative_is_refused() -> None:
    inputs = streams("vgs", 4, 12)
    vis = call("vgs", inputs).vis.sum()
    first, second = (torch.autograd.grad(3 * vis, inputs[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(vis, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


S, T, M = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((S, T, M), {"decomposition": "baies"}, "unknown decomposition 'baies'; choose one of vgs, teacher_prior"),
        ((S, T, M), {}, r"'vgs' needs masked_student_logits .*teacher_prior"),
        ((S, T, M, S), {"decomposition": "teacher_prior"}, "does not use masked_student_logits"),
        ((S, T[:1], M, S), {}, r"teacher_logits has leading shape \(1,\), but student_logits has \(2,\)"),
        ((S, T.double(), M, S), {}, r"teacher_logits has dtype torch\.float64, but student_logits has torch\.float32"),
        ((S, T, M.to("meta"), S), {}, "masked_teacher_logits has device meta, but student_logits has cpu"),
        ((S, T[:, :4], M, S), {}, r"the vocabularies differ in size .*teacher_logits 4"),
        ((S, T, M, S), {"vocab_size": 6}, "vocab_size must be between 1 and the smallest vocabulary, got 6"),
        ((S, T, M, S), {"vocab_size": 0}, "vocab_size must be between 1"),
        ((S, T, M, S), {"vocab_size": 4.0}, r"vocab_size must be a whole number, got 4\.0"),
        ((S, T, M, S), {"temperature": 0.0}, r"temperature must be a positive finite number, got 0\.0"),
        ((S, T, M, S), {"student_softcap": -1.0}, "the soft cap of the student must be a positive"),
        ((S, T, M, S), {"teacher_logit_scale": math.nan}, "the logit scale of the teacher must be a finite number"),
        ((S, T, M, S), {"ratio_guard": RatioGuard(bound=0.0)}, "the bound of ratio_guard must be a positive"),
        ((S, T, M, S), {"ratio_guard": RatioGuard(floor=1.0)}, "the floor of ratio_guard must be at least 0"),
        ((S.long(), T, M, S), {}, r"student_logits must be float32, bfloat16, float16 or float64, got torch\.int64"),
        (tuple(x.to(torch.float8_e5m2) for x in (S, T, M, S)), {}, r"or float64, got torch\.float8_e5m2"),
        ((S, T, M, S), {"backend": "cuda"}, "unknown backend 'cuda'; choose one of native, triton, foreach, reference"),
    ],
)
def test_bad_arguments_are_one_sentence(args: tuple[Tensor, ...], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decomposed_kl(*args, **({"decomposition": "vgs"} | options))
