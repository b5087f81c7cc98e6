"""The page in a real browser: nothing runs, nothing overflows, everything is drawn and prints."""

from __future__ import annotations

import html as markup
import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from vgs_distill.report.run import write_report

from tests.report.recorded_run import STEPS, browse, finished_run, framed, needs_chromium, records_of, write

MEASURE = """
  const root = page.documentElement, token = page.querySelector('.token'), number = token.querySelector('.number');
  const hidden = getComputedStyle(number).display;
  token.focus();
  document.title = JSON.stringify({
    title: page.title, scroll: root.scrollWidth, width: root.clientWidth,
    hidden, shown: getComputedStyle(number).display,
    colors: [...page.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor),
    strengths: [...page.querySelectorAll('.token')].map(t => +t.style.getPropertyValue('--strength')),
    wide: [...page.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.classList.contains('number')
      && e.getBoundingClientRect().right > root.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80)),
  });
"""


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_and_nothing_overflows_in_a_browser(run_dir: Path, width: int) -> None:
    dom = browse(framed(write_report([run_dir]), width, 1200, MEASURE), "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title is not None
    seen = json.loads(markup.unescape(title[1]))
    assert seen["title"] == f"my run: step {STEPS}", "no script of a completion has run"
    assert seen["width"] == width
    assert seen["scroll"] == width
    assert seen["wide"] == []
    assert (seen["hidden"], seen["shown"]) == ("none", "block"), "the number of a token appears when it has the focus"
    opacities = [float(color.rstrip(")").partition("/")[2] or 1) for color in seen["colors"]]  # oklab(l a b / opacity)
    pairs = sorted(zip(seen["strengths"], opacities, strict=True))
    assert pairs[0][1] < 0.05
    assert pairs[-1][1] > 0.9
    assert all(a[1] <= b[1] + 1e-3 for a, b in itertools.pairwise(pairs)), "more nats, more colour"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_several_runs_fit_on_a_page(run_dir: Path, tmp_path: Path, width: int) -> None:
    other = finished_run(tmp_path / ("a-long-name-of-a-run-without-any-place-to-break-it" * 2))
    write(other, records_of(other)[:40])
    page = write_report([run_dir, other], tmp_path / "runs.html")
    probe = """
      page.querySelectorAll('details').forEach(details => details.open = true);
      const root = page.documentElement, charts = [...page.querySelectorAll('.chart')];
      document.title = JSON.stringify({
        title: page.title, scroll: root.scrollWidth, charts: charts.length,
        narrowest: Math.min(...charts.map(c => c.getBoundingClientRect().width / c.parentElement.clientWidth)),
        wide: [...page.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.classList.contains('number')
          && e.getBoundingClientRect().right > root.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80)),
      });
    """
    dom = browse(framed(page, width, 1200, probe), "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title is not None
    seen = json.loads(markup.unescape(title[1]))
    assert seen["title"] == "2 runs"
    assert seen["scroll"] == width
    assert seen["wide"] == []
    assert seen["charts"] > 20
    assert seen["narrowest"] == 1, "charts fill their column"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_drawn(run_dir: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / f"{width}.png"
    report = write_report([run_dir])
    browse(framed(report, width, 3000), f"--screenshot={picture}", width=max(width, 500), height=3000)
    with Image.open(picture) as opened:
        shot = opened.convert("RGB").crop((0, 0, width, 3000))
    for top in range(0, 2400, 600):
        colors = shot.crop((0, top, width, top + 600)).getcolors(maxcolors=1 << 20)
        assert colors is not None
        assert len(colors) > 20, f"{width} px: nothing is drawn from {top} px on"


@needs_chromium
def test_the_page_prints(run_dir: Path, tmp_path: Path) -> None:
    report = write_report([run_dir])
    pdf = tmp_path / "report.pdf"
    browse(report, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF")
    html = report.read_text()
    # What print shows is the style sheet's print rules: apply them to the screen, where they can be measured.
    report.write_text(html.replace("@media print", "@media all"))
    probe = """
      const shown = e => getComputedStyle(e).display;
      const strong = page.querySelector('.token:not(.faint) .number');
      document.title = [shown(strong), getComputedStyle(strong.parentElement).printColorAdjust,
        getComputedStyle(page.body).backgroundColor].join('|');
    """
    dom = browse(framed(report, 760, 1200, probe), "--dump-dom")
    assert "<title>inline|exact|rgb(255, 255, 255)</title>" in dom
