"""`linear_decomposed_kl` against textbook autograd on materialised logits, in fp64, on every backend of this CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_formulas import DECOMPOSITIONS, textbook
from vgs_kernels import LMHead, backend
from vgs_kernels import OldLinearDecomposedKL as LinearDecomposedKL
from vgs_kernels import old_linear_decomposed_kl as linear_decomposed_kl
from vgs_kernels.linear.column_filter import HEAD_MULTIPLE
from vgs_kernels.linear.products import Products
from vgs_kernels.old_linear import op

BACKENDS = ["reference"] + (["native"] if backend._native_problem() is None else [])
TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 11, 8, 12, 61


class Problem:
    """Inputs of one call; `requires_grad` on everything of the student."""

    def __init__(
        self,
        decomposition: str,
        *,
        dtype: torch.dtype = torch.float64,
        tokens: int = TOKENS,
        vocab: int = VOCAB,
        teacher_vocab: int | None = None,
        width: int = WIDTH,
        bias: bool = False,
        seed: int = 0,
        scale: float = 1.0,
        **head: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, factor: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * factor).to(dtype)

        self.decomposition = decomposition
        self.hidden = normal(tokens, width).requires_grad_()
        self.masked_hidden = normal(tokens, width).requires_grad_() if decomposition != "teacher_prior" else None
        self.teacher_hidden, self.masked_teacher_hidden = normal(2, tokens, TEACHER_WIDTH).unbind()
        self.weight = normal(vocab, width, factor=scale).requires_grad_()
        self.bias = normal(vocab).requires_grad_() if bias else None
        self.head = LMHead(self.weight, self.bias, **head)
        self.teacher_head = LMHead(normal(teacher_vocab or vocab, TEACHER_WIDTH), **head)
        self.token_weights: Tensor | None = torch.rand(tokens, generator=generator).to(torch.float64)

    @property
    def students(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.masked_hidden, self.weight, self.bias) if t is not None]

    def call(self, **options: Any) -> LinearDecomposedKL:
        return linear_decomposed_kl(
            self.hidden,
            self.head,
            self.teacher_hidden,
            self.teacher_head,
            masked_teacher_hidden=self.masked_teacher_hidden,
            masked_student_hidden=self.masked_hidden,
            token_weights=self.token_weights,
            decomposition=self.decomposition,
            **options,
        )

    def textbook(self, visual_weights: Tensor | float = 1.0, **options: Any) -> dict[str, Tensor]:
        """lang and vis, weighted sums."""

        def logits(hidden: Tensor | None, head: LMHead) -> Tensor | None:
            if hidden is None:
                return None
            z = hidden @ head.weight.t()
            return z if head.bias is None else z + head.bias

        student, masked = logits(self.hidden, self.head), logits(self.masked_hidden, self.head)
        teacher, masked_teacher = (
            logits(h, self.teacher_head) for h in (self.teacher_hidden, self.masked_teacher_hidden)
        )
        assert student is not None
        assert teacher is not None
        assert masked_teacher is not None
        parts = textbook(
            student, teacher, masked_teacher, masked, self.decomposition, **options,
            student_scale=self.head.logit_scale, teacher_scale=self.teacher_head.logit_scale,
            student_softcap=self.head.softcap, teacher_softcap=self.teacher_head.softcap,
        )  # fmt: skip
        parts["vis"] = parts["vis"] * visual_weights
        weights = self.token_weights
        return {name: (part if weights is None else part * weights).sum() for name, part in parts.items()}


def gradients(value: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True, **options)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


def assert_all_close(got: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-10} | tolerance))


@pytest.fixture(params=BACKENDS)
def chosen(request: pytest.FixtureRequest) -> str:
    return request.param


def chunk_bytes(problem: Problem, tokens: int) -> int:
    rows = 3 if problem.masked_hidden is None else 4
    return tokens * rows * max(problem.head.weight.shape[0], problem.teacher_head.weight.shape[0]) * 8


HEADS: list[dict[str, Any]] = [{}, {"bias": True, "logit_scale": 0.7}, {"softcap": 4.0, "bias": True}]


@pytest.mark.parametrize("head", HEADS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_values_and_gradients_are_those_of_the_textbook(decomposition: str, head: dict[str, Any], chosen: str) -> None:
    problem = Problem(decomposition, **head)
    expected = problem.textbook(temperature=1.3)
    for tokens in (1, 4, 100):  # per chunk: the result does not depend on it
        got = problem.call(temperature=1.3, backend=chosen, max_chunk_bytes=chunk_bytes(problem, tokens))
        for part in ("lang", "vis"):
            value = getattr(got, part)
            torch.testing.assert_close(value, expected[part], rtol=1e-10, atol=1e-10)
            assert_all_close(
                gradients(2.5 * value, problem.students), gradients(2.5 * expected[part], problem.students)
            )


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gradcheck(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, tokens=3, vocab=7, width=3, bias=True)
    count = len(problem.students)

    def parts(*students: Tensor) -> tuple[Tensor, ...]:
        hidden, weight, bias = students[0], students[-2], students[-1]
        result = linear_decomposed_kl(
            hidden,
            LMHead(weight, bias),
            problem.teacher_hidden,
            problem.teacher_head,
            masked_teacher_hidden=problem.masked_teacher_hidden,
            masked_student_hidden=students[1] if count == 4 else None,
            token_weights=problem.token_weights,
            decomposition=decomposition,
            backend=chosen,
        )
        # vis of bayes stops a gradient, so it is the derivative of nothing.
        return (result.lang,) if decomposition == "bayes" else (result.lang, result.vis)

    assert torch.autograd.gradcheck(parts, problem.students)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_objective_is_the_weighted_sum(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, bias=True)
    pair = torch.tensor([0.3, -1.7], dtype=torch.float64)
    apart = problem.call(backend=chosen, max_chunk_bytes=chunk_bytes(problem, 4))
    together = problem.call(backend=chosen, max_chunk_bytes=chunk_bytes(problem, 4), steering_weights=pair)
    weighted = pair[0] * apart.lang + pair[1] * apart.vis
    assert together.objective is not None
    torch.testing.assert_close(together.objective, weighted)
    assert not together.lang.requires_grad
    assert not together.vis.requires_grad
    assert_all_close(gradients(together.objective, problem.students), gradients(weighted, problem.students))
    torch.testing.assert_close(together.logit_gramian, apart.logit_gramian)
    for a, b in zip(together.tokens, apart.tokens, strict=True):
        torch.testing.assert_close(a, b)
    switched_off = problem.call(backend=chosen, steering_weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(switched_off.objective, apart.lang)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_hidden_gradients_are_those_of_the_sums(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    lang_reaches = problem.hidden if problem.masked_hidden is None else problem.masked_hidden
    apart = problem.call(backend=chosen)
    assert apart.hidden_gradients.objective is None
    assert_all_close([apart.hidden_gradients.lang], gradients(apart.lang, [lang_reaches]))
    assert_all_close([apart.hidden_gradients.vis], gradients(apart.vis, [problem.hidden]))
    together = problem.call(backend=chosen, steering_weights=torch.tensor([0.3, 0.7]))
    assert together.hidden_gradients[:2] == (None, None)
    assert_all_close([together.hidden_gradients.objective], gradients(together.objective, [problem.hidden]))
    with torch.no_grad():
        assert problem.call(backend=chosen).hidden_gradients == (None, None, None)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gramian_is_that_of_the_logit_gradients(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    got = problem.call(backend=chosen, max_chunk_bytes=chunk_bytes(problem, 3)).logit_gramian
    # With the identity for a head, hidden states are logits.
    identity = torch.eye(VOCAB, dtype=torch.float64, requires_grad=True)
    for name in ("hidden", "masked_hidden"):
        hidden = getattr(problem, name)
        if hidden is not None:
            setattr(problem, name, (hidden @ problem.weight.t()).detach().requires_grad_())
    problem.weight, problem.head = identity, LMHead(identity)
    expected = problem.textbook()
    logits = [t for t in (problem.hidden, problem.masked_hidden) if t is not None]
    flat = [torch.cat([g.flatten() for g in gradients(expected[part], logits)]) for part in ("lang", "vis")]
    torch.testing.assert_close(got, torch.stack([torch.stack([a @ b for b in flat]) for a in flat]))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_padded_vocabularies_that_differ(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, vocab=64, teacher_vocab=70)
    with pytest.raises(ValueError, match="vocab_size"):
        problem.call(backend=chosen)
    expected = problem.textbook(vocab_size=61)
    got = problem.call(backend=chosen, vocab_size=61, max_chunk_bytes=chunk_bytes(problem, 4))
    for part in ("lang", "vis"):
        assert_all_close(gradients(getattr(got, part), problem.students), gradients(expected[part], problem.students))


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_tokens_of_weight_zero_take_no_part(decomposition: str, combined: bool, chosen: str) -> None:
    problem = Problem(decomposition)
    options: dict[str, Any] = {"backend": chosen, "max_chunk_bytes": chunk_bytes(problem, 3)}
    if combined:
        options["steering_weights"] = torch.tensor([0.5, 2.0])
    assert problem.token_weights is not None
    problem.token_weights[[0, 3, 4, 10]] = 0.0
    skipped = problem.token_weights == 0
    clean = problem.call(**options)
    wanted = gradients(clean.objective if clean.objective is not None else clean.lang + clean.vis, problem.students)
    with torch.no_grad():
        for hidden in (problem.hidden, problem.masked_hidden, problem.teacher_hidden, problem.masked_teacher_hidden):
            if hidden is not None:
                hidden[skipped] = math.nan
    dirty = problem.call(**options)
    got = gradients(dirty.objective if dirty.objective is not None else dirty.lang + dirty.vis, problem.students)
    assert_all_close(got, wanted)
    torch.testing.assert_close(dirty.logit_gramian, clean.logit_gramian)
    for part in dirty.tokens:
        assert not part[skipped].any()
    assert not got[0][skipped].any()


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_nothing_to_do(decomposition: str, combined: bool, tokens: int, chosen: str) -> None:
    """No tokens, or all of weight 0."""
    problem = Problem(decomposition, tokens=tokens, bias=True)
    problem.token_weights = torch.zeros(tokens)
    got = problem.call(backend=chosen, steering_weights=torch.ones(2) if combined else None)
    total = got.objective if got.objective is not None else got.lang + got.vis
    assert total.item() == 0
    for gradient in gradients(total, problem.students):
        assert not gradient.any()
        assert not gradient.isnan().any()


def test_frozen_parts_get_nothing_and_change_nothing(chosen: str) -> None:
    problem = Problem("matched", bias=True)
    wanted = gradients(problem.call(backend=chosen).vis, problem.students)
    for tensor, index in ((problem.weight, 2), (problem.hidden, 0)):
        tensor.requires_grad_(False)
        left = [t for t in problem.students if t.requires_grad]
        expected = [g for g, t in zip(wanted, problem.students, strict=True) if t.requires_grad]
        assert_all_close(gradients(problem.call(backend=chosen).vis, left), expected)
        tensor.requires_grad_()
        assert problem.students[index] is tensor
    with torch.no_grad():
        assert not problem.call(backend=chosen).vis.requires_grad
        assert not problem.call(backend=chosen).logit_gramian.any()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_backward_twice_gives_the_same(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    got = problem.call(backend=chosen, steering_weights=torch.tensor([1.0, 3.0]))
    first = gradients(got.objective * 0.5, problem.students)
    second = gradients(got.objective * 0.5, problem.students)
    again = gradients(
        problem.call(backend=chosen, steering_weights=torch.tensor([1.0, 3.0])).objective, problem.students
    )
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c * 0.5)
    got.objective.backward(retain_graph=True)
    got.objective.backward()
    assert_all_close([t.grad for t in problem.students], [2 * g for g in again])


def test_double_backward_raises_and_says_so(chosen: str) -> None:
    problem = Problem("teacher_prior")
    lang = problem.call(backend=chosen).lang
    (gradient,) = torch.autograd.grad(lang, [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), [problem.hidden])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_accumulate_head_grad(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition, bias=True)
    pair = torch.tensor([0.4, 0.6], dtype=torch.float64)
    options: dict[str, Any] = {"backend": chosen, "steering_weights": pair, "max_chunk_bytes": chunk_bytes(problem, 4)}
    wanted = gradients(problem.call(**options).objective, problem.students)
    for repeat in (1, 2):  # the first makes .grad, the second adds to it
        problem.call(accumulate_head_grad=True, **options).objective.backward()
        assert_all_close([t.grad for t in problem.students], [repeat * g for g in wanted])
    with pytest.raises(ValueError, match="steering_weights"):
        problem.call(accumulate_head_grad=True, backend=chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_error_is_that_of_plain_torch(decomposition: str, dtype: torch.dtype, chosen: str) -> None:
    """In 13 chunks, so that partial sums of the head gradient are rounded 13 times."""
    problem = Problem(decomposition, dtype=dtype, tokens=104, vocab=1003, width=32, scale=0.5)
    exact = Problem(decomposition, tokens=104, vocab=1003, width=32, scale=0.5)
    for name in ("teacher_hidden", "masked_teacher_hidden"):
        setattr(exact, name, getattr(problem, name).double())
    exact.hidden, exact.weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    if problem.masked_hidden is not None:
        exact.masked_hidden = problem.masked_hidden.detach().double().requires_grad_()
    exact.head = LMHead(exact.weight)
    exact.teacher_head = LMHead(problem.teacher_head.weight.double())
    problem.token_weights = exact.token_weights = None
    truth, plain = exact.textbook(), problem.textbook()
    got = problem.call(
        backend=chosen, max_chunk_bytes=8 * (3 + (decomposition != "teacher_prior")) * 1003 * dtype.itemsize
    )
    for part in ("lang", "vis"):
        for a, b, t in zip(
            gradients(getattr(got, part), problem.students),
            gradients(plain[part], problem.students),
            gradients(truth[part], exact.students),
            strict=True,
        ):
            floor = 4 * torch.finfo(dtype).eps * float(t.norm()) / math.sqrt(t.numel())
            error, plain_error = ((x.double() - t).square().mean().sqrt() for x in (a, b))
            assert error <= 2 * plain_error + floor, (part, float(error), float(plain_error), floor)


def test_gradient_filter_keeps_its_bound(chosen: str) -> None:
    """norm(dropped logit gradient) <= tolerance * norm(logit gradient), checked with the identity for a head; the head
    gradient, whose columns do not add up, drops up to HEAD_MULTIPLE times as much."""
    for decomposition in DECOMPOSITIONS:
        problem = Problem(decomposition, vocab=300, width=300, tokens=9)
        with torch.no_grad():
            problem.weight.copy_(torch.eye(300))
            problem.hidden.mul_(6.0)
        options: dict[str, Any] = {"backend": chosen, "max_chunk_bytes": chunk_bytes(problem, 4)}
        for extra in ({}, {"steering_weights": torch.tensor([0.5, 0.5])}):
            whole = problem.call(**options, **extra)
            exact = gradients(whole.objective if extra else whole.vis, problem.students)
            for tolerance in (1e-3, 0.1):
                filtered = problem.call(gradient_filter=tolerance, **options, **extra)
                got = gradients(filtered.objective if extra else filtered.vis, problem.students)
                # The head is the identity: hidden gradients are logit gradients, and the bound holds exactly.
                dropped = torch.stack([(a - b).norm() for a, b in zip(got[:-1], exact[:-1], strict=True)]).norm()
                size = torch.stack([b.norm() for b in exact[:-1]]).norm()
                assert dropped <= tolerance * size
                change = (got[-1] - exact[-1]).norm()
                assert change <= HEAD_MULTIPLE * tolerance * size * problem.hidden.norm()
                torch.testing.assert_close(filtered.vis, whole.vis)
            assert dropped > 0  # at 0.1 something was dropped
            assert change > tolerance * size  # and more for the head
    for wrong in (0.0, 1 / HEAD_MULTIPLE, -1.0, math.nan):
        with pytest.raises(ValueError, match="gradient_filter must be between 0 and 1/6"):
            problem.call(gradient_filter=wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 33])
def test_products_of_gathered_columns(width: int, dtype: torch.dtype, chosen: str) -> None:
    generator = torch.Generator().manual_seed(width)
    gradient = torch.randn(5, 9001, generator=generator).to(dtype)
    weight = torch.randn(9001, width, generator=generator).to(dtype)
    hidden = torch.randn(5, width, generator=generator).to(dtype)
    products = Products(gradient.device, dtype, chosen == "native")
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


def test_gradient_filter_adds_to_existing_gradients(chosen: str) -> None:
    problem = Problem("matched", bias=True)
    pair = torch.ones(2)
    wanted = gradients(problem.call(backend=chosen, steering_weights=pair).objective, problem.students)
    call = problem.call(backend=chosen, steering_weights=pair, accumulate_head_grad=True, gradient_filter=1e-9)
    call.objective.backward()
    assert_all_close([t.grad for t in problem.students], wanted, rtol=1e-6, atol=1e-6)


def test_autocast_casts_as_a_linear_layer_would(chosen: str) -> None:
    problem = Problem("matched", dtype=torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.call(backend=chosen)
    assert got.vis.dtype == torch.float32
    found = gradients(got.vis, problem.students)
    assert [g.dtype for g in found] == [torch.float32] * 4
    assert_all_close(found, gradients(problem.textbook()["vis"], problem.students), rtol=0.1, atol=0.05)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # bf16 hidden states beside an fp32 head
        problem.call(backend=chosen, steering_weights=torch.ones(2), accumulate_head_grad=True).objective.backward()
    assert problem.weight.grad is not None
    assert problem.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_compile_without_graph_breaks(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    pair, sampled = torch.tensor([0.4, 0.6]), torch.arange(TOKENS)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        problem.hidden, problem.head = hidden * 2.0, LMHead(weight)
        result = problem.call(
            backend=chosen, steering_weights=pair, sampled_tokens=sampled, token_steering=2.0, plausibility=0.1
        )
        return result.objective * 3.0 + result.tokens.entropy.sum() + result.contribution.sum()

    hidden, weight = problem.hidden, problem.weight
    wanted = gradients(step(hidden, weight), [hidden, weight])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_all_close(gradients_once(compiled(hidden, weight), [hidden, weight]), wanted)


def gradients_once(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("decomposition", ["teacher_prior", "matched"])
@pytest.mark.parametrize("combined", [False, True])
def test_opcheck(decomposition: str, combined: bool, chosen: str) -> None:
    problem = Problem(decomposition, bias=True, tokens=4, vocab=9)
    masked = None if problem.masked_hidden is None else problem.masked_hidden.detach()
    weight, bias = problem.weight.detach(), problem.bias.detach()
    inputs = (problem.hidden.detach(), masked, problem.teacher_hidden, problem.masked_teacher_hidden)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias)) if combined else (None, None)
    settings = (True, True, True, 3, 0.0, 2.0, 0.1, 0.1, decomposition, 9, 1.0, 1.0, 1.0, 0.0, 0.0, chosen)
    arguments = (
        *inputs, weight, bias, problem.teacher_head.weight, None, problem.token_weights,
        torch.rand(4) if combined else None, torch.arange(4), torch.ones(2) if combined else None, *grads, *settings,
    )  # fmt: skip
    torch.library.opcheck(op.linear_decomposed_kl, arguments)
    results = op.linear_decomposed_kl(*arguments)
    attached = (
        *results[:3],
        problem.hidden,
        problem.masked_hidden,
        problem.weight,
        problem.bias,
        *results[7:],
        combined,
    )
    torch.library.opcheck(op.attach_gradients, attached)
    torch.library.opcheck(
        op.first_order_only, (results[0], problem.hidden), test_utils=("test_schema", "test_faketensor")
    )


def test_wrong_arguments_say_what_is_wrong() -> None:
    problem = Problem("teacher_prior")
    with pytest.raises(ValueError, match="flatten batch and sequence first"):
        linear_decomposed_kl(
            problem.hidden[None], problem.head, problem.teacher_hidden, problem.teacher_head,
            masked_teacher_hidden=problem.masked_teacher_hidden, decomposition="teacher_prior",
        )  # fmt: skip
    problem.teacher_hidden = problem.teacher_hidden.float()
    with pytest.raises(ValueError, match=r"teacher_hidden is torch\.float32"):
        problem.call()
    with pytest.raises(ValueError, match="max_chunk_bytes must be positive"):
        Problem("teacher_prior").call(max_chunk_bytes=0)
