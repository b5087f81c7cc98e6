"""The page about a run: the numbers of its log, its pictures and words, and what must not get into it."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from vgs_distill.report.charts import Series, legend, line_chart, number
from vgs_distill.report.log import IMAGE_FOLDER, read_run
from vgs_distill.report.page import strength, visible
from vgs_distill.report.run import write_report

from tests.html_page import Page
from tests.report.recorded_run import (
    HOSTILE,
    MODULES,
    STEPS,
    completion,
    html_of,
    logged,
    metrics,
    page_of,
    records_of,
    start,
    write,
)

# ---------------------------------------------------------------------- what it says


def test_the_numbers_are_those_of_the_log(run_dir: Path) -> None:
    html = html_of(run_dir)
    table = re.findall(r"<tr><td>(\d+)</td>((?:<td>[^<]*</td>)+)</tr>", html)
    assert len(table) == 25
    assert [table[0][0], table[-1][0]] == ["1", str(STEPS)]
    for step, cells in table:
        values = metrics(int(step))
        shown = re.findall(r"<td>([^<]*)</td>", cells)
        names = [
            "loss/standard", "loss/lang", "loss/vis", "dependency", "entropy", "gradient/cosine",
            "gradient/norm_standard", "gradient/norm_vis", "steering/weight_ratio", "steering/gamma", "steering/eta",
            "steering/language_preservation",
        ]  # fmt: skip
        assert [float(text.replace("−", "-")) for text in shown] == pytest.approx([values[n] for n in names], rel=5e-3)
    text = Page(html).text
    last = metrics(STEPS)
    assert number(last["loss/standard"]) in text
    assert f"at most {number(metrics(1)['steering/eta'])}" in text
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
    chart = line_chart([cosine], "cosine")
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
    assert f"cosine <b>{number(0.3 - STEPS / 100)}</b>" in legend([cosine])
    assert (min(steps), max(steps)) == (46, 370), "from the axis to the edge of 380"


def test_long_lines_keep_their_spikes_and_stay_small() -> None:
    values = [(float(step), 9.0 if step == 31_337 else step % 7 / 10) for step in range(100_000)]
    chart = line_chart([Series("line", "ink", tuple(values))], "long")
    assert chart is not None
    assert len(chart) < 20_000
    heights = [float(point.split(",")[1]) for point in re.findall(r'points="([^"]+)"', chart)[0].split()]
    assert sum(height < 0.5 * max(heights) for height in heights) == 1


def test_gamma_length_and_learning_rate_are_drawn(run_dir: Path) -> None:
    html = html_of(run_dir)
    for title, label, name in (
        ("γ", "γ", "steering/gamma"),
        ("η", "η", "steering/eta"),
        ("λ", "λ", "steering/language_preservation"),
        ("Length of the answers", "tokens", "completions/mean_length"),
        ("Learning rate", "learning rate", "learning_rate"),
    ):
        figure = re.search(rf"<figure><h3>{title}</h3>.*?</figure>", html, re.S)
        assert figure is not None, title
        last = {"completions/mean_length": (metrics(59)[name] + metrics(60)[name]) / 2}.get(name, metrics(60)[name])
        assert f"{label} <b>{number(last)}</b>" in figure[0]
    assert number(1e-6) == "1e−6"
    assert number(123456.0) == "1e5"


def test_teacher_and_reference_stand_beside_the_student(run_dir: Path) -> None:
    text = " ".join(page_of(run_dir).text.split())
    assert f"teacher the teacher says {HOSTILE} reference the truth".replace(" ", "") in text.replace(" ", "")
    assert text.count("reference") == 1, "a row without one shows none"
    assert "The teacher's answer is what it writes itself, greedily." in text
    write(run_dir, [{**start(), "teacher_silent": "it is away"}, *records_of(run_dir)[1:]])
    assert "There is no answer of the teacher: it is away." in page_of(run_dir).text


def test_modules_show_cosine_and_shares(run_dir: Path) -> None:
    text = " ".join(page_of(run_dir).text.split())
    assert "vision tower–0.0 %33.3 %" in text
    assert "decoder layer 0−0.5036.0 %33.3 %" in text
    assert "head+0.2564.0 %33.3 %" in text
    assert "cosinewholevisual" in text.replace(" ", "")


def test_tokens_carry_their_number_and_colour(run_dir: Path) -> None:
    html = html_of(run_dir)
    tokens = re.findall(
        r'<span class="token tint (\w+)[^"]*" style="--strength:(\d+)[^"]*" tabindex="0">(.*?)<span', html, re.S
    )
    by_text = {text: (side, int(level)) for side, level, text in tokens}
    assert by_text["a"] == ("raised", 100)
    assert by_text["long"] == ("lowered", 100)
    assert by_text["red"] == ("lowered", 75)
    assert by_text["é"] == ("raised", 50), "1.0 of the half before it and 0.5 of its own"
    assert by_text["↵\n"] == ("lowered", 13)
    for value in ("+3.50", "−9.00", "−2.25", "+1.50"):
        assert f'<span class="number" dir="ltr">{value}<' in html


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
        measured = {"accuracy": accuracy, "standard": 0.125}
        source = (
            {"source": "all rows of rows.jsonl", "trained_on": True} if accuracy > 0.5 else {}
        )  # older ones have none
        record = {"rows": 64, **source, "with_image": measured, "without_image": {"accuracy": 0.5, "standard": None}}
        path.write_text(json.dumps(record))
    (run_dir / "eval_notes.json").write_text('["no evaluation"]')
    text = " ".join(page_of(run_dir).text.split())
    assert "20 25.0 % 50.0 % 0.125 – 64 – checkpoint-20/eval.json".replace(" ", "") in text.replace(" ", "")
    seen = "60 81.2 % 50.0 % 0.125 – 64 all rows of rows.jsonl, which it was trained on eval.json"
    assert seen.replace(" ", "") in text.replace(" ", "")
    assert "with image 81.2" in text


def test_a_plain_run_has_no_gradients_and_no_colour(run_dir: Path) -> None:
    names = ("loss/standard", "entropy", "time/rollout", "time/teacher", "time/student")
    records = [start(method="opd"), completion(1, [" a", " b"], None)]
    records += [{**logged(step), "values": {name: metrics(step)[name] for name in names}} for step in (1, 2, 3)]
    write(run_dir, records)
    page = page_of(run_dir)
    assert "Plain distillation runs no masked teacher" in page.text
    assert "Gradients" not in page.text
    assert not any("token" in (attributes.get("class") or "") for _, attributes in page.tags)


# ---------------------------------------------------------------------- hostile text


def test_text_is_escaped_and_the_page_stands_alone(run_dir: Path) -> None:
    html = html_of(run_dir)
    page = Page(html)
    assert HOSTILE in page.text
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert "href" not in attributes
    assert not re.search(r"url\(|@import", html)


@pytest.mark.parametrize("field", ["student", "teacher", "method", "note"])
def test_settings_are_escaped(run_dir: Path, field: str) -> None:
    write(run_dir, [start(**{field: HOSTILE}), logged(1)])
    assert HOSTILE in page_of(run_dir).text


def test_module_names_are_escaped(run_dir: Path) -> None:
    write(run_dir, [start(), {**MODULES, "names": [HOSTILE, "b", "c"]}, logged(1)])
    assert HOSTILE in page_of(run_dir).text


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/passwd", "notes.txt", "text.png", "gone.png", ".", "x" * 300 + ".png", "a\0.png"]
)
def test_only_pictures_of_the_run_are_embedded(run_dir: Path, name: str) -> None:
    (run_dir / "secret.png").write_text("secret")
    for text in ("notes.txt", "text.png"):
        (run_dir / IMAGE_FOLDER / text).write_text("secret")
    write(run_dir, [start(), logged(1), completion(1, ["a"], [1.0], images=[name, "0123.png"])])
    page = page_of(run_dir)
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "1 picture left out: gone, or not in the folder of the run." in page.text


@pytest.mark.parametrize("link", ["file", "folder", "recording"])
def test_a_link_out_of_the_run_is_not_followed(run_dir: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "private"
    outside.mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(outside / "0123.png")
    (outside / "passwd").write_text("root:x:0:0")
    images = run_dir / IMAGE_FOLDER
    if link == "file":
        for name, target in (("0123.png", "0123.png"), ("0000.png", "passwd")):
            (images / name).unlink(missing_ok=True)
            (images / name).symlink_to(outside / target)
    elif link == "folder":
        images.rename(tmp_path / "moved")
        images.symlink_to(outside)
    else:
        (outside / "images").mkdir()
        (outside / "0123.png").rename(outside / "images" / "0123.png")
        (run_dir / "recording" / "log.jsonl").rename(outside / "log.jsonl")
        (run_dir / "recording").rename(tmp_path / "moved")
        (run_dir / "recording").symlink_to(outside)
    write(run_dir, [start(), logged(1), completion(1, ["a"], [1.0], images=["0123.png", "0000.png"])])
    html = html_of(run_dir)
    assert "<img" not in html
    assert base64.b64encode(b"root:x:0:0").decode() not in html
    assert "2 pictures left out" in html


def test_a_run_that_is_reached_by_a_link_shows_its_pictures(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run_dir)
    (run_dir / IMAGE_FOLDER / "again.png").symlink_to("0123.png")
    write(run_dir, [start(), logged(1), completion(1, ["a"], [1.0], images=["0123.png", "again.png"])])
    assert html_of(tmp_path / "link").count("<img") == 2


def test_what_cannot_be_seen_is_written_out(run_dir: Path) -> None:
    assert visible("a\x00b\x1b[31m\u202egnp.exe\u2066") == "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+202E⟩gnp.exe⟨U+2066⟩"
    assert visible("\ud83d") == "⟨U+D83D⟩"
    assert visible("tab\tline\nمرحبا 👩‍🚀") == "tab\tline\nمرحبا 👩‍🚀"
    write(run_dir, [start(), logged(1), completion(1, ["\ud83d", "\x00", "\u202e"], [1.0, 1.0, 1.0])])
    text = write_report([run_dir]).read_text(encoding="utf-8")
    assert "⟨U+D83D⟩" in text
    assert "⟨U+202E⟩" in text
