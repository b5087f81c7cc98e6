"""`RUN_DIR/report.html`: the report of one training run, self-contained, without script, from any moment of the run."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vgs_distill.errors import InputError

from .charts import Points, Series, line_chart, moving_average, number, signed
from .log import IMAGE_FOLDER, RunLog, read_run
from .page import SATURATION, TIME_PARTS, data_uri, environment, strength, time_bar

REPORT_FILE = "report.html"
_SMOOTHING_SHARE = 25  # a line is averaged over a 25th of its steps: long enough to read, short enough to see turns
_SHOWN_COMPLETION_STEPS = 8  # first, last and evenly spaced between, so that the file stays small
_SHOWN_MODULE_STEPS = 60  # columns of the map of modules: what a phone can show
_TABLE_ROWS = 25


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the run and return where it is; InputError, in one sentence, where there is no run."""
    log = read_run(run_dir)
    path = output or run_dir / REPORT_FILE
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(render_run(log), encoding="utf-8")
        os.replace(part, path)  # a browser that reloads never meets half a page
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}); choose another --output") from None
    return path


def render_run(log: RunLog) -> str:
    window = max(1, len(log.steps) // _SMOOTHING_SHARE)
    return (
        environment()
        .get_template("run.html.jinja")
        .render(
            name=log.run_dir.resolve().name,
            settings=log.settings,
            status=_status(log),
            tiles=_tiles(log),
            window=window,
            loss_figures=_loss_figures(log, window),
            gradient_figures=_gradient_figures(log, window),
            modules=_module_map(log),
            evaluation_figures=_evaluation_figures(log),
            evaluations=log.evaluations,
            time=_time(log),
            completions=_completions(log),
            teacher_silent=log.teacher_silent,
            scales={
                "cosine": [_tint(value, 1.0) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)],
                "contribution": [_tint(value, SATURATION) for value in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)],
            },
            table=_table(log),
            number=number,
            signed=signed,
        )
    )


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
    full = log.line("loss/full")
    if full:
        tiles.append(
            {
                "label": "KL to the teacher, nats",
                "value": number(full[-1][1]),
                "note": f"{number(full[0][1])} at step {full[0][0]}",
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
    ratio = log.line("steering/weight_ratio")
    if ratio:
        highest = max(value for _, value in ratio)
        tiles.append(
            {"label": "weight, visual : language", "value": number(ratio[-1][1]), "note": f"at most {number(highest)}"}
        )
    alarms = [step for step, value in log.line("runaway/alarm") if value > 0]
    if alarms:
        tiles.append({"label": "ran away from its teacher", "value": f"step {alarms[0]}", "note": "alarm"})
    seconds = _seconds_per_step(log)
    if seconds is not None:
        tiles.append({"label": "seconds per step", "value": number(seconds), "note": "wall clock, all included"})
    return tiles


def _smoothed(label: str, color: str, points: Points, window: int) -> Series:
    if window == 1 or len(points) < 2 * window:
        return Series(label, color, points)
    means = moving_average([value for _, value in points], window)
    return Series(label, color, tuple((step, mean) for (step, _), mean in zip(points, means, strict=True)), raw=points)


def _figure(title: str, sentence: str, series: Sequence[Series], **options: bool) -> list[dict[str, Any]]:
    """A list of the one figure, or of none if there is nothing to draw."""
    chart: Markup | None = line_chart(series, f"{title}. {sentence}", label_ends=True, **options)
    return [] if chart is None else [{"title": title, "sentence": sentence, "chart": chart}]


def _parts_of_loss(prefix: str, line: Callable[[str, str, str], Series]) -> list[Series]:
    full = line("full", "ink", f"{prefix}loss/full")
    lang, vis = line("language", "lang", f"{prefix}loss/lang"), line("visual", "vis", f"{prefix}loss/vis")
    if full.points == vis.points:  # the matched decomposition: its visual part is the whole, with the image in view
        return [lang, replace(vis, label="visual, full")]
    return [full, lang, vis]


def _loss_figures(log: RunLog, window: int) -> list[dict[str, Any]]:
    def line(label: str, color: str, name: str) -> Series:
        return _smoothed(label, color, log.line(name), window)

    return [
        *_figure(
            "Distance to the teacher",
            "Reverse KL divergence, student to teacher, on the student's own words: in full, and its language and "
            "visual part; nats per token, lower is closer.",
            _parts_of_loss("", line),
            zero_line=True,
        ),
        *_figure(
            "Entropy of the student",
            "How undecided the student is about its next word, in nats per token; a fall to zero is a collapse.",
            [line("entropy", "entropy", "entropy")],
            zero_line=True,
        ),
    ]


def _gradient_figures(log: RunLog, window: int) -> list[dict[str, Any]]:
    predicted, measured = log.line("steering/predicted_weight_ratio"), log.line("steering/measured_weight_ratio")
    amortized = bool(log.line("steering/refreshed"))

    def line(label: str, color: str, name: str, measured_now_and_then: bool = False) -> Series:
        if measured_now_and_then and amortized:
            return Series(label, color, log.line(name), dots=True)
        return _smoothed(label, color, log.line(name), window)

    return [
        *_figure(
            "Angle between the two gradients",
            "Cosine of the language and the visual gradient: near 0 they ask for unrelated changes, below 0 they pull "
            "against each other.",
            [line("cosine", "ink", "gradient/cosine", True)],
            zero_line=True,
        ),
        *_figure(
            "Gradient norms",
            "How strongly each part pulls before steering sets their shares (logarithmic scale).",
            [
                line("language", "lang", "gradient/norm_lang", True),
                line("visual", "vis", "gradient/norm_vis", True),
            ],
            logarithmic=True,
        ),
        *_figure(
            "Weight ratio",
            "Weight of the visual gradient over that of the language gradient (logarithmic scale); a ratio that keeps "
            "growing is the sign of a run about to collapse.",
            [line("ratio", "ink", "steering/weight_ratio")],
            logarithmic=True,
        ),
        *_figure(
            "Signs of a runaway",
            "KL to the teacher and weight ratio, each over its lowest level so far (logarithmic scale); an alarm needs "
            "both to double, or more completions that are cut off, or a KL of four times.",
            [
                Series("KL", "ink", log.line("runaway/divergence_growth")),
                Series("weight ratio", "vis", log.line("runaway/weight_growth"), dashed=True),
            ],
            logarithmic=True,
        ),
        *_figure(
            "Predicted against measured weight ratio",
            "At every refresh: the ratio that the prediction would have used, and the one that was measured "
            "(logarithmic scale).",
            [
                Series("predicted", "lang", predicted, dashed=True, dots=True),
                Series("measured", "ink", measured, dots=True),
            ]
            if predicted
            else [],
            logarithmic=True,
        ),
        *_figure(
            "How right the prediction was",
            "At every refresh: cosine between the update that the prediction would have made and the exact one; "
            "1 is the same direction.",
            [Series("cosine", "ink", log.line("steering/direction_cosine"), dots=True)],
        ),
    ]


def _evaluation_figures(log: RunLog) -> list[dict[str, Any]]:
    def line(label: str, color: str, name: str) -> Series:
        return Series(label, color, log.line(name), dots=True)

    def accuracy(label: str, color: str, view: str) -> Series:
        by_step = {step: 100 * content[view]["accuracy"] for step, _, content in log.evaluations}
        return Series(label, color, tuple(by_step.items()) if len(by_step) > 1 else (), dots=True)

    return [
        *_figure(
            "Accuracy",
            "Share of questions answered correctly by free generation, in percent, with the image in view and without.",
            [accuracy("with image", "vis", "with_image"), accuracy("without", "lang", "without_image")],
        ),
        *_figure(
            "Distance to the teacher, held out",
            "The same divergence and its parts on prompts that are not trained on; nats per token.",
            _parts_of_loss("eval_", line),
            zero_line=True,
        ),
    ]


def _module_map(log: RunLog) -> dict[str, Any] | None:
    """Cosine per module (rows) and recorded step (columns), and where the gradients' norms are, at the last step."""
    if not log.modules:
        return None
    records = _spaced(log.modules, _SHOWN_MODULE_STEPS)
    last = records[-1]
    cosines = [dict(zip(record["names"], record["cosines"], strict=True)) for record in records]

    def shares(norms: Sequence[float]) -> list[float]:
        squares = [norm * norm for norm in norms]
        return [100 * square / (sum(squares) or 1.0) for square in squares]

    shown = zip(last["names"], shares(last["norms_lang"]), shares(last["norms_vis"]), strict=True)
    return {
        "first": records[0]["step"],
        "last": last["step"],
        "rows": [
            {
                "name": name,
                "cells": [
                    {"step": record["step"], **_tint(row.get(name), 1.0)}
                    for record, row in zip(records, cosines, strict=True)
                ],
                "cosine": cosines[-1][name],
                "share_lang": share_lang,
                "share_vis": share_vis,
            }
            for name, share_lang, share_vis in shown
        ],
    }


def _tint(value: float | None, saturation: float) -> dict[str, Any]:
    """A value with its colour; None has none."""
    if value is None:
        return {"value": None, "side": "none", "strength": 0}
    return {"value": value, "side": "raised" if value > 0 else "lowered", "strength": strength(value, saturation)}


def _seconds_per_step(log: RunLog) -> float | None:
    """Wall clock over steps, of every (re)start from its first log on: what comes before is loading, not steps."""
    seconds = steps = 0.0
    for _, *logs in log.sessions:
        if logs:
            seconds += logs[-1][1] - logs[0][1]
            steps += logs[-1][0] - logs[0][0]
    return seconds / steps if steps else None


def _time(log: RunLog) -> dict[str, Any] | None:
    means = {}
    for name in (*TIME_PARTS, "masked_teacher", "masked_student"):
        values = [value for _, value in log.line(f"time/{name}")]
        if values:
            means[name] = statistics.fmean(values)
    if not means:
        return None
    measured = sum(means.get(name, 0.0) for name in TIME_PARTS)
    total = max(_seconds_per_step(log) or 0.0, measured)
    colors = ("time-0", "time-1", "time-2", "time-3")
    return {
        "bar": time_bar("mean step", means, total, total),
        "masked": {
            name: means[key]
            for key, name in (("masked_teacher", "teacher"), ("masked_student", "student"))
            if key in means
        },
        "figures": _figure(
            "Seconds per step",
            "The same parts over training.",
            [
                _smoothed(label, color, log.line(f"time/{name}"), max(1, len(log.steps) // _SMOOTHING_SHARE))
                for (name, label), color in zip(TIME_PARTS.items(), colors, strict=True)
            ],
        ),
    }


def _completions(log: RunLog) -> list[dict[str, Any]]:
    """The latest step first."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in log.completions:
        by_step.setdefault(record["step"], []).append(record)
    return [
        {"step": step, "samples": [_sample(log.run_dir, record) for record in by_step[step]]}
        for step in reversed(_spaced(list(by_step), _SHOWN_COMPLETION_STEPS))
    ]


def _sample(run_dir: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    # Only the name: a path out of the folder would put any file of the machine into the page.
    pictures = [data_uri(run_dir / IMAGE_FOLDER / Path(name).name) for name in record["images"]]
    ratios = record["log_ratios"]
    finite = [value for value in ratios or [] if value is not None]
    return {
        "prompt": record["prompt"],
        "pictures": [picture for picture in pictures if picture is not None],
        "tokens": _colored(record["tokens"], ratios),
        "total": sum(finite) if finite else None,
        "teacher": record.get("teacher"),
        "reference": record.get("reference"),
    }


def _colored(texts: Sequence[str], ratios: Sequence[float | None] | None) -> list[dict[str, Any]]:
    """Tokens with their colour; those that end inside a character join the one that completes it (logs add)."""
    tokens = []
    total: float | None = 0.0
    for text, ratio in zip(texts, ratios or [None] * len(texts), strict=True):
        total = None if ratio is None or total is None else total + ratio
        if text:
            word = text.lstrip(" ") or text
            shown = word.replace("\n", "↵\n")  # a break would have no place for its colour
            tokens.append({"before": text[: len(text) - len(word)], "text": shown, **_tint(total, SATURATION)})
            total = 0.0
    return tokens


def _table(log: RunLog) -> dict[str, Any]:
    """Evenly spaced steps with their values as logged; the log has the rest."""
    columns = {
        "loss/full": "KL",
        "loss/lang": "language",
        "loss/vis": "visual",
        "entropy": "entropy",
        "gradient/cosine": "cosine",
        "gradient/norm_lang": "‖g_lang‖",
        "gradient/norm_vis": "‖g_vis‖",
        "steering/weight_ratio": "ratio",
        "steering/gamma": "γ",
    }
    logged = {name: label for name, label in columns.items() if log.line(name)}
    steps = _spaced([step for step, values in log.steps.items() if "loss/full" in values], _TABLE_ROWS)
    return {
        "columns": list(logged.values()),
        "rows": [(step, [log.steps[step].get(name) for name in logged]) for step in steps],
    }


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
    """The first, the last and evenly spaced ones between."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
