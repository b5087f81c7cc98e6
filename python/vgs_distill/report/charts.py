"""Line charts as inline SVG, small enough to read at one to one on a phone.

Plain SVG keeps a report at tens of kilobytes, prints sharply, follows the page's light and dark colours through
CSS classes, and needs no script. A chart is as wide as its column; the names of its lines stand below it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup, escape

from .log import Points

WIDTH, HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_TICKS = 4
_MOST_POINTS = 600  # of a line: two per drawn pixel are indistinguishable from more


@dataclass(frozen=True)
class Series:
    """One line; `color` names one of the page's colours (`color-...`)."""

    label: str
    color: int | str
    points: Points
    dashed: bool = False
    raw: Points = ()  # drawn faintly behind the line that smooths them
    dots: bool = False  # marks where there are few points far apart


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values; the first ones average what there is."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


@dataclass(frozen=True)
class _Plane:
    """Where steps and values lie on the chart."""

    first: float
    last: float
    low: float
    high: float

    def across(self, x: float) -> float:
        return _LEFT + (x - self.first) / ((self.last - self.first) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - _BOTTOM - (y - self.low) / ((self.high - self.low) or 1.0) * (HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in _thinned(points))


def line_chart(
    series: Sequence[Series],
    description: str,
    *,
    logarithmic: bool = False,
    zero_line: bool = False,
    below: str = "training step",
) -> Markup | None:
    """An SVG of `series` over what `below` says, or None if there is nothing to draw. Its key is `legend`.

    `description` is read out by screen readers. A logarithmic chart leaves out values at or below zero.
    """
    drawn = [line for line in series if _drawable(line.points, logarithmic)]
    if not drawn:
        return None
    lines = [_drawable(line.points, logarithmic) for line in drawn]
    clouds = [_drawable(line.raw, logarithmic) for line in drawn]
    xs = [x for points in lines + clouds for x, _ in points]
    ys = [y for points in lines + clouds for _, y in points] + ([0.0] if zero_line else [])
    ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    plane = _Plane(min(xs), max(xs), min(ticks[0], min(ys)), max(ticks[-1], max(ys)))
    labels = {tick: number(10**tick if logarithmic else tick) for tick in ticks}
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, description),
        *_axes(plane, labels, zero_line, below),
    ]
    for line, points in zip(drawn, clouds, strict=True):
        if points:
            parts.append(
                Markup('<polyline class="line raw color-{}" points="{}"/>').format(line.color, plane.path(points))
            )
    for line, points in zip(drawn, lines, strict=True):
        parts.append(
            Markup('<polyline class="line color-{}{}" points="{}"><title>{}</title></polyline>').format(
                line.color, " dashed" if line.dashed else "", plane.path(points), line.label
            )
        )
        for x, y in points if line.dots or len(points) == 1 else ():
            parts.append(
                Markup('<circle class="dot color-{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
                    line.color, plane.across(x), plane.down(y)
                )
            )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _axes(plane: _Plane, labels: dict[float, str], zero_line: bool, caption: str) -> list[Markup]:
    """Horizontal lines with their values, and below the steps, or whatever `caption` says."""
    parts = [
        Markup(
            '<line class="{}" x1="{}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(
            "zero" if zero_line and tick == 0 else "grid",
            _LEFT, WIDTH - _RIGHT, plane.down(tick), plane.down(tick), _LEFT - 6, plane.down(tick) + 3.5, text,
        )
        for tick, text in labels.items()
    ]  # fmt: skip
    steps = [tick for tick in _ticks(plane.first, plane.last) if plane.first <= tick <= plane.last]
    middle, below = (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - _BOTTOM + 15
    captions = [(plane.across(step), below, f"{step:g}") for step in steps] + [(middle, HEIGHT - 4, caption)]
    return parts + [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, y, text)
        for x, y, text in captions
    ]


def legend(series: Sequence[Series]) -> Markup:
    """The key of a chart with the last value of each line, as text that wraps on a narrow page."""
    items = (
        Markup('<span class="key"><span class="swatch color-{}{}"></span>{} <b>{}</b></span>').format(
            line.color, " dashed" if line.dashed else "", escape(line.label), number(line.points[-1][1])
        )
        for line in series
        if line.points
    )
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def _drawable(points: Points, logarithmic: bool) -> Points:
    """As the axis counts them, without what it cannot show."""
    return tuple(
        (x, math.log10(y) if logarithmic else y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)
    )


def _thinned(points: Points) -> Points:
    """Of a long line the lowest and the highest point of every stretch, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretch = 2 * len(points) / _MOST_POINTS
    kept = set()
    for index in range(_MOST_POINTS // 2):
        indices = range(round(index * stretch), round((index + 1) * stretch))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return tuple(points[i] for i in sorted(kept | {0, len(points) - 1}))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover low..high, about four of them."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(start, stop + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Exponents for a logarithmic axis: whole decades, with 2 and 5 between them where the range is short."""
    within = (1, 10) if high - low > 2 else (1, 2, 5)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = sorted({decade + math.log10(factor) for decade in decades for factor in within})
    below = max((tick for tick in ticks if tick <= low), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def number(value: float) -> str:
    """Three digits: 0.123, 12.3, 1e−6."""
    text = f"{value:.3g}" if abs(value) < 10_000 else f"{value:.0e}"
    return re.sub(r"e(-?)\+?0*", r"e\1", text).replace("-", "−")


def signed(value: float) -> str:
    """Two decimals with a sign; zero has none."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
