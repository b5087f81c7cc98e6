"""Lines as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_lines(
    path: Path,
    panels: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]],  # x label, y label, label -> points
    columns: int,
    scale: str = "log",
) -> None:
    """Panels as SVG with both axes to `scale`, one legend for all; the same bytes for the same data."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    count = math.ceil(len(panels) / columns)
    with plt.rc_context({"svg.hashsalt": "vgs", "font.size": 9}):
        figure, axes = plt.subplots(count, columns, figsize=(4.2 * columns, 3.3 * count), squeeze=False)
        handles: dict[str, Any] = {}
        for axis, (x_label, y_label, lines) in zip(axes.flat, panels, strict=False):
            for number, (label, points) in enumerate(sorted(lines.items())):
                xs, ys = zip(*sorted(points), strict=True)
                color = handles[label].get_color() if label in handles else f"C{max(number, len(handles))}"
                handles[label] = axis.plot(xs, ys, marker="o", markersize=3, linewidth=1.3, color=color)[0]
            axis.set(xlabel=x_label, ylabel=y_label, xscale=scale, yscale=scale)
            axis.grid(True, which="both", linewidth=0.3, alpha=0.6)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
        figure.tight_layout(rect=(0, 0.2 / count / 2, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
