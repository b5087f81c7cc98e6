"""`gradient_gramian`: every backend against fp64, the ways gradients come in lists, and the errors of arguments."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.places import here
from vgs_kernels import backend, gradient_gramian

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a millisecond for every thousand entries
ROWS, LONG = (200, 2051) if INTERPRETED else (1000, 65536 * 2 + 3)
SHAPES = ((3,), (0,), (), (ROWS, 77), (5, 7, 9), (LONG,), (8, 3, 5, 5))
BACKENDS = [name for name in backend.BACKENDS if backend._problem("gradient_gramian", name, "cpu") is None]

Gradients = list[Tensor | None]


def gradients(dtype: torch.dtype = torch.float32, seed: int = 0, shapes: tuple = SHAPES) -> tuple[Gradients, Gradients]:
    """Peaked, as gradients are: a few large entries among many small ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.pow(5).to(dtype).to(here().device)

    return [draw(shape) for shape in shapes], [draw(shape) for shape in shapes]


def exact_gramian(lang: Gradients, vis: Gradients) -> Tensor:
    rows = []
    for own, other in ((lang, vis), (vis, lang)):
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(b) if a is None else a).double().reshape(-1)
                    for a, b in zip(own, other, strict=True)
                    if a is not None or b is not None
                ]
            )
        )
    return torch.stack(rows) @ torch.stack(rows).T


def check(found: Tensor, lang: Gradients, vis: Gradients, message: str = "") -> None:
    """At most twice the error of plain torch in the accumulation dtype, plus a rounding of the result."""
    exact = exact_gramian(lang, vis)
    plain = gradient_gramian(lang, vis, backend="reference").double()
    size = exact.diagonal().sqrt()
    floor = 4 * torch.finfo(found.dtype).eps * size[:, None] * size
    assert torch.all((found.double() - exact).abs() <= 2 * (plain - exact).abs() + floor), message


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_agrees_with_fp64(name: str, dtype: torch.dtype) -> None:
    lang, vis = gradients(dtype)
    result = gradient_gramian(lang, vis, backend=name)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(result, lang, vis)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)))
def test_every_instruction_set_and_mixture_of_dtypes(level: int, first: torch.dtype, second: torch.dtype) -> None:
    shapes = ((1,), (15,), (17,), (70, 61), (4096,))
    lang, vis = gradients(first, 1, shapes)[0], gradients(second, 2, shapes)[1]
    check(gradient_gramian(lang, vis, backend="native"), lang, vis)


def test_none_counts_as_zero(name: str) -> None:
    lang, vis = gradients()
    lang[0] = lang[3] = vis[3] = vis[5] = None
    check(gradient_gramian(lang, vis, backend=name), lang, vis)
    alone = gradient_gramian(lang, [None] * len(lang), backend=name)
    assert alone[0, 0] > 0
    assert alone[0, 1] == alone[1, 0] == alone[1, 1] == 0


def test_strides_and_offsets_do_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(here().device)

    images = [draw(2, 3, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    lang: Gradients = [
        draw(50, 70).t(),
        draw(1001)[1:],
        draw(64, 3)[:, 1],
        images[0],
        draw(1).expand(9),
        draw(40, 30).t(),
    ]
    vis: Gradients = [draw(50, 70).t(), draw(1002)[2:], draw(64), images[1], draw(9), draw(30, 40)]
    check(gradient_gramian(lang, vis, backend=name), lang, vis)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_degenerate_gradient_shows_in_its_own_norm_and_leaves_the_other_alone(name: str, value: float) -> None:
    lang, vis = gradients()
    vis[3].view(-1)[12345] = value  # type: ignore[union-attr]
    result = gradient_gramian(lang, vis, backend=name)
    torch.testing.assert_close(result[0, 0].double(), exact_gramian(lang, lang)[0, 0], rtol=1e-5, atol=0.0)
    assert not torch.isfinite(result[1, 1])
    assert not torch.isfinite(result[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_the_same_on_every_run_and_number_of_threads(dtype: torch.dtype) -> None:
    lang, vis = gradients(dtype, shapes=((300_001,), (65536,), (17,)))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [gradient_gramian(lang, vis) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)


def test_thousands_of_tensors() -> None:
    lang, vis = gradients(shapes=((3,),) * 3000)
    check(gradient_gramian(lang, vis), lang, vis)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the compiled extension")
def test_opcheck() -> None:
    lang, vis = gradients(shapes=((5, 4), (3,)))
    for float64 in (False, True):
        torch.library.opcheck(torch.ops.vgs_kernels_native.inner_products.default, (lang, vis, float64))


# -------------------------------------------------------------------------------------------------------------- DTensor


@pytest.fixture
def mesh() -> Iterator[object]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", BACKENDS)
def test_shards_are_summed_over_the_group(mesh, name: str) -> None:  # type: ignore[no-untyped-def]
    lang, vis = gradients(shapes=((6, 5), (7,)))
    sharded = [[distribute_tensor(g, mesh, [Shard(0)]) for g in list_] for list_ in (lang, vis)]
    result = gradient_gramian(*sharded, backend=name)
    assert not isinstance(result, DTensor)
    check(result, lang, vis)


def test_dtensors_that_do_not_fit_are_refused(mesh) -> None:  # type: ignore[no-untyped-def]
    shard = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"second\[0\] is placed as"):
        gradient_gramian([shard], [distribute_tensor(torch.ones(4), mesh, [Replicate()])])
    with pytest.raises(ValueError, match="Partial placement"):
        gradient_gramian([DTensor.from_local(torch.ones(4), mesh, [Partial()])], [None])


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("lang", "vis", "message"),
    [
        ([torch.ones(2)], [], "first has 1 entries and second 0"),
        ([], [], "every gradient is None"),
        ([None], [None], "every gradient is None"),
        ([torch.ones(2)], [torch.ones(1, 2)], r"second\[0\] has shape"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], "are on both cpu and meta"),
        ([torch.ones(2, dtype=torch.int64)], [None], "must be float32, bfloat16"),
        ([torch.ones(2, 2).to_sparse()], [None], "must be dense"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(lang: Gradients, vis: Gradients, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_gramian(lang, vis)
