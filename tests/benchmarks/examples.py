"""A record and small heads, shared by the tests of the benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.harness.cases import DTYPES
from benchmarks.harness.gates import Check, Gate
from benchmarks.harness.records import Record, Row, Target
from benchmarks.inputs import (
    random_heads,
)

GREEN = Gate((Check("values", error=1e-7, peer_error=1e-7, floor=0.0),))
RED = Gate((*GREEN.checks, Check("gradients", error=1.0, peer_error=1e-7, floor=1e-6)))
MACHINE = {"device": "cpu", "name": "Some (R) CPU", "cores": 2, "memory_gib": 8.0, "instruction_set": "AVX2"}


def record_of(gate: Gate = GREEN, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "benchmark": "linear_reverse_kl",
        "case": {"tokens": 4, "width": 8, "teacher_width": 8, "vocab": 16, "dtype": "bf16", "threads": 1},
        "gate": gate,
        "rows": [
            Row("naive", "plain torch", [4.0, 5.0, 6.0], ours="ours"),
            Row("ours", "ours", [2.0, 1.0, 3.0], floor="naive", bytes_moved=2**20, peak_bytes=2**21),
            Row("twice", "a peer, twice", [2.0], calls=2),
            Row("absent", "a peer that failed", note="skipped: it raised"),
        ],
        "environment": {
            "hardware": MACHINE,
            "versions": {"torch": "2.14"},
            "commit": "0123456789abcdef",
            "modified": False,
            "date": "2026-01-01T00:00:00Z",
            "load_average_1min": 0.0,
        },
        "targets": [
            Target("speed", 2.5, 4.0, "the floor allows it", at_least=True),
            Target("memory", None, 128, "no logits"),
        ],
        "facts": {"memory": "VmHWM"},
    }
    return Record(**fields | changes)


def tiny_heads(dtype: str = "fp32") -> tuple[Tensor, Tensor]:
    # Rows of fewer entries are too parallel for `peaked_streams`: all tokens become deterministic.
    return random_heads(256, 288, 301, DTYPES[dtype], "cpu")
