"""One JSON file a case: gate, rows, targets, machine. A record with a red gate has no ratios."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.gates import Check, Gate
from benchmarks.harness.machine import hardware, versions

SCHEMA = 4
RECORDS = Path(__file__).resolve().parent.parent / "records"


@dataclass
class Row:
    """One peer of a case. `seconds` is empty when it has no figure, and `note` says why."""

    name: str
    label: str
    seconds: list[float] = field(default_factory=list)
    bytes_moved: int | None = None  # by the byte model that the record names
    peak_bytes: int | None = None  # above inputs and gradients
    floor: str | None = None  # name of the row that holds this one's floor
    ours: str | None = None  # name of our row that does the same work
    calls: int = 1  # the figure is this many times the median of `seconds` (one call per teacher: 2)
    errors: dict[str, float] = field(default_factory=dict)  # of the loss and the gradients, against fp64
    note: str = ""

    @property
    def median(self) -> float | None:
        return self.calls * statistics.median(self.seconds) if self.seconds else None


@dataclass
class Target:
    """What a figure was to reach, and why that much."""

    text: str
    value: float | None
    limit: float
    reason: str
    at_least: bool = False  # otherwise at most

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def bound(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def describe(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        figure = "" if self.value is None else f"{self.value:.3g} "
        return f"{verdict:6}  {self.text}: {figure}(target {self.bound}: {self.reason})"


class GateError(RuntimeError):
    """A ratio was asked of a record whose correctness gate is not green."""


@dataclass
class Record:
    """Everything about one case of one benchmark: `benchmarks/records/<slug>.json`."""

    benchmark: str
    case: dict[str, Any]  # shapes, dtype, threads: what was asked for
    gate: Gate
    rows: list[Row]
    environment: dict[str, Any]
    targets: list[Target] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # bandwidths, entropies, methods
    error_floor: float = 0.0  # below which no two rows' errors are told apart
    sources: str = ""  # `source_digest`

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, name: str, other: str) -> float | None:
        """median(name) / median(other); None where either has no figure. Raises GateError unless the gate is green."""
        if not self.gate.passed:
            raise GateError(f"{self.benchmark} {self.case}: the correctness gate is red, so there are no ratios")
        first, second = self.row(name), self.row(other)
        if first is None or second is None or first.median is None or second.median is None:
            return None
        return first.median / second.median

    def more_exact(self, peer: Row) -> bool:
        """Whether our row of the same work has an error beyond twice the peer's: a speedup over it would be none."""
        ours = self.row(peer.ours) if peer.ours else None
        if ours is None:
            return False
        return any(
            math.isfinite(error) and not ours.errors[key] <= 2 * error + self.error_floor
            for key, error in peer.errors.items()
            if key in ours.errors
        )

    @property
    def slug(self) -> str:
        words = [self.benchmark, self.environment["hardware"]["name"]]
        words += [f"{key}-{value}" for key, value in self.case.items()]
        return re.sub(r"[^a-z0-9_.]+", "-", "--".join(words).lower().replace("(r)", "").replace("(tm)", "")).strip("-")

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self) | {"gate_passed": self.gate.passed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record of schema {data.get('schema')}, this code reads {SCHEMA}")
        return cls(
            benchmark=data["benchmark"],
            case=data["case"],
            gate=Gate(tuple(Check(**check) for check in data["gate"]["checks"]), data["gate"]["held_to"]),
            rows=[Row(**row) for row in data["rows"]],
            environment=data["environment"],
            targets=[Target(**target) for target in data["targets"]],
            facts=data["facts"],
            error_floor=data["error_floor"],
            sources=data["sources"],
        )


def write_record(record: Record, folder: Path = RECORDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.slug}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record.to_json(), indent=1) + "\n")
    unfinished.replace(path)
    return path


def read_records(folder: Path = RECORDS, benchmark: str | None = None) -> list[Record]:
    """Records of the folder, in the order of their file names."""
    records = [Record.from_json(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if benchmark in (None, record.benchmark)]


def finished_record(
    benchmark: str, case: Mapping[str, Any], sources: str, device: str, folder: Path = RECORDS
) -> Record | None:
    """The record of this very case, code and hardware, if a run left one: what makes a run resumable."""
    for record in read_records(folder, benchmark):
        same_place = record.environment["hardware"] == hardware(device) and record.environment["versions"] == versions()
        if record.case == dict(case) and record.sources == sources and same_place:
            return record
    return None
