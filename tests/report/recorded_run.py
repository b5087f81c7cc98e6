"""A recorded run on disk, written by hand so that every number of it is known, and a browser to look at its page."""

from __future__ import annotations

import html as markup
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vgs_distill.report.log import IMAGE_FOLDER, LOG_FILE, read_run
from vgs_distill.report.run import render_runs

from tests.html_page import Page

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'&amp;"
STEPS = 60


def metrics(step: int) -> dict[str, float]:
    lang, vis = 1 / step, 2 / step + 0.01
    return {
        "loss/lang": lang,
        "loss/vis": vis,
        "loss/standard": lang + vis,
        "entropy": 1 + 1 / step,
        "gradient/cosine": 0.3 - step / 100,
        "gradient/norm_standard": 1 + step / 7,
        "gradient/norm_vis": 3.0,
        "steering/gamma": 0.5 + step / 200,
        "completions/mean_length": 9 - step / 20,
        "learning_rate": 1e-6 * (1 - step / 100),
        "steering/weight_ratio": 4 + step / 13,
        "steering/eta": 0.5 - step / 300,
        "steering/language_preservation": 0.01,
        "dependency": 0.3 + step / 90,
        "runaway/divergence_growth": 1 + step / 50,
        "runaway/weight_growth": 1 + step / 40,
        "runaway/language_growth": 1 + step / 70,
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
    record |= {"teacher": None, "reference": None, "dependency": None}
    return {**record, "tokens": tokens, "log_ratios": log_ratios, **changes}


def start(step: int = 0, **settings: Any) -> dict[str, Any]:
    shown = {"student": "org/student", "teacher": "org/teacher", "method": "vgs"}
    return {
        "kind": "start",
        "step": step,
        "time": 1e9,
        "max_steps": STEPS,
        "teacher_silent": None,
        "angles_silent": None,
        "settings": {**shown, "gamma": 2.0} | settings,
    }


def logged(step: int) -> dict[str, Any]:
    return {"kind": "metrics", "step": step, "time": 1e9 + 2 * step, "values": metrics(step)}


MODULES = {
    "kind": "modules",
    "step": 1,
    "time": 1e9,
    "names": ["vision tower", "decoder layer 0", "head"],
    "parts": ["standard", "vis"],
    "norms_first": [0.0, 3.0, 4.0],
    "norms_second": [1.0, 1.0, 1.0],
    "cosines": [None, -0.5, 0.25],
}


def angles(step: int) -> dict[str, Any]:
    tenths = range(1, 11)
    return {
        "kind": "dependency",
        "step": step,
        "time": 1e9,
        "tokens": [40] * 10,
        "dependency": [tenth**2 / 50 for tenth in tenths],
        "norm_standard": [0.5 * tenth for tenth in tenths],
        "norm_vis": [0.4 * tenth for tenth in tenths],
        "norm_lang": [3.0 / tenth for tenth in tenths],
        "angle_lang_vis": [None, *(60.0 + 3 * tenth + step / 30 for tenth in tenths[1:])],
        "angle_standard_vis": [30.0 + tenth for tenth in tenths],
        "angle_standard_lang": [65.0 - tenth for tenth in tenths],
    }


def thirds(step: int) -> dict[str, Any]:
    losses = {
        part: [scale / step, 2 * scale / step, 4 * scale / step] for part, scale in (("standard", 3.0), ("vis", 2.0))
    }
    record = {"kind": "thirds", "step": step, "time": 1e9, "tokens": [130, 130, 140]}
    return {**record, **losses, "lang": [0.1, 0.2, 0.1 + step / 100]}


def write(folder: Path, records: list[dict[str, Any]], end: str = "\n") -> None:
    (folder / LOG_FILE).write_text("\n".join(map(json.dumps, records)) + end)


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def html_of(folder: Path) -> str:
    return render_runs({folder.name: read_run(folder)})


def page_of(folder: Path) -> Page:
    return Page(html_of(folder))


def finished_run(folder: Path) -> Path:
    """A finished run of 60 steps in `folder`."""
    (folder / IMAGE_FOLDER).mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / IMAGE_FOLDER / "0123.png")
    records = [
        start(),
        MODULES,
        completion(
            1,
            [HOSTILE, " مرحبا", "\n", " red", "", "é"],
            [0.1, 1.5, -0.4, -2.25, 1.0, 0.5],
            prompt=HOSTILE,
            teacher=f"the teacher says {HOSTILE}",
            reference="the truth",
            dependency=[0.0, 0.75, 0.2, 3.5, 0.125, 0.25],
        ),
        *(logged(step) for step in range(1, STEPS + 1)),
        {**MODULES, "step": STEPS},
        completion(STEPS, [" a", " long", " word " + "x" * 400], [3.5, -9.0, 0.0]),
        *(angles(step) for step in (1, STEPS)),
        *(thirds(step) for step in range(1, STEPS + 1)),
        {"kind": "end", "step": STEPS, "time": 1e9 + 130},
    ]
    write(folder, records)
    return folder


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
