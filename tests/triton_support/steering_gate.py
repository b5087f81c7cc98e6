"""Compiles the Triton kernels of both steering ops for GPUs that are not here, as their launchers start them.

What the gate holds (`problems`): no stack and no spills; in a group every entry is loaded and stored 128 bits at a time
(in a mixture of dtypes those of the widest); no barrier and no exchange between threads inside a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from tests.triton_support import compile_gate
from tests.triton_support.compile_gate import Report
from vgs_kernels.combine_gradients.triton import combine_kernel
from vgs_kernels.gradient_gramian import triton_table
from vgs_kernels.gradient_gramian.triton import products_kernel
from vgs_kernels.gradient_gramian.triton_table import TYPES, Dtypes, Launch

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KERNELS = {"products": products_kernel, "combine": combine_kernel}
POINTERS = ("LINES", "PARTS", "WEIGHTS")  # allocations of their own: the launcher sees that they are aligned

# All tensors of a program of 128 threads: 64 registers let a processor of 64 Ki hold eight of them, 1024 threads with a
# 128-bit load or more of each gradient in flight. Twice as many where an entry is a float64.
REGISTER_LIMITS = {F32: 64, F64: 128}


@dataclass(frozen=True)
class Variant:
    architecture: str
    kernel: str
    dtypes: Dtypes  # of first, second, out
    sums: torch.dtype = F32

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return f"{self.architecture} {self.kernel} {','.join(names)}"


def shipped_variants(architecture: str) -> list[Variant]:
    """What training starts: gradients of one dtype, a gradient alone, a mixture; and float64."""
    if architecture not in ("sm_90", "gfx942"):
        return [Variant(architecture, "products", (BF16, BF16)), Variant(architecture, "combine", (BF16, BF16, BF16))]
    variants = [Variant(architecture, "products", pair) for pair in ((BF16, BF16), (F16, F16), (F32, F32), (F32, BF16))]
    variants += [Variant(architecture, "products", pair) for pair in ((F32, None), (None, F32))]
    variants += [Variant(architecture, "combine", (d, d, d)) for d in (BF16, F16, F32)]
    variants += [Variant(architecture, "combine", triple) for triple in ((F32, BF16, F32), (F32, None, F32))]
    variants.append(Variant(architecture, "products", (F64, F64), F64))
    return [*variants, Variant(architecture, "combine", (F64, F64, F64), F64)]


def compile_variant(variant: Variant, **options: Any) -> Any:
    kernel = KERNELS[variant.kernel]
    device = compile_gate._device(variant.architecture)
    constants = triton_table.launch_options(Launch(variant.dtypes, 0, 1), device)
    options = {"num_warps": constants.pop("num_warps"), **options}
    if variant.kernel == "products":
        constants["SUM"] = TYPES[variant.sums]
    types = {"LINES": "*i64", "PARTS": "*fp64", "WEIGHTS": f"*{TYPES[variant.sums].name}", "begin": "i32"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS if name in names},
    )
    return triton.compile(source, target=compile_gate.ARCHITECTURES[variant.architecture], options=options)


def problems(variant: Variant, report: Report) -> list[str]:
    """Why the variant must not ship; empty when it may."""
    found = []
    if report.stack or report.local_accesses or report.spills:
        found.append(f"spills: stack {report.stack}, {report.local_accesses} local accesses, {report.spills} spills")
    if report.registers > REGISTER_LIMITS[variant.sums]:
        found.append(f"{report.registers} registers, more than {REGISTER_LIMITS[variant.sums]}")
    if report.waits:
        found.append(f"{report.waits} barriers or exchanges between threads inside a loop")
    widest = max(dtype.itemsize for dtype in variant.dtypes if dtype is not None)
    # A program reads a tile of eight entries a thread; the loop over single entries that follows is narrow.
    wide = [8 * widest // 16 if dtype is not None and dtype.itemsize == widest else 0 for dtype in variant.dtypes]
    if report.wide_loads < sum(wide[:2]):
        found.append(f"only {report.wide_loads} loads are 128 bits wide, a tile has {sum(wide[:2])}")
    if report.wide_stores < sum(wide[2:]):
        found.append(f"only {report.wide_stores} stores are 128 bits wide, a tile has {sum(wide[2:])}")
    return found
