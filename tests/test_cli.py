"""The `vgs` command: help, doctor, and one sentence with a non-zero exit for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from vgs_distill.cli import app

from vgs_kernels import backend

runner = CliRunner()


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("train", "eval", "demo", "doctor", "bench"):
        assert command in result.output


def test_doctor_names_the_backend_of_every_op() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for row in backend.status():
        assert row.op in result.output
        assert row.active in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gamma", "1.5"], "gamma must lie between 0"),
        (["--steps", "0"], "steps must be 1 or more"),
        (["--jobs", "0"], "jobs must be 1 or more"),
    ],
)
def test_bad_demo_arguments_are_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("vgs: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_an_unknown_task_is_refused() -> None:
    result = runner.invoke(app, ["demo", "--task", "letters"])
    assert result.exit_code == 2
    assert "letters" in result.output


def test_an_unwritable_output_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path / "file" / "run")])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
