"""Records as text and as markdown, and the spelling of seconds and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.memory import MIB
from benchmarks.harness.records import Record, Row


def table_rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a record's table: only the columns that something stands in. Ratios need a green gate."""
    errors = list(dict.fromkeys(key for row in record.rows for key in row.errors))
    header = ["", "median", "range", "× floor", "ours is faster by"]
    header += [*(f"error of the {key.replace('_', ' ')}" for key in errors), "peak memory", "bytes moved"]
    any_timed = any(row.seconds for row in record.rows)
    cells = []
    for row in record.rows:
        timed = bool(row.seconds) and record.gate.passed
        over_floor = record.ratio(row.name, row.floor) if timed and row.floor else None
        cells.append(
            [
                row.label,
                seconds_text(row.median) if row.seconds else row.note or ("not measured" if any_timed else ""),
                f"{row.calls * min(row.seconds):.3g} to {row.calls * max(row.seconds):.3g}" if row.seconds else "",
                "" if over_floor is None else f"{over_floor:.2f}",
                _faster_by(record, row) if timed and row.ours else "",
                *(error_text(row.errors.get(key)) for key in errors),
                bytes_text(row.peak_bytes),
                bytes_text(row.bytes_moved),
            ]
        )
    used = [column for column in range(len(header)) if column == 0 or any(row[column] for row in cells)]
    return [header[column] for column in used], [[row[column] for column in used] for row in cells]


def _faster_by(record: Record, row: Row) -> str:
    if record.more_exact(row):
        return "no figure: it is more exact"
    ratio = record.ratio(row.name, str(row.ours))
    return "" if ratio is None else f"{ratio:.2f}×"


def describe_record(record: Record) -> str:
    """A record for the terminal: case, gate, table, targets."""
    case = ", ".join(f"{key} {value}" for key, value in record.case.items())
    parts = [f"{record.benchmark}: {case}", record.gate.describe()]
    if record.rows:
        parts.append(text_table(*table_rows(record)))
    if record.gate.passed:
        parts += [target.describe() for target in record.targets]
    return "\n".join(parts)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; every column but the first is aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in aligned)


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def bytes_text(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / MIB:.3g} MiB"


def error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
