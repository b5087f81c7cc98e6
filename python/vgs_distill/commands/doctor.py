"""`vgs doctor`: which backend runs every op and why nothing faster does, versions, devices, and a self-test.

Layer: cli; calls the public functions of `vgs_kernels`. Imports torch and none of the libraries it asks about.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from vgs_kernels.__main__ import report
from vgs_kernels.selftest import Check, self_test

# Needed by the engine, then used only where asked for, with what asks for it.
_NEEDED = ("transformers", "trl", "accelerate", "datasets", "peft", "safetensors")
_OPTIONAL = {
    "triton": "kernels on GPUs",
    "flash-attn": "attn_implementation: flash_attention_2",
    "liger-kernel": "use_liger_kernel",
    "vllm": "use_vllm",
    "bitsandbytes": "load_in_4bit, load_in_8bit",
    "deepspeed": "accelerate's DeepSpeed",
}


def doctor(console: Console) -> bool:
    """Print the report; return whether every self-test passed."""
    console.print(report(), highlight=False, soft_wrap=True)
    console.print(_versions())
    for line in devices():
        console.print(line, highlight=False, soft_wrap=True)
    checks = self_test()
    console.print(_table(checks))
    wrong = [check for check in checks if not check.passed]
    for check in wrong:
        console.print(
            f"{check.op} computes wrongly on {check.device} with {check.backend}: avoid it with "
            'backend="reference" or VGS_KERNELS_BACKEND=reference, and report it with the lines above.',
            soft_wrap=True,
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


def _versions() -> Table:
    table = Table(title="Libraries", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("library", "version", "used by"):
        table.add_column(column)
    for name, use in [*((name, "every run") for name in _NEEDED), *_OPTIONAL.items()]:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        table.add_row(name, found, use)
    return table


def _table(checks: list[Check]) -> Table:
    title = "Self-test: relative error against float64, beside that of plain torch"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("op", "device", "backend", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("error", "torch", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for check in checks:
        verdict = "ok" if check.passed else "WRONG"
        errors = f"{check.error:.1e}", f"{check.plain_error:.1e}"
        table.add_row(check.op, check.device, check.backend, check.dtype, *errors, verdict)
    return table
