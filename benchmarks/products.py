"""The matrix products alone: the floor under every way from hidden states to gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.machine import has_matrix_unit
from benchmarks.harness.records import Row
from benchmarks.harness.timing import Timing
from benchmarks.inputs import Streams
from benchmarks.methods import METHODS, Cost
from vgs_kernels import backend
from vgs_kernels.linear.products import Products

PRODUCTS = {
    "project_student": "one projection, student, fp32 logits",
    "project_teacher": "one projection, teacher, fp32 logits",
    "hidden_product": "one hidden-gradient product",
    "head_product": "one head-gradient product",
}
Call = Callable[[], Any]


def product_calls(streams: Streams) -> dict[str, tuple[str, Call]]:
    """Name -> label and call of each of `PRODUCTS`, on all tokens at once, into tensors that exist.

    By torch where it has the product (of 16-bit operands into fp32 it has none on a CPU), and on a CPU by ours.
    """
    found = {}
    for name, call in _torch_products(streams).items():
        found[f"{name}:torch"] = f"{PRODUCTS[name]}, torch", call
    if not streams.student.is_cuda:
        for name, call in _our_products(streams).items():
            found[f"{name}:ours"] = f"{PRODUCTS[name]}, ours", call
    return found


def _torch_products(streams: Streams) -> dict[str, Call]:
    logits, gradients, hidden_out, head_out = _outputs(streams, streams.student.dtype)
    student, teacher, student_head, teacher_head = _operands(streams)
    found: dict[str, Call] = {
        "hidden_product": lambda: torch.mm(gradients, student_head, out=hidden_out),
        "head_product": lambda: torch.mm(gradients.t(), student, out=head_out),
    }
    if logits.dtype == student.dtype:
        found["project_student"] = lambda: torch.mm(student, student_head.t(), out=logits)
        found["project_teacher"] = lambda: torch.mm(teacher, teacher_head.t(), out=logits)
    elif student.is_cuda:
        wide = {"out_dtype": logits.dtype, "out": logits}
        found["project_student"] = lambda: torch.mm(student, student_head.t(), **wide)
        found["project_teacher"] = lambda: torch.mm(teacher, teacher_head.t(), **wide)
    return {name: found[name] for name in PRODUCTS if name in found}


def _our_products(streams: Streams) -> dict[str, Call]:
    device = streams.student.device
    ours = Products(device, streams.student.dtype, backend.resolve("stream_kl", device) == "native")
    logits, gradients, hidden_out, head_out = _outputs(streams, ours.gradient_dtype)
    student, teacher, student_head, teacher_head = _operands(streams)
    return {
        "project_student": lambda: ours.project(student, student_head, None, logits),
        "project_teacher": lambda: ours.project(teacher, teacher_head, None, logits),
        "hidden_product": lambda: ours.hidden_gradient(gradients, student_head, hidden_out),
        "head_product": lambda: ours.head_gradient(gradients, student, head_out, False),
    }


def _operands(streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return streams.student.detach(), streams.teacher, streams.student_head.detach(), streams.teacher_head


def _outputs(streams: Streams, gradient_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, logit gradients, hidden gradient, head gradient."""
    student, head = streams.student.detach(), streams.student_head.detach()
    dtype = torch.promote_types(student.dtype, torch.float32)
    logits = student.new_zeros(streams.tokens, head.shape[0], dtype=dtype)
    gradients = torch.zeros_like(logits, dtype=gradient_dtype)
    return logits, gradients, torch.empty_like(student), torch.empty_like(head)


def limits(dtype: str) -> dict[str, float]:
    """How many times its products alone a method may take on a CPU.

    A matrix unit (AMX) makes the products, and not the rest, several times faster; it takes bf16 alone.
    """
    if dtype == "bf16" and has_matrix_unit():
        return dict.fromkeys(("opd", "vgs", "vgs_preserving", "matched"), 1.4) | {"prior_parts": 1.5}
    return {"opd": 1.15, "vgs": 1.2, "vgs_preserving": 1.2, "matched": 1.2, "prior_parts": 1.25}


def floor_name(method: str | Cost) -> str:
    cost = METHODS[method].cost if isinstance(method, str) else method
    return f"floor_{cost.products:g}"


def floor_rows(
    timings: Mapping[str, Timing], methods: tuple[str, ...] = tuple(METHODS), further: tuple[Cost, ...] = ()
) -> list[Row]:
    """The products of every method alone, each by the faster of its ways, from the turns of each."""
    student, teacher, hidden, head = (_fastest(name, timings) for name in PRODUCTS)
    turns = list(zip(student, teacher, hidden, head, strict=False))
    rows = [Row("floor_projections", "floor: 4 projections", [2 * s + 2 * t for s, t, _, _ in turns])]
    for cost in sorted({*(METHODS[method].cost for method in methods), *further}, key=lambda cost: cost.products):
        seconds = [
            cost.student_projections * s + cost.teacher_projections * t + cost.gradients * (h + w)
            for s, t, h, w in turns
        ]
        rows.append(Row(f"floor_{cost.products:g}", f"floor: {cost.products:g} products", seconds))
    return rows


def _fastest(name: str, timings: Mapping[str, Timing]) -> list[float]:
    ways = [timings[key] for key in (f"{name}:torch", f"{name}:ours") if key in timings and timings[key].seconds]
    return min(ways, key=lambda way: way.median).seconds
