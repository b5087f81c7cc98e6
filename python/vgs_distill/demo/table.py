"""The table printed at the end of the demo, from a results dictionary (`results.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table


def percent(value: float | None) -> str:
    """0.8125 -> "81.2"."""
    return "–" if value is None else f"{100 * value:.1f}"


def spread_text(spread: dict[str, Any], *, signed: bool = False) -> str:
    """Mean in percent, with the standard deviation where there is more than one seed."""
    mean = 100 * spread["mean"]
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if spread["deviation"] is None else f"{text} ± {100 * spread['deviation']:.1f}"


def results_table(results: dict[str, Any]) -> Group:
    """Two narrow tables, so that 80 columns are enough: accuracy by model, then by kind of question. In percent. Below
    them what is to be known of the methods."""
    return Group(_accuracy_table(results), _question_table(results), *notes(results))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the methods that ran."""
    return list(dict.fromkeys(method["note"] for method in results["methods"].values() if method["note"]))


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )


def _accuracy_table(results: dict[str, Any]) -> Table:
    seeds = len(results["seeds"])
    count = results["recipe"]["evaluation"]["examples"]
    table = _table(
        f"{results['task']}: accuracy in % on {count} balanced held-out questions",
        f"± is the standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: a few points of difference can be chance.",
    )
    table.add_column("model", no_wrap=True)
    for header in ("accuracy", "vs OPD", "no image", "steps", "s/step"):
        table.add_column(header, justify="right", no_wrap=True)
    teacher, start = results["teacher"], results["student_start"]
    if teacher:
        table.add_row("teacher", percent(teacher["with_image"]), "", percent(teacher["without_image"]))
    if start:
        table.add_row("student start", spread_text(start["accuracy"]))
    for name, summary in results["summary"].items():
        gain = summary.get("gain_over_opd")
        table.add_row(
            results["methods"][name]["label"],
            spread_text(summary["accuracy"]),
            spread_text(gain, signed=True) if gain else "",
            percent(summary["without_image"]["mean"]),
            f"{summary['steps']:.0f}",
            f"{summary['step_seconds']['total']:.2f}",
        )
    return table


def _question_table(results: dict[str, Any]) -> Table:
    rows = {"teacher": results["teacher"], "student start": results["student_start"]}
    rows |= {results["methods"][name]["label"]: summary for name, summary in results["summary"].items()}
    rows = {label: record for label, record in rows.items() if record}
    table = _table("by kind of question")
    table.add_column("model", no_wrap=True)
    for index, (label, record) in enumerate(rows.items()):
        if index == 0:
            for kind in record["by_question_type"]:
                table.add_column(kind, justify="right", no_wrap=True)
        table.add_row(label, *[percent(value) for value in record["by_question_type"].values()])
    return table
