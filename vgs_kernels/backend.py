"""Which implementation runs: the one place in the package that chooses.

Every op has a plain-torch `reference` implementation and may have faster ones. An explicit choice that cannot run
raises `BackendUnavailableError`; the automatic choice takes the first of the device's preference list that can, and
says once per op when that is not the first. Kernels never choose and never read the environment.

Order of precedence: the `backend=` argument of a call, then the environment variable `VGS_KERNELS_BACKEND`, then the
automatic choice.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

logger = logging.getLogger("vgs_kernels")

ENVIRONMENT_VARIABLE = "VGS_KERNELS_BACKEND"
BACKENDS = ("native", "triton", "foreach", "reference")

_Function = TypeVar("_Function", bound=Callable)

# op -> backend -> module. One op, one folder.
_MODULES: dict[str, dict[str, str]] = {
    "stream_kl": {
        "native": "vgs_kernels.stream_kl.native",
        "triton": "vgs_kernels.stream_kl.triton",
        "reference": "vgs_kernels.stream_kl.reference",
    },
    "gradient_gramian": {
        "native": "vgs_kernels.gradient_gramian.native",
        "triton": "vgs_kernels.gradient_gramian.triton",
        "foreach": "vgs_kernels.gradient_gramian.foreach",
        "reference": "vgs_kernels.gradient_gramian.reference",
    },
    "combine_gradients": {
        "native": "vgs_kernels.combine_gradients.native",
        "triton": "vgs_kernels.combine_gradients.triton",
        "foreach": "vgs_kernels.combine_gradients.foreach",
        "reference": "vgs_kernels.combine_gradients.reference",
    },
}

OPS = tuple(_MODULES)

# op -> device type -> backends, fastest first. "cuda" is also what PyTorch calls a ROCm device, for which nothing is
# compiled ahead. Of the ops on lists of tensors, foreach is plain torch that launches once for many tensors.
_LISTS = {
    "cpu": ("native", "foreach", "reference"),
    "cuda": (*(() if torch.version.hip else ("native",)), "triton", "foreach", "reference"),
}
_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "stream_kl": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "gradient_gramian": _LISTS,
    "combine_gradients": _LISTS,
}

# (op, backend) -> dtypes, where not every floating one. Kernels that accumulate in float32 cannot stand in for float64.
_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {
    ("stream_kl", "triton"): (torch.float32, torch.bfloat16, torch.float16)
}

# The schemas of the compiled operators, in a checkout; an install from a wheel has none and cannot be out of date.
_SCHEMAS = Path(__file__).resolve().parent.parent / "csrc" / "extension.cpp"


# Imported modules. torch.compile reads them here and does not trace imports.
_LOADED: dict[tuple[str, str], ModuleType] = {}


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run this op on this device."""


@dataclass(frozen=True)
class BackendStatus:
    """One row of the report of `status`: an op on a device type, what runs it, and what would be faster."""

    op: str
    device: str
    active: str
    missing: tuple[tuple[str, str], ...]  # (backend, why it cannot run and how to get it), fastest first


@cache
def _native_problem() -> str | None:
    """Why the compiled library cannot be used at all; None when it can."""
    if importlib.util.find_spec("vgs_kernels._C") is None:
        return (
            "the compiled kernels are not in this install: install torch first, then "
            "`pip install --no-build-isolation vgs-kernels` with a C++20 compiler on the PATH"
        )
    try:
        importlib.import_module("vgs_kernels._C")
    except ImportError as error:
        return f"the compiled kernels do not load ({error}): rebuild them against the installed torch"
    if missing := _outdated_operators():
        return f"the compiled kernels are older than the Python files (they lack {', '.join(missing)}): install again"
    return None


def compiled() -> str:
    """What the compiled kernels of this install are for, in words."""
    if importlib.util.find_spec("vgs_kernels._C") is None:
        return "none"
    if importlib.util.find_spec("vgs_kernels._C_cuda") is None:
        return "for CPUs"
    try:
        targets = importlib.import_module("vgs_kernels._C_cuda").architectures.replace(".", ", ")
    except ImportError:
        targets = f"another version than {torch.version.cuda or 'none'}"
    return f"for CPUs, and for CUDA ({targets})"


@cache
def _cuda_problem(index: int | None) -> str | None:
    """Why the compiled library of CUDA kernels cannot run on a GPU; None when it can."""
    if importlib.util.find_spec("vgs_kernels._C_cuda") is None:
        toolkit = (
            f"nvcc of CUDA {torch.version.cuda.partition('.')[0]}" if torch.version.cuda else "a CUDA build of torch"
        )
        return f"the compiled CUDA kernels are not in this install: install again with {toolkit} and FORCE_CUDA=1"
    try:
        targets = importlib.import_module("vgs_kernels._C_cuda").architectures
    except ImportError as error:
        return f"the compiled CUDA kernels do not load ({error}): rebuild them against the installed torch"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if not _runs_on(targets, (major, minor)):
        own, number = f"sm_{major}{minor}", f"{major}.{minor}"
        return (
            f"the compiled CUDA kernels are for {targets.replace('.', ', ')}, and this GPU is {own}: "
            f"install again with TORCH_CUDA_ARCH_LIST={number}"
        )
    return None


def _runs_on(targets: str, capability: tuple[int, int]) -> bool:
    """Whether code for `targets`, such as "sm_90.compute_120", runs on a GPU of that compute capability.

    Machine code runs on later minor versions of its major one, and what is left to the driver's compiler on anything
    later; a target that ends in "a" on nothing else, one that ends in "f" within its major version.
    """
    for kind, major, minor, suffix in re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", targets):
        built = (int(major), int(minor))
        anywhere = kind == "compute" and not suffix
        if built == capability or (suffix != "a" and built < capability and (anywhere or built[0] == capability[0])):
            return True
    return False


def _outdated_operators() -> list[str]:
    """Operators of the checkout that the compiled library has not, or with another schema: after a pull an editable
    install is left with yesterday's."""
    if not _SCHEMAS.exists():
        return []
    definitions = re.findall(r"m\.def\((.*?)\);", _SCHEMAS.read_text(encoding="utf-8"), re.DOTALL)
    wanted = [torch._C.parse_schema("vgs_kernels_native::" + "".join(re.findall(r'"(.*?)"', d))) for d in definitions]
    ops = torch.ops.vgs_kernels_native

    def is_built(name: str, schema: str) -> bool:
        return hasattr(ops, name) and str(getattr(ops, name).default._schema) == schema

    names = [schema.name.partition("::")[2] for schema in wanted]
    return [name for name, schema in zip(names, wanted, strict=True) if not is_built(name, str(schema))]


@cache
def _triton_problem(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device_type == "cpu":
        return "Triton kernels need a GPU tensor (or TRITON_INTERPRET=1, for tests)"
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler to launch kernels, and there is none (gcc or clang on the PATH, or $CC)"
    return None


def _constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, so that torch.compile does not trace imports. That one imports
    `torch._dynamo`, which takes longer than the rest of this package, to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _problem(op: str, backend: str, device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot run `op` on `device`, for inputs of `dtype` where it is given; None when it can."""
    device = torch.device(device)
    if backend not in _MODULES[op]:
        return f"{op} has no {backend} implementation"
    if dtype is not None and dtype not in _DTYPES.get((op, backend), (dtype,)):
        return f'{backend} kernels do not compute in {dtype}: use backend="reference"'
    if backend == "triton":
        return _triton_problem(device.type)
    if backend == "native":
        if problem := _native_problem():
            return problem
        if device.type not in importlib.import_module(_MODULES[op]["native"]).DEVICES:
            return f"there are no compiled {device.type} kernels of {op}"
        return _cuda_problem(device.index) if device.type == "cuda" else None
    return None


@cache
def _automatic(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    problems: list[tuple[str, str]] = []
    for backend in _preference(op, device):
        problem = _problem(op, backend, device, dtype)
        if problem is None:
            for missing, why in problems:
                logger.warning("%s on %s runs on %s, not on %s: %s.", op, device.type, backend, missing, why)
            return backend
        problems.append((backend, problem))
    raise AssertionError("the reference backend is always available")


def _preference(op: str, device: str | torch.device) -> tuple[str, ...]:
    return _PREFERENCE[op].get(torch.device(device).type, ("reference",))


def resolve(op: str, device: torch.device, backend: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Return the name of the backend that runs `op` on `device`, for inputs of `dtype` where it is given.

    Raises:
        ValueError: `backend` (or `VGS_KERNELS_BACKEND`) is not a backend's name.
        BackendUnavailableError: it is, but cannot run here; the message says why and what to do.
    """
    return _chosen_and_loaded(op, device, backend, dtype)


@_constant
def _chosen_and_loaded(op: str, device: torch.device, backend: str | None, dtype: torch.dtype | None) -> str:
    chosen = _chosen(op, device, backend, dtype)
    load(op, chosen)
    return chosen


def _chosen(op: str, device: torch.device, backend: str | None, dtype: torch.dtype | None) -> str:
    requested = backend or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if requested is None:
        return _automatic(op, device, dtype)
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}, or None for automatic")
    if backend is None and requested not in _MODULES[op]:
        return _automatic(op, device, dtype)  # the variable speaks for the ops that have such a backend
    problem = _problem(op, requested, device, dtype)
    if problem is not None:
        raise BackendUnavailableError(f"backend {requested!r} cannot run {op} on {device.type}: {problem}")
    return requested


def available(op: str, device: str | torch.device) -> list[str]:
    """The backends that can run `op` on `device` on this machine, fastest first."""
    return [backend for backend in _preference(op, device) if _problem(op, backend, device) is None]


def load(op: str, backend: str) -> ModuleType:
    """The module of a backend name that `resolve` returned."""
    if (op, backend) not in _LOADED:
        _LOADED[op, backend] = importlib.import_module(_MODULES[op][backend])
    return _LOADED[op, backend]


def status() -> list[BackendStatus]:
    """What runs every op on every device type of this machine, and why nothing faster does."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in OPS:
        for device in devices:
            missing: list[tuple[str, str]] = []
            for backend in _preference(op, device):
                problem = _problem(op, backend, device)
                if problem is None:
                    rows.append(BackendStatus(op, device, backend, tuple(missing)))
                    break
                missing.append((backend, problem))
    return rows
