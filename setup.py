"""Builds the compiled kernels where that is possible, a pure-Python package where it is not.

Everything static lives in pyproject.toml. There are two libraries, both on torch's stable ABI and Python's limited API:

* `vgs_kernels._C`, the schemas of all operators and the kernels for CPUs. One build serves torch >= 2.11, whatever GPU
  that is built for, and CPython >= 3.10. It needs an importable torch (`pip install --no-build-isolation .`) and a
  C++20 compiler.
* `vgs_kernels._C_cuda`, the kernels for CUDA: also nvcc, of the major version of torch's CUDA. No GPU is needed.

Compilers are tried before anything is decided. What fails is left out, CUDA first, then both, and named; a failure in
the sources themselves, later, has the same end.

Environment:
    VGS_KERNELS_PURE_PYTHON=1   skip the extension
    FORCE_ONLY_CPU=1            leave the CUDA sources out
    FORCE_CUDA=1                fail where they cannot be built, instead of leaving them out
    CXX, CUDA_HOME              the C++ compiler and the CUDA toolkit
    TORCH_CUDA_ARCH_LIST        GPU architectures, as everywhere in PyTorch
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY, CUDA_LIBRARY = "vgs_kernels._C", "vgs_kernels._C_cuda"
MINIMUM_TORCH = (2, 11)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
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
# What is asked of a compiler before it is trusted: C++20, vectors, Python's headers, linking.
CXX_TRIAL = """
#include <Python.h>
#include <bit>
typedef float Row __attribute__((vector_size(16)));
extern "C" Row trial(Row a) { return __builtin_shufflevector(a, a, 0, 4, 1, 5); }
"""
CUDA_TRIAL = "#include <cuda_bf16.h>\n__global__ void trial(float* x) { *x = 1.0f; }\n"


@dataclass(frozen=True)
class Plan:
    """What to build, and why not more."""

    native: bool
    cuda: bool
    reason: str
    label: str  # behind the version and a plus: pip shows that, where it hides what a build prints


class Missing(Exception):
    """Why something is not built, and the label that says so."""

    def __init__(self, reason: str, label: str) -> None:
        super().__init__(reason)
        self.label = label


def plan() -> Plan:
    """Decide what can be built here. Raises only where FORCE_CUDA asks for the impossible."""
    native = False
    try:
        _check_cpu_build()
        native = True
        _check_cuda_build()
    except Missing as missing:
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"vgs-kernels: FORCE_CUDA=1 is set, but {missing}") from None
        return Plan(native=native, cuda=False, reason=str(missing), label=missing.label)
    import torch

    return Plan(native=True, cuda=True, reason="", label=f"cu{str(torch.version.cuda).partition('.')[0]}")


def _check_cpu_build() -> None:
    """Raise `Missing` where `_C` cannot be built."""
    if os.environ.get("VGS_KERNELS_PURE_PYTHON") == "1":
        raise Missing("VGS_KERNELS_PURE_PYTHON=1 is set", "pure")
    if sys.platform == "win32":
        raise Missing("the sources need GCC or Clang, which Windows builds of PyTorch do not use", "pure.on.windows")
    compiler = cxx_compiler()
    if compiler is None:
        raise Missing("no C++ compiler was found (c++, g++ or clang++ on the PATH, or $CXX)", "pure.no.compiler")
    nvcc = shutil.which("nvcc")
    if nvcc and not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        os.environ["CUDA_HOME"] = _toolkit(nvcc)  # before torch looks for it
    try:
        import torch
    except ImportError:
        raise Missing(
            "torch cannot be imported at build time; install it first and use `pip install --no-build-isolation`",
            "pure.no.torch",
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        raise Missing(f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}", "pure.old.torch")
    flags = ["-std=c++20", "-fPIC", "-shared", "-I" + sysconfig.get_paths()["include"]]
    if complaint := try_compiler([compiler, *flags], CXX_TRIAL, "trial.cpp"):
        raise Missing(f"{compiler} cannot build an extension in C++20: {complaint}", "pure.compiler.failed")


def _check_cuda_build() -> None:
    """Raise `Missing` where `_C_cuda` cannot be built beside `_C`."""
    if os.environ.get("FORCE_ONLY_CPU") == "1":
        raise Missing("FORCE_ONLY_CPU=1 is set", "cpu")
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA", "cpu")
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        raise Missing("nvcc was not found (on the PATH, or under CUDA_HOME)", "cpu.no.nvcc")
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", report)
    if found and found[1] != torch.version.cuda.partition(".")[0]:
        raise Missing(
            f"{nvcc} is of CUDA {found[1]}.{found[2]}, torch {torch.__version__} of CUDA {torch.version.cuda}; their "
            "major versions must be the same",
            f"cpu.nvcc.{found[1]}.{found[2]}",
        )
    if complaint := try_compiler([str(nvcc), "-c", "-std=c++20", *cuda_architectures()], CUDA_TRIAL, "trial.cu"):
        raise Missing(f"{nvcc} cannot compile a kernel: {complaint}", "cpu.nvcc.failed")


def try_compiler(command: list[str], source: str, name: str) -> str:
    """What a compiler complains of first when it is given a source; empty where it builds that."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(source)
        command = [*command, name, "-o", "trial.out"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = (done.stderr + done.stdout).splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[0]).strip()


def cuda_architectures() -> list[str]:
    """nvcc's flags for the GPUs to build for: TORCH_CUDA_ARCH_LIST, those that are here, or all that matter. Imports
    torch."""
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if not torch.cuda.is_available():
        version = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
        architectures = "8.0;9.0;10.0;12.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    return _get_cuda_arch_flags()


def _toolkit(nvcc: str) -> str:
    """The CUDA toolkit of an `nvcc`, from nvcc itself: torch takes the folder above the one it finds nvcc in, which is
    wrong, and fails on `-lcudart`, where that file is a symbolic link or a script."""
    report = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", report.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent)


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


def build_arguments(decision: Plan) -> dict:
    """The arguments of `setup` that build the libraries. Imports torch."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    levels = [name for name, flags in INSTRUCTION_SETS.items() if not flags or (is_x86 and compiles_for(flags))]
    return {
        "ext_modules": libraries(decision, levels),
        "cmdclass": {
            "build_ext": build_step([(u, name) for u, wanted in UNITS.items() for name in wanted if name in levels])
        },
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def libraries(decision: Plan, levels: list[str]) -> list[Extension]:
    """`_C`, and `_C_cuda` where it was decided on."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    common = [*STABLE_ABI, "-I" + str(ROOT / "csrc")]
    headers = ["setup.py", *_sources("csrc", "*.h"), *_sources("csrc/cpu", "*.h"), *_sources("csrc/cuda", "*.*h")]
    sources = _sources("csrc", "*.cpp") + _sources("csrc/cpu", "*.cpp")
    cpu = CppExtension(
        CPU_LIBRARY,
        [path for path in sources if Path(path).stem not in UNITS],
        extra_compile_args={"cxx": [*CXX_FLAGS, *common, *(f"-DVGS_HAVE_{name.upper()}" for name in levels)]},
        py_limited_api=True,
        depends=headers + sources,
    )
    if not decision.cuda:
        return [cpu]
    # What the library can run on, as nvcc is told: code=sm_90 -> sm_90. Python reads it (vgs_kernels/backend.py).
    targets = ".".join(re.findall(r",code=(\w+)", " ".join(cuda_architectures())))
    flags = [*common, "-DUSE_CUDA", f"-DVGS_CUDA_ARCHITECTURES={targets}"]
    cuda = CUDAExtension(
        CUDA_LIBRARY,
        _sources("csrc/cuda", "*.cpp") + _sources("csrc/cuda", "*.cu"),
        extra_compile_args={"cxx": [*CXX_FLAGS, *flags], "nvcc": ["-O3", *flags]},
        py_limited_api=True,
        depends=headers,
    )
    return [cpu, cuda]


def build_step(units: list[tuple[str, str]]) -> type:
    """torch's build step, plus the objects that need flags of their own; a library that fails is left out."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self):  # type: ignore[no-untyped-def]
            while self.extensions:
                try:
                    return super().build_extensions()
                except Exception as error:  # torch refuses a compiler that passed the trial
                    self._leave_out(self.extensions[-1], error)

        def build_extension(self, extension):  # type: ignore[no-untyped-def]
            try:
                if extension.name == CPU_LIBRARY:
                    extension.extra_objects += self._unit_objects()
                super().build_extension(extension)
            except Exception as error:
                self._leave_out(extension, error)

        def _leave_out(self, extension: Extension, error: Exception) -> None:
            """Go on without a library; without the first there is none, since that holds the schemas."""
            if os.environ.get("FORCE_CUDA") == "1":
                raise error
            self.extensions[:] = [] if extension.name == CPU_LIBRARY else self.extensions[:1]
            print(f"{error}\n\nvgs-kernels: BUILDING {extension.name} FAILED, see above", file=sys.stderr)
            announce(Plan(bool(self.extensions), cuda=False, reason=f"{extension.name} does not build", label=""))

        def copy_extensions_to_source(self):  # type: ignore[no-untyped-def]
            """Of an editable install: a library that is no longer built must not stay as it was."""
            super().copy_extensions_to_source()
            built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
            for path in (ROOT / "vgs_kernels").glob("_C*.so"):
                if path.name not in built:
                    path.unlink()

        def _unit_objects(self) -> list[str]:
            folder = Path(self.build_temp) / "units"
            folder.mkdir(parents=True, exist_ok=True)

            def build(unit: str, name: str) -> str:
                source, target = ROOT / "csrc" / "cpu" / f"{unit}.cpp", folder / f"{unit}_{name}.o"
                command = [cxx_compiler(), "-std=c++20", "-fPIC", *CXX_FLAGS, *INSTRUCTION_SETS[name]]
                self.spawn([*command, f"-DVGS_LEVEL={name}", "-c", str(source), "-o", str(target)])
                return str(target)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                return list(pool.map(build, *zip(*units, strict=True)))

    return Build


def _sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def version(decision: Plan) -> str:
    """The version with what was built behind a plus, such as 0.1.0+cu13; an sdist is built into nothing yet."""
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
        message = "building the compiled kernels for CPU and CUDA"
    else:
        message = f"building the compiled kernels FOR CPU ONLY: {decision.reason}."
    print(f"vgs-kernels: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    decision = plan()
    announce(decision)
    setup(version=version(decision), **(build_arguments(decision) if decision.native else {}))
