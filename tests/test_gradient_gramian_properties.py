"""Properties of `gradient_gramian` that hold for any gradients, in every place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.places import Place, at, places
from tests.test_gradient_gramian import INTERPRETED, gradients
from vgs_kernels import gradient_gramian

# Triton's interpreter takes milliseconds a tensor.
EXAMPLES = 2 if INTERPRETED else 15


@pytest.mark.parametrize("place", places("gradient_gramian"))
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), random=st.randoms())
def test_order_and_pieces_do_not_matter(place: Place, seed: int, sizes: list[int], random) -> None:  # type: ignore[no-untyped-def]
    with at(place):
        _check_order_and_pieces(place.backend, seed, tuple((size,) for size in (*sizes, 5)), random)


def _check_order_and_pieces(name: str, seed: int, shapes: tuple[tuple[int], ...], random) -> None:  # type: ignore[no-untyped-def]
    lang, vis = gradients(torch.float64, seed, shapes)
    whole = gradient_gramian(lang, vis, backend=name)
    order = list(range(len(lang)))
    random.shuffle(order)
    shuffled = gradient_gramian([lang[i] for i in order], [vis[i] for i in order], backend=name)
    pieces = [[part for g in gradients_ for part in g.split(7)] for gradients_ in (lang, vis)]  # type: ignore[union-attr]
    for other in (
        shuffled,
        gradient_gramian(*pieces, backend=name),
        gradient_gramian(vis, lang, backend=name).flip(0, 1),
    ):
        torch.testing.assert_close(other, whole, rtol=1e-12, atol=1e-12 * whole.max().item())


@pytest.mark.parametrize("place", places("gradient_gramian"))
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 10**6), mixture=st.floats(-1.0, 1.0))
def test_it_is_positive_semi_definite_to_rounding(place: Place, seed: int, mixture: float) -> None:
    with at(place):
        lang, other = gradients(torch.float32, seed, ((100,), (7, 5)))
        vis = [a * mixture + b * 1e-3 for a, b in zip(lang, other, strict=True)]  # type: ignore[operator]
        gramian = gradient_gramian(lang, vis, backend=place.backend)
    assert gramian.equal(gramian.T)
    assert torch.linalg.eigvalsh(gramian.double()).min() >= -1e-6 * gramian.trace()
