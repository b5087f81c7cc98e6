"""What a linear call takes at best on this machine: its products alone, and what else must move at the speed of a copy.

Logits are fp32, logit gradients in the dtype of the hidden states. The loss reads every stream; the gradient reads it
again and writes a gradient. A head gradient adds up in fp32 over the runs of tokens: each run but the first reads it
and writes it, and it is rounded once. How many runs there were is counted while the call runs (`harness/runs.py`), not
reckoned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.records import Row
from benchmarks.harness.runs import head_products
from benchmarks.harness.tables import bytes_text
from benchmarks.methods import METHODS, Cost
from benchmarks.products import floor_name

ACCUMULATED = 4  # bytes of a logit and of a head gradient that adds up
COPY_BYTES = 2**29  # beyond any cache


class Traffic(NamedTuple):
    """Bytes of a call: those that come on top of its products, and all of them."""

    beyond_products: int
    total: int


def traffic(shape: Mapping[str, int], cost: Cost, itemsize: int, head_products: int, objectives: int) -> Traffic:
    """`itemsize`: of hidden states and heads. `head_products`: of all runs and objectives."""
    logits = shape["tokens"] * shape["vocab"]
    student, teacher = (shape["vocab"] * shape[width] for width in ("width", "teacher_width"))
    streams = cost.student_projections + cost.teacher_projections
    runs = head_products // objectives
    wide = max(itemsize, ACCUMULATED)
    looks = 2 * streams * logits * wide + cost.gradients * logits * itemsize
    added = 2 * (head_products - objectives) * student * wide
    rounded = objectives * student * (wide + itemsize) if itemsize < wide else 0
    beyond = looks + added + rounded
    projections = streams * logits * wide + runs * (student + teacher) * itemsize
    gradients = 2 * cost.gradients * logits * itemsize + runs * student * itemsize + objectives * student * wide
    return Traffic(round(beyond), round(beyond + projections + gradients))


def count_head_products(calls: Mapping[str, Callable[[], Any]]) -> dict[str, int]:
    """Of one call of each method by name; without those that make none, or that raise (the turns say why)."""
    found = {}
    for name, call in calls.items():
        with head_products() as rows:
            try:
                call()
            except Exception:
                continue
        if rows:
            found[name] = len(rows)
    return found


def add_rooflines(
    rows: Mapping[str, Row], floors: Sequence[Row], shape: Mapping[str, int], itemsize: int, counts: Mapping[str, int]
) -> list[Row]:
    """A row for each method in `counts`, from the turns of its floor and of "copy"; its own row gets its bytes."""
    copied, by_name = rows["copy"], {row.name: row for row in floors}
    found: list[Row] = []
    if copied.median is None or copied.bytes_moved is None:
        return found
    bandwidth = copied.bytes_moved / copied.median
    for name, count in counts.items():
        method = METHODS[name]
        moved = traffic(shape, method.cost, itemsize, count, len(method.objectives))
        rows[name].bytes_moved = moved.total
        label = (
            f"roofline of {method.label}: its products, and {bytes_text(moved.beyond_products)} as a copy moves them"
        )
        alone = by_name[floor_name(name)].seconds
        found.append(Row(f"roofline_{name}", label, [s + moved.beyond_products / bandwidth for s in alone]))
    return found
