"""`vgs doctor`: which backend runs every op and why nothing faster does, versions, devices, and a self-test.

Imports torch and none of the libraries it asks about, so that it runs where torch is all there is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch

from vgs_kernels import SelfTestResult, backend_report, self_test

from ..compatibility import installed, trl_problem

# Needed by the engine, then used only where asked for, with what asks for it.
_NEEDED = ("transformers", "trl", "accelerate", "datasets", "peft", "safetensors", "rich")
_OPTIONAL = {
    "triton": "kernels on GPUs",
    "flash-attn": "attn_implementation: flash_attention_2",
    "liger-kernel": "use_liger_kernel",
    "vllm": "use_vllm",
    "bitsandbytes": "load_in_4bit, load_in_8bit",
    "deepspeed": "accelerate's DeepSpeed",
}


def doctor() -> bool:
    """Print the report; return whether every self-test passed."""
    print(backend_report(), end="\n\n")
    print(_versions(), end="\n\n")
    print(*devices(), sep="\n", end="\n\n", flush=True)
    checks = self_test()
    print(_table(checks))
    wrong = [check for check in checks if not check.passed]
    for check in wrong:
        print(
            f"{check.op} computes wrongly on {check.device} with {check.backend}: avoid it with "
            'backend="reference" or VGS_KERNELS_BACKEND=reference, and report it with the lines above.'
        )
    return not wrong


def devices() -> list[str]:
    """One line for the CPU and one for every GPU that torch sees."""
    threads = torch.get_num_threads()
    lines = [f"CPU: {_processor()}, {os.cpu_count()} logical cores, {threads} torch threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = f"capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(f"GPU {index}: {properties.name}, {memory}, {capability}, {kind}")
    return lines


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> str:
    rows = [("library", "version", "used by")]
    for name, use in [*((name, "the engine") for name in _NEEDED), *_OPTIONAL.items()]:
        rows.append((name, installed(name) or "not installed", use))
    problem = trl_problem(installed("trl"))
    return "\n".join([*_columns(rows), *([problem] if problem else [])])


def _table(checks: list[SelfTestResult]) -> str:
    rows = [("op", "device", "backend", "dtype", "error", "torch", "")]
    for check in checks:
        errors = f"{check.error:.1e}", f"{check.plain_error:.1e}"
        rows.append((check.op, check.device, check.backend, check.dtype, *errors, "ok" if check.passed else "WRONG"))
    return "\n".join(["Self-test: relative error against float64, beside that of plain torch", *_columns(rows)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
