"""Line charts as inline SVG, small enough to read at one to one on a phone.

Plain SVG keeps the report at tens of kilobytes, prints sharply, follows the page's light and dark colours through
CSS classes, and needs no script.

Layer: numbers in, markup out. Called by `report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_TICKS = 4


@dataclass(frozen=True)
class Series:
    """One line: `points` are (step, value) in step order; `color` indexes the page's palette."""

    label: str
    color: int
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values; the first ones average what there is."""
    means = []
    for index in range(len(values)):
        recent = values[max(0, index + 1 - window) : index + 1]
        means.append(sum(recent) / len(recent))
    return means


def line_chart(
    series: Sequence[Series], description: str, *, logarithmic: bool = False, zero_line: bool = False
) -> Markup | None:
    """An SVG of `series` over training steps, or None if there is nothing to draw.

    `description` is read out by screen readers. A logarithmic chart leaves out values at or below zero.
    """
    drawn = []
    for line in series:
        points = [
            (x, math.log10(y) if logarithmic else y)
            for x, y in line.points
            if math.isfinite(y) and (y > 0 or not logarithmic)
        ]
        if points:
            drawn.append((line, points))
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points] + ([0.0] if zero_line else [])
    y_ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    first, last = min(xs), max(xs)

    def across(x: float) -> float:
        return _LEFT + (x - first) / ((last - first) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, description)
    ]
    for tick in y_ticks:
        kind = "zero" if zero_line and tick == 0 else "grid"
        text = _number(10**tick if logarithmic else tick)
        parts.append(
            Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(kind, _LEFT, WIDTH - _RIGHT, down(tick), down(tick), _LEFT - 6, down(tick) + 3.5, text)
        )
    for tick in _ticks(first, last):
        if first <= tick <= last:
            parts.append(
                Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    across(tick), HEIGHT - _BOTTOM + 15, _number(tick)
                )
            )
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">training step</text>').format(
            (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4
        )
    )
    for line, points in drawn:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(
            Markup('<polyline class="line color-{}{}" points="{}"><title>{}</title></polyline>').format(
                line.color, " dashed" if line.dashed else "", path, line.label
            )
        )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend(series: Sequence[Series]) -> Markup:
    """The key of a chart, as text that wraps on a narrow page."""
    items = (
        Markup('<span class="key"><span class="swatch color-{}{}"></span>{}</span>').format(
            line.color, " dashed" if line.dashed else "", escape(line.label)
        )
        for line in series
        if line.points
    )
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


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


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10_000 else f"{value:.0e}"
