"""Nothing on a step's path makes the host wait for a GPU: on meta tensors everywhere, and on a GPU where there is one.

A wait empties the queue of a GPU that runs faster than Python, and a CUDA graph cannot hold one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu_loop import HostWait, gpu_loop
from vgs_kernels import (
    LMHead,
    RatioGuard,
    TokenSteering,
    UnitGradients,
    VisualGradientSteering,
    combine_gradients,
    gradient_gramian,
    linear_decomposed_kl,
    linear_reverse_kl,
    steer_,
)  # fmt: skip
from vgs_kernels.linear import op

POLICIES = [VisualGradientSteering(2.0), UnitGradients(0.8, 1.0, "preserve")]


class Step:
    """What a step runs, on tensors of one device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, tokens: int = 40, vocab: int = 1003) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.hidden, self.masked = normal(tokens, 32).requires_grad_(), normal(tokens, 32)
        self.teacher, self.masked_teacher = normal(tokens, 48), normal(tokens, 48)
        self.head = LMHead(normal(vocab, 32).requires_grad_(), normal(vocab).requires_grad_())
        self.teacher_head = LMHead(normal(vocab, 48))
        self.weights = torch.rand(tokens, device=device)
        self.sampled = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.scale = torch.ones((), device=device)

    def reverse_kl(self) -> Tensor:
        return linear_reverse_kl(
            self.hidden, self.head, self.teacher, self.teacher_head, token_weights=self.weights,
            sampled_tokens=self.sampled, vocab_size=1000, temperature=0.9, teacher_smoothing=0.01,
        ).kl  # fmt: skip

    def decomposed_kl(self, decomposition: str, **options: Any) -> Any:
        return linear_decomposed_kl(
            self.hidden, self.head, self.teacher, self.teacher_head, self.masked_teacher,
            self.masked if decomposition == "vgs" else None, decomposition=decomposition, token_weights=self.weights,
            vis_weights=self.weights, sampled_tokens=self.sampled, token_steering=TokenSteering(2.0, 0.1),
            ratio_guard=RatioGuard(1.0, 0.1) if decomposition == "vgs" else None, **options,
        )  # fmt: skip

    def opd(self) -> None:
        (self.reverse_kl() * self.scale).backward()

    def known_weights(self) -> None:
        result = self.decomposed_kl("vgs", objective=(self.scale, self.weights, 0), accumulate_head_grad=True)
        (result.objective * self.scale).backward()

    def steering(self) -> None:
        parameters = [self.hidden, self.head.weight, self.head.bias]
        for decomposition, policy in zip(("vgs", "teacher_prior"), POLICIES, strict=True):
            result = self.decomposed_kl(decomposition)
            first = result.standard if decomposition == "vgs" else result.lang
            steer_(parameters, first, result.vis, policy, max_norm=1.0)  # type: ignore[arg-type]

    def gradients(self) -> None:
        first = [torch.zeros_like(self.hidden), None, torch.zeros_like(self.head.weight)]
        second = [None, torch.zeros_like(self.weights), torch.zeros_like(self.head.weight)]
        out = [torch.empty_like(t) for t in (self.hidden, self.weights, self.head.weight)]
        gramian = gradient_gramian(first, second)
        for policy in POLICIES:
            combine_gradients(first, second, policy(gramian), out=out, max_norm=1.0)  # type: ignore[operator]


KINDS: dict[str, Callable[[Step], None]] = {
    "opd": Step.opd, "known_weights": Step.known_weights, "steering": Step.steering, "gradients": Step.gradients,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_step_waits(kind: str) -> None:
    step = Step("meta")
    with gpu_loop(meta=True, tokens=12, multiple=4) as loop:
        KINDS[kind](step)
    assert len(loop.work) > 10


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[[0, 2]],
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([1])],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.to("cpu"),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_a_wait_is_seen(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device="meta")
    with gpu_loop(meta=True), pytest.raises(HostWait):
        wait(x)


def test_a_wait_within_an_operator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(hidden: Tensor, rows: slice, weights: Tensor) -> Tensor:
        return hidden[list(range(rows.start, rows.stop))]

    for planted, message in ((gather, "Python list"), (lambda h, r, w: h[r][w[: h[r].shape[0]] > 0], "a mask")):
        monkeypatch.setattr(op, "gather", planted)
        with gpu_loop(meta=True), pytest.raises(HostWait, match=message):
            Step("meta").opd()


def test_a_filter_of_columns_waits_and_says_so() -> None:
    """How many columns are kept decides the shape of a product."""
    step = Step("meta")
    with gpu_loop(meta=True, tokens=12, multiple=4), pytest.raises(HostWait):
        step.decomposed_kl("vgs", gradient_filter=0.01)
    assert "waits for the device" in (linear_reverse_kl.__doc__ or "")


# ------------------------------------------------------------------ on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_driver_sees_no_wait(kind: str, dtype: torch.dtype) -> None:
    step = Step("cuda", dtype, tokens=3000)
    KINDS[kind](step)  # compiles, and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        KINDS[kind](step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_the_step(kind: str) -> None:
    """Replayed on new inputs in the same memory, it gives what the step gives."""
    step = Step("cuda", tokens=3000)
    leaves = [step.hidden, step.head.weight, step.head.bias]

    def run() -> list[Tensor | None]:
        for leaf in leaves:
            if leaf is not None and leaf.grad is not None:
                leaf.grad.zero_()
        KINDS[kind](step)
        return [None if leaf is None or leaf.grad is None else leaf.grad.clone() for leaf in leaves]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        step.teacher.normal_()
    graph.replay()
    found = [None if g is None else g.clone() for g in captured]
    for a, b in zip(found, run(), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
