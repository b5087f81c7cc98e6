"""`combine_gradients`: every backend against fp64, in place and apart, clipping, degenerate gradients, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.places import here
from vgs_kernels import UnitGradients, backend, combine_gradients, gradient_gramian

from .test_gradient_gramian import BACKENDS, DTYPES, SHAPES, Gradients, gradients


def weights_of_two() -> Tensor:
    return torch.tensor([0.3, -0.7])


def exact_combination(lang: Gradients, vis: Gradients, weights: Tensor, out: list[Tensor]) -> list[Tensor]:
    results = []
    for a, b, target in zip(lang, vis, out, strict=True):
        total = torch.zeros(target.shape, dtype=torch.float64)
        for weight, gradient in zip(weights.double(), (a, b), strict=True):
            if gradient is not None and weight != 0:
                total += weight * gradient.double()
        results.append(total)
    return results


def fresh(shapes: tuple, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]


def check(found: list[Tensor], exact: list[Tensor], lang: Gradients, vis: Gradients) -> None:
    """One rounding of the result, and one of each product in the arithmetic of the weights."""
    for result, expected, a, b in zip(found, exact, lang, vis, strict=True):
        products = sum((g.double().abs() for g in (a, b) if g is not None), torch.zeros(()))
        unit = torch.finfo(result.dtype)
        allowed = unit.eps * expected.abs() + 4 * torch.finfo(torch.float32).eps * products + unit.smallest_normal
        if expected.numel() and expected.abs().max() > unit.max:
            allowed = allowed + float("inf")
        assert torch.all((result.double() - expected).abs() <= allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["apart", "lang", "vis"])
def test_every_backend_agrees_with_fp64(name: str, dtype: torch.dtype, where: str) -> None:
    lang, vis = gradients(dtype)
    originals = [[g.clone() for g in list_] for list_ in (lang, vis)]  # type: ignore[union-attr]
    out = {"apart": fresh(SHAPES, dtype), "lang": lang, "vis": vis}[where]
    combine_gradients(lang, vis, weights_of_two(), out=out, backend=name)  # type: ignore[arg-type]
    check(out, exact_combination(*originals, weights_of_two(), out), *originals)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_every_instruction_set_and_mixture_of_dtypes(level: int, dtypes: tuple[torch.dtype, ...]) -> None:
    shapes = ((1,), (15,), (17,), (33, 61), (4096,))
    lang, vis, out = gradients(dtypes[0], 1, shapes)[0], gradients(dtypes[1], 2, shapes)[1], fresh(shapes, dtypes[2])
    combine_gradients(lang, vis, weights_of_two(), out=out, backend="native")
    check(out, exact_combination(lang, vis, weights_of_two(), out), lang, vis)


def test_none_counts_as_zero(name: str) -> None:
    lang, vis = gradients()
    lang[0] = lang[3] = vis[3] = vis[5] = None
    out = fresh(SHAPES, torch.float32)
    combine_gradients(lang, vis, weights_of_two(), out=out, backend=name)
    check(out, exact_combination(lang, vis, weights_of_two(), out), lang, vis)
    assert out[3].eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("component", [0, 1])
def test_weight_zero_removes_a_component_whatever_it_holds(name: str, value: float, component: int) -> None:
    pair = gradients()
    healthy = pair[1 - component]
    for gradient in pair[component]:
        gradient.fill_(value)  # type: ignore[union-attr]
    weights = torch.zeros(2)
    weights[1 - component] = 0.5
    out = fresh(SHAPES, torch.float32)
    norm = combine_gradients(*pair, weights, out=out, max_norm=1e9, backend=name)
    for result, gradient in zip(out, healthy, strict=True):
        torch.testing.assert_close(result, 0.5 * gradient)  # type: ignore[operator]
    assert torch.isfinite(norm)


def test_a_degenerate_gradient_is_steered_around(name: str) -> None:
    lang, vis = gradients()
    vis[2] = torch.tensor(float("nan"))
    gramian = gradient_gramian(lang, vis, backend=name)
    out = fresh(SHAPES, torch.float32)
    norm = combine_gradients(lang, vis, UnitGradients(0.8)(gramian), out=out, gramian=gramian, backend=name)
    assert all(torch.isfinite(result).all() for result in out)
    torch.testing.assert_close(norm, torch.tensor(0.2))


def test_strides_and_offsets_do_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(here().device)

    lang: Gradients = [draw(50, 70).t(), draw(1001)[1:], draw(64, 3)[:, 1], draw(40, 30).t(), draw(40, 30)]
    vis: Gradients = [draw(50, 70).t(), draw(1002)[2:], draw(64), draw(30, 40), draw(40, 30).clone()]
    out = [draw(50, 70).t(), draw(1003)[3:], draw(64, 2)[:, 0], draw(40, 30).t(), draw(30, 40).t()]
    around = out[2]._base[:, 1].clone()  # type: ignore[union-attr, index]
    combine_gradients(lang, vis, weights_of_two(), out=out, backend=name)
    check(out, exact_combination(lang, vis, weights_of_two(), out), lang, vis)
    assert out[2]._base[:, 1].equal(around)  # type: ignore[union-attr, index]
    # In place, with an order that the other gradient does not share.
    expected = exact_combination(lang, vis, weights_of_two(), out)
    originals = [g.clone() for g in lang]  # type: ignore[union-attr]
    combine_gradients(lang, vis, weights_of_two(), out=lang, backend=name)  # type: ignore[arg-type]
    check(lang, expected, originals, vis)  # type: ignore[arg-type]


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_results_too_large_for_the_caches(dtype: torch.dtype, level: int, offset: int) -> None:
    # Past 32 MiB of results the CPU kernels write around the caches, where `out` is aligned.
    size = 34 * 2**20 // dtype.itemsize + 5
    lang, vis = (torch.linspace(-1, n, size, dtype=torch.float64).to(dtype) for n in (2, 3))
    out = torch.full((size + offset,), float("nan"), dtype=dtype)[offset:]
    combine_gradients([lang], [vis], weights_of_two(), out=[out], gramian=torch.eye(2))
    unit = 1e-6 + torch.finfo(dtype).eps
    torch.testing.assert_close(out, (0.3 * lang.float() - 0.7 * vis.float()).to(dtype), rtol=unit, atol=unit)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_clipping_equals_clip_grad_norm_after_the_combination(name: str, max_norm: float) -> None:
    lang, vis = gradients(shapes=((300, 40), (7,), (65537,)))
    weights = UnitGradients(0.8)(gradient_gramian(lang, vis, backend=name))
    unclipped = fresh(((300, 40), (7,), (65537,)), torch.float32)
    combine_gradients(lang, vis, weights, out=unclipped, backend=name)
    # clip_grad_norm_ in fp64: in fp32, torch's own norm of these gradients is off by 3e-6.
    parameters = [nn.Parameter(gradient.double()) for gradient in unclipped]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    expected = torch.cat([p.grad.view(-1) for p in parameters])  # type: ignore[union-attr]

    out = fresh(((300, 40), (7,), (65537,)), torch.float32)
    norm = combine_gradients(lang, vis, weights, out=out, max_norm=max_norm, backend=name)
    found = torch.cat([result.view(-1) for result in out])
    limit = 1e-6 if name == "native" else 3e-6  # plain torch sums in fp32
    assert (found - expected).norm() <= limit * expected.norm()
    torch.testing.assert_close(norm.double(), expected.norm(), rtol=limit, atol=0.0)


def test_autocast_does_not_coarsen_the_norm() -> None:
    lang, vis = gradients(shapes=((300, 40),))
    exact = (0.3 * lang[0].double() - 0.7 * vis[0].double()).norm()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = combine_gradients(lang, vis, weights_of_two(), out=fresh(((300, 40),), torch.float32))
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the compiled extension")
def test_opcheck() -> None:
    lang, vis = gradients(shapes=((5, 4), (3,)))
    out = fresh(((5, 4), (3,)), torch.float32)
    torch.library.opcheck(torch.ops.vgs_kernels_native.combine.default, (lang, vis, weights_of_two(), out))


def test_shards_are_combined_where_they_are(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        lang, vis = gradients(shapes=((6, 5), (7,)))
        sharded = [[distribute_tensor(g, mesh, [Shard(0)]) for g in list_] for list_ in (lang, vis)]
        with pytest.raises(ValueError, match=r"out\[0\] is placed as None"):
            combine_gradients(*sharded, weights_of_two(), out=lang)  # type: ignore[arg-type]
        combine_gradients(*sharded, weights_of_two(), out=sharded[0])
        out = [g.full_tensor() for g in sharded[0]]
    finally:
        torch.distributed.destroy_process_group()
    check(out, exact_combination(lang, vis, weights_of_two(), out), lang, vis)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": []}, "out has 0 tensors for 1 gradients"),
        ({"out": [torch.ones(2)]}, r"out\[0\] has shape \(2,\)"),
        ({"weights": torch.ones(3)}, "weights must have shape"),
        ({"max_norm": 0.0}, "max_norm must be positive"),
        ({"gramian": torch.ones(3)}, "gramian must have shape"),
        ({"gramian": torch.ones(2, 2, device="meta")}, "gramian must have shape"),
        ({"out": [torch.ones(3, device="meta")]}, "out and gradients are on both cpu and meta"),
        ({"out": [torch.ones(3).to_sparse()]}, "out and gradients must be dense"),
        ({"out": [torch.ones(3, dtype=torch.int32)]}, "out and gradients must be float32, bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    fitting = {"weights": weights_of_two(), "out": [torch.full((3,), 7.0)]}
    with pytest.raises(ValueError, match=message):
        combine_gradients([torch.ones(3)], [torch.ones(3)], **(fitting | arguments))
    assert fitting["out"][0].eq(7.0).all()


def test_the_backend_that_was_asked_for_forms_the_gramian_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    resolve = backend.resolve
    monkeypatch.setattr(
        backend, "resolve", lambda op, device, name=None: asked.append(name) or resolve(op, device, name)
    )
    combine_gradients([torch.ones(3)], [torch.ones(3)], weights_of_two(), out=[torch.empty(3)], backend="reference")
    assert asked == ["reference", "reference"]


@pytest.mark.parametrize("size", [1e-18, 0.5e19])
def test_the_norm_is_right_where_its_square_is_not_a_float32(size: float) -> None:
    first, second = [torch.full((4,), size)], [torch.full((4,), size)]
    out = [torch.empty(4)]
    norm = combine_gradients(
        first, second, torch.tensor([2.0, 1.0]), out=out, gramian=torch.full((2, 2), 4.0 * size**2)
    )
    torch.testing.assert_close(norm, torch.tensor(6.0 * size))
