"""The page that `make gpu-check` ends in: pass or fail, each time beside its roofline, which constants to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import launch_constants
from benchmarks.harness.records import Record, Row
from benchmarks.harness.tables import bytes_text, markdown_table, seconds_text

TIMED = ("linear_reverse_kl", "linear_decomposed_kl", "steering", "decomposed_kl", "training_step")
# Parts of floors and rooflines, which stand beside what they are of.
NO_ROWS_OF_THEIR_OWN = ("floor", "roofline", "project_", "hidden_product", "head_product", "clone")
SEND = "Attach the archive beside this folder to an issue of the repository, or its records to a pull request."


class StepLine(NamedTuple):
    name: str
    status: str  # "passed", "failed" or "left out"
    seconds: float
    note: str


def build(
    steps: Sequence[StepLine],
    records: Sequence[Record],
    environment: Mapping[str, Any],
    tests: Mapping[str, int] | None,
    dry_run: bool,
) -> str:
    """The whole page, in markdown."""
    parts = [f"# GPU check: {verdict(steps)}", _machine(environment)]
    if dry_run:
        parts.append("**A dry run on a CPU**: the plan was walked with tiny sizes, and no time of it is shown.")
    parts.append(f"## Steps\n\n{_steps(steps, tests)}")
    if failures := _failures(records):
        parts.append("## What is wrong\n\n" + "\n".join(f"* {line}" for line in failures))
    parts.append(f"## Times beside their rooflines\n\n{_times(records, dry_run)}")
    parts.append(f"## Launch constants: a proposal\n\n{_constants(records, dry_run)}")
    if notes := _not_shown(records):
        parts.append("## Not shown by this machine\n\n" + "\n".join(f"* {note}" for note in notes))
    return "\n\n".join([*parts, SEND]) + "\n"


def verdict(steps: Sequence[StepLine]) -> str:
    failed = [step.name for step in steps if step.status == "failed"]
    if failed:
        return f"FAIL ({', '.join(failed)})"
    return "PASS" if any(step.status == "passed" for step in steps) else "NOTHING RAN"


def _machine(environment: Mapping[str, Any]) -> str:
    hardware = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in environment["hardware"].items())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    modified = ", with uncommitted changes" if environment["modified"] else ""
    return f"{hardware}; {versions}; commit {environment['commit'][:12]}{modified}; {environment['date']}"


def _steps(steps: Sequence[StepLine], tests: Mapping[str, int] | None) -> str:
    lines = []
    for step in steps:
        note = step.note
        if step.name == "tests" and tests is not None:
            note = ", ".join([f"{count} {what}" for what, count in tests.items()] + [note] * bool(note))
        lines.append(
            [step.name, f"{step.seconds:.0f}", f"**{step.status}**" if step.status == "failed" else step.status, note]
        )
    return markdown_table(["step", "seconds", "verdict", ""], lines)


def _failures(records: Sequence[Record]) -> list[str]:
    """The checks of every red gate."""
    return [
        f"{_case(record)}: {check.name}: error {check.error:.2e}, allowed {check.allowed:.2e}"
        for record in records
        for check in record.gate.checks
        if not check.passed
    ]


def least(record: Record, row: Row) -> float | None:
    """Seconds: the roofline of a row, or of our row of the same work, or its floor, or its bytes at a copy's speed."""
    own = record.row(f"roofline_{row.name}")
    if own is None and row.ours:
        own = record.row(f"roofline_{row.ours}")
    floor = own or (record.row(row.floor) if row.floor else None)
    if floor is not None:
        return floor.median
    bandwidth = record.facts.get("copy_bandwidth")
    return row.bytes_moved / bandwidth if row.bytes_moved and bandwidth else None


def _times(records: Sequence[Record], dry_run: bool) -> str:
    """A table a record."""
    header = ["", "time", "roofline", "×", "peak memory", "ours is faster by"]
    parts = []
    for record in records:
        if record.benchmark in TIMED and record.gate.passed:
            rows = [row for row in record.rows if not row.name.startswith(NO_ROWS_OF_THEIR_OWN)]
            table = markdown_table(header, [[row.label, *_cells(record, row, dry_run)] for row in rows])
            parts.append(f"**{_case(record)}**\n\n{table}")
        elif record.benchmark in TIMED:
            parts.append(f"**{_case(record)}**: no time, the gate is red")
    return "\n\n".join(parts) or "not measured"


def _cells(record: Record, row: Row, dry_run: bool) -> list[str]:
    if dry_run:
        return ["dry run" if row.seconds else row.note or "not measured", "", "", "", ""]
    if row.median is None:
        return [row.note or "not measured", "", "", "", ""]
    bound = least(record, row)
    ratio = None if row.ours is None else record.ratio(row.name, row.ours)
    faster = (
        "it is more exact" if ratio is not None and record.more_exact(row) else "" if ratio is None else f"{ratio:.2f}×"
    )
    return [
        seconds_text(row.median),
        "" if bound is None else seconds_text(bound),
        "" if not bound else f"{row.median / bound:.2f}",
        bytes_text(row.peak_bytes),
        faster,
    ]


def _constants(records: Sequence[Record], dry_run: bool) -> str:
    found = [
        launch_constants.Proposal(**proposal)
        for record in records
        if record.benchmark == launch_constants.NAME and record.gate.passed
        for proposal in record.facts["proposals"]
    ]
    if not found:
        return "not measured"
    if dry_run:
        return f"{len(found)} constants were varied; the interpreter's times decide nothing."
    changes = [proposal for proposal in found if proposal.verdict != "keep"]
    header, lines = launch_constants.proposal_table(changes)
    kept = f"{len(found) - len(changes)} of {len(found)} stay as they are: none is faster by more than "
    kept += f"{launch_constants.WORTHWHILE:.0%}."
    return f"{markdown_table(header, lines)}\n\n{kept}" if changes else kept


def _not_shown(records: Sequence[Record]) -> list[str]:
    """What could not run here, each once: peers that are missing, and what needs more than this machine has."""
    notes = dict.fromkeys(
        f"{what}: {why}" for record in records for what, why in record.facts.get("not shown", {}).items()
    )
    absent = dict.fromkeys(
        f"{row.label}: {row.note}"
        for record in records
        for row in record.rows
        if not row.seconds and row.note and "|" not in row.name
    )
    return [*notes, *absent]


def _case(record: Record) -> str:
    return f"{record.benchmark}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in record.case.items())
