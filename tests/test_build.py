"""The build script decides what can be built without a compiler, without torch, without nvcc; and the report of
`python -m vgs_kernels`."""

from __future__ import annotations

import builtins
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vgs_kernels import backend, backend_report

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("VGS_KERNELS_PURE_PYTHON", "FORCE_CUDA", "FORCE_ONLY_CPU", "CXX")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    specification = importlib.util.spec_from_file_location("vgs_setup", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "vgs_setup", module)
    specification.loader.exec_module(module)
    return module


def test_no_compiler(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    decision = script.plan()
    assert not decision.native
    assert "C++ compiler" in decision.reason
    script.announce(decision)
    assert "PURE-PYTHON INSTALL" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1 is set, but no C\+\+ compiler"):
        script.plan()


def test_no_torch(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "cxx_compiler", lambda: "/usr/bin/c++")
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError("hidden")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    decision = script.plan()
    assert not decision.native
    assert "--no-build-isolation" in decision.reason


def test_switches(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "cxx_compiler", lambda: "/usr/bin/c++")
    assert script.plan(sources=[]).native
    assert not script.plan(sources=[]).cuda
    monkeypatch.setenv("FORCE_ONLY_CPU", "1")
    decision = script.plan(sources=["csrc/cuda/some.cu"])
    assert decision.native
    assert not decision.cuda
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_ONLY_CPU=1 is set"):
        script.plan(sources=["csrc/cuda/some.cu"])
    monkeypatch.setenv("VGS_KERNELS_PURE_PYTHON", "1")
    monkeypatch.delenv("FORCE_CUDA")
    assert not script.plan(sources=[]).native


def test_the_version_says_what_was_built(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "cxx_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for missing, built in (("", "0.1.0+cu130"), ("nvcc was not found", "0.1.0+cpu.no.nvcc"), ("set", "0.1.0+cpu")):
        monkeypatch.setattr(script, "_missing_for_cuda", lambda sources, missing=missing: missing)
        assert script.version(script.plan(sources=[])) == built
    monkeypatch.setenv("VGS_KERNELS_PURE_PYTHON", "1")
    assert script.version(script.plan(sources=[])) == "0.1.0+pure"
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert script.version(script.plan(sources=[])) == "0.1.0"


def test_old_torch(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "cxx_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    assert "older than 2.13" in script.plan(sources=[]).reason


def test_install_without_a_compiler_works(tmp_path: Path) -> None:
    """A real install from a copy of the sources, with a PATH that has no compiler, and a call of every op in it."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("vgs_kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".typed", ".cpp", ".h", ".cu", ".cuh"):
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    (source / "python" / "vgs_distill").mkdir(parents=True)
    (source / "python" / "vgs_distill" / "__init__.py").touch()
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES} | {"PATH": str(tmp_path / "nothing")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", str(target), str(source)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Successfully installed vgs-kernels-0.1.0+pure.no.compiler" in done.stdout  # what pip shows without -v
    assert not list(target.rglob("*.so"))
    # The import hook of an editable install would find the compiled extension of the checkout.
    run = (
        "import runpy, sys; "
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]; "
        "runpy.run_module('vgs_kernels', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", run],
        env=environment | {"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vgs-kernels 0.1.0+pure.no.compiler, torch ")
    assert "stream_kl" in done.stdout
    assert "faster: native: the compiled extension is not in this install" in done.stdout


def test_report_names_every_op() -> None:
    text = backend_report()
    for row in backend.status():
        assert row.op in text
        assert row.active in text


def test_an_extension_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if backend._native_problem() is not None:
        pytest.skip(f"native backend: {backend._native_problem()}")
    assert backend._outdated_operators() == []
    text = backend._SCHEMAS.read_text()
    changed = text.replace('"transpose(Tensor input, ', '"transpose(Tensor matrix, ')
    assert changed != text
    schemas = tmp_path / "extension.cpp"
    schemas.write_text(changed.replace('m.def("cpu_level', 'm.def("of_tomorrow() -> int");\n  m.def("cpu_level'))
    monkeypatch.setattr(backend, "_SCHEMAS", schemas)
    assert backend._outdated_operators() == ["transpose", "of_tomorrow"]
    problem = backend._native_problem.__wrapped__()
    assert "older than the Python files (it lacks transpose, of_tomorrow): install again" in problem
