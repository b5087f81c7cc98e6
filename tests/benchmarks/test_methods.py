"""What is measured is what is said: methods against the textbook in fp64, inputs, and gates that see planted errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    decomposed_kl,
    gpu_correctness,
    linear_gate,
    methods,
    peers,
    roofline,
    truth,
)
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.timing import Timing
from benchmarks.inputs import (
    Streams,
    converging_streams,
    logits_fp32,
    peaked_streams,
    random_heads,
    random_streams,
    rotate_head,
)
from benchmarks.methods import METHODS, OBJECTIVES
from benchmarks.products import floor_rows
from benchmarks.truth import Result, Truth
from tests.benchmarks.examples import tiny_heads
from tests.gpu_loop import Model, gpu_loop
from vgs_kernels.linear.reference import reverse_kl


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_gate_of_the_methods_is_green_and_peers_compute_what_they_are_compared_as(dtype: str) -> None:
    eager = {"trl": peers.trl_reverse_kl, "liger": lambda streams: peers.liger_reverse_kl(streams, compiled=False)}
    ways = {name: ("standard", way) for name, way in eager.items()}
    gate, worst = linear_gate.run_gate(tiny_heads(dtype), list(METHODS), ways)
    assert gate.passed, gate.describe()
    assert set(worst) == {*METHODS, "trl", "liger"}
    if dtype == "fp32":
        assert all(error < 1e-2 for found in worst.values() for error in found.values()), worst


def _changed(
    method: str, streams: Streams, change: Callable[[Result], Result], options: dict[str, Any]
) -> list[Result]:
    *before, last = METHODS[method].ours(streams, **options)
    return [*before, change(last)]


def _scaled_head_gradient(method: str, streams: Streams, **options: Any) -> list[Result]:
    return _changed(method, streams, lambda result: result._replace(head=result.head * 1.001), options)


def _one_wrong_entry(method: str, streams: Streams, **options: Any) -> list[Result]:
    """As a missing mask does: the last vocabulary entry's gradient is off."""

    def change(result: Result) -> Result:
        head = result.head.clone()
        head[-1, 0] += 0.01 * head.abs().max()
        return result._replace(head=head)

    return _changed(method, streams, change, options)


def _wrong_loss_of_one_token(method: str, streams: Streams, **options: Any) -> list[Result]:
    def change(result: Result) -> Result:
        assert result.losses is not None
        losses = result.losses.clone()
        losses[0] *= 1.01
        return result._replace(losses=losses)

    return _changed(method, streams, change, options)


def _swapped_parts(method: str, streams: Streams, **options: Any) -> list[Result]:
    return METHODS[method].ours(streams, **options)[::-1]


@pytest.mark.parametrize("planted", [_scaled_head_gradient, _one_wrong_entry, _wrong_loss_of_one_token, _swapped_parts])
def test_gate_of_the_methods_refuses_a_planted_error(planted: Any) -> None:
    gate, _ = linear_gate.run_gate(tiny_heads(), ["vgs_parts"], {}, ours=planted)
    assert "RED" in gate.describe()
    assert any(not check.passed and "runs" not in check.name for check in gate.checks)


def test_gate_refuses_16_bit_logits() -> None:
    def rounded(method: str, streams: Streams, **options: Any) -> list[Result]:
        return [peers.plain(OBJECTIVES[METHODS[method].objectives[0]], streams)]

    gate, _ = linear_gate.run_gate(tiny_heads("bf16"), ["opd"], {}, ours=rounded)
    assert any(not check.passed and "runs" not in check.name for check in gate.checks)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_gate_goes_through_several_runs_of_unequal_length(dtype: str) -> None:
    for method in METHODS:
        _, products = linear_gate.in_runs(method, random_streams(linear_gate.GATE_TOKENS, tiny_heads(dtype)))
        lengths = products[:: len(METHODS[method].objectives)]
        assert len(lengths) >= 3, (method, products)
        assert len(set(lengths)) > 1, (method, products)


def test_a_gate_of_one_run_is_red() -> None:
    """A test of the gate: right results of a call that saw all tokens at once must not pass."""

    def at_once(method: str, streams: Streams, **options: Any) -> Sequence[Result]:
        return METHODS[method].ours(streams)

    gate, _ = linear_gate.run_gate(tiny_heads(), ["opd"], {}, ours=at_once)
    assert [check.name.partition(" opd ")[2] for check in gate.checks if not check.passed] == ["in 1 runs"] * 4
    equal, _ = linear_gate.run_gate(tiny_heads(), ["opd"], {}, rows=(1,))
    assert not equal.passed


def test_gate_of_decomposed_kl() -> None:
    def wrong(*streams: Tensor) -> Tensor:
        return decomposed_kl.KINDS["vgs"].ours(*streams) * 1.0001

    assert decomposed_kl.run_gate(999, "fp32", "cpu").passed
    assert decomposed_kl.run_gate(999, "bf16", "cpu").passed
    assert not decomposed_kl.run_gate(999, "fp32", "cpu", {"vgs": wrong}).passed


def test_peaked_inputs_are_peaked_at_the_targets_vocabulary() -> None:
    streams = peaked_streams(6, random_heads(256, 256, 151936, torch.bfloat16, "cpu"))
    assert 0.3 < methods.student_entropy(streams) < 2.0
    (result,) = METHODS["opd"].ours(streams)
    assert result.loss / 6 > 0.05  # and student and teacher differ


@pytest.mark.parametrize("divergence", [1e-1, 1e-3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_converging_student_is_as_far_from_its_teacher_as_asked(dtype: str, divergence: float) -> None:
    head, _ = random_heads(128, 128, 1000, DTYPES[dtype], "cpu")
    streams = converging_streams(8, rotate_head(head, teacher_width=160), deviation=4.0, divergence=divergence)
    student, masked = (logits_fp32(hidden, head) for hidden in (streams.student, streams.masked_student))
    teacher, other = (logits_fp32(h, streams.teacher_head) for h in (streams.teacher, streams.masked_teacher))
    assert student.std(-1).mean() == pytest.approx(4.0, rel=0.1)
    assert reverse_kl(student, teacher).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert reverse_kl(masked, other).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert reverse_kl(teacher, other).min() > 0.01  # the image makes a difference


def test_truth_is_autograd_in_fp64_and_errors_are_over_the_largest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "BLOCK", 100)
    streams = random_streams(19, tiny_heads("fp64"))  # more tokens than it takes at a time
    exact = Truth(streams, {"standard": OBJECTIVES["standard"]})
    loss, losses, (hidden,), head = peers.plain(OBJECTIVES["standard"], streams)
    assert max(exact.errors("standard", Result(loss, losses, [hidden], head))) < 1e-12
    wrong = head.clone()
    wrong[-1, 3] += 0.01 * head.abs().max()
    found = exact.errors("standard", Result(loss * 1.5, None, [hidden], wrong))
    assert (found.loss, found.head_gradient) == pytest.approx((0.5, 0.01), rel=1e-6)
    assert found.losses is None
    wrong[150, 0] = math.nan
    assert math.isnan(exact.errors("standard", Result(loss, losses, [hidden], wrong)).head_gradient)


def test_our_methods_are_the_textbook_in_fp64() -> None:
    """With the plain formulas in fp64, every method's call agrees to rounding: the formulas say what it computes."""
    streams = random_streams(10, tiny_heads("fp64"))
    for name, method in METHODS.items():
        exact = Truth(streams, {objective: OBJECTIVES[objective] for objective in method.objectives})
        for objective, result in zip(method.objectives, method.ours(streams), strict=True):
            assert max(exact.errors(objective, result)) < 1e-10, name


def test_floors_count_the_products() -> None:
    seconds = {
        "project_student:ours": 1.0, "project_teacher:torch": 20.0, "project_teacher:ours": 10.0,
        "hidden_product:torch": 100.0, "hidden_product:ours": 200.0, "head_product:torch": 1000.0,
    }  # fmt: skip
    rows = floor_rows({name: Timing([value]) for name, value in seconds.items()})
    assert {row.name: row.median for row in rows} == pytest.approx({
        "floor_projections": 22, "floor_4": 1111, "floor_6": 1122, "floor_7.2": 1455.3, "floor_8": 2222,
        "floor_5": 1121, "floor_7": 2221,
    })  # fmt: skip


def test_the_cross_entropy_of_torch_is_what_it_is_called() -> None:
    streams = random_streams(6, tiny_heads())
    label, call = peers.cross_entropies(streams)["cross_entropy_torch"]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(301, (6,), generator=generator)
    loss = torch.nn.functional.cross_entropy(streams.student @ streams.student_head.t(), tokens, reduction="sum")
    torch.testing.assert_close(call(), list(torch.autograd.grad(loss, [streams.student, streams.student_head])))
    assert "another loss" in label


def test_a_roofline_counts_what_moves_beside_the_products() -> None:
    shape = {"tokens": 10, "width": 3, "teacher_width": 5, "vocab": 7}
    cost = METHODS["opd"].cost
    one = roofline.traffic(shape, cost, itemsize=2, head_products=1, objectives=1)
    # two looks at two fp32 streams and a bf16 gradient; the head gradient, rounded once
    assert one.beyond_products == 2 * 2 * 70 * 4 + 70 * 2 + 21 * (4 + 2)
    # logits written, heads read, the gradient read twice, the head read and its gradient written
    assert one.total == one.beyond_products + 2 * 70 * 4 + (21 + 35) * 2 + 2 * 70 * 2 + 21 * 2 + 21 * 4
    three = roofline.traffic(shape, cost, itemsize=2, head_products=3, objectives=1)
    assert three.beyond_products - one.beyond_products == 2 * 2 * 21 * 4
    wide = roofline.traffic(shape, cost, itemsize=4, head_products=1, objectives=1)
    assert wide.beyond_products == 2 * 2 * 70 * 4 + 70 * 4  # nothing to round


@pytest.mark.parametrize(("method", "streams"), [("opd", (1, 1, 1)), ("vgs", (2, 2, 1)), ("prior_parts", (1, 2, 2))])
def test_a_roofline_is_that_of_the_chunk_loop_of_a_gpu(method: str, streams: tuple[int, int, int]) -> None:
    """Whose own test holds its model to the bytes that it counts."""
    model = Model(*streams)
    shape = {"tokens": 8192, "width": model.width, "teacher_width": model.teacher_width, "vocab": model.vocab}
    moved = roofline.traffic(shape, METHODS[method].cost, 2, head_products=8 * streams[2], objectives=streams[2])
    assert moved.total == model.bytes(1024)


def test_the_gate_goes_through_several_runs_of_a_gpu_too() -> None:
    """With the rule and the products of a GPU, at the tokens of the gate and at those of the check of a GPU."""
    check = gpu_correctness.FULL
    for tokens, rows in ((linear_gate.GATE_TOKENS, linear_gate.ROWS), (check.tokens, check.rows)):
        streams = random_streams(tokens, random_heads(64, 64, 320, torch.bfloat16, "cpu"))  # rows of whole lines
        for method in METHODS:
            with gpu_loop():
                _, products = linear_gate.in_runs(method, streams, rows)
            lengths = products[:: len(METHODS[method].objectives)]
            assert len(lengths) >= 3, (method, products)
            assert len(set(lengths)) > 1, (method, products)
            assert tokens < 256 or max(products) >= 128, (method, products)  # a tile of the library


def test_the_runs_of_a_roofline_are_counted_while_the_call_runs() -> None:
    streams = random_streams(9, tiny_heads())
    limit = 2 * 4 * 2 * 301  # fp32 logits of two rows of two streams

    def absent() -> None:
        raise ImportError

    calls = {"opd": lambda: METHODS["opd"].ours(streams, max_chunk_bytes=limit), "vgs": absent, "prior": lambda: None}
    assert roofline.count_head_products(calls) == {"opd": 5}
