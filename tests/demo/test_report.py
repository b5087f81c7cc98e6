"""Results and their report: right arithmetic, and nothing a model wrote becomes markup."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console
from vgs_distill.demo.methods import methods_for
from vgs_distill.demo.report import data_uri, render_report
from vgs_distill.demo.results import gallery, spread, summarize
from vgs_distill.demo.table import notes, percent, results_table
from vgs_distill.report.charts import Series, line_chart, moving_average

from tests.html_page import Page


@pytest.fixture
def results(finished):
    return summarize(**finished)


@pytest.fixture
def histories(finished):
    return {f"seed{run['seed']}-{run['method']}": run["history"] for run in finished["runs"]}


@pytest.fixture
def html(results, histories, pictures):
    return render_report(results, histories, pictures)


def test_the_summary_is_the_arithmetic_of_the_runs(results):
    opd, steered = results["summary"]["opd"], results["summary"]["vgs"]
    assert opd["accuracy"]["values"] == [0.6, 0.7]
    assert opd["accuracy"]["mean"] == pytest.approx(0.65)
    assert opd["accuracy"]["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert "gain_over_opd" not in opd
    assert "cosine" not in opd
    assert steered["gain_over_opd"]["values"] == pytest.approx([0.05, 0.03])
    assert steered["cosine"] == pytest.approx(0.1)
    assert steered["absolute_cosine"] == pytest.approx(0.2)
    longer = results["summary"]["opd-as-long-as-vgs"]
    assert longer["gain_over_opd"]["values"] == pytest.approx([0.02, 0.0])
    assert "cosine" not in longer
    assert (opd["steps"], longer["steps"]) == (30, 40)
    assert steered["step_seconds"]["total"] == pytest.approx(0.2)
    assert steered["step_seconds"]["steering"] == pytest.approx(0.02)


def test_one_seed_has_no_deviation():
    assert spread([0.5])["deviation"] is None


@pytest.mark.parametrize("count", [12, 36, 100, 240, 768])
def test_the_gallery_is_spread_and_shows_every_type(world, count):
    examples = world.balanced("test", count, 0)
    shown = gallery(examples, None, {}, [], [], [])
    assert len(shown) == 12
    assert {item["question_type"] for item in shown} == set(world.question_types)
    assert shown[-1]["index"] >= count // 2 - 1
    for item in shown:
        assert item["question"] == examples[item["index"]].question


def test_results_are_plain_json(results):
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(results, default=str))
    assert results["status"] == "complete"
    assert results["runs"][0]["folder"] == "seed0-opd"
    assert results["versions"]["torch"] != "not installed"


def test_what_a_model_wrote_is_escaped(html):
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert('x')</script> answer : one" in page.text, "readers see the text itself"


@pytest.mark.parametrize("field", ["question", "answer"])
def test_every_text_of_the_gallery_is_escaped(results, histories, pictures, field):
    results["gallery"][0][field] = '<img src=x onerror="alert(1)">'
    page = Page(render_report(results, histories, pictures))
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_labels_inside_charts_are_escaped():
    chart = line_chart([Series("<b>bold</b>", 0, ((0, 1.0), (1, 2.0)))], 'a "quoted" <i>chart</i>')
    assert "<b>" not in chart
    assert "<i>" not in chart
    assert "&lt;b&gt;" in chart


def test_table_and_report_say_how_vgs_differs_from_the_paper(results, html):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results_table(results))
    for text in (console.export_text(), Page(html).text):
        assert "λ is 1 instead of 0.01" in text
    assert "language_preservation 1.0, ratio_floor 0.1" in Page(html).text
    assert results["methods"]["vgs"]["settings"] == {"language_preservation": 1.0, "ratio_floor": 0.1}


def test_a_comparison_without_vgs_says_nothing_of_it(finished):
    finished["methods"] = methods_for(["matched"], None)
    assert not notes(summarize(**finished))


def test_the_report_stands_alone_and_stays_small(html):
    assert len(html.encode()) < 6_000_000
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe"}
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes
    assert not re.search(r"url\(|@import", html)


def test_the_report_shows_methods_figures_and_answers(html):
    page = Page(html)
    for expected in (
        "OPD",
        "VGS",
        "VGS · standard",
        "Student start",
        "Teacher",
        "65.0",
        "Angle between the two gradients",
    ):
        assert expected in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 12
    assert all(attributes["alt"] for attributes in pictures)
    assert page.text.count("✓") + page.text.count("✗") == 12 * 5


def test_every_figure_has_an_explanation_and_a_description(html):
    page = Page(html)
    figures = sum(tag == "figure" for tag, _ in page.tags)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == figures
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(attributes["aria-label"] for attributes in charts)


def test_a_run_that_ended_early_still_gives_a_report(finished, pictures):
    finished |= {"runs": [], "starts": {}, "teacher": None, "error": "Interrupted."}
    results = summarize(**finished)
    assert results["status"] == "incomplete"
    page = Page(render_report(results, {}, pictures))
    assert "Interrupted." in page.text
    results_table(results)


def test_a_run_without_its_baseline_has_no_gain(finished, pictures):
    finished["runs"] = [run for run in finished["runs"] if run["method"] == "vgs"]
    results = summarize(**finished)
    assert "gain_over_opd" not in results["summary"]["vgs"]
    Page(render_report(results, {}, pictures))


def test_the_table_fits_eighty_columns(results):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    assert "…" not in text
    assert "65.0 ± 7.1" in text
    assert "+4.0 ± 1.4" in text


def test_percent_of_nothing_is_a_dash():
    assert percent(None) == "–"
    assert percent(0.8125) == "81.2"


def test_moving_average_uses_what_there_is():
    assert moving_average([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1e-9, 1e-9], [5.0], [1e6, 2e6], [float("nan"), 1.0], [0.1, 0.11]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_charts_take_awkward_values(values, logarithmic):
    points = tuple((float(step), value) for step, value in enumerate(values))
    chart = line_chart([Series("line", 0, points)], "awkward", logarithmic=logarithmic)
    if chart is None:
        assert logarithmic
        assert max(values) <= 0
    else:
        assert "nan" not in chart
        Page(str(chart))


def test_a_chart_without_data_is_left_out():
    assert line_chart([Series("line", 0, ())], "empty") is None


def test_the_picture_is_a_png_at_its_own_size(pictures):
    assert data_uri(pictures[0]).startswith("data:image/png;base64,iVBOR")
