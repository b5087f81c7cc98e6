"""The compile gate: shipped Triton launches compiled for GPUs that are not here, and their machine code read.

A tenth of the launches, chosen in `compile_gate.gated_variants`; `python -m benchmarks.compile_report` compiles all on
every architecture and writes docs/compile_report.md, which a test here holds to the sources. Reports are cached in
pytest's cache under a hash of the sources and Triton's version.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 turns the compiler off", allow_module_level=True)

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from tests.triton_support import compile_gate, machine_code  # noqa: E402
from tests.triton_support.compile_gate import Report, Variant  # noqa: E402
from vgs_kernels.stream_kl import triton as kernels  # noqa: E402
from vgs_kernels.stream_kl import triton_tiles as tiles  # noqa: E402
from vgs_kernels.stream_kl.reference import Streams  # noqa: E402
from vgs_kernels.stream_kl.transform import LogitTransform  # noqa: E402


def _report(variant: Variant, cache: pytest.Cache) -> Report:
    key = f"vgs_compile/{compile_gate.cache_key(variant)}"
    stored = cache.get(key, None)
    if stored is None:
        stored = compile_gate.to_json(compile_gate.read_report(compile_gate.compile_variant(variant)))
        cache.set(key, stored)
    return compile_gate.from_json(stored)


@pytest.mark.parametrize("variant", compile_gate.gated_variants(), ids=str)
def test_shipped_launches(variant: Variant, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    assert compile_gate.problems(variant, _report(variant, pytestconfig.cache)) == []


def test_a_planted_spill_is_found() -> None:
    variant = Variant("sm_90", "divergences", "visual")
    report = compile_gate.read_report(compile_gate.compile_variant(variant, maxnreg=40))
    assert report.stack > 0
    assert report.local_accesses > 0
    assert any("spills" in problem for problem in compile_gate.problems(variant, report))


def test_a_planted_spill_is_found_on_amd() -> None:
    variant = Variant("gfx942", "divergences", "visual", "fp32")
    report = compile_gate.read_report(compile_gate.compile_variant(variant, waves_per_eu=8))
    assert report.spills > 0
    assert any("spills" in problem for problem in compile_gate.problems(variant, report))


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_a_planted_misaligned_stride_is_found(architecture: str) -> None:
    """Compiled without the promise that rows start at 16 bytes, judged as if it had been given."""
    for kernel in ("divergences", "gradients"):
        unaligned = Variant(architecture, kernel, "visual", aligned=False, even=False)
        report = compile_gate.read_report(compile_gate.compile_variant(unaligned))
        judged = Variant(architecture, kernel, "visual")
        assert any("128 bits wide" in problem for problem in compile_gate.problems(judged, report))


@pytest.mark.parametrize("kind", ["reverse_kl", "visual"])
def test_rows_without_holes_take_the_shorter_of_two_loops(kind: str, pytestconfig: pytest.Config) -> None:
    variant = Variant("sm_90", "divergences", kind, "fp32", weighted=True)
    assert pytestconfig.cache is not None
    trusting, careful = compile_gate.instructions(variant, _report(variant, pytestconfig.cache))
    assert trusting < 0.75 * careful


def test_planted_instructions_are_found(pytestconfig: pytest.Config) -> None:
    """Twice the budget in every loop: over it where float32 logits are held to it."""
    variant = Variant("sm_90", "divergences", "visual", "fp32", weighted=True)
    assert pytestconfig.cache is not None
    report = _report(variant, pytestconfig.cache)
    assert compile_gate.problems(variant, report) == []
    factor = 2 * compile_gate.budget(variant) / compile_gate.instructions(variant, report)[0]
    loops = tuple(loop._replace(instructions=int(loop.instructions * factor)) for loop in report.loops)
    planted = dataclasses.replace(report, loops=loops)
    assert any("instructions a column, more than 153" in p for p in compile_gate.problems(variant, planted))
    elsewhere = dataclasses.replace(variant, architecture="sm_100")
    assert not any("instructions a column" in p for p in compile_gate.problems(elsewhere, planted))


# Two streams of float32 logits, four columns a turn. The block after the exit belongs to the loop, the loop after it
# does not load, and the load before it is in no loop.
SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/              @!P1 FADD R4, R4, R8 ;
        /*0040*/                   NOP ;
        /*0050*/               @P2 BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0070*/               @P3 BRA `(.L_x_3) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_what_is_counted() -> None:
    assert machine_code.innermost(SASS) == (machine_code.Loop(instructions=7, loaded=32),)
    report = Report(
        registers=1, stack=0, local_accesses=0, spills=0, loads=2, wide_loads=2, stores=0, wide_stores=0, waits=0,
        loops=machine_code.innermost(SASS),
    )  # fmt: skip
    assert compile_gate.instructions(Variant("sm_90", "divergences", "reverse_kl", "fp32"), report) == [7 / 4]


def test_the_budget_is_of_bytes() -> None:
    prior = {dtype: Variant("sm_90", "divergences", "prior", dtype) for dtype in ("fp32", "bf16")}
    assert [round(compile_gate.budget(v)) for v in prior.values()] == [115, 57]
    assert round(compile_gate.budget(Variant("sm_100", "divergences", "prior", "fp32"))) == 60
    gradients = Variant("sm_90", "gradients", "prior", "fp32", out_dtype="bf16", second=True)
    assert compile_gate.column_bytes(gradients) == 3 * 4 + 2 * 2


def test_the_page_is_of_these_kernels() -> None:
    page = Path(__file__).parent.parent / "docs" / "compile_report.md"
    text = page.read_text(encoding="utf-8")
    assert f"Sources: `{compile_gate.source_hash()}`" in text, (
        "run: python -m benchmarks.compile_report --write " + str(page)
    )
    assert {f"| {architecture} |" in text for architecture in compile_gate.ARCHITECTURES} == {True}


def test_row_offsets_are_formed_in_64_bits() -> None:
    """Strides arrive as 32-bit integers; the product with the row must not stay there."""
    for kernel in ("divergences", "gradients"):
        intermediate = compile_gate.compile_variant(Variant("sm_90", kernel, "visual")).asm["ttir"]
        extended = [line.split("=")[0].strip() for line in intermediate.splitlines() if "arith.extsi" in line]
        products = [line for line in intermediate.splitlines() if "arith.muli" in line and "i64" in line]
        assert len(products) >= 4, "one for each stream"
        assert any(name in product for name in extended for product in products)


class _Recorder:
    """Stands for a kernel: takes a launch as Triton's run time would, without a device."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.launches: list[tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = []

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        def record(*arguments: Any, **named: Any) -> None:
            backend = CUDABackend(compile_gate.ARCHITECTURES["sm_90"])
            bind = create_function_from_signature(self.function.signature, self.function.params, backend)
            bound, kinds, options = bind(*arguments, **named)
            types = {name: kind for name, (kind, _) in zip(bound, kinds, strict=True)}
            constants = {name: bound[name] for name in bound if types[name] == "constexpr"}
            assert all(value is None for kind, value in kinds if kind != "constexpr"), "specialised on a value"
            self.launches.append((types, constants, options))

        return record


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", tiles.KINDS)
def test_the_launcher_starts_what_the_gate_compiles(kind: str, second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument types, constants and options of real calls, as Triton would specialise them."""
    expected = {
        "divergences": compile_gate.launch(Variant("sm_90", "divergences", kind, "fp32", weighted=True)),
        "gradients": compile_gate.launch(Variant("sm_90", "gradients", kind, "fp32", "bf16", second=second)),
    }
    recorders = {name: _Recorder(getattr(kernels, name)) for name in ("divergences_kernel", "gradients_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    device = kernels.config.Device(kernels.config.NVIDIA, processors=1, warp_size=32)
    monkeypatch.setattr(kernels.config, "describe_device", lambda _device: device)
    streams = Streams(*(torch.zeros(64, 4096) for _ in range(tiles.KINDS[kind] + 2)))
    settings, coefficients = LogitTransform(4096), torch.zeros(64, 3)
    outs = [torch.zeros(64, 4096, dtype=torch.bfloat16) for _ in range(2)]
    values, statistics = kernels.divergences(streams, settings, torch.ones(64))
    kernels.logit_gradients(
        streams, values, statistics, coefficients, settings, out=outs[0],
        second_coefficients=coefficients if second else None, out_second=outs[1] if second else None,
    )  # fmt: skip
    for kernel, (_, types, constants, options) in expected.items():
        assert recorders[f"{kernel}_kernel"].launches == [(types, constants, options)]
