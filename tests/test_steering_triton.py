"""The Triton kernels of `gradient_gramian` and `combine_gradients`: on a GPU, or in Triton's interpreter.

Everywhere, `test_in_the_interpreter` runs this file and the tests that all backends share once more in a process where
TRITON_INTERPRET=1, on CPU tensors; those of this file under the bounds guard. What their machine code looks like is in
`test_steering_triton_compile.py`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from tests import test_combine_gradients as combinations  # noqa: E402
from tests import test_gradient_gramian as gramians  # noqa: E402
from tests.triton_support import interpreter  # noqa: E402
from vgs_kernels.combine_gradients import triton as combine_kernels  # noqa: E402
from vgs_kernels.gradient_gramian import triton as gramian_kernels  # noqa: E402
from vgs_kernels.gradient_gramian import triton_table  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS = torch.tensor([0.3, -0.7])
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" and torch.cuda.is_available() else []
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU here; test_in_the_interpreter runs it"
)

Gradients = list[Tensor | None]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    shared = ("test_gradient_gramian.py", "test_gradient_gramian_properties.py", "test_combine_gradients.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in shared)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def guard(*lists: Sequence[Tensor | None]) -> Any:
    return interpreter.guard(*(tensor for tensors in lists for tensor in tensors)) if INTERPRETED else nullcontext()


@pytest.fixture(autouse=True)
def known_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers make: the table, the sums of the parts."""
    table_of = triton_table.table_of

    def registered(*arguments: Any) -> triton_table.Table:
        table = table_of(*arguments)
        interpreter.register(table.lines)
        return table

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(gramian_kernels, "table_of", registered)
    monkeypatch.setattr(combine_kernels, "table_of", registered)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **named: interpreter.register(new_empty(*a, **named)))
    triton_table._tables.clear()


def products(first: Gradients, second: Gradients) -> Tensor:
    """The Gramian, checked against float64."""
    dtype = torch.float64 if any(g is not None and g.dtype == torch.float64 for g in first + second) else torch.float32
    with guard(first, second):
        sums = gramian_kernels.inner_products(first, second, dtype)
    gramian = torch.stack([sums[0], sums[1], sums[1], sums[2]]).reshape(2, 2)
    gramians.check(gramian.cpu(), on_cpu(first), on_cpu(second))
    return gramian


def combined(first: Gradients, second: Gradients, out: list[Tensor], weights: Tensor = WEIGHTS) -> None:
    """The combination, checked against float64."""
    before = on_cpu(first), on_cpu(second)
    exact = combinations.exact_combination(*before, weights, on_cpu(out))  # type: ignore[arg-type]
    weights = weights.to(DEVICE)
    with guard(first, second, out, [weights]):
        combine_kernels.combine(first, second, weights, out)
    combinations.check(on_cpu(out), exact, *before)  # type: ignore[arg-type]


def on_cpu(gradients: Sequence[Tensor | None]) -> Gradients:
    """Copies."""
    return [None if g is None else g.to("cpu", copy=True) for g in gradients]


def drawn(seed: int, dtype: torch.dtype, *sizes: int, offset: int = 0) -> Gradients:
    """Tensors `offset` entries after a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size + offset, generator=generator, dtype=torch.float64) for size in sizes]
    return [value.pow(3).to(DEVICE, dtype)[offset:] for value in values]


def empty(dtype: torch.dtype, *sizes: int, offset: int = 0) -> list[Tensor]:
    return [torch.full((size + offset,), float("nan"), dtype=dtype, device=DEVICE)[offset:] for size in sizes]


SIZES = (1, 7, 8, 9, 1023, 1024, 2049, 5000)  # around a group and around a tile


@runs_kernels
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(first: torch.dtype, second: torch.dtype) -> None:
    lang, vis = drawn(1, first, *SIZES), drawn(2, second, *SIZES)
    products(lang, vis)
    for out in (first, torch.bfloat16):
        combined(lang, vis, empty(out, *SIZES))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_with_weights_of_float64(dtype: torch.dtype) -> None:
    lang, vis = drawn(1, dtype, *SIZES), drawn(2, dtype, *SIZES)
    combined(lang, vis, lang)  # type: ignore[arg-type]
    combined(lang, vis, vis, WEIGHTS.double())  # type: ignore[arg-type]


@runs_kernels
def test_none_and_empty() -> None:
    lang, vis = drawn(1, torch.bfloat16, 0, 9, 70, 3, 0), drawn(2, torch.float32, 0, 9, 70, 3, 0)
    lang[1] = vis[2] = lang[3] = vis[3] = lang[4] = None
    products(lang, vis)
    out = empty(torch.float32, 0, 9, 70, 3, 0)
    combined(lang, vis, out)
    assert out[3].eq(0).all()
    products(drawn(1, torch.float32, 0), [None])


@runs_kernels
def test_unaligned_views() -> None:
    """Alike: a few entries until all are aligned. Apart: never aligned at the same time."""
    for dtype in (torch.float32, torch.bfloat16):
        for offsets in ((3, 3, 3), (1, 2, 3), (0, 0, 1)):
            lang, vis = drawn(1, dtype, 2, 4099, offset=offsets[0]), drawn(2, dtype, 2, 4099, offset=offsets[1])
            products(lang, vis)
            combined(lang, vis, empty(dtype, 2, 4099, offset=offsets[2]))


@runs_kernels
def test_parts_of_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_table, "SMALLEST_PART", 2048)
    lang, vis = drawn(1, torch.bfloat16, 10_001, 3, 4096), drawn(2, torch.bfloat16, 10_001, 3, 4096)
    first, again = products(lang, vis), products(lang, vis)
    assert first.equal(again)
    combined(lang, vis, empty(torch.float32, 10_001, 3, 4096))


@runs_kernels
def test_thousands_of_tensors() -> None:
    """Rows of one buffer each, because the guard looks at every tensor; what lies between them is NaN. The combination
    of fewer: the interpreter takes milliseconds a tensor."""
    generator = torch.Generator().manual_seed(5)
    lang, vis, out = (torch.full((4100, 4), float("nan")) for _ in range(3))
    for buffer in (lang, vis):
        buffer[:, :3] = torch.randn(4100, 3, generator=generator)
    lang, vis, out = (buffer.to(DEVICE) for buffer in (lang, vis, out))
    rows = [list(buffer[:, :3].unbind()) for buffer in (lang, vis, out)]
    with guard([lang, vis]):
        sums = gramian_kernels.inner_products(rows[0], rows[1], torch.float32)
    exact = [(a[:, :3].double() * b[:, :3].double()).sum() for a, b in ((lang, lang), (lang, vis), (vis, vis))]
    torch.testing.assert_close(sums.double(), torch.stack(exact), rtol=1e-6, atol=1e-6 * float(exact[0]))
    weights = WEIGHTS.to(DEVICE)
    with guard([lang, vis, out, weights]):
        combine_kernels.combine(*(tensors[:500] for tensors in rows[:2]), weights, rows[2][:500])
    torch.testing.assert_close(out[:500, :3], 0.3 * lang[:500, :3] - 0.7 * vis[:500, :3])
    assert out[:, 3].isnan().all()
    assert out[500:].isnan().all()


@runs_kernels
def test_one_launch_for_each_combination_of_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    kernel = gramian_kernels.products_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(gramian_kernels, "products_kernel", Counted())
    lang = drawn(1, torch.float32, 9, 9, 9) + drawn(1, torch.bfloat16, 9, 9)
    vis = drawn(2, torch.float32, 9, 9) + drawn(2, torch.bfloat16, 9, 9, 9)
    products(lang, vis)
    assert launched == [(2,), (1,), (2,)]


@runs_kernels
def test_the_table_is_made_once_for_the_same_addresses() -> None:
    lang, vis = drawn(1, torch.float32, 30), drawn(2, torch.float32, 30)
    table = triton_table.table_of(list(zip(lang, vis, strict=True)), DEVICE)
    assert triton_table.table_of(list(zip(lang, vis, strict=True)), DEVICE) is table
    products(lang, vis)
    assert len(triton_table._tables) == 1
    lang[0].mul_(2)  # type: ignore[union-attr]
    products(lang, vis)  # other values at the same addresses
    products(drawn(3, torch.float32, 30), vis)
    assert len(triton_table._tables) == 2
    products([lang[0][:29]], [vis[0][:29]])  # type: ignore[index]
    for seed in range(triton_table.CACHED_TABLES + 3):
        products(drawn(seed, torch.float32, 5), drawn(seed + 1, torch.float32, 5))
    assert len(triton_table._tables) <= triton_table.CACHED_TABLES


def test_every_group_begins_at_a_multiple_of_16_bytes_in_all_tensors() -> None:
    """What the kernels promise the compiler; and every entry is in one line exactly."""
    for offsets, dtypes in (((3, 3), (torch.bfloat16,) * 2), ((1, 2), (torch.float32,) * 2),
                            ((4, 2), (torch.bfloat16, torch.float32)), ((0, 0), (torch.float64,) * 2)):  # fmt: skip
        tensors = tuple(
            torch.empty(200_003 + offset, dtype=dtype)[offset:] for offset, dtype in zip(offsets, dtypes, strict=True)
        )
        lines, launches = triton_table._built([tensors])
        assert [launch.parts for launch in launches] == [len(lines)]
        next_addresses = [t.data_ptr() for t in tensors]
        for first, second, out, groups, rest in lines:
            assert [first, second, out] == [*next_addresses, 0]
            assert not groups or (first % 16 == 0 and second % 16 == 0)
            entries = groups * triton_table.GROUP_ENTRIES + rest
            next_addresses = [a + entries * t.element_size() for a, t in zip((first, second), tensors, strict=True)]
        assert next_addresses == [t.data_ptr() + t.nbytes for t in tensors]


def test_parts_grow_with_the_number_of_entries() -> None:
    assert triton_table.part_size(10) == 65536
    assert triton_table.part_size(65536 * 8193) == 131072
    assert triton_table.part_size(10**11) // 65536 == 256


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU such a lane reads a neighbour")
def test_a_planted_entry_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = triton_table._lines

    def one_more(*arguments: Any) -> Any:
        return [(*line[:4], line[4] + 1) for line in lines(*arguments)]

    monkeypatch.setattr(triton_table, "_lines", one_more)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="1 of 2 unmasked lanes"):
        products(drawn(1, torch.float32, 9), drawn(2, torch.float32, 9))
