"""The `vgs` command: help, versions, doctor, what it needs of what is installed, and one sentence for bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.command_line import invoke
from vgs_kernels import backend, selftest
from vgs_kernels.selftest import self_test

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("train", "eval", "export", "report", "demo", "doctor", "bench")


def test_help_names_the_commands() -> None:
    result = invoke(["--help"])
    assert result.exit_code == 0
    for command in NAMES:
        assert f"\n  {command} " in result.stdout
    assert invoke([]).stdout == result.stdout


@pytest.mark.parametrize("command", ["export", "report", "demo", "doctor"])
def test_every_command_has_a_help_of_its_own(command: str) -> None:
    result = invoke([command, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"usage: vgs {command}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "vgs: vgs has no command 'trian'; did you mean 'train'?"),
        (["--verison"], "vgs: vgs has no flag '--verison'; did you mean '--version'?"),
        (["report"], "vgs: the following arguments are required: RUN_DIR"),
        (["report", "run", "--ouput", "x"], "vgs: vgs report has no flag '--ouput'; did you mean '--output'?"),
        (["demo", "--task", "letters"], "vgs: task cannot be 'letters'; choose from digits, shapes, easyvqa"),
        (["demo", "--steps", "ten"], "vgs: steps: invalid int value: 'ten'"),
    ],
)
def test_what_is_mistyped_is_one_sentence(arguments: list[str], sentence: str) -> None:
    result = invoke(arguments)
    assert result.exit_code == 2
    assert result.output == sentence + "\n"


def test_doctor_names_the_backend_of_every_op() -> None:
    result = invoke(["doctor"])
    assert result.exit_code == 0
    for row in backend.status():
        assert row.op in result.output
        assert row.active in result.output
    assert "transformers" in result.output
    assert "CPU:" in result.output


def test_the_self_test_runs_every_backend_of_every_op() -> None:
    checks = self_test()
    rows = [row for row in backend.status() if row.op != "decomposed_kl"]  # replaced by stream_kl
    assert {check.op for check in checks} == {"linear_reverse_kl", "linear_decomposed_kl", *(row.op for row in rows)}
    for row in rows:
        tested = [check.backend for check in checks if (check.op, check.device) == (row.op, row.device)]
        assert set(tested) == set(backend.available(row.op, row.device))
        assert {row.active, "reference"} <= set(tested)
    assert all(check.passed and 0 <= check.error < 0.1 for check in checks)


def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    command = [sys.executable, "-m", "vgs_distill", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as doctor:
        assert doctor.stdout is not None
        assert doctor.stderr is not None
        doctor.stdout.close()
        assert "Traceback" not in doctor.stderr.read()
    assert doctor.returncode == 141


def test_doctor_fails_where_a_backend_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.gradient_gramian

    def wrong_on_foreach(*gradients: Any, backend: str) -> Any:
        return right(*gradients, backend=backend) * (1.001 if backend == "foreach" else 1.0)

    monkeypatch.setattr(selftest, "gradient_gramian", wrong_on_foreach)
    result = invoke(["doctor"])
    assert result.exit_code == 1
    assert "gradient_gramian computes wrongly on cpu with foreach" in result.output
    assert "WRONG" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gamma", "1.5", "--method", "matched"], "gamma must lie between 0 and 1"),
        (["--eta", "exact"], "eta must be measured, amortized or a positive number"),
        (["--steps", "0"], "steps must be 1 or more"),
        (["--jobs", "0"], "jobs must be 1 or more"),
        (["--seeds", "0"], "seeds must be 1 or more"),
    ],
)
def test_bad_demo_arguments_are_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = invoke(["demo", "--output-dir", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("vgs: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_an_unwritable_output_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = invoke(["demo", "--output-dir", str(tmp_path / "file" / "run")])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


# ------------------------------------------------------------------ where torch is all that is installed


def needs(name: str, known: dict[str, Distribution]) -> Iterator[Distribution]:
    """A distribution and all that it requires here, extras left out."""
    if name in known:
        return
    known[name] = distribution(name)
    yield known[name]
    for line in known[name].requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from needs(requirement.name.lower(), known)


@pytest.fixture(scope="module")
def only_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with torch and what it requires, the very files that are installed here."""
    folder = tmp_path_factory.mktemp("packages")
    for found in needs("torch", {}):
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    return folder


def alone(packages: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python without its site-packages, with these packages and this checkout in their place."""
    path = os.pathsep.join(map(str, (packages, ROOT, ROOT / "python")))
    return subprocess.run(
        [sys.executable, "-S", *command],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_doctor_and_help_need_torch_only(only_torch: Path) -> None:
    assert "No module named" in alone(only_torch, "-c", "import transformers").stderr
    result = alone(only_torch, "-m", "vgs_distill", "doctor")
    assert result.returncode == 0, result.stderr
    assert "decomposed_kl" in result.stdout
    assert re.search(r"^transformers +not installed", result.stdout, re.MULTILINE)
    assert "pip install 'vgs-kernels[train]'" in result.stdout
    for flag in ("--help", "--version"):
        result = alone(only_torch, "-m", "vgs_distill", flag)
        assert result.returncode == 0, result.stderr
        assert "vgs" in result.stdout
    result = alone(only_torch, "-c", "import vgs_kernels; print(vgs_kernels.__version__)")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [("train", "--gamma", "1"), ("eval",), ("report", "run"), ("demo",)])
def test_the_other_commands_name_what_to_install(command: tuple[str, ...], only_torch: Path) -> None:
    result = alone(only_torch, "-m", "vgs_distill", *command)
    assert result.returncode == 2
    assert result.stderr == (
        "vgs: the engine needs trl >= 1.16, < 1.17, which is not installed; install it with: "
        "pip install 'vgs-kernels[train]'\n"
    )


def test_an_import_of_the_engine_names_what_to_install(only_torch: Path) -> None:
    result = alone(only_torch, "-c", "from vgs_distill import VGSTrainer")
    assert result.stderr.splitlines()[-1].endswith("install it with: pip install 'vgs-kernels[train]'")


def test_a_library_of_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vgs_distill.report.run", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "vgs_distill.report.run")
    monkeypatch.delitem(sys.modules, "vgs_distill.report.page", raising=False)
    result = invoke(["report", "run"])
    assert result.exit_code == 2
    assert "vgs report needs jinja2, which is not installed; install it with: pip install" in result.stderr
