"""The chunk loop as a GPU runs it, without one: results against float64, traffic against arithmetic, no waits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu_loop import GpuLoop, Model, gpu_loop
from tests.linear_problem import DECOMPOSITIONS, Problem, gradients
from vgs_kernels import LMHead, linear_decomposed_kl, linear_reverse_kl
from vgs_kernels.linear.rule import CPU, GPU, Bytes, DeviceFacts

FLOP_RATE, BANDWIDTH = 750e12, 3.0e12  # usual rates of an H100: bf16 products, memory
TOKENS = 46
UNEVEN: dict[str, Any] = {"tokens": 12, "multiple": 4}  # chunks of 12, 16 and 18 - 4
PARTS = {"vgs": ("standard", "vis"), "teacher_prior": ("lang", "vis")}


def wide(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem, of the values that 16 bits have left."""
    found = Problem(problem.decomposition, dtype=dtype, tokens=TOKENS, vocab=1003, width=32, scale=0.5)
    for name in ("hidden", "masked_hidden", "teacher_hidden", "masked_teacher_hidden", "weight"):
        given = getattr(problem, name)
        setattr(found, name, None if given is None else given.detach().to(dtype))
    found.hidden.requires_grad_()
    found.weight.requires_grad_()
    found.head, found.teacher_head = LMHead(found.weight), LMHead(problem.teacher_head.weight.to(dtype))
    found.token_weights = problem.token_weights
    return found


def assert_as_exact_as_plain_torch(
    found: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> None:
    for a, b, t in zip(found, plain, exact, strict=True):
        assert a.dtype == dtype
        floor = 4 * torch.finfo(dtype).eps * float(t.norm()) / math.sqrt(t.numel())
        error, plain_error = (float((x.double() - t).square().mean().sqrt()) for x in (a, b.to(dtype)))
        assert error <= 2 * plain_error + floor


def assert_uneven_chunks(loop: GpuLoop, width: int) -> None:
    """At least three head gradients for each objective, of unequal numbers of rows."""
    rows = [shape[0] for _, _, shape in loop.products if shape[1] == width and shape[0] < 1003]
    assert len(rows) >= 3, f"the chunk loop ran {len(rows)} chunks"
    assert len(set(rows)) >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_results_are_as_exact_as_those_of_plain_torch(decomposition: str, combined: bool, dtype: torch.dtype) -> None:
    problem = Problem(decomposition, dtype=dtype, tokens=TOKENS, vocab=1003, width=32, scale=0.5)
    problem.token_weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) / 1e4  # of a large batch
    problem.token_weights[5] = 0.0
    objective = (0.7, 1.3, 0) if combined else None
    with gpu_loop(**UNEVEN) as loop:
        got = problem.call(objective=objective, backend="reference")
    values = [got.objective] if combined else [getattr(got, part) for part in PARTS[decomposition]]
    found = [gradients(2.5e4 * value, problem.students) for value in values]  # what a loss scaler does
    expected: dict[torch.dtype, list[list[Tensor]]] = {}
    for other in (torch.float32, torch.float64):
        same = wide(problem, other)
        parts = same.textbook()
        wanted = [0.7 * parts["standard"] + 1.3 * parts["vis"]] if combined else [
            parts[part] for part in PARTS[decomposition]
        ]  # fmt: skip
        totals = [(2.5e4 * part * same.token_weights.to(other)).sum() for part in wanted]
        expected[other] = [gradients(total, same.students) for total in totals]
        if other == torch.float64:
            for value, total in zip(values, totals, strict=True):
                torch.testing.assert_close(2.5e4 * value.double(), total, rtol=1e-5, atol=1e-4)
    for mine, plain, exact in zip(found, expected[torch.float32], expected[torch.float64], strict=True):
        assert_as_exact_as_plain_torch(mine, plain, exact, dtype)

    assert_uneven_chunks(loop, 32)
    hidden = got.hidden_gradients.objective if combined else got.hidden_gradients.vis
    assert hidden is not None
    assert hidden.dtype == torch.float32
    assert {(taken, given) for taken, given, _ in loop.products} == {(dtype, torch.float32)}
    stacked = [shape[0] for _, _, shape in loop.products if shape[1] == 32 and shape[0] < 1003]
    assert sum(stacked) == len(values) * TOKENS  # one dH a chunk, of both objectives
    assert len(stacked) == 3


def test_a_gate_of_one_chunk_is_seen() -> None:
    problem = Problem(dtype=torch.bfloat16, tokens=8, vocab=1003, width=32)
    with gpu_loop(**UNEVEN) as loop:
        problem.reverse_kl(backend="reference")
    with pytest.raises(AssertionError, match="ran 1 chunks"):
        assert_uneven_chunks(loop, 32)


def test_where_memory_is_short_logits_come_in_slices_and_gradients_as_one() -> None:
    problem = Problem("vgs", dtype=torch.bfloat16, tokens=TOKENS, vocab=1003, width=32, scale=0.5)
    with gpu_loop(**UNEVEN) as whole:
        wanted = gradients(problem.call(objective=(1, 2, 0), backend="reference").objective, problem.students)
    a_row = 1024 * (4 * 4 + 2)
    with gpu_loop(**UNEVEN) as cut:
        got = problem.call(objective=(1, 2, 0), backend="reference", max_chunk_bytes=8 * a_row)
    found = gradients(got.objective, problem.students)

    def of_heads(loop: GpuLoop) -> int:
        return sum(shape == (1003, 32) for _, _, shape in loop.products)

    def projections(loop: GpuLoop) -> int:
        return sum(shape[1] == 1003 for _, _, shape in loop.products)

    assert of_heads(whole) == 3
    assert projections(whole) == 6
    assert of_heads(cut) <= 4
    assert projections(cut) > 12
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gradient_that_is_added_to_is_rounded_once(dtype: torch.dtype) -> None:
    problem = Problem("vgs", dtype=dtype, tokens=TOKENS, vocab=1003, width=32, bias=True)
    start = torch.randn(1003, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    options: dict[str, Any] = {"objective": (1, 2, 0), "backend": "reference"}
    for numbers in (UNEVEN, {"tokens": 64, "multiple": 4}):  # several chunks, and one
        with gpu_loop(**numbers):
            apart = problem.call(**options).objective
            hidden, weight, bias = torch.autograd.grad(apart, problem.students)
            problem.weight.grad, problem.hidden.grad = start.clone(), None
            assert problem.bias is not None
            problem.bias.grad = None
            problem.call(accumulate_head_grad=True, **options).objective.backward()
        assert problem.weight.grad is not None
        assert problem.hidden.grad is not None
        error = problem.weight.grad.double() - (start.double() + weight.double())
        # The gradient by itself was rounded, too.
        allowed = torch.finfo(dtype).eps * (start.double() + weight.double()).abs().maximum(weight.double().abs())
        assert (error.abs() <= allowed + 1e-6).all()
        assert torch.equal(problem.hidden.grad, hidden)
        assert torch.equal(problem.bias.grad, bias)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_teacher_that_sees_the_same_is_projected_once(decomposition: str, logits_dtype: torch.dtype) -> None:
    problem = Problem(decomposition, dtype=torch.bfloat16, tokens=TOKENS, vocab=1003, width=32)
    options: dict[str, Any] = {"backend": "reference", "logits_dtype": logits_dtype}
    found, rows = [], []
    for masked in (problem.teacher_hidden, problem.teacher_hidden.clone()):
        problem.masked_teacher_hidden = masked
        with gpu_loop(**UNEVEN) as loop:
            got = problem.call(**options)
        parts = [getattr(got, part) for part in PARTS[decomposition]]
        found.append([*parts, *gradients(parts[0] + 2 * parts[1], problem.students)])
        rows.append(sum(shape[0] for _, _, shape in loop.products if shape[1] == 1003))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    students = 2 if decomposition == "vgs" else 1
    assert rows == [(students + 1) * TOKENS, (students + 2) * TOKENS]


@pytest.mark.parametrize("vocab", [1003, 1024])
def test_rows_of_odd_vocabularies_begin_at_cache_lines(vocab: int) -> None:
    problem = Problem("vgs", dtype=torch.bfloat16, tokens=20, vocab=vocab, width=32)
    seen: list[Tensor] = []
    with gpu_loop(**UNEVEN) as loop:
        kernels, plain = loop.kernels, problem.call

        def watching(real: Any) -> Any:
            found = kernels(real)
            inner = found.logit_gradients

            def logit_gradients(streams: Any, *rest: Any, out: Tensor, **more: Any) -> None:
                seen.extend((*streams, out, more["out_second"]))
                inner(streams, *rest, out=out, **more)

            found.logit_gradients = logit_gradients
            return found

        loop.kernels = watching  # type: ignore[method-assign]
        plain(backend="reference")
    assert len(seen) > 5
    for tensor in seen:
        assert tensor.shape[1] == vocab
        assert tensor.stride(0) * tensor.itemsize % 128 == 0
        assert (tensor.storage_offset() * tensor.itemsize) % 128 == 0


# ------------------------------------------------------------------ traffic


def streams_on_meta(model: Model) -> tuple[Any, ...]:
    def hidden(width: int) -> Tensor:
        return torch.empty(model.tokens, width, dtype=torch.bfloat16, device="meta")

    head, teacher = (
        LMHead(torch.empty(model.vocab, width, dtype=torch.bfloat16, device="meta"))
        for width in (model.width, model.teacher_width)
    )
    head.weight.requires_grad_()
    return hidden, head, teacher


METHODS = {"opd": Model(1, 1, 1), "vgs": Model(2, 2, 1), "teacher_prior": Model(1, 2, 2)}


def walk(method: str, numbers: dict[str, Any] | None = None, **options: Any) -> GpuLoop:
    """8,192 tokens of a 2048-wide student and a 4096-wide teacher over 151,936 entries, forward and back."""
    model = METHODS[method]
    hidden, head, teacher = streams_on_meta(model)
    student = hidden(model.width).requires_grad_()
    with gpu_loop(meta=True, **(numbers or {})) as loop:
        if method == "opd":
            linear_reverse_kl(student, head, hidden(model.teacher_width), teacher, **options).kl.backward()
            return loop
        masked = hidden(model.width) if method == "vgs" else None
        got = linear_decomposed_kl(
            student, head, hidden(model.teacher_width), teacher, hidden(model.teacher_width), masked,
            decomposition=method, objective=(1.0, 2.0, 0) if method == "vgs" else None, **options,
        )  # fmt: skip
        (got.lang + got.vis if got.objective is None else got.objective).backward()
    return loop


@pytest.mark.parametrize("method", METHODS)
def test_traffic_is_that_of_the_model_and_near_the_floor(method: str) -> None:
    """Floor: the products' FLOPs at 750 TFLOP/s. An operation takes the longer of FLOPs / rate and bytes / 3.0 TB/s,
    and one comes after the other."""
    model, loop = METHODS[method], walk(method)
    assert sum(work.flops for work in loop.work) == model.floor_flops
    counted, expected = sum(work.bytes for work in loop.work), model.bytes(1024)
    assert abs(counted / expected - 1) <= 0.1
    assert loop.seconds(FLOP_RATE, BANDWIDTH) <= 1.3 * model.floor_flops / FLOP_RATE


def test_chunks_counted_in_bytes_were_far_from_it() -> None:
    """512 MiB of logits, as it was: the check above sees it."""
    for method, model in METHODS.items():
        loop = walk(method, {"tokens": None, "multiple": 1}, max_chunk_bytes=2**29)
        assert loop.seconds(FLOP_RATE, BANDWIDTH) > 1.3 * model.floor_flops / FLOP_RATE


# ------------------------------------------------------------------ the rule


A_ROW = Bytes(logits=4 * 4 * 151_936, gradients=2 * 151_936)


@pytest.mark.parametrize("count", [1, 255, 1023, 1024, 2047, 2048, 3000, 8191, 8192, 9000, 100_003])
def test_chunks_of_a_gpu_are_equal_multiples_of_at_least_1024(count: int) -> None:
    plan = GPU.plan(DeviceFacts(is_gpu=True, free_bytes=40 * 2**30), A_ROW, None, None)
    lengths = plan.chunks(count)
    assert sum(lengths) == count
    assert min(lengths) >= min(count, 1024)
    assert max(lengths) < 2048 + 256
    assert max(lengths) - min(lengths) <= 256 + 255
    assert all(length % 256 == 0 for length in lengths[:-1])
    assert all(plan.slices(length) == [length] for length in lengths)


def test_what_memory_allows() -> None:
    def plan(gib: float, **more: Any) -> tuple[list[int], list[int]]:
        found = GPU.plan(DeviceFacts(is_gpu=True, free_bytes=int(gib * 2**30)), A_ROW, **{
            "max_bytes": None, "tokens": None, **more,
        })  # fmt: skip
        return found.chunks(8192), found.slices(max(found.chunks(8192)))

    assert plan(40) == ([1024] * 8, [1024])
    assert plan(5) == ([1024] * 8, [512, 512])  # short: gradients of 1,024 rows, logits of 512
    assert plan(3) == ([1024] * 8, [512, 512])
    assert plan(2) == ([1024] * 8, [256] * 4)
    assert plan(1.5) == ([512] * 16, [256, 256])
    assert max(plan(0.1)[0]) == 19
    assert max(plan(0.0001)[0]) == 1
    assert plan(40, max_bytes=2 * 2**30) == ([1024] * 8, [512, 512])
    assert plan(40, tokens=4096) == ([4096, 4096], [4096])
    assert plan(40, tokens=2000) == ([2048] * 4, [2048])


def test_the_longest_slice_is_within_its_bytes() -> None:
    for rule in (GPU, CPU):
        for mib in (1, 10, 150, 700, 3000, 9000):
            for row in (A_ROW, Bytes(8 * 151_936, 0), Bytes(12 * 151_936, 4 * 151_936), Bytes(8 * 100, 2 * 100)):
                plan = rule.plan(DeviceFacts(is_gpu=rule is GPU), row, mib * 2**20, None)
                for count in (1, 300, 2000):
                    chunk = max(plan.chunks(count))
                    rows = max(plan.slices(chunk))
                    assert rows * row.logits + chunk * row.gradients <= mib * 2**20 or rows == chunk == 1


def test_a_cpu_takes_slices_of_64_and_gradients_of_256() -> None:
    two = Bytes(logits=2 * 4 * 151_936, gradients=2 * 151_936)
    plan = CPU.plan(DeviceFacts(is_gpu=False), two, None, None)
    assert (plan.slice, plan.chunk) == (64, 256)
