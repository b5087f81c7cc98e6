"""The matrix products alone: the floor under every way from hidden states to gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.records import Row
from benchmarks.harness.timing import Timing
from benchmarks.inputs import Streams
from benchmarks.methods import METHODS
from vgs_kernels import backend
from vgs_kernels.linear.products import Products

PRODUCTS = {
    "project_student": "one projection, student, fp32 logits",
    "project_teacher": "one projection, teacher, fp32 logits",
    "hidden_product": "one hidden-gradient product",
    "head_product": "one head-gradient product",
}


def product_calls(streams: Streams) -> dict[str, Callable[[], Any]]:
    """Each of `PRODUCTS` on all tokens at once, into tensors that exist."""
    student, teacher = streams.student.detach(), streams.teacher
    student_head, teacher_head = (head.detach() for head in streams.heads)
    dtype = torch.promote_types(student.dtype, torch.float32)
    logits = student.new_zeros(streams.tokens, student_head.shape[0], dtype=dtype)
    gradients = torch.zeros_like(logits, dtype=student.dtype)
    hidden_out, head_out = torch.empty_like(student), torch.empty_like(student_head)
    project = _projection(student)
    return {
        "project_student": lambda: project(student, student_head, logits),
        "project_teacher": lambda: project(teacher, teacher_head, logits),
        "hidden_product": lambda: torch.mm(gradients, student_head, out=hidden_out),
        "head_product": lambda: torch.mm(gradients.t(), student, out=head_out),
    }


def _projection(hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor], object]:
    """torch's product where it has one with fp32 output; of 16-bit operands on a CPU only ours has."""
    if hidden.dtype in (torch.float32, torch.float64):
        return lambda hidden, head, out: torch.mm(hidden, head.t(), out=out)
    if hidden.is_cuda:
        return lambda hidden, head, out: torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    products = Products(hidden.device, hidden.dtype, backend.resolve("stream_kl", hidden.device) == "native")
    return lambda hidden, head, out: products.project(hidden, head, None, out)


def limits(dtype: str) -> dict[str, float]:
    """How many times its products alone a method may take on a CPU.

    A matrix unit (AMX) makes the products, and not the rest, several times faster; it takes bf16 alone.
    """
    native = torch.ops.vgs_kernels_native
    if dtype == "bf16" and hasattr(native, "has_matrix_unit") and native.has_matrix_unit():
        return dict.fromkeys(("opd", "vgs", "vgs_preserving", "matched"), 1.4) | {"prior_parts": 1.5}
    return {"opd": 1.15, "vgs": 1.2, "vgs_preserving": 1.2, "matched": 1.2, "prior_parts": 1.25}


def floor_name(method: str) -> str:
    return f"floor_{METHODS[method].cost.products:g}"


def floor_rows(timings: Mapping[str, Timing], methods: tuple[str, ...] = tuple(METHODS)) -> list[Row]:
    """The products of every method alone, from the turns of each."""
    parts = [timings[name].seconds for name in PRODUCTS]
    rows = {}
    for method in methods:
        cost = METHODS[method].cost
        seconds = [
            cost.student_projections * student + cost.teacher_projections * teacher + cost.gradients * (hidden + head)
            for student, teacher, hidden, head in zip(*parts, strict=False)
        ]
        name = floor_name(method)
        rows.setdefault(name, Row(name, f"floor: {cost.products:g} products", seconds))
    projections = [2 * student + 2 * teacher for student, teacher, _, _ in zip(*parts, strict=False)]
    floors = sorted(rows.values(), key=lambda row: row.label)
    return [Row("floor_projections", "floor: 4 projections", projections), *floors]
