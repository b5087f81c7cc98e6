"""The `vgs` command: help, doctor, and one sentence with a non-zero exit for bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vgs_distill.commands.cli import app

from vgs_kernels import backend, selftest
from vgs_kernels.selftest import self_test

runner = CliRunner()


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("train", "eval", "report", "demo", "doctor", "bench"):
        assert command in result.output


def test_doctor_names_the_backend_of_every_op() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for row in backend.status():
        assert row.op in result.output
        assert row.active in result.output
    assert "transformers" in result.output
    assert "CPU:" in result.output


def test_the_self_test_runs_every_backend_of_every_op() -> None:
    checks = self_test()
    assert {check.op for check in checks} == {"linear_decomposed_kl", *(row.op for row in backend.status())}
    for row in backend.status():
        tested = [check.backend for check in checks if (check.op, check.device) == (row.op, row.device)]
        assert set(tested) == set(backend.available(row.op, row.device))
        assert {row.active, "reference"} <= set(tested)
    assert all(check.passed and 0 <= check.error < 0.1 for check in checks)


def test_doctor_fails_where_a_backend_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.gradient_gramian

    def wrong_on_foreach(*gradients: Any, backend: str) -> Any:
        return right(*gradients, backend=backend) * (1.001 if backend == "foreach" else 1.0)

    monkeypatch.setattr(selftest, "gradient_gramian", wrong_on_foreach)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "gradient_gramian computes wrongly on cpu with foreach" in result.output
    assert "WRONG" in result.output


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
