"""The one place that chooses: precedence, refusals, the single warning of a fallback, and the status report."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from vgs_kernels import BackendUnavailableError, active_backends, backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    backend._automatic.cache_clear()
    yield
    backend._automatic.cache_clear()


def test_the_argument_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    assert backend.resolve("stream_kl", CPU, "reference") == "reference"


def test_the_variable_beats_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert backend.resolve("stream_kl", CPU) == "reference"


@pytest.mark.parametrize("name", ["fast", "cuda"])
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown backend '{name}'"):
        backend.resolve("stream_kl", CPU, name)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(ValueError, match=f"unknown backend '{name}'"):
        backend.resolve("stream_kl", CPU)


def test_an_explicit_choice_that_cannot_run_raises_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_native_problem", lambda: "the compiled extension is not in this install")
    monkeypatch.setitem(backend._MODULES["stream_kl"], "native", "vgs_kernels.stream_kl.native")
    with pytest.raises(BackendUnavailableError, match="'native' cannot run stream_kl on cpu: the compiled"):
        backend.resolve("stream_kl", CPU, "native")


def test_the_active_backends_are_those_that_calls_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert active_backends(CPU) == {row.op: row.active for row in backend.status() if row.device == "cpu"}
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert set(active_backends(CPU).values()) == {"reference"}


def test_a_fallback_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_native_problem", lambda: "no compiler when it was installed")
    monkeypatch.setitem(backend._MODULES["stream_kl"], "native", "vgs_kernels.stream_kl.native")
    monkeypatch.setitem(backend._PREFERENCE["stream_kl"], "cpu", ("native", "reference"))
    with caplog.at_level(logging.WARNING, logger="vgs_kernels"):
        assert backend.resolve("stream_kl", CPU) == "reference"
        assert backend.resolve("stream_kl", CPU) == "reference"
    assert caplog.text.count("no compiler when it was installed") == 1


def test_importing_the_package_leaves_the_compiler_alone() -> None:
    seen = "import sys, vgs_kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_choice_is_a_constant_to_the_compiler() -> None:
    def same(value: int) -> int:
        return value

    torch.compiler.assume_constant_result(same)
    marks = vars(same)
    assert marks
    assert marks.items() <= vars(backend._chosen_and_loaded).items()


def test_status_names_what_runs_every_op() -> None:
    rows = {row.op: row for row in backend.status() if row.device == "cpu"}
    assert set(rows) == {"stream_kl", "gradient_gramian", "combine_gradients"}
    for row in rows.values():
        assert backend.resolve(row.op, CPU) == row.active
