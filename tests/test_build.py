"""The build script decides what can be built without a compiler, without torch, without nvcc; and the report of
`python -m vgs_kernels`."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

from vgs_kernels import backend, backend_report

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("VGS_KERNELS_PURE_PYTHON", "FORCE_CUDA", "FORCE_ONLY_CPU", "CXX", "CUDA_HOME", "CUDA_PATH", "CC")


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


@pytest.fixture
def machine(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script on a machine whose compilers pass every trial: a C++ compiler, nvcc of CUDA 13.0, torch for 13.0."""
    monkeypatch.setattr(script, "cxx_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(script, "try_compiler", lambda command, source, name: "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    toolkit_of(monkeypatch, tmp_path, "13.0")
    return script


def toolkit_of(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.85'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(folder))


def test_switches(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (machine.plan().native, machine.plan().cuda) == (True, True)
    monkeypatch.setenv("FORCE_ONLY_CPU", "1")
    assert (machine.plan().native, machine.plan().cuda) == (True, False)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_ONLY_CPU=1 is set"):
        machine.plan()
    monkeypatch.setenv("VGS_KERNELS_PURE_PYTHON", "1")
    monkeypatch.delenv("FORCE_CUDA")
    assert not machine.plan().native


def test_what_fails_is_left_out_and_the_version_says_so(
    machine: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def built() -> tuple[bool, bool, str]:
        decision = machine.plan()
        return decision.native, decision.cuda, machine.version(decision)

    assert built() == (True, True, "0.1.0+cu13")
    toolkit_of(monkeypatch, tmp_path, "13.2")
    assert built() == (True, True, "0.1.0+cu13")
    toolkit_of(monkeypatch, tmp_path, "12.6")
    assert built() == (True, False, "0.1.0+cpu.nvcc.12.6")
    assert "is of CUDA 12.6, torch" in machine.plan().reason
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1 is set, but .* is of CUDA 12\.6"):
        machine.plan()
    monkeypatch.delenv("FORCE_CUDA")
    toolkit_of(monkeypatch, tmp_path, "13.0")
    monkeypatch.setattr(machine, "try_compiler", lambda command, source, name: "error: no" * name.endswith(".cu"))
    assert built() == (True, False, "0.1.0+cpu.nvcc.failed")
    monkeypatch.setattr(machine, "try_compiler", lambda command, source, name: "error: no")
    assert built() == (False, False, "0.1.0+pure.compiler.failed")
    monkeypatch.setattr(machine, "try_compiler", lambda command, source, name: "")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    assert built() == (True, False, "0.1.0+cpu.no.nvcc")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert built() == (True, False, "0.1.0+cpu")
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert machine.version(machine.plan()) == "0.1.0"


def test_a_compiler_is_tried(script: ModuleType) -> None:
    compiler = script.cxx_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler here")
    assert script.try_compiler([compiler, "-fsyntax-only"], "int one = 1;", "trial.cpp") == ""
    assert "error" in script.try_compiler([compiler, "-fsyntax-only"], "#include <no_such_header>", "trial.cpp")


def test_old_torch(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert "older than 2.11" in machine.plan().reason
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    assert machine.plan().native


def test_one_floor(script: ModuleType) -> None:
    floor = ".".join(map(str, script.MINIMUM_TORCH))
    assert f'dependencies = ["torch>={floor}"]' in (ROOT / "pyproject.toml").read_text()
    assert f" torch=={floor}.0 " in (ROOT / "Makefile").read_text()
    assert (
        script.STABLE_ABI[0]
        == f"-DTORCH_TARGET_VERSION=0x{script.MINIMUM_TORCH[0]:02x}{script.MINIMUM_TORCH[1]:02x}{0:012x}"
    )


def test_a_library_that_does_not_build_is_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compilers passed their trials, and then the sources fail, or torch refuses them."""
    from setuptools import Distribution, Extension
    from torch.utils.cpp_extension import BuildExtension

    failing: set[str] = set()

    def build_extension(self: Any, extension: Extension) -> None:
        if extension.name in failing:
            raise RuntimeError(f"{extension.name}: internal compiler error")

    def build_extensions(self: Any) -> None:
        if "torch" in failing and len(self.extensions) > 1:
            raise RuntimeError("torch does not like this nvcc")
        for extension in self.extensions:
            self.build_extension(extension)

    monkeypatch.setattr(BuildExtension, "build_extension", build_extension)
    monkeypatch.setattr(BuildExtension, "build_extensions", build_extensions)
    step = script.build_step([])
    monkeypatch.setattr(step, "_unit_objects", lambda self: [])

    def built(*names: str) -> list[str]:
        failing.clear()
        failing.update(names)
        command = step(Distribution())
        command.extensions = [Extension(name, []) for name in (script.CPU_LIBRARY, script.CUDA_LIBRARY)]
        command.build_extensions()
        return [extension.name for extension in command.extensions]

    assert built() == [script.CPU_LIBRARY, script.CUDA_LIBRARY]
    assert capsys.readouterr().err == ""
    for failure in (script.CUDA_LIBRARY, "torch"):
        assert built(failure) == [script.CPU_LIBRARY]
        assert "BUILDING vgs_kernels._C_cuda FAILED" in capsys.readouterr().err
    assert built(script.CPU_LIBRARY) == []
    assert "PURE-PYTHON INSTALL, without the compiled kernels: vgs_kernels._C does not" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match="internal compiler error"):
        built(script.CUDA_LIBRARY)


def test_what_the_version_promises_is_there() -> None:
    """A library that failed after the version was decided: a broken source must not pass as a missing compiler."""
    try:
        label = importlib.metadata.version("vgs-kernels").partition("+")[2]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the sources, not installed")
    if label.startswith(("cpu", "cu")):
        assert backend._native_problem() is None
    if label.startswith("cu"):
        assert importlib.util.find_spec("vgs_kernels._C_cuda") is not None


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
    assert "Compiled kernels: none." in done.stdout
    assert "stream_kl" in done.stdout
    assert "faster: native: the compiled kernels are not in this install" in done.stdout


def test_report_names_every_op_and_what_was_built() -> None:
    text = backend_report()
    for library, said in (("_C", "Compiled kernels: for CPUs"), ("_C_cuda", ", and for CUDA (")):
        assert (said in text) == (importlib.util.find_spec(f"vgs_kernels.{library}") is not None)
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
    assert "older than the Python files (they lack transpose, of_tomorrow): install again" in problem
