"""Hardware, versions and commit that a record names, and the fingerprint of the code that its figures depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# What a figure depends on beside the kernels and the benchmark itself.
MEASURING = tuple(Path(__file__).with_name(f"{name}.py") for name in ("gates", "memory", "timing"))


def environment(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions, commit and load of the machine, as a record holds them."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "modified": bool(_git("status", "--porcelain", "--", "vgs_kernels", "csrc", "benchmarks/*.py")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    return _git("rev-parse", "HEAD") or "unknown"


def hardware(device: str = "cpu") -> dict[str, Any]:
    described: dict[str, Any] = {
        "device": device,
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "name": properties.name,
            "cpu": _cpu_name(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return described


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "trl", "liger-kernel", "torchjd", "vgs-kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    return found


def source_digest(*benchmark_files: Path) -> str:
    """Fingerprint of the code that a record's figures depend on; a finished case is measured again when it changes."""
    digest = hashlib.sha256()
    files = [*REPOSITORY.glob("vgs_kernels/**/*.py"), *(f for f in REPOSITORY.glob("csrc/**/*") if f.is_file())]
    for file in [*sorted(files), *MEASURING, *benchmark_files]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def has_matrix_unit() -> bool:
    """Whether the CPU multiplies bf16 matrices in a unit of their own (AMX), as Linux tells."""
    return "amx_bf16" in _cpu_info("flags").split()


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """What Linux says of the first core; empty where there is no such line."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else ""


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""
