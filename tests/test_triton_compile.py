"""The compile gate: shipped Triton launches compiled for GPUs that are not here, and their machine code read.

Reports are cached in pytest's cache under a hash of the sources and Triton's version. `python -m
benchmarks.compile_report` compiles more (every variant on every architecture) and writes docs/compile_report.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 turns the compiler off", allow_module_level=True)

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from tests.triton_support import compile_gate  # noqa: E402
from tests.triton_support.compile_gate import Report, Variant  # noqa: E402
from vgs_kernels.stream_kl import triton as kernels  # noqa: E402
from vgs_kernels.stream_kl import triton_tiles as tiles  # noqa: E402
from vgs_kernels.stream_kl.reference import Streams  # noqa: E402
from vgs_kernels.stream_kl.transform import LogitTransform  # noqa: E402


def _report(variant: Variant, cache: pytest.Cache) -> Report:
    key = f"vgs_compile/{compile_gate.source_hash()}/{variant}".replace(" ", "_").replace(">", "-")
    stored = cache.get(key, None)
    if stored is None:
        stored = compile_gate.to_json(compile_gate.read_report(compile_gate.compile_variant(variant)))
        cache.set(key, stored)
    return Report(**stored)


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
