"""The matrix products alone: the floor under every way from hidden states to gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness.records import Row
from benchmarks.harness.timing import Timing
from benchmarks.inputs import Streams

PRODUCTS = {
    "project_student": "one projection, student",
    "project_teacher": "one projection, teacher",
    "hidden_product": "one hidden-gradient product",
    "head_product": "one head-gradient product",
}


def product_calls(streams: Streams) -> dict[str, Callable[[], Any]]:
    """Each of `PRODUCTS` on all tokens at once, into tensors that exist."""
    student, teacher = streams.student.detach(), streams.teacher
    student_head, teacher_head = (head.detach() for head in streams.heads)
    logits = student.new_zeros(streams.tokens, student_head.shape[0])
    hidden_out, head_out = torch.empty_like(student), torch.empty_like(student_head)
    return {
        "project_student": lambda: torch.mm(student, student_head.t(), out=logits),
        "project_teacher": lambda: torch.mm(teacher, teacher_head.t(), out=logits),
        "hidden_product": lambda: torch.mm(logits, student_head, out=hidden_out),
        "head_product": lambda: torch.mm(logits.t(), student, out=head_out),
    }


def floor_rows(timings: Mapping[str, Timing]) -> list[Row]:
    """The products alone: 3 or 4 projections, and 1 or 2 pairs of hidden and head product."""
    parts = [timings[n].seconds for n in ("project_student", "project_teacher", "hidden_product", "head_product")]
    counts = {  # student projections, teacher projections, pairs
        "floor_3": (1, 2, 0, "floor: 3 projections alone"),
        "floor_5": (1, 2, 1, "floor: 5 products (objective, teacher_prior)"),
        "floor_7": (1, 2, 2, "floor: 7 products (both components, teacher_prior)"),
        "floor_8": (2, 2, 2, "floor: 8 products (bayes, matched)"),
    }
    return [
        Row(name, label, [s * student + t * teacher + pairs * (h + w) for s, t, h, w in zip(*parts, strict=False)])
        for name, (student, teacher, pairs, label) in counts.items()
    ]
