"""Compile every shipped launch of the Triton kernels for GPUs that are not here, and read the machine code.

What the gate holds, per variant (`problems`):
* no stack, no local memory: a spill would send accumulators through memory once per tile;
* loads of logits inside the loops over tiles are 128 bits wide where the launcher promises aligned rows;
* no barrier and no exchange between threads inside those loops: rows wait for memory only;
* registers within REGISTER_LIMITS, where rows are aligned;
* instructions a column within what the device can issue while memory brings the column, for float32 logits on the
  architectures of HELD_TO_BUDGET. Elsewhere the report says by how much a launch is over.

`machine_code.py` reads and counts. A column's instructions are those of one turn of the loop over whole tiles, over the
columns that a thread takes in it. `divergences` has that loop twice: the one without care for -inf is the shorter one.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.triton_support import machine_code
from tests.triton_support.machine_code import Loop, Report, read_report
from vgs_kernels.stream_kl import triton as kernels
from vgs_kernels.stream_kl import triton_config as config
from vgs_kernels.stream_kl import triton_divergences, triton_gradients
from vgs_kernels.stream_kl import triton_tiles as tiles

__all__ = ["Report", "Variant", "read_report"]

ARCHITECTURES: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = {"plain": tiles.PLAIN_FORM, "scaled": tiles.SCALED_FORM, "softcap": tiles.SOFTCAP_FORM}

# 128 registers let a processor of 64 Ki registers hold four 128-thread programs, an AMD SIMD of 512 four wavefronts.
# With four streams three do: 48 KiB of float32 loads are in flight then, more than bandwidth x latency asks for.
REGISTER_LIMITS = {"reverse_kl": 128, "prior": 128, "visual": 168}


@dataclass(frozen=True)
class Issue:
    """What a device can issue and what its memory can bring. From data sheets: nobody has measured it here."""

    device: str
    lanes: int  # threads whose instructions issue in one cycle, of all processors
    gigahertz: float  # as it runs under load
    terabytes: float  # a second: nine tenths of the data sheet's

    @property
    def a_byte(self) -> float:
        """Instructions of a thread that issue while memory brings a byte."""
        return self.lanes * self.gigahertz / (self.terabytes * 1000)


ISSUE = {
    "sm_80": Issue("A100", 108 * 128, 1.41, 1.83),
    "sm_89": Issue("RTX 4090", 128 * 128, 2.5, 0.91),
    "sm_90": Issue("H100", 132 * 128, 1.7, 3.0),
    "sm_100": Issue("B200", 148 * 128, 1.85, 7.0),
    "sm_103": Issue("B300", 148 * 128, 1.85, 7.2),
    "sm_120": Issue("RTX 5090", 170 * 128, 2.4, 1.61),
    "gfx942": Issue("MI300X", 304 * 64, 2.1, 4.8),
}
HELD_TO_BUDGET = ("sm_80", "sm_90")


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
        notes += ["smoothed"] * self.smoothed
        notes += ["weighted"] * self.weighted + ["two objectives"] * self.second
        notes += [f"{self.warps} warps"] * (self.warps is not None)
        return " ".join(notes)


def shipped_variants(architecture: str) -> list[Variant]:
    """What production starts, and other options where registers are tightest."""
    variants = [
        Variant(architecture, kernel, kind, dtype)
        for kernel in ("divergences", "gradients")
        for kind in tiles.KINDS
        for dtype in DTYPES
    ]
    variants += [variant for kind in tiles.KINDS for variant in linear_variants(architecture, kind)]
    for kind in tiles.KINDS:
        for kernel in ("divergences", "gradients"):
            of_kind = Variant(architecture, kernel, kind, "fp32")
            variants += [replace(of_kind, form="scaled"), replace(of_kind, smoothed=True)]
    for kernel in ("divergences", "gradients"):
        worst = Variant(architecture, kernel, "visual")
        variants += [replace(worst, dtype=dtype, form="softcap") for dtype in ("fp32", "bf16")]
        variants += [
            replace(worst, form="scaled"),
            replace(worst, even=False),
            replace(worst, aligned=False, even=False),
            replace(worst, dtype="fp32", guarded=True),
            replace(worst, dtype="fp32", guarded=True, form="softcap"),
            replace(worst, dtype="fp32", guarded=True, form="softcap", smoothed=True),
        ]
    variants.append(Variant(architecture, "divergences", "visual", "fp32", split=True))
    variants.append(Variant(architecture, "merge", "visual", "fp32"))
    return variants


def linear_variants(architecture: str, kind: str) -> list[Variant]:
    """What the linear calls start: float32 logits by default, gradients in the dtype of the hidden states, of one
    objective or, where there is a third number, of two."""
    variants = [Variant(architecture, "divergences", kind, dtype, weighted=True) for dtype in ("fp32", "bf16")]
    for second in (False, True) if kind != "reverse_kl" else (False,):
        variants += [
            Variant(architecture, "gradients", kind, "fp32", out_dtype="bf16", second=second),
            Variant(architecture, "gradients", kind, "fp32", out_dtype="fp16", second=second),
        ]
        if second:
            variants += [Variant(architecture, "gradients", kind, dtype, second=True) for dtype in ("fp32", "bf16")]
    return variants


def gated_variants() -> list[Variant]:
    """What the test compiles: few enough for a machine whose cache is empty. On sm_90 and gfx942 what the linear calls
    start by default and the worst of each kernel, elsewhere two and four streams. The report compiles all."""
    chosen = []
    for architecture in ARCHITECTURES:
        whole = architecture in ("sm_90", "gfx942")
        for kind in tiles.KINDS if whole else ("reverse_kl", "visual"):
            chosen.append(Variant(architecture, "divergences", kind, "fp32", weighted=True))
            second = whole and kind != "reverse_kl"
            chosen.append(Variant(architecture, "gradients", kind, "fp32", out_dtype="bf16", second=second))
        if whole:
            worst = Variant(architecture, "divergences", "visual")
            chosen += [
                worst,
                Variant(architecture, "gradients", "reverse_kl", "fp32", out_dtype="fp16"),
                Variant(architecture, "gradients", "visual"),
                Variant(architecture, "gradients", "visual", even=False),
                Variant(architecture, "merge", "visual", "fp32"),
                replace(worst, dtype="fp32", split=True),
                replace(worst, aligned=False, even=False),
            ]
            for kernel in ("divergences", "gradients"):
                chosen.append(
                    Variant(architecture, kernel, "visual", "fp32", form="softcap", guarded=True, smoothed=True)
                )
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
        "PTX": int(device.heuristics is config.NVIDIA),
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


def instructions(variant: Variant, report: Report) -> list[float]:
    """Instructions a column of every loop over tiles, the shortest first; empty where there is none."""
    streams = tiles.KINDS[variant.kind] + 2
    itemsize = DTYPES[variant.dtype].itemsize
    if variant.kernel == "merge":
        return []
    return sorted(loop.instructions * streams * itemsize / loop.loaded for loop in report.loops)


def column_bytes(variant: Variant) -> int:
    """Bytes that a column of logits and gradients moves."""
    moved = (tiles.KINDS[variant.kind] + 2) * DTYPES[variant.dtype].itemsize
    if variant.kernel == "gradients":
        moved += (1 + variant.second) * DTYPES[variant.out_dtype or variant.dtype].itemsize
    return moved


def budget(variant: Variant) -> float:
    """Instructions a column that the device issues while memory moves the column."""
    return ISSUE[variant.architecture].a_byte * column_bytes(variant)


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
        counts = instructions(variant, report)
        held = variant.architecture in HELD_TO_BUDGET and variant.dtype == "fp32"
        if held and counts and counts[0] > budget(variant):
            found.append(f"{counts[0]:.0f} instructions a column, more than {budget(variant):.0f}")
    return found


def source_hash() -> str:
    """Of the kernels, without lines of comment: a report of others is out of date."""
    digest = hashlib.sha256()
    for module in (kernels, config, triton_divergences, triton_gradients, tiles):
        lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()
        digest.update("\n".join(line for line in lines if not line.lstrip().startswith("#")).encode())
    return digest.hexdigest()[:16]


def cache_key(variant: Variant) -> str:
    """Changes when a cached report may no longer hold."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (__file__, machine_code.__file__):
        digest.update(Path(path).read_bytes())
    return f"{source_hash()}-{digest.hexdigest()[:16]}/{variant}".replace(" ", "_").replace(">", "-")


def to_json(report: Report) -> dict[str, Any]:
    return asdict(report) | {"loops": [tuple(loop) for loop in report.loops]}


def from_json(stored: dict[str, Any]) -> Report:
    return Report(**(stored | {"loops": tuple(Loop(*loop) for loop in stored["loops"])}))
