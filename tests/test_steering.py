"""`UnitGradients` and the TorchJD adapter: properties of the weights, degenerate gradients, equivalence."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vgs_kernels import UnitGradients, combine_gradients, gradient_gramian
from vgs_kernels.torchjd_adapter import from_torchjd

SCALES = ("unit", "preserve")
gammas = st.floats(0.0, 1.0)
factors = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**31 - 1)


def random_gramian(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    gradients = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return gradients @ gradients.T


def length(weights: Tensor, gramian: Tensor) -> Tensor:
    return (weights @ gramian @ weights).clamp(min=0.0).sqrt()


@settings(max_examples=50, deadline=None)
@given(seeds, gammas, factors, factors)
def test_scaling_a_component_changes_nothing_in_unit_scale(seed: int, gamma: float, a: float, b: float) -> None:
    # The combination w0 (a L) + w1 (b V) stays what it was: each weight takes up the scale of its component.
    gramian, scale = random_gramian(seed), torch.tensor([a, b], dtype=torch.float64)
    policy = UnitGradients(gamma)
    scaled = policy(scale[:, None] * gramian * scale)
    torch.testing.assert_close(scaled * scale, policy(gramian), rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seeds, gammas, factors, st.sampled_from(SCALES))
def test_the_direction_does_not_depend_on_the_size_of_a_component(
    seed: int, gamma: float, factor: float, scale: str
) -> None:
    gramian, sizes = random_gramian(seed), torch.tensor([1.0, factor], dtype=torch.float64)
    policy = UnitGradients(gamma, scale=scale)
    before, after = policy(gramian), policy(sizes[:, None] * gramian * sizes) * sizes
    torch.testing.assert_close(before * after.norm(), after * before.norm(), rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seeds, gammas, st.sampled_from(SCALES))
def test_swapping_the_components_and_gamma_swaps_the_weights(seed: int, gamma: float, scale: str) -> None:
    gramian = random_gramian(seed)
    weights = UnitGradients(gamma, scale=scale)(gramian)
    swapped = UnitGradients(1.0 - gamma, scale=scale)(gramian.flip(0, 1))
    torch.testing.assert_close(swapped.flip(0), weights, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seeds, gammas, factors)
def test_preserve_keeps_the_length_of_the_sum(seed: int, gamma: float, factor: float) -> None:
    gramian = random_gramian(seed) * factor
    weights = UnitGradients(gamma, scale="preserve")(gramian)
    torch.testing.assert_close(length(weights, gramian), gramian.sum().clamp(min=0.0).sqrt(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_zero_and_one_follow_one_component(gamma: float) -> None:
    gramian = random_gramian(3)
    weights = UnitGradients(gamma)(gramian)
    assert weights[1 - int(gamma)] == 0.0
    torch.testing.assert_close(length(weights, gramian), torch.tensor(1.0, dtype=torch.float64))


def test_parallel_gradients_add_up_and_opposed_ones_cancel() -> None:
    policy = UnitGradients(0.8)
    for sign, expected in ((1.0, 1.0), (-1.0, 0.6)):
        gramian = torch.tensor([[4.0, sign * 6.0], [sign * 6.0, 9.0]])
        torch.testing.assert_close(length(policy(gramian), gramian), torch.tensor(expected))


def test_preserve_does_not_amplify_what_cancels() -> None:
    gramian = torch.tensor([[4.0, -6.0], [-6.0, 9.0]])
    weights = UnitGradients(0.5, scale="preserve")(gramian)  # the unit gradients cancel, their sum does not
    assert torch.isfinite(weights).all()
    assert weights.max() <= 1.0 / (4 * torch.finfo(torch.float32).eps ** 0.5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-42])
@pytest.mark.parametrize("component", [0, 1])
def test_a_degenerate_component_is_dropped_and_flagged(component: int, value: float, scale: str) -> None:
    gramian = torch.full((2, 2), value)
    gramian[1 - component, 1 - component] = 4.0
    if value == 1e-42:  # a norm whose inverse is still finite
        gramian[component, component] = 0.0
    policy = UnitGradients(0.75, max_weight_ratio=3.0, scale=scale)
    weights = policy(gramian)
    assert torch.isfinite(weights).all()
    assert weights[component] == 0.0
    # What is left: its share of a unit vector, or all of itself.
    share = 0.75 if component == 0 else 0.25
    torch.testing.assert_close(weights[1 - component], torch.tensor(share / 2 if scale == "unit" else 1.0))


@pytest.mark.parametrize("scale", SCALES)
def test_two_degenerate_components_give_no_step(scale: str) -> None:
    for value in (0.0, float("nan"), float("inf")):
        policy = UnitGradients(scale=scale)
        assert policy(torch.full((2, 2), value)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_gradients_at_the_ends_of_the_range_of_float32(size: float, scale: str) -> None:
    gramian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weights = UnitGradients(scale=scale)(gramian * size * size)
    expected = UnitGradients(scale=scale)(gramian)
    torch.testing.assert_close(weights, expected / size if scale == "unit" else expected)


@settings(max_examples=50, deadline=None)
@given(seeds, gammas, st.floats(0.1, 10.0), st.sampled_from(SCALES))
def test_max_weight_ratio_bounds_the_ratio(seed: int, gamma: float, ratio: float, scale: str) -> None:
    weights = UnitGradients(gamma, ratio, scale)(random_gramian(seed))
    assert weights[0] == 0.0 or weights[1] <= ratio * weights[0] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, "gamma must be in"),
        ({"gamma": float("nan")}, "gamma must be in"),
        ({"max_weight_ratio": 0.0}, "max_weight_ratio must be positive"),
        ({"scale": "sum"}, "scale must be one of unit, preserve"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnitGradients(**arguments)


def test_a_gramian_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        UnitGradients()(torch.eye(3))


# -------------------------------------------------------------------------------------------------------------- TorchJD

WEIGHTINGS = [
    "MeanWeighting",
    "SumWeighting",
    "PCGradWeighting",
    "MGDAWeighting",
    "CAGradWeighting",
    "UPGradWeighting",
    "DualProjWeighting",
    "AlignedMTLWeighting",
    "IMTLGWeighting",
]


def make_weighting(name: str) -> nn.Module:
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        return getattr(aggregation, name)(**({"c": 0.5} if name == "CAGradWeighting" else {}))
    except ImportError as error:  # some rules need a solver that TorchJD leaves optional
        pytest.skip(str(error))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_torchjd_rule_gives_the_update_that_torchjd_gives(name: str) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = make_weighting(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))
    parameters, inputs = list(model.parameters()), torch.randn(5, 7)

    def losses() -> list[Tensor]:
        return [model(inputs).square().mean(), (model(inputs) - 1.0).abs().sum()]

    torch.manual_seed(1)  # PCGrad draws an order
    autojac.backward(losses())
    rule = aggregation.GramianWeightedAggregator(weighting)
    autojac.jac_to_grad(parameters, rule, optimize_gramian_computation=True)
    theirs = [p.grad for p in parameters]

    lang, vis = (list(torch.autograd.grad(loss, parameters)) for loss in losses())
    torch.manual_seed(1)
    gramian = gradient_gramian(lang, vis)
    combine_gradients(lang, vis, from_torchjd(weighting)(gramian), out=lang, gramian=gramian)
    for ours, expected in zip(lang, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_torchjd_rule_drops_a_degenerate_component(name: str, value: float) -> None:
    policy = from_torchjd(make_weighting(name))
    gramian = torch.tensor([[4.0, value], [value, value]])
    weights = policy(gramian)
    assert torch.isfinite(weights).all()
    assert weights[1] == 0.0


def test_aggregators_are_taken_for_their_weighting_and_others_refused() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    gramian = torch.tensor([[2.0, -1.0], [-1.0, 3.0]])
    expected = from_torchjd(aggregation.MGDAWeighting())(gramian)
    torch.testing.assert_close(from_torchjd(aggregation.MGDA())(gramian), expected)
    with pytest.raises(TypeError, match="does not weigh gradients by their Gramian"):
        from_torchjd(aggregation.TrimmedMean(trim_number=0))
    with pytest.raises(TypeError, match="got UnitGradients"):
        from_torchjd(UnitGradients())


def test_without_torchjd_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchjd"):
        from_torchjd(object())
