"""`vgs report`: the numbers of the log, live and torn logs, hostile text, and the page in a real browser."""

from __future__ import annotations

import html as markup
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vgs_distill.report.charts import Series, line_chart, number
from vgs_distill.report.log import IMAGE_FOLDER, LOG_FILE, read_run
from vgs_distill.report.page import strength, visible
from vgs_distill.report.run import render_run, write_report

from tests.command_line import invoke
from tests.html_page import Page

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'&amp;"
STEPS = 60


def metrics(step: int) -> dict[str, float]:
    lang, vis = 1 / step, 2 / step + 0.01
    return {
        "loss/lang": lang,
        "loss/vis": vis,
        "loss/full": lang + vis,
        "entropy": 1 + 1 / step,
        "gradient/cosine": 0.3 - step / 100,
        "gradient/norm_lang": 1 + step / 7,
        "gradient/norm_vis": 3.0,
        "steering/gamma": 0.8,
        "steering/weight_ratio": 4 + step / 13,
        "runaway/divergence_growth": 1 + step / 50,
        "runaway/weight_growth": 1 + step / 40,
        "runaway/alarm": float(step > 57),
        "time/rollout": 0.25,
        "time/teacher": 0.125,
        "time/student": 0.5,
        "time/steering": 0.01,
        "time/masked_teacher": 0.0625,
        "time/masked_student": 0.2,
    }


def completion(step: int, tokens: list[str], log_ratios: list[float | None] | None, **changes: Any) -> dict[str, Any]:
    record = {"kind": "completion", "step": step, "time": 1e9, "prompt": "What is this?", "images": ["0123.png"]}
    return {**record, "tokens": tokens, "log_ratios": log_ratios, **changes}


def start(step: int = 0, **settings: Any) -> dict[str, Any]:
    shown = {"student": "org/student", "teacher": "org/teacher", "steering": "exact", "decomposition": "bayes"}
    return {
        "kind": "start",
        "step": step,
        "time": 1e9,
        "max_steps": STEPS,
        "settings": {**shown, "gamma": 0.8} | settings,
    }


def logged(step: int) -> dict[str, Any]:
    return {"kind": "metrics", "step": step, "time": 1e9 + 2 * step, "values": metrics(step)}


MODULES = {
    "kind": "modules",
    "step": 1,
    "time": 1e9,
    "names": ["vision tower", "decoder layer 0", "head"],
    "norms_lang": [0.0, 3.0, 4.0],
    "norms_vis": [1.0, 1.0, 1.0],
    "cosines": [None, -0.5, 0.25],
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 60 steps."""
    folder = tmp_path / "my run"
    (folder / IMAGE_FOLDER).mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / IMAGE_FOLDER / "0123.png")
    records = [
        start(),
        MODULES,
        completion(1, [HOSTILE, " مرحبا", "\n", " red", "", "é"], [0.1, 1.5, -0.4, -2.25, 1.0, 0.5], prompt=HOSTILE),
        *(logged(step) for step in range(1, STEPS + 1)),
        {**MODULES, "step": STEPS},
        completion(STEPS, [" a", " long", " word " + "x" * 400], [3.5, -9.0, 0.0]),
        {"kind": "end", "step": STEPS, "time": 1e9 + 130},
    ]
    write(folder, records)
    return folder


def write(folder: Path, records: list[dict[str, Any]], end: str = "\n") -> None:
    (folder / LOG_FILE).write_text("\n".join(map(json.dumps, records)) + end)


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def page_of(folder: Path) -> Page:
    return Page(render_run(read_run(folder)))


# ---------------------------------------------------------------------- what it says


def test_the_numbers_are_those_of_the_log(run_dir: Path) -> None:
    html = render_run(read_run(run_dir))
    table = re.findall(r"<tr><td>(\d+)</td>((?:<td>[^<]*</td>)+)</tr>", html)
    assert len(table) == 25
    assert [table[0][0], table[-1][0]] == ["1", str(STEPS)]
    for step, cells in table:
        values = metrics(int(step))
        shown = re.findall(r"<td>([^<]*)</td>", cells)
        names = [
            "loss/full", "loss/lang", "loss/vis", "entropy", "gradient/cosine", "gradient/norm_lang",
            "gradient/norm_vis", "steering/weight_ratio", "steering/gamma",
        ]  # fmt: skip
        assert [float(text.replace("−", "-")) for text in shown] == pytest.approx([values[n] for n in names], rel=5e-3)
    text = Page(html).text
    last = metrics(STEPS)
    assert number(last["loss/full"]) in text
    assert f"at most {number(last['steering/weight_ratio'])}" in text
    assert "2.00 s" in text, "seconds per step: the log advances by two seconds a step"
    assert "student writes 0.250 s" in text
    assert "everything else 1.115 s" in text
    assert "teacher 0.062 s, student 0.200 s" in text


def test_a_runaway_is_shown(run_dir: Path) -> None:
    assert re.search(r"step 58\s*ran away from its teacher\s*alarm", page_of(run_dir).text)
    write(run_dir, [record for record in records_of(run_dir) if record["step"] <= 57])
    assert "ran away" not in page_of(run_dir).text


def test_charts_draw_the_values_of_the_log(run_dir: Path) -> None:
    cosine = Series("cosine", "ink", read_run(run_dir).line("gradient/cosine"))
    chart = line_chart([cosine], "cosine", label_ends=True)
    assert chart is not None
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points[1].split()]
    steps = [float(point.split(",")[0]) for point in points[1].split()]
    assert len(heights) == STEPS
    # The log's cosine falls by 0.01 a step: on the page it is a straight line downwards, with even steps.
    drops = [b - a for a, b in itertools.pairwise(heights)]
    assert min(drops) > 0
    assert max(drops) - min(drops) < 0.25
    assert max(b - a for a, b in itertools.pairwise(steps)) == pytest.approx(steps[1] - steps[0], abs=0.25)
    assert f">cosine {number(0.3 - STEPS / 100)}<" in chart


def test_long_lines_keep_their_spikes_and_stay_small() -> None:
    values = [(float(step), 9.0 if step == 31_337 else step % 7 / 10) for step in range(100_000)]
    chart = line_chart([Series("line", "ink", tuple(values))], "long")
    assert chart is not None
    assert len(chart) < 20_000
    heights = [float(point.split(",")[1]) for point in re.findall(r'points="([^"]+)"', chart)[0].split()]
    assert sum(height < 0.5 * max(heights) for height in heights) == 1


def test_end_labels_do_not_cover_each_other() -> None:
    lines = [Series(f"line {index}", "ink", ((0.0, 0.0), (1.0, index / 1000))) for index in range(5)]
    chart = line_chart(lines, "close ends", label_ends=True)
    assert chart is not None
    heights = sorted(map(float, re.findall(r'class="end[^>]* y="([\d.]+)"', chart)))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12.9
    assert heights[0] > 0
    assert heights[-1] < 230


def test_modules_show_cosine_and_shares(run_dir: Path) -> None:
    text = " ".join(page_of(run_dir).text.split())
    assert "vision tower–0.0 %33.3 %" in text
    assert "decoder layer 0−0.5036.0 %33.3 %" in text
    assert "head+0.2564.0 %33.3 %" in text


def test_tokens_carry_their_number_and_colour(run_dir: Path) -> None:
    html = render_run(read_run(run_dir))
    tokens = re.findall(
        r'<span class="token tint (\w+)[^"]*" style="--strength:(\d+)" tabindex="0">(.*?)<span', html, re.S
    )
    by_text = {text: (side, int(level)) for side, level, text in tokens}
    assert by_text["a"] == ("raised", 100)
    assert by_text["long"] == ("lowered", 100)
    assert by_text["red"] == ("lowered", 75)
    assert by_text["é"] == ("raised", 50), "1.0 of the half before it and 0.5 of its own"
    assert by_text["↵\n"] == ("lowered", 13)
    for value in ("+3.50", "−9.00", "−2.25", "+1.50"):
        assert f'<span class="number" dir="ltr">{value}</span>' in html


def test_the_colour_of_a_contribution_grows_with_its_size() -> None:
    values = [index / 100 for index in range(401)]
    levels = [strength(value, 3.0) for value in values]
    assert levels[0] == 0
    assert levels[300:] == [100] * 101
    assert all(a <= b for a, b in itertools.pairwise(levels))
    assert len(set(levels)) == 101
    assert levels == [strength(-value, 3.0) for value in values]


def test_accuracies_of_vgs_eval_are_shown(run_dir: Path) -> None:
    (run_dir / "checkpoint-20").mkdir()
    for path, accuracy in ((run_dir / "eval.json", 0.8125), (run_dir / "checkpoint-20" / "eval.json", 0.25)):
        measured = {"accuracy": accuracy, "full": 0.125}
        path.write_text(
            json.dumps({"rows": 64, "with_image": measured, "without_image": {"accuracy": 0.5, "full": None}})
        )
    (run_dir / "eval_notes.json").write_text('["no evaluation"]')
    text = " ".join(page_of(run_dir).text.split())
    assert "20 25.0 % 50.0 % 0.125 – 64 checkpoint-20/eval.json".replace(" ", "") in text.replace(" ", "")
    assert "60 81.2 % 50.0 % 0.125 – 64 eval.json".replace(" ", "") in text.replace(" ", "")
    assert "with image 81.2" in text


def test_a_monolithic_run_has_no_gradients_and_no_colour(run_dir: Path) -> None:
    names = ("loss/full", "entropy", "time/rollout", "time/teacher", "time/student")
    records = [start(steering="none"), completion(1, [" a", " b"], None)]
    records += [{**logged(step), "values": {name: metrics(step)[name] for name in names}} for step in (1, 2, 3)]
    write(run_dir, records)
    page = page_of(run_dir)
    assert "Monolithic distillation runs no masked teacher" in page.text
    assert "Gradients" not in page.text
    assert not any("token" in (attributes.get("class") or "") for _, attributes in page.tags)


# ---------------------------------------------------------------------- live, torn and resumed logs


@pytest.mark.parametrize("end", ["", "\n", '\n{"kind": "met', '\n{"kind": "metrics", "step": 31, "time"', "\n\x00\xff"])
def test_a_log_that_is_being_written_can_be_read(run_dir: Path, end: str) -> None:
    write(run_dir, records_of(run_dir)[:33], end)
    log = read_run(run_dir)
    assert max(log.steps) == 30
    assert "Step 30 of 60, training, or killed." in page_of(run_dir).text


def test_a_log_can_be_read_wherever_it_is_cut(run_dir: Path) -> None:
    content = (run_dir / LOG_FILE).read_bytes()
    seen = set()
    for cut in range(0, len(content), 97):
        (run_dir / LOG_FILE).write_bytes(content[:cut])
        if b'"kind": "metrics"' in content[:cut].rpartition(b"\n")[0]:
            seen.add(max(read_run(run_dir).steps))
    assert seen == set(range(1, STEPS + 1))


def test_a_resumed_run_shows_each_step_once(run_dir: Path) -> None:
    changed = {**logged(41), "values": metrics(41) | {"entropy": 7.5}}
    records = [*records_of(run_dir)[:53], completion(50, ["late"], [1.0]), start(40), changed, logged(42)]
    write(run_dir, records)
    log = read_run(run_dir)
    assert list(log.steps) == list(range(1, 43))
    assert log.steps[41]["entropy"] == 7.5
    assert [record["step"] for record in log.completions] == [1]
    assert "in 2 starts" in page_of(run_dir).text


def test_a_run_that_starts_afresh_in_the_same_folder_forgets_the_old_one(run_dir: Path) -> None:
    write(run_dir, [*records_of(run_dir), start(), logged(1), logged(2)])
    log = read_run(run_dir)
    assert list(log.steps) == [1, 2]
    assert log.completions == log.modules == []
    assert len(log.sessions) == 1


# ---------------------------------------------------------------------- the command


def test_the_command_writes_one_file(run_dir: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 0, result.output
    assert set(tmp_path.rglob("*")) - before == {run_dir / "report.html"}
    other = tmp_path / "other.html"
    assert invoke(["report", str(run_dir), "--output", str(other)]).exit_code == 0
    assert other.read_text() == (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no directory"),
        ({}, "is not a training run (it has no recording/log.jsonl)"),
        ({LOG_FILE: ""}, "nothing is logged in"),
        ({LOG_FILE: json.dumps(start()) + "\n"}, "nothing is logged in"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path: Path, content: dict[Path, str] | None, sentence: str) -> None:
    folder = tmp_path / "run"
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    if content is not None:
        folder.mkdir(exist_ok=True)
    result = invoke(["report", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("vgs: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_an_output_that_cannot_be_written_is_one_sentence(run_dir: Path) -> None:
    result = invoke(["report", str(run_dir), "--output", str(run_dir / "none" / "report.html")])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------- hostile text


def test_text_is_escaped_and_the_page_stands_alone(run_dir: Path) -> None:
    html = render_run(read_run(run_dir))
    page = Page(html)
    assert HOSTILE in page.text
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert "href" not in attributes
    assert not re.search(r"url\(|@import", html)


@pytest.mark.parametrize("field", ["student", "teacher", "steering", "decomposition", "note"])
def test_settings_are_escaped(run_dir: Path, field: str) -> None:
    write(run_dir, [start(**{field: HOSTILE}), logged(1)])
    assert HOSTILE in page_of(run_dir).text


def test_module_names_are_escaped(run_dir: Path) -> None:
    write(run_dir, [start(), {**MODULES, "names": [HOSTILE, "b", "c"]}, logged(1)])
    assert HOSTILE in page_of(run_dir).text


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "notes.txt", "gone.png", "."])
def test_only_pictures_of_the_run_are_embedded(run_dir: Path, name: str) -> None:
    (run_dir / "secret.png").write_text("secret")
    (run_dir / IMAGE_FOLDER / "notes.txt").write_text("secret")
    write(run_dir, [start(), logged(1), completion(1, ["a"], [1.0], images=[name])])
    assert not any(tag == "img" for tag, _ in page_of(run_dir).tags)


def test_what_cannot_be_seen_is_written_out(run_dir: Path) -> None:
    assert visible("a\x00b\x1b[31m\u202egnp.exe\u2066") == "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+202E⟩gnp.exe⟨U+2066⟩"
    assert visible("\ud83d") == "⟨U+D83D⟩"
    assert visible("tab\tline\nمرحبا 👩‍🚀") == "tab\tline\nمرحبا 👩‍🚀"
    write(run_dir, [start(), logged(1), completion(1, ["\ud83d", "\x00", "\u202e"], [1.0, 1.0, 1.0])])
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "⟨U+D83D⟩" in text
    assert "⟨U+202E⟩" in text


# ---------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")


def browse(page: Path, *flags: str, width: int = 1280, height: int = 1200) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}",
        f"--user-data-dir={page.parent / 'chromium'}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def framed(report: Path, width: int, height: int, probe: str = "") -> Path:
    """A page with the report in a frame: a window of Chromium is never narrower than 500 px, a frame is."""
    page = report.with_name(f"frame-{width}.html")
    srcdoc = markup.escape(report.read_text())
    page.write_text(
        "<!doctype html><meta charset=utf-8><style>body{margin:0}</style>"
        f'<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{srcdoc}"></iframe>'
        "<script>addEventListener('load', () => { const page = document.querySelector('iframe').contentDocument;"
        f"{probe} }})</script>"
    )
    return page


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
    dom = browse(framed(write_report(run_dir), width, 1200, MEASURE), "--dump-dom")
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
def test_the_page_is_drawn(run_dir: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / f"{width}.png"
    report = write_report(run_dir)
    browse(framed(report, width, 3000), f"--screenshot={picture}", width=max(width, 500), height=3000)
    with Image.open(picture) as opened:
        shot = opened.convert("RGB").crop((0, 0, width, 3000))
    for top in range(0, 2400, 600):
        colors = shot.crop((0, top, width, top + 600)).getcolors(maxcolors=1 << 20)
        assert colors is not None
        assert len(colors) > 20, f"{width} px: nothing is drawn from {top} px on"


@needs_chromium
def test_the_page_prints(run_dir: Path, tmp_path: Path) -> None:
    report = write_report(run_dir)
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
