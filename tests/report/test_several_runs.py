"""Several runs on one page: laid over each other under their names, and each on its own below."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from vgs_distill.report.charts import Series, line_chart, number
from vgs_distill.report.log import read_run
from vgs_distill.report.run import REPORT_OF_SEVERAL, render_runs

from tests.command_line import invoke
from tests.html_page import Page
from tests.report.recorded_run import HOSTILE, STEPS, finished_run, logged, metrics, records_of, start, write


@pytest.fixture
def others(tmp_path: Path) -> tuple[Path, Path]:
    """A steered run with another γ that is at its 30th step, and a plain one."""
    steered, plain = finished_run(tmp_path / "steered"), finished_run(tmp_path / "plain")
    write(steered, [start(gamma=0.3), *records_of(steered)[1:33]])
    kept = ("loss/standard", "entropy", "learning_rate")
    few = [{**logged(step), "values": {name: metrics(step)[name] for name in kept}} for step in range(1, 21)]
    write(plain, [start(method="opd"), *few])
    return steered, plain


def figures(html: str) -> dict[str, str]:
    """The figures before the runs' own, by title."""
    shared = html[: html.index("<h2>Each run</h2>")]
    return dict(re.findall(r"<figure><h3>(.*?)</h3>(.*?)</figure>", shared, re.S))


def test_a_line_is_a_run(run_dir: Path, others: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke(["report", str(run_dir), *map(str, others), "--output", str(page)])
    assert result.exit_code == 0, result.output
    html = page.read_text()
    Page(html)
    shown = figures(html)
    names = {title: re.findall(r"</span>([^<]+) <b>", figure) for title, figure in shown.items()}
    everyone, steered = ["my run", "steered", "plain"], ["my run", "steered"]
    assert names["Distance to the teacher: whole"] == names["Entropy of the student"] == everyone
    assert names["Learning rate"] == everyone
    assert names["Distance to the teacher: language"] == names["Weight ratio"] == names["γ"] == steered
    assert "Signs of a runaway" not in shown
    # Learning rates are not smoothed: what is drawn is what was logged, on axes that hold all runs.
    lines = [
        Series(name, color, read_run(folder).line("learning_rate"))
        for name, color, folder in zip(everyone, (2, 1, 3), (run_dir, *others), strict=True)
    ]
    description = unescape(re.findall(r'aria-label="(.*?)"', shown["Learning rate"])[0])
    chart = line_chart(lines, description, zero_line=True)
    assert chart is not None
    assert str(chart) in shown["Learning rate"]
    for name, step in (("my run", STEPS), ("steered", 30), ("plain", 20)):
        assert f"{name} <b>{number(metrics(step)['learning_rate'])}</b>" in shown["Learning rate"]


def test_the_table_and_the_differences(run_dir: Path, others: tuple[Path, Path]) -> None:
    html = render_runs({path.name: read_run(path) for path in (run_dir, *others)})
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", html[: html.index("<h2>Each run</h2>")])
        )
    }
    assert rows["run"] == ["step", "KL", "entropy", "cosine", "η", "ratio", "s per step", ""]
    assert rows["my run"][:3] == [
        f"60 of {STEPS}",
        number(metrics(60)["loss/standard"]),
        number(metrics(60)["entropy"]),
    ]
    assert rows["my run"][-1] == "finished, ran away at step 58"
    assert rows["plain"][3:6] == ["–", "–", "–"]
    assert rows["plain"][-1] == "training, or killed"
    assert rows["gamma"] == ["2.0", "0.3", "2.0"]
    assert rows["method"] == ["vgs", "vgs", "opd"]
    assert "teacher" not in rows, "it is the same"


def test_each_run_has_its_own_page_below(run_dir: Path, others: tuple[Path, Path]) -> None:
    html = render_runs({path.name: read_run(path) for path in (run_dir, *others)})
    below = html[html.index("<h2>Each run</h2>") :]
    assert re.findall(r'<details class="run"><summary>(.*?)</summary>', below) == ["my run", "steered", "plain"]
    assert below.count("<h2>As logged</h2>") == 3
    assert "Signs of a runaway" in below
    assert "<script" not in html


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [finished_run(tmp_path / "first" / "run"), finished_run(tmp_path / "second" / "run")]
    (tmp_path / "link").symlink_to(runs[0])
    monkeypatch.chdir(tmp_path)
    result = invoke(["report", "first/run", str(runs[1]), "link"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Written: {REPORT_OF_SEVERAL}\n"
    html = (tmp_path / REPORT_OF_SEVERAL).read_text()
    assert "<h1>first/run, second/run</h1>" in html, "a run that is named twice is one"


def test_more_runs_than_colours_are_told_apart(tmp_path: Path) -> None:
    html = render_runs({f"run {index}": read_run(finished_run(tmp_path / str(index))) for index in range(10)})
    keys = re.findall(r'swatch (color-\d(?: dashed)?)"', figures(html)["Learning rate"])
    assert len(set(keys)) == len(keys) == 10


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "∕")
    page = Page(render_runs({folder.name: read_run(finished_run(folder)), "b": read_run(folder)}))
    assert folder.name in page.text
    assert not any(tag == "script" for tag, _ in page.tags)


def test_one_that_is_no_run_is_one_sentence(run_dir: Path, tmp_path: Path) -> None:
    result = invoke(["report", str(run_dir), str(tmp_path)])
    assert result.exit_code == 2
    assert f"{str(tmp_path)!r} is not a training run" in result.stderr
