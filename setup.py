"""Builds the compiled extension `vgs_kernels._C` where that is possible, a pure-Python package where it is not.

Everything static lives in pyproject.toml. The extension uses torch's stable ABI and Python's limited API: one build
serves torch >= 2.13 and CPython >= 3.10. It needs an importable torch (`pip install --no-build-isolation .`) and a
C++20 compiler; CUDA sources are added when there are any, nvcc is found and torch has CUDA. No GPU is needed to build.

Environment:
    VGS_KERNELS_PURE_PYTHON=1   skip the extension
    FORCE_ONLY_CPU=1            leave the CUDA sources out
    FORCE_CUDA=1                fail where they cannot be built, instead of leaving them out
    TORCH_CUDA_ARCH_LIST        GPU architectures, as everywhere in PyTorch
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 13)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020d000000000000", "-DTORCH_STABLE_ONLY"]
# -std=c++20 alone would switch off the contraction of a * b + c, which the exponential is priced with. The warnings
# switched off are a note on the ABI of vectors passed between files (none are) and a false alarm in GCC 12's headers.
CXX_FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# Files that are compiled for instruction sets of their own, chosen at run time: never -march=native. `kernels.cpp` is
# compiled once for each of its sets, `products_amx.cpp` for one.
INSTRUCTION_SETS = {
    "baseline": [],  # the compiler's default
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mfma", "-mf16c"],
    "amx": ["-mavx512f", "-mavx512bw", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
UNITS = {"kernels": ("baseline", "avx2", "avx512", "avx512bf16"), "products_amx": ("amx",)}


@dataclass(frozen=True)
class Plan:
    """What to build, and why not more."""

    native: bool
    cuda: bool
    reason: str
    label: str  # behind the version and a plus: pip shows that, where it hides what a build prints


def plan(sources: list[str] | None = None) -> Plan:
    """Decide what can be built here. Raises only where FORCE_CUDA asks for the impossible."""
    if os.environ.get("VGS_KERNELS_PURE_PYTHON") == "1":
        return _without_extension("VGS_KERNELS_PURE_PYTHON=1 is set", "pure")
    if sys.platform == "win32":
        return _without_extension(
            "the sources need GCC or Clang, which Windows builds of PyTorch do not use", "pure.on.windows"
        )
    compiler = cxx_compiler()
    if compiler is None:
        return _without_extension(
            "no C++ compiler was found (c++, g++ or clang++ on the PATH, or $CXX)", "pure.no.compiler"
        )
    nvcc = shutil.which("nvcc")
    if nvcc and not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        os.environ["CUDA_HOME"] = _toolkit(nvcc)
    try:
        import torch
    except ImportError:
        return _without_extension(
            "torch cannot be imported at build time; install it first and use `pip install --no-build-isolation`",
            "pure.no.torch",
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return _without_extension(
            f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}", "pure.old.torch"
        )
    missing = _missing_for_cuda(cuda_sources() if sources is None else sources)
    if missing and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"vgs-kernels: FORCE_CUDA=1 is set, but {missing}")
    if not missing:
        return Plan(native=True, cuda=True, reason="", label=f"cu{(torch.version.cuda or '').replace('.', '')}")
    return Plan(native=True, cuda=False, reason=missing, label="cpu.no.nvcc" if "nvcc" in missing else "cpu")


def _toolkit(nvcc: str) -> str:
    """The CUDA toolkit of an `nvcc`, from nvcc itself: torch takes the folder above the one it finds nvcc in, which is
    wrong, and fails on `-lcudart`, where that file is a symbolic link or a script."""
    report = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", report.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent)


def _without_extension(reason: str, label: str) -> Plan:
    if os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"vgs-kernels: FORCE_CUDA=1 is set, but {reason}")
    return Plan(native=False, cuda=False, reason=reason, label=label)


def _missing_for_cuda(sources: list[str]) -> str:
    """Why CUDA sources are left out; empty when they are built."""
    if os.environ.get("FORCE_ONLY_CPU") == "1":
        return "FORCE_ONLY_CPU=1 is set"
    if not sources:
        return "there are no CUDA sources"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc was not found (on the PATH, or under CUDA_HOME)"
    return ""


def cxx_compiler() -> str | None:
    """The C++ compiler that torch will use, as a path."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def compiles_for(flags: list[str]) -> bool:
    """Whether the compiler knows the flags of an instruction set; an older one does without that set."""
    compiler = cxx_compiler()
    assert compiler is not None
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def cuda_sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def extension_arguments(decision: Plan) -> dict:
    """The arguments of `setup` that build the extension. Imports torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    known = [name for name, flags in INSTRUCTION_SETS.items() if not flags or (is_x86 and compiles_for(flags))]
    units = [(unit, name) for unit, wanted in UNITS.items() for name in wanted if name in known]
    sources = [
        str(path.relative_to(ROOT))
        for folder in ("csrc", "csrc/cpu")
        for path in sorted((ROOT / folder).glob("*.cpp"))
        if path.stem not in UNITS
    ]
    defines = [f"-DVGS_HAVE_{name.upper()}" for name in known]
    common = [*STABLE_ABI, *defines, "-I" + str(ROOT / "csrc")]
    compile_args = {"cxx": [*CXX_FLAGS, *common]}
    kind = CppExtension
    if decision.cuda:
        kind = CUDAExtension
        sources += cuda_sources()
        compile_args["cxx"].append("-DUSE_CUDA")
        compile_args["nvcc"] = ["-O3", *common, "-DUSE_CUDA"]
        if not torch.cuda.is_available():
            assert torch.version.cuda is not None
            version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
            architectures = "8.0;9.0;10.0;12.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)

    class Build(BuildExtension):
        """torch's build step, plus the objects that need flags of their own."""

        def build_extension(self, extension):  # type: ignore[no-untyped-def]
            folder = Path(self.build_temp) / "units"
            folder.mkdir(parents=True, exist_ok=True)

            def build(unit: str, name: str) -> str:
                source, target = ROOT / "csrc" / "cpu" / f"{unit}.cpp", folder / f"{unit}_{name}.o"
                command = [cxx_compiler(), "-std=c++20", "-fPIC", *CXX_FLAGS, *INSTRUCTION_SETS[name]]
                self.spawn([*command, f"-DVGS_LEVEL={name}", "-c", str(source), "-o", str(target)])
                return str(target)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(build, *zip(*units, strict=True)))
            extension.extra_objects += objects
            super().build_extension(extension)

    extension = kind(
        "vgs_kernels._C",
        sources,
        extra_compile_args=compile_args,
        py_limited_api=True,
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def version(decision: Plan) -> str:
    """The version with what was built behind a plus, such as 0.1.0+cpu; an sdist is built into nothing yet."""
    public = re.search(r'__version__ = "(.+)"', (ROOT / "vgs_kernels" / "version.py").read_text())
    assert public is not None
    return public[1] if "sdist" in sys.argv else f"{public[1]}+{decision.label}"


def announce(decision: Plan) -> None:
    if not decision.native:
        message = (
            f"PURE-PYTHON INSTALL, without the compiled kernels: {decision.reason}. Everything works, slower. "
            "`python -m vgs_kernels` shows what is active and how to get the rest."
        )
    elif decision.cuda:
        message = "building the compiled extension for CPU and CUDA"
    else:
        message = f"building the compiled extension for CPU ({decision.reason})"
    print(f"vgs-kernels: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    decision = plan()
    announce(decision)
    setup(version=version(decision), **(extension_arguments(decision) if decision.native else {}))
