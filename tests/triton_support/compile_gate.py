"""Compile every shipped launch of the Triton kernels for GPUs that are not here, and read the machine code.

What the gate holds, per variant (`problems`):
* no stack, no local memory: a spill would send accumulators through memory once per tile;
* loads of logits inside the loops over tiles are 128 bits wide where the launcher promises aligned rows;
* no barrier and no exchange between threads inside those loops: rows wait for memory only;
* registers within REGISTER_LIMITS, where rows are aligned.

Used by `tests/test_triton_compile.py` and `benchmarks/compile_report.py`. Reads SASS with the nvdisasm and cuobjdump
that come with triton, and the assembly that LLVM prints for AMD.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vgs_kernels.stream_kl import triton as kernels
from vgs_kernels.stream_kl import triton_config as config
from vgs_kernels.stream_kl import triton_tiles as tiles

ARCHITECTURES: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = {"plain": tiles.PLAIN_FORM, "scaled": tiles.SCALED_FORM, "softcap": tiles.SOFTCAP_FORM}

# 128 registers let a processor of 64 Ki registers hold four 128-thread programs, an AMD SIMD of 512 four wavefronts.
# With four streams three do: 48 KiB of float32 loads are in flight then, more than bandwidth x latency asks for.
REGISTER_LIMITS = {"reverse_kl": 128, "prior": 128, "visual": 168}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: what the launcher's constants and argument types can be."""

    architecture: str
    kernel: str  # divergences, gradients or merge
    kind: str  # reverse_kl, prior or visual
    dtype: str = "bf16"
    out_dtype: str | None = None  # of gradients, where it is not dtype
    form: str = "plain"
    aligned: bool = True  # rows start at multiples of 16 bytes
    even: bool = True  # the vocabulary is a multiple of a full-width load
    split: bool = False  # the forward of split rows
    guarded: bool = False  # the ratio within the visual target
    smoothed: bool = False  # the teachers
    weighted: bool = False  # token weights are given
    second: bool = False  # a second objective
    warps: int | None = None  # None: what the heuristics choose

    def __str__(self) -> str:
        notes = [
            self.architecture,
            self.kernel,
            self.kind,
            self.dtype + (f">{self.out_dtype}" * bool(self.out_dtype)),
        ]
        notes += [self.form] * (self.form != "plain") + ["unaligned"] * (not self.aligned)
        notes += ["odd vocabulary"] * (not self.even) + ["split"] * self.split + ["guarded"] * self.guarded
        notes += ["weighted"] * self.weighted + ["two objectives"] * self.second
        notes += [f"{self.warps} warps"] * (self.warps is not None)
        return " ".join(notes)


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant shows."""

    registers: int
    stack: int  # bytes per thread
    local_accesses: int  # LDL and STL, or scratch loads and stores
    spills: int
    loads: int  # of global memory, inside loops
    wide_loads: int  # those of 128 bits or more
    stores: int
    wide_stores: int
    waits: int  # barriers and exchanges between threads inside loops

    @property
    def wide_share(self) -> float:
        return self.wide_loads / self.loads if self.loads else 1.0


def shipped_variants(architecture: str) -> list[Variant]:
    """Every combination of kernel, kind and dtype, what the linear calls start, and other options where registers are
    tightest."""
    variants = [
        Variant(architecture, kernel, kind, dtype)
        for kernel in ("divergences", "gradients")
        for kind in tiles.KINDS
        for dtype in DTYPES
    ]
    for kind in tiles.KINDS:  # the linear calls: float32 logits, gradients in the dtype of the hidden states
        variants.append(Variant(architecture, "divergences", kind, "fp32", weighted=True))
        variants.append(Variant(architecture, "gradients", kind, "fp32", out_dtype="bf16"))
        if kind != "reverse_kl":
            variants.append(Variant(architecture, "gradients", kind, "fp32", out_dtype="bf16", second=True))
    variants.append(Variant(architecture, "gradients", "visual", "fp32", out_dtype="fp16"))
    variants.append(Variant(architecture, "gradients", "visual", "fp32", second=True))
    for kernel in ("divergences", "gradients"):
        worst = Variant(architecture, kernel, "visual")
        variants += [replace(worst, dtype=dtype, form="softcap") for dtype in ("fp32", "bf16")]
        variants += [
            replace(worst, form="scaled"),
            replace(worst, even=False),
            replace(worst, aligned=False, even=False),
            replace(worst, dtype="fp32", guarded=True),
            replace(worst, dtype="fp32", guarded=True, form="softcap"),
        ]
    variants.append(Variant(architecture, "divergences", "visual", "fp32", split=True))
    variants.append(Variant(architecture, "merge", "visual", "fp32"))
    return variants


def gated_variants() -> list[Variant]:
    """What the test compiles cold: all of sm_90 and gfx942, of the others every kernel, kind and dtype."""
    chosen = []
    for architecture in ARCHITECTURES:
        everything = shipped_variants(architecture)
        if architecture in ("sm_90", "gfx942"):
            chosen += everything
        else:
            chosen += [v for v in everything if v == Variant(architecture, v.kernel, v.kind, v.dtype)]
    return chosen


def _device(architecture: str) -> config.Device:
    target = ARCHITECTURES[architecture]
    heuristics = config.AMD if target.backend == "hip" else config.NVIDIA
    return config.Device(heuristics, processors=1, warp_size=target.warp_size)


def launch(variant: Variant) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """The kernel, argument types, constants and options with which the launcher starts a variant."""
    device = _device(variant.architecture)
    shape = config.geometry(device, DTYPES[variant.dtype].itemsize, variant.warps, variant.aligned)
    logits, out = f"*{variant.dtype}", f"*{variant.out_dtype or variant.dtype}"
    constants: dict[str, Any] = {
        "KIND": tiles.KINDS[variant.kind],
        "GUARDED": int(variant.guarded),
        "SMOOTHED": int(variant.smoothed),
    }
    pointers = dict.fromkeys(("WEIGHTS", "STATISTICS", "WORKSPACE", "VALUES_", "COEFFICIENTS", "SECOND"), "*fp32")
    pointers |= dict.fromkeys(("P", "Q", "R", "N"), logits) | {"OUT_SECOND": out}
    pointers["OUT"] = out if variant.kernel == "gradients" else "*fp32"
    scalars = dict.fromkeys(("student_multiplier", "student_cap", "teacher_multiplier", "teacher_cap"), "fp32")
    scalars |= dict.fromkeys(("bound", "log_floor", "share"), "fp32")
    absent = {"reverse_kl": ("R", "N"), "prior": ("N",), "visual": ()}[variant.kind]
    absent += () if variant.weighted else ("WEIGHTS",)
    absent += () if variant.second else ("SECOND", "OUT_SECOND")
    if variant.kernel == "merge":
        function, launch_options = kernels.merge_kernel, {"num_warps": 1}
        constants["PARTS"] = 32
    else:
        function = kernels.divergences_kernel if variant.kernel == "divergences" else kernels.gradients_kernel
        launch_options = {"num_warps": shape.warps}
        if variant.kernel == "divergences":
            launch_options = config.forward_options(device, shape, tiles.KINDS[variant.kind])
        form = FORMS[variant.form]
        constants |= {
            "STUDENT_FORM": form,
            "TEACHER_FORM": form,
            **kernels._tile(shape, shape.vector if variant.even else 1),
        }
        absent += () if variant.split else ("WORKSPACE",)
    constants |= dict.fromkeys(absent)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "i32")
        for name in function.arg_names
    }
    return function, signature, constants, launch_options


def compile_variant(variant: Variant, **options: Any) -> Any:
    """Compile for the variant's architecture with the launcher's own constants; `options` plant faults."""
    function, signature, constants, launch_options = launch(variant)
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=positions)
    return triton.compile(source, target=ARCHITECTURES[variant.architecture], options={**launch_options, **options})


def read_report(compiled: Any) -> Report:
    return _read_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _read_nvidia(compiled.asm["cubin"])


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _loop_lines(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str]) -> list[str]:
    """The instructions between a label and a later branch back to it."""
    labels = {match[1]: index for index, line in enumerate(lines) if (match := label.match(line))}
    inside: set[int] = set()
    for index, line in enumerate(lines):
        match = branch.search(line)
        if match and labels.get(match[1], index) < index:
            inside.update(range(labels[match[1]], index))
    return [lines[index] for index in sorted(inside)]


def _read_nvidia(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    lines = sass.splitlines()
    loops = _loop_lines(lines, re.compile(r"^(\.L_x_\d+):"), re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)"))
    body = "\n".join(loops)
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Report(
        registers=registers,
        stack=stack,
        local_accesses=local,
        spills=local,
        loads=len(re.findall(r"\bLDG\b", body)),
        wide_loads=len(re.findall(r"\bLDG\.\S*(?:128|256)\b", body)),
        stores=len(re.findall(r"\bSTG\b", body)),
        wide_stores=len(re.findall(r"\bSTG\.\S*(?:128|256)\b", body)),
        waits=len(re.findall(r"\b(?:BAR|SHFL|LDS|STS)\b", body)),
    )


def _read_amd(assembly: str) -> Report:
    def number(pattern: str) -> int:
        return int(re.search(pattern, assembly)[1])  # type: ignore[index]

    lines = assembly.splitlines()
    loops = _loop_lines(lines, re.compile(r"^(\.LBB\d+_\d+):"), re.compile(r"\bs_c?branch\S*\s+(\.LBB\d+_\d+)"))
    body = "\n".join(loops)
    access = r"\b(?:global|buffer)_{}_\w+"
    wide = r"\b(?:global|buffer)_{}_dwordx4"
    return Report(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        stack=number(r"; ScratchSize: (\d+)"),
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        spills=number(r"\.vgpr_spill_count:\s+(\d+)"),
        loads=len(re.findall(access.format("load"), body)),
        wide_loads=len(re.findall(wide.format("load"), body)),
        stores=len(re.findall(access.format("store"), body)),
        wide_stores=len(re.findall(wide.format("store"), body)),
        waits=len(re.findall(r"\b(?:s_barrier|ds_\w+)", body)),
    )


def problems(variant: Variant, report: Report) -> list[str]:
    """Why the variant must not ship; empty when it may."""
    found = []
    if report.stack or report.local_accesses or report.spills:
        found.append(f"spills: stack {report.stack}, {report.local_accesses} local accesses, {report.spills} spills")
    if (
        variant.aligned and report.registers > REGISTER_LIMITS[variant.kind]
    ):  # unaligned is for correctness: one load per element
        found.append(f"{report.registers} registers, more than {REGISTER_LIMITS[variant.kind]}")
    if report.waits and variant.kernel != "merge":
        found.append(f"{report.waits} barriers or exchanges between threads inside a loop")
    if variant.kernel != "merge" and variant.aligned:
        if not report.loads:
            found.append("no loads found inside loops: the reader no longer understands the machine code")
        # The loop that V cuts is inside the gradient's loops as well; an odd vocabulary loads narrowly there.
        if variant.even and report.wide_share < 1.0:
            found.append(f"only {report.wide_loads} of {report.loads} loads are 128 bits wide")
        if not variant.even and not report.wide_loads:
            found.append("no load is 128 bits wide")
    return found


def source_hash() -> str:
    """Changes when a cached report may no longer hold."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (kernels.__file__, config.__file__, __file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def to_json(report: Report) -> dict[str, int]:
    return asdict(report)
