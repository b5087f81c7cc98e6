"""What the page shows of dependency: angles and norms by tenths, losses by thirds, a line under every token."""

from __future__ import annotations

from pathlib import Path

from vgs_distill.report.dependency import dependency_figures
from vgs_distill.report.log import read_run

from tests.report.recorded_run import STEPS, angles, html_of, logged, page_of, records_of, start, write


def test_angles_norms_and_losses_are_drawn(run_dir: Path) -> None:
    figures = {figure["title"]: figure for figure in dependency_figures(read_run(run_dir))}
    assert list(figures) == [
        "Angles by dependency",
        "Gradient norms by dependency",
        "Loss by dependency: whole",
        "Loss by dependency: language",
        "Loss by dependency: visual",
    ]
    by_tenths = figures["Angles by dependency"]
    assert f"language and visual, step {STEPS} <b>92</b>" in by_tenths["legend"]
    assert "whole and visual, step 1 <b>40</b>" in by_tenths["legend"]
    assert by_tenths["chart"].count(' dashed"') == 3
    assert by_tenths["chart"].count("<circle") == 9 + 10 + 10  # a group without an angle has no dot
    assert "tenth of the tokens" in by_tenths["chart"]
    assert "training step" not in by_tenths["chart"]
    assert "depend most <b>0.695</b>" in figures["Loss by dependency: language"]["legend"]  # smoothed over 2 steps
    assert "training step" in figures["Loss by dependency: visual"]["chart"]


def test_one_record_is_no_comparison(run_dir: Path) -> None:
    write(run_dir, [start(), logged(1), angles(1)])
    figures = dependency_figures(read_run(run_dir))
    assert [figure["title"] for figure in figures] == ["Angles by dependency", "Gradient norms by dependency"]
    assert "dashed" not in figures[0]["sentence"]


def test_a_resumed_run_forgets_what_came_after(run_dir: Path) -> None:
    write(run_dir, [*records_of(run_dir), start(20), logged(21)])
    log = read_run(run_dir)
    assert [record["step"] for record in log.angles] == [1]
    assert max(record["step"] for record in log.thirds) == 20


def test_tokens_carry_their_dependency(run_dir: Path) -> None:
    html = html_of(run_dir)
    assert "--need:75" in html
    assert "--need:100" in html  # 3.5 nats are beyond the scale
    assert " · KL 0.75" in html
    assert "--need:38" in html  # a token that ends inside a character joins the next: 0.125 + 0.25
    assert "The line under a token" in page_of(run_dir).text


def test_a_run_without_dependency_says_nothing_of_it(run_dir: Path) -> None:
    records = [r for r in records_of(run_dir) if r["kind"] not in ("dependency", "thirds")]
    write(run_dir, [{**r, "dependency": None} if r["kind"] == "completion" else r for r in records])
    html = html_of(run_dir)
    assert "--need:" not in html.split("<body>")[1]
    assert "Where tokens depend on the image" not in html
    assert "The line under a token" not in html


def test_the_page_says_why_there_are_no_angles(run_dir: Path) -> None:
    reason = "gradients are sharded"
    write(run_dir, [{**start(), "angles_silent": reason}, logged(1)])
    assert f"There are no angles: {reason}." in page_of(run_dir).text
