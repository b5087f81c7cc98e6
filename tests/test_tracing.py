"""The calls under torch.compile, vmap, meta and fake tensors, and under TorchJD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.linear_problem import DECOMPOSITIONS, TOKENS, Problem, assert_all_close, gradients
from vgs_kernels import (
    LMHead,
    RatioGuard,
    TokenSteering,
    UnitGradients,
    VisualGradientSteering,
    combine_gradients,
    decomposed_kl,
    gradient_gramian,
    linear_decomposed_kl,
    linear_reverse_kl,
    reverse_kl,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_linear_calls_compile_without_graph_breaks(decomposition: str, chosen: str) -> None:
    problem = Problem(decomposition)
    sampled = torch.arange(TOKENS)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        problem.hidden, problem.head = hidden * 2.0, LMHead(weight)
        result = problem.call(
            backend=chosen, objective=(0.4, torch.tensor(0.6), 0), sampled_tokens=sampled,
            token_steering=TokenSteering(2.0, 0.1),
            ratio_guard=RatioGuard(bound=1.0) if decomposition == "vgs" else None,
        )  # fmt: skip
        assert result.sampled is not None
        return result.objective * 3.0 + result.per_token.entropy.sum() + problem.reverse_kl(backend=chosen).kl

    hidden, weight = problem.hidden, problem.weight
    wanted = gradients(step(hidden, weight), [hidden, weight])
    found = torch.autograd.grad(compiled(step)(hidden, weight), [hidden, weight])
    assert_all_close(list(found), wanted)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_logit_calls_compile_without_graph_breaks(decomposition: str, chosen: str) -> None:
    inputs = [torch.randn(4, 33, requires_grad=index == 0) for index in range(4 if decomposition == "vgs" else 3)]

    def loss(*tensors: Tensor) -> Tensor:
        parts = decomposed_kl(*tensors, decomposition=decomposition, temperature=0.9, backend=chosen)
        return (parts.standard + 2 * parts.vis + reverse_kl(*tensors[:2], backend=chosen).entropy).sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs[0])
    torch.testing.assert_close(torch.autograd.grad(compiled(loss)(*inputs), inputs[0]), wanted)


def test_one_graph_serves_every_length_and_every_temperature(chosen: str) -> None:
    """Tokens that vary and a temperature that changes compile once more, as dynamic, and then no more."""
    head, teacher_head = LMHead(torch.randn(33, 8, requires_grad=True)), LMHead(torch.randn(33, 12))

    def step(hidden: Tensor, teacher: Tensor, masked_teacher: Tensor, masked: Tensor, temperature: float) -> Tensor:
        alone = linear_reverse_kl(hidden, head, teacher, teacher_head, temperature=temperature, backend=chosen).kl
        parts = linear_decomposed_kl(
            hidden, head, teacher, teacher_head, masked_teacher, masked, decomposition="vgs", objective=(1, 2, 0),
            temperature=temperature, backend=chosen,
        )  # fmt: skip
        assert parts.objective is not None
        logits = reverse_kl(hidden, hidden.flip(0), temperature=temperature, backend=chosen).kl.sum()
        return alone + parts.objective + logits

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(step, backend=counter, fullgraph=True)
    for index, tokens in enumerate((5, 7, 9, 12, 30)):
        inputs = [torch.randn(tokens, width) for width in (8, 12, 12, 8)]
        inputs[0].requires_grad_()
        temperature = 0.7 + 0.1 * index
        wanted = gradients(step(*inputs, temperature), [inputs[0], head.weight])
        found = torch.autograd.grad(fast(*inputs, temperature), [inputs[0], head.weight])
        assert_all_close(list(found), wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("policy", [VisualGradientSteering(2.0), UnitGradients(0.8)], ids=lambda p: type(p).__name__)
def test_gramian_policy_and_combination_compile_into_one_graph(policy: Any) -> None:
    shapes = ((5, 4), (3,), (70, 11))

    def steered(first: list[Tensor], second: list[Tensor], out: list[Tensor]) -> Tensor:
        gramian = gradient_gramian(first, second)
        return combine_gradients(first, second, policy(gramian), out=out, max_norm=1.0, gramian=gramian)

    first, second = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected, found = ([torch.empty(shape) for shape in shapes] for _ in range(2))
    norm = steered(first, second, expected)
    torch.testing.assert_close(compiled(steered)(first, second, found), norm)
    torch.testing.assert_close(found, expected)


def test_vmap_over_upstream_gradients(chosen: str) -> None:
    """What TorchJD does to a list of losses: one backward pass over a batch of upstream gradients."""
    problem = Problem("vgs", bias=True)
    parts = problem.call(backend=chosen)
    both = torch.stack([parts.standard, parts.vis])
    rows = torch.eye(2, dtype=both.dtype)
    batched = torch.autograd.grad(both, problem.students, rows, retain_graph=True, is_grads_batched=True)
    for index, value in enumerate((parts.standard, parts.vis)):
        assert_all_close([g[index] for g in batched], gradients(value, problem.students))
    logits = torch.randn(3, 9, requires_grad=True)
    kl = reverse_kl(logits, torch.randn(3, 9), backend=chosen).kl
    (jacobian,) = torch.autograd.grad(kl, logits, torch.eye(3), retain_graph=True, is_grads_batched=True)
    for token in range(3):
        torch.testing.assert_close(jacobian[token], torch.autograd.grad(kl[token], logits, retain_graph=True)[0])


def test_torchjd_runs_both_losses_back_under_its_default(chosen: str) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    problem = Problem("vgs", dtype=torch.float32)
    backbone = nn.Linear(problem.hidden.shape[1], problem.hidden.shape[1])
    problem.hidden = backbone(problem.hidden.detach())
    parts = problem.call(backend=chosen)
    parameters = [*backbone.parameters(), problem.weight]
    wanted = [gradients(value, parameters) for value in (parts.standard, parts.vis)]
    autojac.backward([parts.standard, parts.vis])
    for parameter, first, second in zip(parameters, *wanted, strict=True):
        torch.testing.assert_close(parameter.jac, torch.stack([first, second]))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_data(device: str, chosen: str) -> None:
    """Meta and fake tensors: the shapes and dtypes of results and gradients, and no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        hidden, masked = torch.empty(2, 6, 8, dtype=torch.bfloat16).unbind()
        teacher, masked_teacher = torch.empty(2, 6, 12, dtype=torch.bfloat16).unbind()
        hidden = hidden.clone().requires_grad_()
        head = LMHead(torch.empty(33, 8, dtype=torch.bfloat16, requires_grad=True))
        teacher_head = LMHead(torch.empty(33, 12, dtype=torch.bfloat16))
        options = {} if device == "meta" else {"backend": chosen}  # there are no kernels for meta
        parts = linear_decomposed_kl(
            hidden, head, teacher, teacher_head, masked_teacher, masked, decomposition="vgs",
            sampled_tokens=torch.zeros(6, dtype=torch.int64), **options,
        )  # fmt: skip
        assert parts.sampled is not None
        shapes = [(t.shape, t.dtype) for t in (parts.vis, parts.per_token.dependency, parts.sampled.student)]  # type: ignore[union-attr]
        assert shapes == [((), torch.float32), ((6,), torch.float32), ((6,), torch.float32)]
        (parts.standard + 2 * parts.vis).backward()
        assert (hidden.grad.shape, hidden.grad.dtype) == ((6, 8), torch.bfloat16)  # type: ignore[union-attr]
        assert (head.weight.grad.shape, head.weight.grad.dtype) == ((33, 8), torch.bfloat16)  # type: ignore[union-attr]
        logits = torch.empty(6, 33, requires_grad=True)
        reverse_kl(logits, torch.empty(6, 33), **options).kl.sum().backward()
        assert logits.grad is not None
        assert logits.grad.shape == (6, 33)
