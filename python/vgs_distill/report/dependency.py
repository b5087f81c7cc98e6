"""What a run learns where tokens depend on the image: angles and norms of gradients by tenths, losses by thirds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import Series, legend, line_chart, moving_average
from .figures import Figure, window_of
from .log import Points, RunLog
from .page import PART_NAMES

_ANGLES = {  # pair -> its name and colour
    "lang_vis": ("language and visual", "ink"),
    "standard_vis": ("whole and visual", "vis"),
    "standard_lang": ("whole and language", "lang"),
}
_NORMS = {"standard": "ink", "vis": "vis", "lang": "lang"}
_THIRDS = {"depend least on the image": 0, "middle third": 5, "depend most": 2}  # -> colour
_GROUPS_BELOW = "tenth of the tokens, by rising KL(q‖r)"


def dependency_figures(log: RunLog) -> list[Figure]:
    """Those that the run has recorded something for."""
    return [*_by_tenths(log), *_by_thirds(log)]


def _by_tenths(log: RunLog) -> list[Figure]:
    """The last record, and the first one dashed."""
    if not log.angles:
        return []
    first, last = log.angles[0], log.angles[-1]
    records = [last] if last is first else [last, first]
    steps = f"Strong: step {last['step']}" + (f", dashed: step {first['step']}" if len(records) > 1 else "")
    angles = [
        _groups(record, f"angle_{pair}", f"{name}, step {record['step']}", color, dashed=record is not last)
        for record in records
        for pair, (name, color) in _ANGLES.items()
    ]
    norms = [
        _groups(record, f"norm_{part}", f"{PART_NAMES[part]}, step {record['step']}", color, dashed=record is not last)
        for record in records
        for part, color in _NORMS.items()
    ]
    return [
        *_figure(
            "Angles by dependency",
            "Degrees between the gradients of two parts of the loss, of the tokens of each tenth: 90 asks for "
            f"unrelated changes. {steps}; beside a name, the tenth that depends most.",
            angles,
            _GROUPS_BELOW,
        ),
        *_figure(
            "Gradient norms by dependency",
            f"Of the mean over the tokens of each tenth (logarithmic scale). {steps}; beside a name, the tenth that "
            "depends most.",
            norms,
            _GROUPS_BELOW,
            logarithmic=True,
        ),
    ]


def _groups(record: Mapping[str, Any], key: str, label: str, color: str, dashed: bool) -> Series:
    points = tuple((group, value) for group, value in enumerate(record[key], start=1) if value is not None)
    return Series(label, color, points, dashed, dots=not dashed)


def _by_thirds(log: RunLog) -> list[Figure]:
    figures = []
    for part, name in PART_NAMES.items():
        figures += _figure(
            f"Loss by dependency: {name}",
            f"Mean of the {name} part over each third of the tokens by KL(q‖r), in nats per token.",
            [_third(log, part, third, label, color) for third, (label, color) in enumerate(_THIRDS.items())],
            zero_line=True,
        )
    return figures


def _third(log: RunLog, part: str, third: int, label: str, color: int) -> Series:
    points: Points = tuple(
        (record["step"], record[part][third]) for record in log.thirds if record[part][third] is not None
    )
    window = window_of(log)
    if window == 1 or len(points) < 2 * window:
        return Series(label, color, points)
    means = moving_average([value for _, value in points], window)
    smooth = tuple((step, mean) for (step, _), mean in zip(points, means, strict=True))
    return Series(label, color, smooth, raw=points)


def _figure(
    title: str,
    sentence: str,
    series: list[Series],
    below: str = "training step",
    *,
    logarithmic: bool = False,
    zero_line: bool = False,
) -> list[Figure]:
    chart = line_chart(series, f"{title}. {sentence}", logarithmic=logarithmic, zero_line=zero_line, below=below)
    if chart is None:
        return []
    return [{"title": title, "sentence": sentence, "chart": chart, "legend": legend(series)}]
