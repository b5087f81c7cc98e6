"""The one place that chooses: precedence, refusals, the single warning of a fallback, and the status report."""

from __future__ import annotations

import importlib.machinery
import logging
import subprocess
import sys
import types
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
    monkeypatch.setattr(backend, "_native_problem", lambda: "the compiled kernels are not in this install")
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


@pytest.mark.parametrize(
    ("targets", "runs", "does_not"),
    [
        ("sm_80.sm_90", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("sm_86.compute_90", [(8, 6), (8, 9), (9, 0), (10, 3), (12, 1)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100f.sm_120", [(10, 0), (10, 3), (12, 0), (12, 1)], [(9, 0), (11, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(targets: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(backend._runs_on(targets, capability) for capability in runs)
    assert not any(backend._runs_on(targets, capability) for capability in does_not)


def test_cuda_kernels_of_another_architecture_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Native where it is built for the GPU at hand, then Triton, then plain torch on lists."""
    library = types.ModuleType("vgs_kernels._C_cuda")
    library.architectures = "sm_80.sm_90"  # type: ignore[attr-defined]
    library.__spec__ = importlib.machinery.ModuleSpec("vgs_kernels._C_cuda", None)
    monkeypatch.setitem(sys.modules, "vgs_kernels._C_cuda", library)
    monkeypatch.setattr(backend, "_native_problem", lambda: None)
    monkeypatch.setattr(backend, "_triton_problem", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, chosen in (((9, 0), "native"), ((12, 0), "triton")):
        backend._cuda_problem.cache_clear()
        backend._automatic.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        for op in ("gradient_gramian", "combine_gradients"):
            assert backend._automatic(op, torch.device("cuda", 0)) == chosen
    assert "for sm_80, sm_90, and this GPU is sm_120: install again with TORCH_CUDA_ARCH_LIST=12.0" in caplog.text
    monkeypatch.setattr(backend, "_triton_problem", lambda device_type: "triton is not installed")
    backend._automatic.cache_clear()
    assert backend._automatic("combine_gradients", torch.device("cuda", 0)) == "foreach"
    backend._cuda_problem.cache_clear()


def test_triton_needs_a_c_compiler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter launches nothing")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "Triton needs a C compiler to launch kernels" in str(backend._triton_problem.__wrapped__("cuda"))


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
