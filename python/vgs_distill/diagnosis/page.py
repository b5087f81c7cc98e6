"""The page of `vgs diagnose`, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..report.charts import Series, legend, line_chart, number
from ..report.dependency import dependency_figures
from ..report.log import RunLog
from ..report.page import environment
from .measure import NEEDS_IMAGE, Diagnosis
from .recommend import Recommendation

_TEMPLATES = Path(__file__).parent / "templates"
_MIB = 2**20


def rows(found: Diagnosis) -> list[tuple[str, str, str]]:
    """Name, value and what it means, in the order of the page."""
    price = found.prices
    measured = [
        ("KL(p‖q)", f"{number(found.standard)} nats", "student to teacher, what OPD lowers"),
        ("KL(p₀‖r)", f"{number(found.lang)} nats", "the same without the image: the student's language"),
        ("… of the 30 % that depend most", f"{number(found.lang_of_dependent)} nats", "what λ holds"),
        ("vis = KL(p‖q*)", f"{number(found.vis)} nats", "student to its own language with the teacher's evidence"),
        ("VDS = KL(q‖r)", f"{number(found.dependency)} nats", "how far the image moves the teacher, on the mean"),
        ("tokens that need the image", f"{found.needs_image:.1%}", f"VDS above {NEEDS_IMAGE} nats"),
        ("completions cut off", f"{found.cut_off:.0%}", "at max_completion_length"),
        ("cosine of standard and vis", f"{found.cosine:.2f}", "of their gradients over all parameters"),
        *((f"η for γ {gamma}", f"{eta:.2f}", "keeps the length of OPD's gradient") for gamma, eta in found.eta.items()),
        ("step of OPD", f"{number(price['opd'].seconds)} s", "without the optimizer"),
        ("step of VGS", f"{number(price['vgs'].seconds)} s", f"{found.step_ratio:.2f} times OPD's"),
        *(
            (f"activations, {name.upper()}", f"{number(price[name].kept_bytes / _MIB)} MiB", "kept for backward")
            for name in ("opd", "vgs")
        ),
    ]
    for name, one in price.items():
        if one.peak_bytes is not None:
            measured.append((f"peak memory, {name.upper()}", f"{number(one.peak_bytes / _MIB)} MiB", "of the device"))
    return measured


def table(found: Diagnosis) -> Table:
    """For the terminal."""
    shown = Table(title=_title(found), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(justify="right", no_wrap=True)
    shown.add_column()
    for row in rows(found):
        shown.add_row(*row)
    return shown


def _title(found: Diagnosis) -> str:
    return f"{found.tokens} tokens of {found.rows} completions, before any training"


def render(found: Diagnosis, advice: Recommendation, names: Mapping[str, str], settings: str) -> str:
    """The page. `names`: of "student", "teacher" and "dataset"; `settings`: the YAML that the advice comes to."""
    return (
        environment(_TEMPLATES)
        .get_template("diagnosis.html.jinja")
        .render(title=_title(found), names=names, rows=rows(found), advice=advice, settings=settings,
                figures=[*_dependency(found), *dependency_figures(_log(found))])
    )  # fmt: skip


def _log(found: Diagnosis) -> RunLog:
    """The angles in the form that a run's report draws."""
    angles = found.angles
    record = {
        "step": 0,
        **{f"angle_{pair}": values for pair, values in angles["angles"].items()},
        **{f"norm_{part}": values for part, values in angles["norms"].items()},
    }
    return RunLog(Path(), angles=[record])


def _dependency(found: Diagnosis) -> list[dict[str, Any]]:
    points: Sequence[tuple[float, float]] = [(10.0 * at, nats) for at, nats in enumerate(found.dependency_quantiles)]
    series = [Series("KL(q‖r)", "vis", tuple(points), dots=True)]
    title = "How many tokens need the image"
    sentence = (
        "Percentiles of KL(q‖r), how far the teacher's prediction moves when it loses the image, in nats; beside the "
        "name, the highest."
    )
    chart = line_chart(series, f"{title}. {sentence}", below="percent of the tokens, by rising KL(q‖r)")
    return [] if chart is None else [{"title": title, "sentence": sentence, "chart": chart, "legend": legend(series)}]
