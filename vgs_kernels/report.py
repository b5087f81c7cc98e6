"""Which backend runs every op on every device here, and how to get the faster one."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import backend
from .version import __version__


def active_backends(device: torch.device) -> dict[str, str]:
    """Op -> the backend that runs it on `device`, as `backend=None` chooses it."""
    return {op: backend.resolve(op, device) for op in backend.OPS}


def backend_report() -> str:
    """What runs every op on the devices of this machine, what would run it faster and how to get it, as text."""
    try:
        built = version("vgs-kernels")  # with what the build made: 0.1.0+cpu
    except PackageNotFoundError:
        built = f"{__version__} (not installed)"
    lines = [f"vgs-kernels {built}, torch {torch.__version__}, Python {platform.python_version()}"]
    lines += [f"Compiled kernels: {backend.compiled()}.", ""]
    rows = backend.status()
    name_width, device_width = (max(len(getattr(row, field)) for row in rows) for field in ("op", "device"))
    for row in rows:
        lines.append(f"{row.op:<{name_width}}  {row.device:<{device_width}}  {row.active}")
        lines += [f"{'':<{name_width}}  {'':<{device_width}}  faster: {name}: {why}" for name, why in row.missing]
    lines += ["", "reverse_kl, decomposed_kl and their linear forms run on the backend of stream_kl."]
    if not torch.cuda.is_available():
        lines.append("No CUDA or ROCm device is visible to torch.")
    return "\n".join(lines)
