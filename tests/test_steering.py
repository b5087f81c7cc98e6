"""The policies, `steer_` and the TorchJD adapter: properties of the weights, degenerate gradients, equivalence."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from vgs_kernels import UnitGradients, VisualGradientSteering, combine_gradients, gradient_gramian, steer_
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


# ---------------------------------------------------------------------------------------------- the paper's, and steer_


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(0.0, 8.0), factors, factors)
def test_steering_keeps_the_length_of_distillation(seed: int, gamma: float, a: float, b: float) -> None:
    scale = torch.tensor([a, b], dtype=torch.float64)
    gramian = scale[:, None] * random_gramian(seed) * scale
    weights = VisualGradientSteering(gamma)(gramian)
    torch.testing.assert_close(weights[1], gamma * weights[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(length(weights, gramian), gramian[0, 0].sqrt(), rtol=1e-6, atol=0.0)


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(0.0, 8.0))
def test_steering_keeps_the_length_in_float32(seed: int, gamma: float) -> None:
    gramian = random_gramian(seed, torch.float32)
    weights = VisualGradientSteering(gamma)(gramian)
    assert weights.dtype == torch.float32
    combined = length(weights.double(), gramian.double())
    torch.testing.assert_close(combined, gramian[0, 0].double().sqrt(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "policy", [VisualGradientSteering(2.0), UnitGradients(0.8), UnitGradients(0.8, scale="preserve")]
)
@pytest.mark.parametrize(
    "sizes", [(1e-23, 1e-23), (1e19, 1e19), (1e-23, 1e19), (1e19, 1e-23), (1e-19, 1e19), (0.0, 1e19)]
)
def test_weights_are_finite_for_every_norm(policy: object, sizes: tuple[float, float]) -> None:
    gradients = [[torch.tensor([0.6, 0.8]) * sizes[0]], [torch.tensor([0.0, 1.0]) * sizes[1]]]
    weights = policy(gradient_gramian(*gradients))  # type: ignore[operator]
    assert torch.isfinite(weights).all()
    if min(sizes) > 1e-20:  # the square is a float32
        assert (weights > 0).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_distillation_goes_on_without_a_visual_gradient_and_not_without_its_own(value: float) -> None:
    policy = VisualGradientSteering()
    assert policy(torch.tensor([[4.0, value], [value, value]])).tolist() == [1.0, 0.0]
    assert policy(torch.tensor([[value, value], [value, 4.0]])).tolist() == [0.0, 0.0]


def test_what_cancels_is_not_amplified() -> None:
    gramian = torch.tensor([[4.0, -2.0], [-2.0, 1.0]])  # standard + 2 vis is 0
    weights = VisualGradientSteering(2.0)(gramian)
    assert torch.isfinite(weights).all()
    assert weights.max() <= 2.0 / (4 * torch.finfo(torch.float32).eps ** 0.5)


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_a_gamma_that_makes_no_sense_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be a finite number of at least 0"):
        VisualGradientSteering(gamma)


def small_problem() -> tuple[nn.Module, list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))
    model[0].bias.requires_grad_(False)
    return model, list(model.parameters()), torch.randn(5, 7)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_steer_is_two_gradients_a_policy_and_their_combination(shared: bool, max_norm: float | None) -> None:
    model, parameters, inputs = small_problem()
    trained = [p for p in parameters if p.requires_grad]

    def losses() -> list[Tensor]:
        outputs = model(inputs), model(inputs)
        return [outputs[0].square().mean(), (outputs[0 if shared else 1] - 1.0).abs().sum()]

    gradients = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses()]
    policy = VisualGradientSteering(2.0)
    gramian = gradient_gramian(*gradients)
    expected = [torch.empty_like(p) for p in trained]
    norm = combine_gradients(*gradients, policy(gramian), out=expected, max_norm=max_norm)
    for repeat in (1, 2):  # it adds, as backward does
        steered = steer_(parameters, *losses(), policy, max_norm=max_norm)
        torch.testing.assert_close([p.grad for p in trained], [repeat * g for g in expected])
    torch.testing.assert_close((steered.gramian, steered.weights, steered.norm), (gramian, policy(gramian), norm))
    assert model[0].bias.grad is None


def test_steer_takes_a_parameter_that_one_loss_does_not_reach() -> None:
    first, second, neither = (torch.ones(3, requires_grad=True) for _ in range(3))
    steer_([first, second, neither], first.sum(), 2 * second.sum(), UnitGradients(0.8))
    torch.testing.assert_close(first.grad, torch.full((3,), 0.2 / 3**0.5))
    torch.testing.assert_close(second.grad, torch.full((3,), 0.8 / 3**0.5))
    assert neither.grad is None
    with pytest.raises(ValueError, match="every gradient is None"):
        steer_([neither], first.sum(), second.sum(), UnitGradients(0.8))


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
