"""`vgs report --watch` in a process of its own, on a log that grows, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vgs_distill.report.log import LOG_FILE

from tests.report.recorded_run import records_of, write


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it did not happen within a minute"
        time.sleep(0.05)


def text_of(page: Path) -> str:
    return page.read_text() if page.exists() else ""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_the_page_follows_the_run_until_it_is_interrupted(run_dir: Path, tmp_path: Path) -> None:
    records, page = records_of(run_dir), tmp_path / "page.html"
    write(run_dir, records[:1])
    process = subprocess.Popen(
        [sys.executable, "-m", "vgs_distill", "report", str(run_dir), "--watch", "--output", str(page)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Waiting for the first log, for {page}; Ctrl-C ends it\n"
        write(run_dir, records[:13])
        assert process.stdout.readline() == f"Written: {page}, and again after every log; Ctrl-C ends it\n"
        assert "Step 10 of 60" in text_of(page)
        assert '<meta http-equiv="refresh" content="10">' in text_of(page)
        write(run_dir, records[:23], end='\n{"kind": "met')
        wait_for(lambda: "Step 20 of 60" in text_of(page), process)
        (run_dir / "eval.json").write_text(
            '{"rows": 8, "with_image": {"accuracy": 0.875, "standard": 1},'
            ' "without_image": {"accuracy": 0.5, "standard": 2}}'
        )
        wait_for(lambda: "87.5 %" in text_of(page), process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (0, "", "")
    assert "Step 20 of 60" in text_of(page)
    assert "http-equiv" not in text_of(page), "what is left does not reload itself"


def test_a_folder_that_is_no_run_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vgs_distill", "report", str(tmp_path), "--watch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"it has no {LOG_FILE}" in done.stderr
