"""The reference backend and the public function of `decomposed_kl`, against textbook autograd in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_formulas import DECOMPOSITIONS, log_probs, streams, textbook
from vgs_kernels import old_decomposed_kl as decomposed_kl
from vgs_kernels.decomposed_kl import smoothing
from vgs_kernels.decomposed_kl.old_types import LogitTransform

PARTS = ("lang", "vis", "full", "entropy")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5, "student_scale": 1.7, "teacher_scale": 0.6},
    {"student_softcap": 3.0, "teacher_softcap": 5.0, "temperature": 1.3},
    {"teacher_smoothing": 0.1, "teacher_scale": 0.6, "teacher_softcap": 5.0, "temperature": 1.3},
]


def call(inputs: list[Tensor], decomposition: str, options: dict[str, Any], **more: Any) -> Any:
    renamed = {
        {"student_scale": "student_logit_scale", "teacher_scale": "teacher_logit_scale"}.get(k, k): v
        for k, v in options.items()
    }
    return decomposed_kl(*inputs, decomposition=decomposition, backend="reference", **renamed, **more)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_values_and_gradients_are_those_of_the_textbook(decomposition: str, options: dict[str, Any]) -> None:
    for seed, (tokens, vocab) in enumerate(((1, 1), (3, 2), (5, 17), (4, 301))):
        inputs = streams(decomposition, tokens, vocab, seed)
        students = [t for t in inputs if t.requires_grad]
        got = call(inputs, decomposition, options)
        expected = textbook(*inputs, *[None] * (4 - len(inputs)), decomposition, **options)
        upstream = torch.Generator().manual_seed(seed + 100)
        for part in PARTS:
            value = getattr(got, part)
            torch.testing.assert_close(value, expected[part], atol=1e-10, rtol=1e-10)
            weights = torch.randn(tokens, generator=upstream, dtype=torch.float64)
            grads = torch.autograd.grad((value * weights).sum(), students, retain_graph=True, allow_unused=True)
            wanted = torch.autograd.grad(
                (expected[part] * weights).sum(), students, retain_graph=True, allow_unused=True
            )
            for a, b, like in zip(grads, wanted, students, strict=True):
                zero = torch.zeros_like(like)
                torch.testing.assert_close(zero if a is None else a, zero if b is None else b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gradcheck(decomposition: str) -> None:
    inputs = streams(decomposition, 3, 7, seed=5, scale=1.0)

    def lang_of_masked(masked: Tensor) -> Tensor:
        return call([*inputs[:3], masked], decomposition, {"temperature": 0.8}).lang

    def of_student(student: Tensor) -> tuple[Tensor, ...]:
        return tuple(call([student, *inputs[1:]], decomposition, {"student_softcap": 4.0}))

    assert torch.autograd.gradcheck(of_student, inputs[0])
    if len(inputs) == 4:
        # Of lang only: in `bayes` vis reads the masked student as a constant, which no finite difference can know.
        assert torch.autograd.gradcheck(lang_of_masked, inputs[3])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_full_is_the_monolithic_divergence(decomposition: str) -> None:
    inputs = streams(decomposition, 6, 40, seed=1)
    got = call(inputs, decomposition, {})
    p, q = inputs[0].detach().log_softmax(-1), inputs[1].log_softmax(-1)
    monolithic = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(got.full.detach(), monolithic, atol=1e-12, rtol=1e-12)
    if decomposition == "teacher_prior":
        torch.testing.assert_close(got.lang + got.vis, got.full, atol=1e-12, rtol=1e-12)
    if decomposition == "matched":
        assert got.vis is got.full or torch.equal(got.vis, got.full)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_leading_dimensions_are_kept(decomposition: str) -> None:
    inputs = streams(decomposition, 12, 9, seed=2)
    flat = call(inputs, decomposition, {})
    folded = call([t.reshape(3, 4, 9) for t in inputs], decomposition, {})
    for a, b in zip(flat, folded, strict=True):
        assert b.shape == (3, 4)
        assert torch.equal(a, b.flatten())
    single = call([t[0] for t in inputs], decomposition, {})
    assert single.lang.shape == ()
    assert torch.equal(single.lang, flat.lang[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smoothed_teachers_are_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over the logits, a part of them at a time; padding stays as it is."""
    transform = LogitTransform("matched", 4001, 1.3, 1.0, 0.6, 0.0, 5.0)
    logits = streams("matched", 8, 4004, seed=3, dtype=dtype)[1]
    exact = log_probs(logits.double(), 0.6, 5.0, 1.3, 4001, smoothing=0.01) * 1.3
    padding = logits[:, 4001:].clone()
    monkeypatch.setitem(smoothing._LOGITS_AT_A_TIME, "cpu", 3 * 4001)
    smoothing.smooth_(logits, 0.01, transform)
    tolerance = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(logits[:, :4001].double(), exact, rtol=tolerance, atol=1e-6)
    assert torch.equal(logits[:, 4001:], padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_fp32(dtype: torch.dtype) -> None:
    inputs = streams("matched", 8, 4001, seed=3, dtype=dtype)
    got = call(inputs, "matched", {})
    exact = textbook(*[t.detach().double() for t in inputs], "matched")
    plain = textbook(*[t.detach() for t in inputs], "matched")
    for part in PARTS:
        value = getattr(got, part)
        assert value.dtype == torch.float32
        error = (value.double() - exact[part]).abs().max()
        plain_error = (plain[part].double() - exact[part]).abs().max()
        assert error <= 2 * plain_error + 1e-5, part
    got.vis.sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.dtype == dtype


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_an_entry_at_minus_infinity_in_every_stream_is_as_if_it_were_not_there(decomposition: str) -> None:
    inputs = streams(decomposition, 4, 20, seed=4)
    kept = torch.tensor([i for i in range(20) if i not in (0, 7, 19)])
    holed = [t.detach().clone() for t in inputs]
    for t in holed:
        t[:, [0, 7, 19]] = -math.inf
    small = [t.detach()[:, kept].clone() for t in inputs]
    for group in (holed, small):
        for index in {0, 3} & set(range(len(group))):
            group[index].requires_grad_()
    a, b = call(holed, decomposition, {}), call(small, decomposition, {})
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    (a.lang + 2 * a.vis).sum().backward()
    (b.lang + 2 * b.vis).sum().backward()
    for index in {0, 3} & set(range(len(holed))):
        torch.testing.assert_close(holed[index].grad[:, kept], small[index].grad, atol=1e-12, rtol=1e-12)
        assert (holed[index].grad[:, [0, 7, 19]] == 0).all()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("blind", [(1,), (2,), (1, 2)])
def test_student_mass_without_teacher_mass_is_infinite_never_nan(decomposition: str, blind: tuple[int, ...]) -> None:
    inputs = streams(decomposition, 3, 11, seed=6)
    for stream in blind:
        inputs[stream][1, 5] = -math.inf
    got = call(inputs, decomposition, {})
    for part in got:
        assert not torch.isnan(part).any()
        assert torch.isfinite(part[[0, 2]]).all()
    masked_blind, seen_blind = 2 in blind, 1 in blind
    assert torch.isinf(got.full[1]) == seen_blind
    assert torch.isinf(got.lang[1]) == masked_blind
    vis_reads_masked = decomposition != "matched"
    assert torch.isinf(got.vis[1]) == (seen_blind or (masked_blind and vis_reads_masked))
    assert (got.vis[torch.isinf(got.vis)] > 0).all()
    torch.where(torch.isinf(got.vis), 0.0, got.vis).sum().backward(retain_graph=True)
    (got.lang + got.vis).sum().backward()
    for t in inputs:
        if t.grad is not None:
            assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_broken_student_is_not_hidden(decomposition: str) -> None:
    """NaN logits must not pass for a loss of 0."""
    inputs = streams(decomposition, 3, 8, seed=20)
    with torch.no_grad():
        inputs[0][1] = math.nan
    got = call(inputs, decomposition, {})
    assert torch.isnan(got.full[1])
    assert torch.isnan(got.entropy[1])
    assert torch.isfinite(got.full[[0, 2]]).all()
    got.full.sum().backward()
    assert torch.isfinite(inputs[0].grad[[0, 2]]).all()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_teacher_without_any_mass_is_infinitely_far(decomposition: str) -> None:
    inputs = streams(decomposition, 3, 8, seed=21)
    inputs[1][1] = -math.inf
    got = call(inputs, decomposition, {})
    assert got.full[1] == math.inf
    assert got.vis[1] == math.inf
    got.full.sum().backward()
    assert torch.isfinite(inputs[0].grad).all()


def test_a_student_hole_needs_no_teacher_mass() -> None:
    inputs = streams("matched", 2, 6, seed=8)
    with torch.no_grad():
        for t in inputs:
            t[:, 2] = -math.inf
        inputs[1][:, 2] = 0.3  # the teacher puts mass where the student has none: reverse KL does not mind
    got = call(inputs, "matched", {})
    assert torch.isfinite(got.full).all()
    got.full.sum().backward()
    assert torch.isfinite(inputs[0].grad).all()


def test_tokens_that_take_no_part_may_hold_nan() -> None:
    inputs = streams("teacher_prior", 4, 13, seed=9)
    with torch.no_grad():
        for t in inputs:
            t[2] = math.nan
    got = call(inputs, "teacher_prior", {})
    mask = torch.tensor([True, True, False, True])
    got.vis[mask].sum().backward()
    assert torch.isfinite(inputs[0].grad).all()
    assert (inputs[0].grad[2] == 0).all()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_padded_vocabularies(decomposition: str) -> None:
    inputs = streams(decomposition, 4, 10, seed=10)
    padded = []
    for index, t in enumerate(inputs):
        junk = torch.full((4, 3 + index), 50.0, dtype=t.dtype)
        padded.append(torch.cat([t.detach(), junk], 1).requires_grad_(t.requires_grad))
    with pytest.raises(ValueError, match="pass vocab_size"):
        call(padded, decomposition, {})
    got, expected = call(padded, decomposition, {}, vocab_size=10), call(inputs, decomposition, {})
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    got.vis.sum().backward()
    expected.vis.sum().backward()
    torch.testing.assert_close(padded[0].grad[:, :10], inputs[0].grad, atol=1e-12, rtol=1e-12)
    assert (padded[0].grad[:, 10:] == 0).all()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_strided_and_empty_inputs(decomposition: str) -> None:
    inputs = streams(decomposition, 6, 15, seed=11)
    expected = call(inputs, decomposition, {})
    views = [torch.stack([t, t], 1)[:, 0] for t in inputs]
    transposed = [t.t().contiguous().t() for t in inputs]
    for variant in (views, transposed):
        got = call(variant, decomposition, {})
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    empty = call([t[:0] for t in inputs], decomposition, {})
    assert all(part.shape == (0,) for part in empty)
    empty.vis.sum().backward()
    assert (inputs[0].grad == 0).all()


def test_backward_twice_gives_the_same_answer_twice() -> None:
    inputs = streams("bayes", 4, 12, seed=12)
    vis = call(inputs, "bayes", {}).vis.sum()
    first = torch.autograd.grad(3 * vis, inputs[0], retain_graph=True)[0]
    second = torch.autograd.grad(3 * vis, inputs[0])[0]
    assert torch.equal(first, second)


def test_double_backward_is_refused_clearly() -> None:
    inputs = streams("matched", 2, 5, seed=13)
    (gradient,) = torch.autograd.grad(call(inputs, "matched", {}).vis.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_opcheck(decomposition: str) -> None:
    inputs = streams(decomposition, 3, 9, seed=14)
    rows = [*inputs, None][:4]
    torch.library.opcheck(
        torch.ops.vgs_kernels.divergences.default, (*rows, decomposition, 9, 1.0, 1.0, 1.0, 0.0, 0.0, "reference")
    )


def test_compiles_without_graph_breaks() -> None:
    inputs = streams("matched", 4, 33, seed=15, dtype=torch.float32)

    def loss(*tensors: Tensor) -> Tensor:
        parts = decomposed_kl(*tensors, temperature=0.9, backend="reference")
        return (parts.lang + 2 * parts.vis).sum()

    expected = loss(*inputs)
    expected_grads = torch.autograd.grad(expected, [inputs[0], inputs[3]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    grads = torch.autograd.grad(compiled, [inputs[0], inputs[3]])
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


S, T, M = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((S, T, M), {"decomposition": "baies"}, "unknown decomposition 'baies'; choose one of"),
        ((S, T, M), {}, "'matched' needs masked_student_logits .*teacher_prior"),
        ((S, T, M), {"decomposition": "bayes"}, "'bayes' needs masked_student_logits"),
        ((S, T, M, S), {"decomposition": "teacher_prior"}, "does not use masked_student_logits"),
        ((S, T[:1], M, S), {}, r"teacher_logits has leading shape \(1,\), but student_logits has \(2,\)"),
        ((S, T.double(), M, S), {}, "teacher_logits has dtype torch.float64, but student_logits has torch.float32"),
        ((S, T, M.to("meta"), S), {}, "masked_teacher_logits has device meta, but student_logits has cpu"),
        ((S, T[:, :4], M, S), {}, "the vocabularies differ in size .*teacher_logits 4"),
        ((S, T, M, S), {"vocab_size": 6}, "vocab_size must be between 1 and the smallest vocabulary, got 6"),
        ((S, T, M, S), {"vocab_size": 0}, "vocab_size must be between 1"),
        ((S, T, M, S), {"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
        ((S, T, M, S), {"student_softcap": -1.0}, "student_softcap must be a positive"),
        ((S.long(), T, M, S), {}, "student_logits must be floating point, got torch.int64"),
        ((S, T, M, S), {"backend": "cuda"}, "unknown backend 'cuda'; choose one of native, triton, foreach, reference"),
    ],
)
def test_bad_arguments_are_one_sentence(args: tuple[Tensor, ...], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decomposed_kl(*args, **options)
