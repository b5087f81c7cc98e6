"""Which charts a report has. One table serves the page of one run and that of several, laid over each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from .charts import Series, legend, line_chart, moving_average
from .log import Points, RunLog
from .page import TIME_PARTS, color_of_run

_SMOOTHING_SHARE = 25  # a line is averaged over a 25th of its steps: long enough to read, short enough to see turns

Values = Callable[[RunLog], Points]


@dataclass(frozen=True)
class Line:
    """One quantity of a run: a name of its log, or what is worked out from it."""

    label: str
    color: str
    values: str | Values
    dashed: bool = False
    as_logged: bool = False  # an average would say something else

    def points(self, log: RunLog) -> Points:
        return log.line(self.values) if isinstance(self.values, str) else self.values(log)


@dataclass(frozen=True)
class Chart:
    """Lines on one pair of axes, with one sentence that says what they are."""

    title: str
    sentence: str
    lines: tuple[Line, ...]
    logarithmic: bool = False
    zero_line: bool = False
    of_one_run: bool = False  # says nothing about another run's


def _parts(prefix: str) -> tuple[Line, ...]:
    return (
        Line("whole", "ink", f"{prefix}loss/standard"),
        Line("language", "lang", f"{prefix}loss/lang"),
        Line("visual", "vis", f"{prefix}loss/vis"),
    )


def _evaluated(view: str) -> Values:
    def accuracies(log: RunLog) -> Points:
        points = log.accuracy(view)
        return points if len(points) > 1 else ()  # a single one stands in the table

    return accuracies


LOSS = (
    Chart(
        "Distance to the teacher",
        "Reverse KL divergence, student to teacher, on the student's own words: the whole, and the language and the "
        "visual part of the method; nats per token, lower is closer.",
        _parts(""),
        zero_line=True,
    ),
    Chart(
        "Entropy of the student",
        "How undecided the student is about its next word, in nats per token; a fall to zero is a collapse.",
        (Line("entropy", "entropy", "entropy"),),
        zero_line=True,
    ),
    Chart(
        "How much the teacher needs the image",
        "Divergence of the teacher with the image from the teacher without it, on the student's words; nats per token.",
        (Line("dependency", "vis", "dependency"),),
        zero_line=True,
    ),
    Chart(
        "Length of the answers",
        "Tokens that the student writes per answer, in the mean of a batch; those that are cut off count as they are.",
        (Line("tokens", "ink", "completions/mean_length"),),
        zero_line=True,
    ),
    Chart(
        "Learning rate",
        "The optimizer's, as its schedule sets it.",
        (Line("learning rate", "ink", "learning_rate", as_logged=True),),
        zero_line=True,
    ),
)
GRADIENTS = (
    Chart(
        "Angle between the two gradients",
        "Cosine of the two gradients that the method weighs: near 0 they ask for unrelated changes, below 0 they pull "
        "against each other.",
        (Line("cosine", "ink", "gradient/cosine"),),
        zero_line=True,
    ),
    Chart(
        "Gradient norms",
        "How strongly each part pulls before steering weighs them (logarithmic scale).",
        (
            Line("whole", "ink", "gradient/norm_standard"),
            Line("language", "lang", "gradient/norm_lang"),
            Line("visual", "vis", "gradient/norm_vis"),
        ),
        logarithmic=True,
    ),
    Chart(
        "γ",
        "Weight of the second part of the method, as it was set, scheduled or adapted.",
        (Line("γ", "ink", "steering/gamma", as_logged=True),),
        zero_line=True,
    ),
    Chart(
        "η",
        "Factor of the whole update, which keeps the length that the gradient of plain distillation has.",
        (Line("η", "ink", "steering/eta", as_logged=True),),
        zero_line=True,
    ),
    Chart(
        "λ",
        "Weight of language preservation: how strongly words that need the image are held to the teacher's without it.",
        (Line("λ", "lang", "steering/language_preservation", as_logged=True),),
        zero_line=True,
    ),
    Chart(
        "Weight ratio",
        "Weight of the second gradient over that of the first (logarithmic scale); where both are taken at unit length "
        "a ratio that keeps growing is the sign of a run about to collapse.",
        (Line("ratio", "ink", "steering/weight_ratio"),),
        logarithmic=True,
    ),
    Chart(
        "Signs of a runaway",
        "KL to the teacher, weight ratio and language loss, each over its lowest level so far (logarithmic scale). An "
        "alarm needs the first two to double, or more completions that are cut off, or a KL of four times; or the "
        "language loss to double while the visual one is at its best.",
        (
            Line("KL", "ink", "runaway/divergence_growth", as_logged=True),
            Line("weight ratio", "vis", "runaway/weight_growth", dashed=True, as_logged=True),
            Line("language", "lang", "runaway/language_growth", as_logged=True),
        ),
        logarithmic=True,
        of_one_run=True,
    ),
    Chart(
        "How right the average was",
        "At every refresh: cosine between the update by the average of earlier measurements and by this one; 1 is the "
        "same direction.",
        (Line("cosine", "ink", "steering/direction_cosine"),),
    ),
)
EVALUATION = (
    Chart(
        "Accuracy",
        "Share of questions answered correctly by free generation, in percent, with the image in view and without.",
        (
            Line("with image", "vis", _evaluated("with_image")),
            Line("without", "lang", _evaluated("without_image")),
        ),
    ),
    Chart(
        "Distance to the teacher, beside training",
        "The same divergence and its parts on the prompts of the evaluation dataset; nats per token.",
        tuple(replace(line) for line in _parts("eval_")),
        zero_line=True,
    ),
)
TIME = (
    Chart(
        "Seconds per step",
        "Wall clock of the parts of a step, over training.",
        tuple(Line(label, f"time-{index}", f"time/{name}") for index, (name, label) in enumerate(TIME_PARTS.items())),
        zero_line=True,
    ),
)

Figure = Mapping[str, Any]  # title, sentence, chart, legend: what the template shows


def figures_of(log: RunLog, charts: Sequence[Chart]) -> list[Figure]:
    """The charts of one run that have something to draw."""
    found = []
    for chart in charts:
        lines = [_series(log, line, line.label, line.color, line.dashed, faint=True) for line in chart.lines]
        found += _figure(chart, chart.title, chart.sentence, lines)
    return found


def figures_over(logs: Mapping[str, RunLog], charts: Sequence[Chart]) -> list[Figure]:
    """The charts of several runs, by their names: every quantity on axes of its own, a line a run."""
    found: list[Figure] = []
    for chart in charts:
        drawn: list[list[Series]] = []
        for line in () if chart.of_one_run else chart.lines:
            lines = [
                _series(log, line, name, *color_of_run(index), faint=False)
                for index, (name, log) in enumerate(logs.items())
            ]
            title = chart.title if len(chart.lines) == 1 else f"{chart.title}: {line.label}"
            found += _figure(chart, title, "" if drawn else chart.sentence, lines)
            drawn.append(lines)
    return found


def window_of(log: RunLog) -> int:
    """How many logged steps a strong line averages."""
    return max(1, len(log.steps) // _SMOOTHING_SHARE)


def _series(log: RunLog, line: Line, label: str, color: int | str, dashed: bool, faint: bool) -> Series:
    points, window = line.points(log), window_of(log)
    if 2 * len(points) <= len(log.steps):  # measured now and then
        return Series(label, color, points, dashed, dots=True)
    if line.as_logged or window == 1 or len(points) < 2 * window:
        return Series(label, color, points, dashed)
    means = moving_average([value for _, value in points], window)
    smooth = tuple((step, mean) for (step, _), mean in zip(points, means, strict=True))
    return Series(label, color, smooth, dashed, raw=points if faint else ())


def _figure(chart: Chart, title: str, sentence: str, series: Sequence[Series]) -> list[Figure]:
    """A list of the one figure, or of none if there is nothing to draw."""
    drawn: Markup | None = line_chart(
        series, f"{title}. {sentence}", logarithmic=chart.logarithmic, zero_line=chart.zero_line
    )
    if drawn is None:
        return []
    return [{"title": title, "sentence": sentence, "chart": drawn, "legend": legend(series)}]
