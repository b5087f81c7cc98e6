"""The page of `vgs report`: about one run or several laid over each other, from any moment of them.

Self-contained and without script. `log.py` reads, `figures.py` and `charts.py` draw, this file says what a page has.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vgs_distill.errors import InputError

from .charts import number, signed
from .completions import completions_of
from .dependency import dependency_figures
from .figures import EVALUATION, GRADIENTS, LOSS, TIME, figures_of, figures_over, window_of
from .log import Points, RunLog, read_run
from .page import (
    NEED_SATURATION,
    PART_NAMES,
    SATURATION,
    TIME_PARTS,
    color_of_run,
    environment,
    spaced,
    strength,
    time_bar,
    tint,
)

REPORT_FILE = "report.html"  # in the folder of a run
REPORT_OF_SEVERAL = "vgs-report.html"  # in the current folder
_SHOWN_MODULE_STEPS = 60  # columns of the map of modules: what a phone can show
_TABLE_ROWS = 25


def write_report(run_dirs: Sequence[Path], output: Path | None = None, refresh_every: int | None = None) -> Path:
    """Write the report of the runs and return where it is; InputError, in one sentence, where one is none.

    `refresh_every`: seconds after which a browser loads the page again; None for a page that stays.
    """
    if not run_dirs:
        raise InputError("name at least one run: the output directory of a VGSTrainer")
    logs = {name: read_run(path) for name, path in _named(run_dirs).items()}
    path = output or report_file(run_dirs)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(render_runs(logs, refresh_every), encoding="utf-8")
        os.replace(part, path)  # a browser that reloads never meets half a page
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}); choose another --output") from None
    return path


def report_file(run_dirs: Sequence[Path]) -> Path:
    """Where a report goes that is sent nowhere else."""
    return run_dirs[0] / REPORT_FILE if len(run_dirs) == 1 else Path(REPORT_OF_SEVERAL)


def render_runs(logs: Mapping[str, RunLog], refresh_every: int | None = None) -> str:
    """The page about these runs, by name."""
    templates = environment()
    templates.globals.update(number=number, signed=signed)
    views = [_view(name, log) for name, log in logs.items()]
    shared = {
        "refresh_every": refresh_every,
        "runs": views,
        "scales": {
            "cosine": [tint(value, 1.0) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)],
            "need": [(value, strength(value, NEED_SATURATION)) for value in (0.0, 0.25, 0.5, 0.75, 1.0)],
            "contribution": [tint(value, SATURATION) for value in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)],
        },
    }
    if len(logs) == 1:
        return templates.get_template("run.html.jinja").render(**shared)
    sections = {"Loss": LOSS, "Gradients": GRADIENTS, "Evaluation": EVALUATION, "Where the time went": TIME}
    return templates.get_template("runs.html.jinja").render(
        **shared,
        sections={title: figures_over(logs, charts) for title, charts in sections.items()},
        comparison=_comparison(logs),
        differences=_differences(logs),
    )


def _named(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """Each run by its folder's name, with as much of the path before it as tells it from the others."""
    paths = {path.resolve(): path for path in run_dirs}
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {Path(*resolved.parts[-depth:]).as_posix(): path for resolved, path in paths.items()}


def _view(name: str, log: RunLog) -> dict[str, Any]:
    """All that the page says about one run."""
    return {
        "name": name,
        "settings": log.settings,
        "status": _status(log),
        "tiles": _tiles(log),
        "window": window_of(log),
        "loss_figures": figures_of(log, LOSS),
        "gradient_figures": figures_of(log, GRADIENTS),
        "modules": _module_map(log),
        "dependency_figures": dependency_figures(log),
        "angles_silent": log.angles_silent,
        "evaluation_figures": figures_of(log, EVALUATION),
        "evaluations": log.evaluations,
        "time": _time(log),
        "completions": completions_of(log),
        "shows_dependency": any(record["dependency"] is not None for record in log.completions),
        "teacher_silent": log.teacher_silent,
        "table": _table(log),
    }


def _status(log: RunLog) -> dict[str, Any]:
    step = max(log.steps)
    if log.ended_at is None:
        state = "training, or killed"
    else:
        state = "finished" if log.ended_at >= log.max_steps else "stopped early"
    return {
        "step": step,
        "max_steps": log.max_steps,
        "state": state,
        "elapsed": _duration(sum(session[-1][1] - session[0][1] for session in log.sessions)),
        "starts": len(log.sessions),
        "last": datetime.fromtimestamp(log.last_time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _tiles(log: RunLog) -> list[dict[str, str]]:
    """The few numbers that one asks for first; each as logged, not smoothed."""
    tiles = []
    standard = log.line("loss/standard")
    if standard:
        tiles.append(
            {
                "label": "KL to the teacher, nats",
                "value": number(standard[-1][1]),
                "note": f"{number(standard[0][1])} at step {standard[0][0]}",
            }
        )
    cosine = [value for _, value in log.line("gradient/cosine")]
    if cosine:
        spread = statistics.fmean(abs(value) for value in cosine)
        tiles.append(
            {
                "label": "cosine of the gradients",
                "value": signed(statistics.fmean(cosine)),
                "note": f"mean; of its size {spread:.2f}",
            }
        )
    eta, ratio = log.line("steering/eta"), log.line("steering/weight_ratio")
    for label, points in (("η, length of the update", eta), ("weight, second : first part", () if eta else ratio)):
        if points:
            highest = max(value for _, value in points)
            tiles.append({"label": label, "value": number(points[-1][1]), "note": f"at most {number(highest)}"})
    alarm = _alarm(log)
    if alarm is not None:
        tiles.append({"label": "ran away from its teacher", "value": f"step {alarm}", "note": "alarm"})
    seconds = log.seconds_per_step()
    if seconds is not None:
        tiles.append({"label": "seconds per step", "value": number(seconds), "note": "wall clock, all included"})
    return tiles


def _alarm(log: RunLog) -> float | None:
    """The step at which the student ran away from its teacher."""
    return next((step for step, value in log.line("runaway/alarm") if value > 0), None)


def _comparison(logs: Mapping[str, RunLog]) -> dict[str, Any]:
    """The table of several runs: columns that one of them has something for, and a row for each."""

    def last(points: Points) -> float | None:
        return points[-1][1] if points else None

    def mean(points: Points) -> float | None:
        return statistics.fmean(value for _, value in points) if points else None

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.1f} %"

    columns: dict[str, Callable[[RunLog], float | str | None]] = {
        "KL": lambda log: last(log.line("loss/standard")),
        "entropy": lambda log: last(log.line("entropy")),
        "cosine": lambda log: mean(log.line("gradient/cosine")),
        "η": lambda log: last(log.line("steering/eta")),
        "ratio": lambda log: last(log.line("steering/weight_ratio")),
        "s per step": RunLog.seconds_per_step,
        "accuracy": lambda log: percent(last(log.accuracy("with_image"))),
        "without": lambda log: percent(last(log.accuracy("without_image"))),
    }
    filled = {title: value for title, value in columns.items() if any(value(log) is not None for log in logs.values())}
    rows = []
    for index, (name, log) in enumerate(logs.items()):
        color, dashed = color_of_run(index)
        cells = [value(log) for value in filled.values()]
        shown = ["–" if cell is None else cell if isinstance(cell, str) else number(cell) for cell in cells]
        rows.append(
            {
                "name": name,
                "color": color,
                "dashed": dashed,
                "status": _status(log),
                "alarm": _alarm(log),
                "cells": shown,
            }
        )
    return {"columns": list(filled), "rows": rows}


def _differences(logs: Mapping[str, RunLog]) -> dict[str, list[Any]]:
    """The settings in which the runs are not alike, with the value of each run."""
    names = dict.fromkeys(name for log in logs.values() for name in log.settings)
    values = {name: [log.settings.get(name) for log in logs.values()] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _module_map(log: RunLog) -> dict[str, Any] | None:
    """Cosine per module (rows) and recorded step (columns), and where the gradients' norms are, at the last step."""
    if not log.modules:
        return None
    records = spaced(log.modules, _SHOWN_MODULE_STEPS)
    last = records[-1]
    cosines = [dict(zip(record["names"], record["cosines"], strict=True)) for record in records]

    def shares(norms: Sequence[float]) -> list[float]:
        squares = [norm * norm for norm in norms]
        return [100 * square / (sum(squares) or 1.0) for square in squares]

    shown = zip(last["names"], shares(last["norms_first"]), shares(last["norms_second"]), strict=True)
    return {
        "first": records[0]["step"],
        "last": last["step"],
        "parts": [PART_NAMES.get(part, part) for part in last["parts"]],
        "rows": [
            {
                "name": name,
                "cells": [
                    {"step": record["step"], **tint(row.get(name), 1.0)}
                    for record, row in zip(records, cosines, strict=True)
                ],
                "cosine": cosines[-1][name],
                "shares": shares_of_both,
            }
            for name, *shares_of_both in shown
        ],
    }


def _time(log: RunLog) -> dict[str, Any] | None:
    means = {}
    for name in (*TIME_PARTS, "masked_teacher", "masked_student"):
        values = [value for _, value in log.line(f"time/{name}")]
        if values:
            means[name] = statistics.fmean(values)
    if not means:
        return None
    measured = sum(means.get(name, 0.0) for name in TIME_PARTS)
    total = max(log.seconds_per_step() or 0.0, measured)
    return {
        "bar": time_bar("mean step", means, total, total),
        "masked": {
            name: means[key]
            for key, name in (("masked_teacher", "teacher"), ("masked_student", "student"))
            if key in means
        },
        "figures": figures_of(log, TIME),
    }


def _table(log: RunLog) -> dict[str, Any]:
    """Evenly spaced steps with their values as logged; the log has the rest."""
    columns = {
        "loss/standard": "KL",
        "loss/lang": "language",
        "loss/vis": "visual",
        "dependency": "dependency",
        "entropy": "entropy",
        "gradient/cosine": "cosine",
        "gradient/norm_standard": "‖g_standard‖",
        "gradient/norm_lang": "‖g_lang‖",
        "gradient/norm_vis": "‖g_vis‖",
        "steering/weight_ratio": "ratio",
        "steering/gamma": "γ",
        "steering/eta": "η",
        "steering/language_preservation": "λ",
    }
    logged = {name: label for name, label in columns.items() if log.line(name)}
    steps = spaced([step for step, values in log.steps.items() if "loss/standard" in values], _TABLE_ROWS)
    return {
        "columns": list(logged.values()),
        "rows": [(step, [log.steps[step].get(name) for name in logged]) for step in steps],
    }
