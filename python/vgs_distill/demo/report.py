"""The self-contained HTML report of a demo: one file, no script, nothing loaded from elsewhere.

Words written by a model are data from an untrusted source: the template escapes everything, and only the charts,
which are built from numbers and escaped labels, are marked as safe.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from vgs_distill.demo.table import notes, percent, spread_text
from vgs_distill.report.charts import Series, legend, line_chart, moving_average
from vgs_distill.report.page import embedded, environment, time_bar
from vgs_distill.steering.methods import METHODS

_TEMPLATES = Path(__file__).parent / "templates"
_SMOOTHING_SHARE = 25  # a line is averaged over a 25th of its steps: long enough to read, short enough to see turns

History = Sequence[Mapping[str, float]]


def render_report(results: Mapping[str, Any], histories: Mapping[str, History], pictures: Sequence[Image.Image]) -> str:
    """The report's HTML.

    Args:
        results: dictionary of the schema in `results.py`; an incomplete one gives a report of what there is.
        histories: run name -> one row per step.
        pictures: the gallery's pictures, in the order of `results["gallery"]`.
    """
    templates = environment(_TEMPLATES)
    templates.filters["percent"] = percent
    templates.filters["spread"] = spread_text
    by_method = _histories_by_method(results, histories)
    colors = {name: index for index, name in enumerate(results["methods"])}
    labels = {name: method["label"] for name, method in results["methods"].items()}
    return templates.get_template("report.html.jinja").render(
        results=results,
        labels={"teacher": "Teacher", "start": "Student start", **labels},
        colors=colors,
        question_types=_question_types(results),
        figures=_figures(results, by_method, colors),
        notes=notes(results),
        window=_window(by_method),
        times=_times(results),
        gallery=[
            {**item, "picture": data_uri(picture)} for item, picture in zip(results["gallery"], pictures, strict=True)
        ],
    )


def data_uri(picture: Image.Image) -> str:
    """The picture as a PNG inside a URL, at its own 32 pixels: the page enlarges it without blurring."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return embedded(buffer.getvalue(), "image/png")


def _histories_by_method(results: Mapping[str, Any], histories: Mapping[str, History]) -> dict[str, list[History]]:
    grouped: dict[str, list[History]] = {}
    for run in results["runs"]:
        if histories.get(run["name"]):
            grouped.setdefault(run["method"], []).append(histories[run["name"]])
    return grouped


def _question_types(results: Mapping[str, Any]) -> list[str]:
    for source in (results["teacher"], results["student_start"], *results["summary"].values()):
        if source:
            return list(source["by_question_type"])
    return []


def _window(by_method: Mapping[str, Sequence[History]]) -> int:
    longest = max((len(history) for runs in by_method.values() for history in runs), default=1)
    return max(1, longest // _SMOOTHING_SHARE)


def _line(runs: Sequence[History], key: str, window: int) -> tuple[tuple[float, float], ...]:
    """`key` over steps: mean over the seeds that logged it, then a moving average."""
    at_step: dict[float, list[float]] = {}
    for history in runs:
        for row in history:
            if key in row and math.isfinite(row[key]):
                at_step.setdefault(row["step"], []).append(row[key])
    steps = sorted(at_step)
    means = [sum(at_step[step]) / len(at_step[step]) for step in steps]
    return tuple(zip(steps, moving_average(means, window), strict=True))


def _figures(
    results: Mapping[str, Any], by_method: Mapping[str, Sequence[History]], colors: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Title, one explaining sentence, chart and key of every line chart that has data."""
    window = _window(by_method)

    def lines(key: str, suffix: str = "", dashed: bool = False) -> list[Series]:
        return [
            Series(results["methods"][name]["label"] + suffix, colors[name], _line(runs, key, window), dashed)
            for name, runs in by_method.items()
        ]

    parts = lines("loss/lang", " · language", dashed=True) + lines("loss/vis", " · visual")
    norms = [
        series
        for name, runs in by_method.items()
        for series in _norms(results["methods"][name], runs, colors[name], window)
    ]
    wanted: list[tuple[str, str, list[Series], dict[str, Any]]] = [
        (
            "Distance to the teacher",
            "How far the student's next-word distribution is from the teacher's, on the student's own answers "
            "(reverse KL divergence in nats per token; lower is closer).",
            lines("loss/standard"),
            {},
        ),
        (
            "Language and vision",
            "Language: the distance to the teacher when both have the picture hidden. Visual: the distance, with the "
            "picture in view, to what the student says without it, corrected by what the picture tells the teacher.",
            parts,
            {"zero_line": True},
        ),
        (
            "Angle between the two gradients",
            "Cosine of the two gradients that a method weighs, where it was measured: near 0 they ask for unrelated "
            "changes, below 0 they pull against each other.",
            lines("gradient/cosine"),
            {"zero_line": True},
        ),
        (
            "Gradient norms",
            "How strongly each of the two parts that a method weighs pulls before it is weighed (standard: towards the "
            "teacher with the picture in view; logarithmic scale).",
            norms,
            {"logarithmic": True},
        ),
        (
            "Weight ratio",
            "Weight of a method's second gradient over that of its first (logarithmic scale). VGS holds it at γ; where "
            "gradients are normalised, a ratio that keeps growing is the sign of a run about to collapse.",
            lines("steering/weight_ratio"),
            {"logarithmic": True},
        ),
    ]
    figures: list[dict[str, Any]] = []
    for title, sentence, series, options in wanted:
        chart: Markup | None = line_chart(series, f"{title}. {sentence}", **options)
        if chart is not None:
            figures.append({"title": title, "sentence": sentence, "chart": chart, "legend": legend(series)})
    return figures


def _norms(method: Mapping[str, Any], runs: Sequence[History], color: int, window: int) -> list[Series]:
    """Norms of the two gradients that a method weighs, the first dashed."""
    kind = METHODS[method["method"]]
    parts = [kind.label.get(part, part) for part in (kind.first, kind.second) if part is not None]
    return [
        Series(f"{method['label']} · {part}", color, _line(runs, f"gradient/norm_{part}", window), part == parts[0])
        for part in parts
    ]


def _times(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per method: its mean step in seconds and the parts of it, each with its share of the slowest method's step."""
    slowest = max((summary["step_seconds"]["total"] for summary in results["summary"].values()), default=1.0)
    rows = []
    for name, summary in results["summary"].items():
        seconds = summary["step_seconds"]
        rows.append(time_bar(results["methods"][name]["label"], seconds, seconds["total"], slowest))
    return rows
