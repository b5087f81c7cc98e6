"""The table printed at the end of the demo.

Layer: turns a results dictionary (`results.py`) into a rich table. Called by `run`.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table


def percent(value: float | None) -> str:
    """0.8125 -> "81.2"."""
    return "–" if value is None else f"{100 * value:.1f}"


def spread_text(spread: dict[str, Any], *, signed: bool = False) -> str:
    """Mean in percent, with the standard deviation where there is more than one seed."""
    mean = 100 * spread["mean"]
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if spread["deviation"] is None else f"{text} ± {100 * spread['deviation']:.1f}"


def results_table(results: dict[str, Any]) -> Table:
    """One row per model; accuracies in percent on the balanced test set."""
    seeds = len(results["seeds"])
    count = results["recipe"]["evaluation"]["examples"]
    table = Table(
        title=f"{results['task']}: accuracy in % on {count} balanced held-out questions",
        caption=f"± is the standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: differences of a point or two are noise.",
        title_justify="left",
        caption_justify="left",
    )
    types = list((results["teacher"] or {}).get("by_question_type", {}))
    table.add_column("model", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True, style="bold")
    for kind in types:
        table.add_column(kind, justify="right")
    table.add_column("no image", justify="right")
    table.add_column("vs OPD", justify="right", no_wrap=True)
    table.add_column("cosine", justify="right")
    table.add_column("s/step", justify="right")

    teacher, start = results["teacher"], results["student_start"]
    if teacher:
        cells = [percent(teacher["by_question_type"][kind]) for kind in types]
        table.add_row("teacher", percent(teacher["with_image"]), *cells, percent(teacher["without_image"]), "", "", "")
    if start:
        cells = [percent(start["by_question_type"].get(kind)) for kind in types]
        table.add_row("student start", spread_text(start["accuracy"]), *cells, "", "", "", "")
    table.add_section()
    for name, summary in results["summary"].items():
        gain = summary.get("gain_over_opd")
        cosine = summary.get("cosine")
        table.add_row(
            results["methods"][name]["label"],
            spread_text(summary["accuracy"]),
            *[percent(summary["by_question_type"].get(kind)) for kind in types],
            percent(summary["without_image"]["mean"]),
            spread_text(gain, signed=True) if gain else "",
            "" if cosine is None else f"{cosine:+.2f}",
            f"{summary['step_seconds']['total']:.2f}",
        )
    return table
