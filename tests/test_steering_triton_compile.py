"""The compile gate of the Triton steering kernels: compiled for GPUs that are not here, and their machine code read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 turns the compiler off", allow_module_level=True)

from tests.triton_support import compile_gate, steering_gate  # noqa: E402
from tests.triton_support.steering_gate import BF16, KERNELS, Variant, compile_variant, problems  # noqa: E402
from vgs_kernels.combine_gradients import triton as combine_kernels  # noqa: E402
from vgs_kernels.gradient_gramian import triton as gramian_kernels  # noqa: E402
from vgs_kernels.gradient_gramian import triton_table  # noqa: E402

SOURCES = (combine_kernels, gramian_kernels, triton_table, compile_gate, steering_gate)
PRODUCTS = Variant("sm_90", "products", (BF16, BF16))


def _report(variant: Variant, cache: pytest.Cache) -> compile_gate.Report:
    digest = hashlib.sha256(triton.__version__.encode())
    for module in SOURCES:
        digest.update(Path(module.__file__).read_bytes())
    key = f"vgs_compile/{digest.hexdigest()[:16]}/{variant}".replace(" ", "_")
    stored = cache.get(key, None)
    if stored is None:
        stored = compile_gate.to_json(compile_gate.read_report(compile_variant(variant)))
        cache.set(key, stored)
    return compile_gate.Report(**stored)


@pytest.mark.parametrize(
    "variant", [v for a in compile_gate.ARCHITECTURES for v in steering_gate.shipped_variants(a)], ids=str
)
def test_shipped_launches(variant: Variant, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    assert problems(variant, _report(variant, pytestconfig.cache)) == []


def test_a_planted_spill_is_found() -> None:
    report = compile_gate.read_report(compile_variant(PRODUCTS, maxnreg=24))
    assert any("spills" in problem for problem in problems(PRODUCTS, report))


@pytest.mark.parametrize(
    ("correct", "planted"), [("tl.int32) * GROUP", "tl.int32)"), ("FIRST, SUM, ALIGNMENT)", "FIRST, SUM, 1)")],
    ids=["a mask at any entry", "no alignment"],
)  # fmt: skip
@pytest.mark.parametrize("name", KERNELS)
def test_a_planted_scalar_load_is_found(name: str, correct: str, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS[name]
    source = kernel.src
    assert source.count(correct) == 1, "the kernel changed: plant the mistake anew"
    variant = PRODUCTS if name == "products" else Variant("sm_90", "combine", (BF16, BF16, BF16))
    try:
        kernel._unsafe_update_src(source.replace(correct, planted))
        report = compile_gate.read_report(compile_variant(variant))
    finally:
        kernel._unsafe_update_src(source)
    assert any("128 bits wide" in problem for problem in problems(variant, report))
