"""The linear calls against textbook autograd on whole logits, in float64, in every place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear_problem import (
    DECOMPOSITIONS,
    HEADS,
    TOKENS,
    VOCAB,
    Problem,
    assert_all_close,
    chunk_bytes,
    gradients,
)  # fmt: skip
from tests.places import here
from vgs_kernels import LMHead, linear_reverse_kl
from vgs_kernels.linear import linear_decomposed_kl, op, reference
from vgs_kernels.linear.column_filter import HEAD_MULTIPLE
from vgs_kernels.linear.gpu_products import GpuProducts
from vgs_kernels.linear.products import Products
from vgs_kernels.stream_kl.transform import LogitTransform

PARTS = {"vgs": ("standard", "vis"), "teacher_prior": ("lang", "vis")}  # that are differentiable by themselves


def objective_of(problem: Problem, weights: tuple[Any, Any, Any], expected: dict[str, Tensor]) -> Tensor:
    """sum over tokens of token weight * (a standard + b vis + c lang)."""
    mixed = sum(w * expected[part] for part, w in zip(("standard", "vis", "lang"), weights, strict=True))
    return (mixed * (1.0 if problem.token_weights is None else problem.token_weights)).sum()


@pytest.mark.parametrize("head", HEADS, ids=lambda o: "-".join(o) or "plain")
def test_reverse_kl_is_that_of_the_textbook(head: dict[str, Any], chosen: str) -> None:
    problem = Problem(**head)
    expected = problem.textbook(temperature=1.3)
    total = (expected["kl"] * problem.token_weights).sum()
    for tokens in (1, 4, 100):  # at a time: the result does not depend on it
        got = problem.reverse_kl(temperature=1.3, backend=chosen, max_chunk_bytes=chunk_bytes(problem, tokens))
        assert_all_close(
            [got.kl, got.per_token.kl, got.per_token.entropy], [total, expected["kl"], expected["entropy"]]
        )
        wanted = gradients(2.5 * total, problem.students)
        assert_all_close(gradients(2.5 * got.kl, problem.students), wanted)
        assert_all_close([got.hidden_gradient], gradients(total, [problem.hidden]))
        assert got.sampled is None


@pytest.mark.parametrize("head", HEADS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_parts_are_those_of_the_textbook(decomposition: str, head: dict[str, Any], chosen: str) -> None:
    problem = Problem(decomposition, **head)
    expected = problem.textbook(temperature=1.3)
    for tokens in (1, 4, 100):
        got = problem.call(temperature=1.3, backend=chosen, max_chunk_bytes=chunk_bytes(problem, tokens))
        for name, value in expected.items():
            torch.testing.assert_close(getattr(got.per_token, name), value, rtol=1e-10, atol=1e-10)
        for part in ("standard", "vis", "lang"):
            value, total = getattr(got, part), (expected[part] * problem.token_weights).sum()
            torch.testing.assert_close(value, total, rtol=1e-10, atol=1e-10)
            hidden = getattr(got.hidden_gradients, part)
            if part not in PARTS[decomposition]:
                assert not value.requires_grad
                assert hidden is None
                continue
            assert_all_close(gradients(2.5 * value, problem.students), gradients(2.5 * total, problem.students))
            assert_all_close([hidden], gradients(total, [problem.hidden]))
        assert got.objective is None
        assert got.hidden_gradients.objective is None
        assert (got.per_token.dependency is None) == (decomposition == "teacher_prior")


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_an_objective_is_one_weighted_sum(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, bias=True)
    expected = problem.textbook()
    per_token = torch.rand(TOKENS, dtype=torch.float64)
    of_lang: Any = 0 if decomposition == "vgs" else 0.4
    for weights in ((0.3, -1.7, of_lang), (1.0, per_token, of_lang), (torch.tensor(0.5), per_token, of_lang)):
        got = problem.call(backend=chosen, objective=weights, max_chunk_bytes=chunk_bytes(problem, 4))
        total = objective_of(problem, weights, expected)
        torch.testing.assert_close(got.objective, total)
        assert_all_close(gradients(got.objective, problem.students), gradients(total, problem.students))
        assert_all_close([got.hidden_gradients.objective], gradients(total, [problem.hidden]))
        assert got.hidden_gradients[:3] == (None, None, None)
        for part in ("standard", "vis", "lang"):
            assert not getattr(got, part).requires_grad
            torch.testing.assert_close(getattr(got, part), (expected[part] * problem.token_weights).sum())


def test_the_objective_of_vgs_has_no_language_that_would_be_without_a_gradient() -> None:
    for weight in (0.01, torch.zeros(()), torch.ones(TOKENS)):
        with pytest.raises(ValueError, match=r"lang of decomposition 'vgs' compares constants .*linear_reverse_kl"):
            Problem("vgs").call(objective=(1.0, 2.0, weight))


def test_distillation_is_the_same_by_every_call(chosen: str) -> None:
    problem = Problem("vgs")
    alone = problem.reverse_kl(backend=chosen)
    for value in (problem.call(backend=chosen).standard, problem.call(backend=chosen, objective=(1, 0, 0)).objective):
        torch.testing.assert_close(value, alone.kl)
        assert_all_close(gradients(value, problem.students), gradients(alone.kl, problem.students))


def test_gradcheck(chosen: str) -> None:
    if here().dtype != torch.float64:
        pytest.skip("finite differences need float64")
    for decomposition in DECOMPOSITIONS:
        problem = Problem(decomposition, tokens=3, vocab=7, width=3, bias=True)

        def parts(hidden: Tensor, weight: Tensor, bias: Tensor, problem: Problem = problem) -> tuple[Tensor, ...]:
            # The masked student reads the head as a constant, which no finite difference can know.
            logits = None if problem.masked_hidden is None else problem.masked_hidden @ problem.weight.detach().t()
            if logits is None:
                problem.hidden, problem.head = hidden, LMHead(weight, bias)
                result = problem.call(backend=chosen)
                return result.lang, result.vis, problem.reverse_kl(backend=chosen).kl
            problem.hidden, problem.head = hidden, LMHead(weight, bias)
            result = problem.reverse_kl(backend=chosen)
            return (result.kl,)

        assert torch.autograd.gradcheck(parts, problem.students)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_padded_vocabularies_that_differ(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, vocab=64, teacher_vocab=70)
    with pytest.raises(ValueError, match="vocab_size"):
        problem.call(backend=chosen)
    expected = problem.textbook(vocab_size=61)
    got = problem.call(backend=chosen, vocab_size=61, max_chunk_bytes=chunk_bytes(problem, 4))
    for part in PARTS[decomposition]:
        total = (expected[part] * problem.token_weights).sum()
        assert_all_close(gradients(getattr(got, part), problem.students), gradients(total, problem.students))


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_tokens_of_weight_zero_take_no_part(decomposition: str, combined: bool, chosen: str) -> None:
    problem = Problem(decomposition)
    options: dict[str, Any] = {"backend": chosen, "max_chunk_bytes": chunk_bytes(problem, 3)}
    if combined:
        options["objective"] = (0.5, 2.0, 0)
    assert problem.token_weights is not None
    problem.token_weights[[0, 3, 4, 10]] = 0.0
    skipped = problem.token_weights == 0

    def total() -> Tensor:
        got = problem.call(**options)
        for part in got.per_token:
            assert part is None or not part[skipped].any()
        parts = [getattr(got, part) for part in PARTS[decomposition]]
        return (parts[0] + parts[1] if got.objective is None else got.objective) + problem.reverse_kl(backend=chosen).kl

    wanted = gradients(total(), problem.students)
    with torch.no_grad():
        for hidden in problem.all_hidden:
            hidden[skipped] = math.nan
    got = gradients(total(), problem.students)
    assert_all_close(got, wanted)
    assert not got[0][skipped].any()


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_nothing_to_do(decomposition: str, combined: bool, tokens: int, chosen: str) -> None:
    """No tokens, or all of weight 0."""
    for dtype in (here().dtype, torch.bfloat16):
        problem = Problem(decomposition, tokens=tokens, bias=True, dtype=dtype)
        problem.token_weights = torch.zeros(tokens)
        got = problem.call(backend=chosen, objective=(1, 1, 0) if combined else None)
        total = sum(getattr(got, part) for part in PARTS[decomposition]) if got.objective is None else got.objective
        total = total + problem.reverse_kl(backend=chosen).kl
        assert total.item() == 0
        for gradient in gradients(total, problem.students):
            assert not gradient.any()
            assert not gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_width_of_zero_has_uniform_logits(dtype: torch.dtype, chosen: str) -> None:
    """Nothing is read that nobody wrote; the bias alone is the logits."""
    hidden, teacher = (torch.zeros(5, 0, dtype=dtype) for _ in range(2))
    head, bias = torch.zeros(33, 0, dtype=dtype), torch.randn(33, dtype=dtype, requires_grad=True)
    for _ in range(3):
        torch.full((2000, 33), math.nan)  # memory that the call may be given
        got = linear_reverse_kl(hidden, LMHead(head, bias), teacher, LMHead(head), backend=chosen)
        p = bias.double().log_softmax(0)
        torch.testing.assert_close(got.kl.double(), 5 * (p.exp() * (p + math.log(33))).sum(), rtol=1e-5, atol=1e-5)
        assert gradients(got.kl, [bias])[0].isfinite().all()


def test_frozen_parts_get_nothing_and_change_nothing(chosen: str) -> None:
    problem = Problem("vgs", bias=True)
    wanted = gradients(problem.call(backend=chosen).vis, problem.students)
    for tensor in (problem.weight, problem.hidden):
        tensor.requires_grad_(False)
        left = [t for t in problem.students if t.requires_grad]
        expected = [g for g, t in zip(wanted, problem.students, strict=True) if t.requires_grad]
        assert_all_close(gradients(problem.call(backend=chosen).vis, left), expected)
        tensor.requires_grad_()
    with torch.no_grad():
        got = problem.call(backend=chosen)
        assert not got.vis.requires_grad
        assert got.hidden_gradients == (None, None, None, None)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_backward_twice_gives_the_same(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    got = problem.call(backend=chosen, objective=(1.0, 3.0, 0))
    first, second = (gradients(got.objective * 0.5, problem.students) for _ in range(2))
    again = gradients(problem.call(backend=chosen, objective=(1.0, 3.0, 0)).objective, problem.students)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c * 0.5)
    got.objective.backward(retain_graph=True)
    got.objective.backward()
    assert_all_close([t.grad for t in problem.students], [2 * g for g in again])


def test_double_backward_raises_and_says_so(chosen: str) -> None:
    problem = Problem("teacher_prior")
    for value in (problem.call(backend=chosen).lang, problem.reverse_kl(backend=chosen).kl):
        (gradient,) = torch.autograd.grad(value, [problem.hidden], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), [problem.hidden])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("gradient_filter", [None, 1e-9])
def test_accumulate_head_grad(decomposition: str, gradient_filter: float | None, chosen: str) -> None:
    problem = Problem(decomposition, bias=True)
    options: dict[str, Any] = {"backend": chosen, "objective": (0.4, 0.6, 0), "gradient_filter": gradient_filter}
    options["max_chunk_bytes"] = chunk_bytes(problem, 4)
    wanted = gradients(problem.call(**options).objective, problem.students)
    for repeat in (1, 2):  # the first makes .grad, the second adds to it
        problem.call(accumulate_head_grad=True, **options).objective.backward()
        assert_all_close([t.grad for t in problem.students], [repeat * g for g in wanted])
    with pytest.raises(ValueError, match="pass objective with it"):
        problem.call(accumulate_head_grad=True, backend=chosen)
    for t in problem.students:
        t.grad = None
    problem.reverse_kl(accumulate_head_grad=True, backend=chosen).kl.backward()
    assert_all_close([t.grad for t in problem.students], gradients(problem.reverse_kl().kl, problem.students))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_error_is_that_of_plain_torch_with_float32_logits(decomposition: str, dtype: torch.dtype, chosen: str) -> None:
    """In 13 runs, so that partial sums of the head gradient are rounded 13 times."""
    problem = Problem(decomposition, dtype=dtype, tokens=104, vocab=1003, width=32, scale=0.5)
    exact = Problem(decomposition, dtype=torch.float64, tokens=104, vocab=1003, width=32, scale=0.5)
    plain = Problem(decomposition, dtype=torch.float32, tokens=104, vocab=1003, width=32, scale=0.5)
    for other in (exact, plain):
        wide = other.hidden.dtype
        for name in ("teacher_hidden", "masked_teacher_hidden", "masked_hidden"):
            given = getattr(problem, name)
            setattr(other, name, None if given is None else given.to(wide))
        other.hidden, other.weight = (t.detach().to(wide).requires_grad_() for t in (problem.hidden, problem.weight))
        other.head, other.teacher_head = LMHead(other.weight), LMHead(problem.teacher_head.weight.to(wide))
        other.token_weights = None
    problem.token_weights = None
    truth, near = exact.textbook(), plain.textbook()
    got = problem.call(backend=chosen, max_chunk_bytes=chunk_bytes(problem, 8))
    for part in PARTS[decomposition]:
        torch.testing.assert_close(getattr(got, part).double(), truth[part].sum(), rtol=1e-5, atol=1e-4)
        for a, b, t in zip(
            gradients(getattr(got, part), problem.students),
            gradients(near[part].sum(), plain.students),
            gradients(truth[part].sum(), exact.students),
            strict=True,
        ):
            floor = 4 * torch.finfo(dtype).eps * float(t.norm()) / math.sqrt(t.numel())
            error, plain_error = ((x.double() - t).square().mean().sqrt() for x in (a, b.to(dtype)))
            assert error <= 2 * plain_error + floor, (part, float(error), float(plain_error), floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [4.0, 30.0])
@pytest.mark.parametrize("divergence", [1e-1, 1e-2, 1e-3])
def test_digits_near_convergence(divergence: float, deviation: float, dtype: torch.dtype, chosen: str) -> None:
    """Of the exact result for these 16-bit inputs: gradients within 1 % of the largest entry; losses of tokens within
    1e-5, or within twice the error of plain torch on float32 logits where rounding the logits alone costs more."""
    generator = torch.Generator().manual_seed(3)
    width, vocab, tokens = 64, 2003, 24
    hidden, head, change = (
        torch.randn(rows, width, generator=generator, device="cpu").to(here().device) for rows in (tokens, vocab, vocab)
    )
    head *= deviation / width**0.5
    teacher = (head + change * (2 * divergence / width) ** 0.5).to(dtype)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    got = linear_reverse_kl(hidden, LMHead(head), hidden.detach(), LMHead(teacher), backend=chosen)
    found = gradients(got.kl, [hidden, head])
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head)]

    def by_torch(of: torch.dtype) -> Tensor:
        return reference.linear_reverse_kl(*(t.to(of) for t in (*leaves, hidden.detach(), teacher))).double()

    exact = by_torch(torch.float64)
    error, plain = ((x - exact).square().mean().sqrt() for x in (got.per_token.kl, by_torch(torch.float32)))
    assert error <= max(1e-5 * exact.mean(), 2 * plain)
    for a, b in zip(found, gradients(exact.sum(), leaves), strict=True):
        assert (a.double() - b).abs().max() <= 0.01 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_gradient_of_many_runs_is_rounded_like_one_of_few(dtype: torch.dtype, chosen: str) -> None:
    sums = torch.empty(1, 1, dtype=dtype, device="cpu")
    if here().device != "cpu" or Products(sums.device, dtype, chosen == "native").remainder(sums) is None:
        pytest.skip("the library adds up head gradients here")
    problem = Problem(dtype=dtype, tokens=96)
    exact = Problem(dtype=dtype, tokens=96)
    for name in ("hidden", "teacher_hidden"):
        setattr(exact, name, getattr(problem, name).detach().double().requires_grad_())
    exact.head, exact.teacher_head = (LMHead(h.weight.detach().double()) for h in (problem.head, problem.teacher_head))
    exact.weight = exact.head.weight.requires_grad_()
    (truth,) = gradients((exact.textbook()["kl"] * problem.token_weights).sum(), [exact.weight])
    errors = []
    for rows in (96, 2):
        # A long run has twice the bytes of its logits at most.
        result = problem.reverse_kl(backend=chosen, max_chunk_bytes=2 * 2 * 4 * VOCAB * rows)
        (found,) = gradients(result.kl, [problem.weight])
        errors.append(float((found.double() - truth).square().mean().sqrt()))
    assert errors[1] <= 1.5 * errors[0]


def test_the_logits_may_have_the_dtype_of_the_hidden_states(chosen: str) -> None:
    problem = Problem("vgs", dtype=torch.bfloat16)
    rounded = problem.reverse_kl(logits_dtype=torch.bfloat16, backend=chosen)
    kept = problem.reverse_kl(backend=chosen)
    exact = reference.linear_reverse_kl(
        *(t.double() for t in (problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_head.weight))
    )
    assert 100 * (kept.per_token.kl - exact).abs().max() < (rounded.per_token.kl - exact).abs().max()
    assert_all_close(gradients(rounded.kl, problem.students), gradients(kept.kl, problem.students), rtol=0.1, atol=0.1)
    for wrong in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=r"logits_dtype must be torch\.float32 or that of the hidden states"):
            problem.reverse_kl(logits_dtype=wrong)


def test_gradient_filter_keeps_its_bound(chosen: str) -> None:
    """norm(dropped logit gradient) <= tolerance * norm(logit gradient), checked with the identity for a head; the head
    gradient, whose columns do not add up, drops up to HEAD_MULTIPLE times as much."""
    for decomposition in DECOMPOSITIONS:
        problem = Problem(decomposition, vocab=300, width=300, tokens=9)
        with torch.no_grad():
            problem.weight.copy_(torch.eye(300))
            problem.hidden.mul_(6.0)
        options: dict[str, Any] = {"backend": chosen, "max_chunk_bytes": chunk_bytes(problem, 4)}
        for extra in ({}, {"objective": (0.5, 0.5, 0)}):
            whole = problem.call(**options, **extra)
            exact = gradients(whole.objective if extra else whole.vis, problem.students)
            for tolerance in (1e-3, 0.1):
                filtered = problem.call(gradient_filter=tolerance, **options, **extra)
                got = gradients(filtered.objective if extra else filtered.vis, problem.students)
                # The head is the identity: hidden gradients are logit gradients, and the bound holds exactly.
                dropped, size = (got[0] - exact[0]).norm(), exact[0].norm()
                assert dropped <= tolerance * size
                change = (got[1] - exact[1]).norm()
                assert change <= HEAD_MULTIPLE * tolerance * size * problem.hidden.norm()
                torch.testing.assert_close(filtered.vis, whole.vis)
            assert dropped > 0  # at 0.1 something was dropped
            assert change > tolerance * size  # and more for the head
    for wrong in (0.0, 1 / HEAD_MULTIPLE, -1.0, math.nan):
        with pytest.raises(ValueError, match="gradient_filter must be between 0 and 1/6"):
            problem.call(gradient_filter=wrong)


def test_gradient_filter_over_several_short_runs(chosen: str) -> None:
    """16-bit gradients gather from short runs of float32 logits; their squares add up over them."""
    problem = Problem("vgs", dtype=torch.bfloat16, tokens=40)
    options: dict[str, Any] = {
        "backend": chosen,
        "objective": (1.0, 2.0, 0),
        "max_chunk_bytes": chunk_bytes(problem, 8),
    }
    whole = gradients(problem.call(**options).objective, problem.students)
    kept = gradients(problem.call(gradient_filter=1e-9, **options).objective, problem.students)
    assert_all_close(kept, whole, rtol=0.02, atol=0.02 * float(whole[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 33])
def test_products_of_gathered_columns(width: int, dtype: torch.dtype, chosen: str) -> None:
    generator = torch.Generator().manual_seed(width)
    gradient, weight, hidden = (
        torch.randn(shape, generator=generator, device="cpu").to(here().device, dtype)
        for shape in ((5, 9001), (9001, width), (5, width))
    )
    products = GpuProducts(dtype) if gradient.is_cuda else Products(gradient.device, dtype, chosen == "native")
    limit = torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 16)  # in bf16, rounded once
    for columns in (torch.arange(0), torch.arange(1, 9001, 3), torch.arange(0, 9001, 2)):
        kept = products.gather(gradient, columns)
        assert torch.equal(kept, gradient[:, columns])
        out = torch.full((5, width), math.nan, dtype=dtype)
        products.gathered_hidden_gradient(kept, weight, columns, out)
        exact = gradient.double()[:, columns] @ weight.double()[columns]
        assert (out.double() - exact).norm() <= limit * exact.norm()
        head = weight.clone()
        products.gathered_head_gradient(kept, hidden, columns, head)
        exact = weight.double()
        exact[columns] += gradient.double()[:, columns].t() @ hidden.double()
        assert (head.double() - exact).norm() <= limit * exact.norm()
        untouched = torch.ones(9001, dtype=torch.bool).index_fill_(0, columns, False)
        assert torch.equal(head[untouched], weight[untouched])


def test_autocast_casts_as_a_linear_layer_would(chosen: str) -> None:
    problem = Problem("vgs", dtype=torch.float32, bias=True)
    with torch.autocast(here().device, torch.bfloat16):
        got = problem.call(backend=chosen)
    assert got.vis.dtype == torch.float32
    found = gradients(got.vis, problem.students)
    assert [g.dtype for g in found] == [torch.float32] * 3
    expected = (problem.textbook()["vis"] * problem.token_weights).sum()
    assert_all_close(found, gradients(expected, problem.students), rtol=0.1, atol=0.1)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast(here().device, torch.bfloat16):  # bf16 hidden states beside an fp32 head
        problem.call(backend=chosen, objective=(1, 1, 0), accumulate_head_grad=True).objective.backward()
    assert problem.weight.grad is not None
    assert problem.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [None, *DECOMPOSITIONS])
@pytest.mark.parametrize("objectives", [1, 2])
def test_opcheck(kind: str | None, objectives: int, chosen: str) -> None:
    problem = Problem(kind, bias=True, tokens=4, vocab=9, dtype=torch.float32)
    weight, bias = problem.weight.detach(), problem.bias.detach()
    grads = (torch.zeros_like(weight), torch.zeros_like(bias)) if objectives == 1 else (None, None)
    coefficients = torch.rand(objectives, 4, 3)
    steered = torch.rand(objectives, 4, 3) if kind else None
    settings = (
        True,
        True,
        True,
        3 * 4 * 9 * 4,
        0,
        0.0,
        2.0,
        0.1,
        torch.float32,
        *LogitTransform(9, teacher_smoothing=0.1).arguments(),
        chosen,
    )
    arguments = (
        problem.hidden.detach(), problem.masked_hidden, problem.teacher_hidden, problem.masked_teacher_hidden, weight,
        bias, problem.teacher_head.weight, None, torch.rand(4), coefficients, steered, torch.arange(4), *grads,
        *settings,
    )  # fmt: skip
    torch.library.opcheck(op.linear_kl, arguments)
    found = op.linear_kl(*arguments)[3:]
    value = torch.zeros(())
    torch.library.opcheck(op.attach_gradient, (value, problem.hidden, problem.weight, problem.bias, *found[:3]))
    torch.library.opcheck(op.first_order_only, (value, problem.hidden), test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_say_what_is_wrong() -> None:
    problem = Problem("teacher_prior")
    with pytest.raises(ValueError, match="flatten batch and sequence first"):
        linear_reverse_kl(problem.hidden[None], problem.head, problem.teacher_hidden, problem.teacher_head)
    for options, message in (
        ({"max_chunk_bytes": 0}, "max_chunk_bytes must be positive"),
        ({"chunk_tokens": -1}, "chunk_tokens must be positive, got -1"),
        ({"vocab_size": 9.0}, r"vocab_size must be a whole number, got 9\.0"),
        ({"vocab_size": VOCAB + 1}, "vocab_size must be between 1 and the smallest vocabulary"),
        ({"temperature": math.nan}, "temperature must be a positive finite number"),
        ({"token_weights": torch.ones(3)}, r"token_weights must have shape \(11,\)"),
        ({"objective": (1.0, 2.0)}, "objective must hold the weights of standard, vis and lang"),
        ({"objective": (1.0, math.nan, 0)}, "the weight of vis in objective must be a finite number"),
        ({"objective": (1.0, torch.ones(3), 0)}, r"the weight of vis in objective must have shape \(11,\)"),
        ({"decomposition": "vgs"}, "'vgs' needs masked_student_hidden"),
        ({"decomposition": "bayes"}, "unknown decomposition 'bayes'; choose one of vgs, teacher_prior"),
    ):
        with pytest.raises(ValueError, match=message):
            problem.call(**options)
    problem.head = problem.head._replace(logit_scale=math.nan)
    with pytest.raises(ValueError, match="the logit scale of the student must be a finite number, got nan"):
        problem.call()
    with pytest.raises(ValueError, match="'teacher_prior' does not use masked_student_hidden"):
        Problem("vgs").call(decomposition="teacher_prior")
    problem.teacher_hidden = problem.teacher_hidden.float()
    with pytest.raises(ValueError, match=r"teacher_hidden is torch\.float32"):
        problem.call()
    eight = torch.zeros(4, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"must be float32, bfloat16, float16 or float64, got torch\.float8_e4m3fn"):
        linear_reverse_kl(eight, LMHead(torch.zeros(9, 8).to(eight)), eight, LMHead(torch.zeros(9, 8).to(eight)))


def test_decomposition_has_no_default() -> None:
    problem = Problem("teacher_prior")
    with pytest.raises(TypeError, match="decomposition"):
        linear_decomposed_kl(  # type: ignore[call-arg]
            problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, problem.masked_teacher_hidden
        )


@pytest.mark.parametrize("decomposition", [None, "vgs", "teacher_prior"])
def test_of_no_tokens_every_input_has_a_gradient(decomposition: str | None) -> None:
    """A process without tokens must walk the same graph as the others, or collectives in it are met by some only."""
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    heads, others = (LMHead(weight), LMHead(torch.randn(31, 6))), torch.randn(2, 0, 6).unbind()
    if decomposition is None:
        linear_reverse_kl(hidden, heads[0], others[0], heads[1]).kl.backward()
    else:
        masked = hidden.detach() if decomposition == "vgs" else None
        parts = linear_decomposed_kl(
            hidden, heads[0], others[0], heads[1], others[1], masked, decomposition=decomposition
        )
        parts.vis.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert weight.grad is not None
    assert not weight.grad.any()
