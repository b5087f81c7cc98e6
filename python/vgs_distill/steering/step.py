"""One optimizer step of steering: the two parts of the loss of its micro-batches in, one gradient in `.grad` out.

A step that measures both gradients runs back the language part and the visual part of every micro-batch apart; after
the last one the Gramian of the two gradients gives the weights they are combined with. With ``steering="exact"`` that
is every step. With ``"amortized"`` it is one in `refresh_every`; the others predict the weights and run back the
weighted sum once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgs_kernels import UnitGradients

from ..distributed import is_replicated, process_count, sum_over_processes, two_backward_passes
from .gamma import ADAPTIVE, AdaptiveGamma, ScheduledGamma
from .gradient_pair import NO_MODULES, GradientPair, PairRecord, direction_cosine, no_gradient, weight_ratio
from .predictor import GramianPredictor
from .proxy import GradientProxy
from .token_weights import VisualTokenWeights

# Takes gamma and the bound on the weight ratio as they are set, returns those that are used.
Guard = Callable[[float, float | None], tuple[float, float | None]]
# Takes the trained parameters, returns names of modules with the indices of their parameters.
ModulesOf = Callable[[Sequence[nn.Parameter]], Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class SteeringSettings:
    """How steps are steered: settings of `VGSConfig`, which explains them."""

    steering: str
    gamma: float | str
    gamma_min: float
    gamma_max: float
    gamma_schedule: str
    gamma_start: float
    max_weight_ratio: float | None
    steering_scale: str
    refresh_every: int
    refresh_drift: float
    weighs_tokens: bool


class LossParts(NamedTuple):
    """The two parts of the loss of a micro-batch, each a sum over tokens / number of tokens of the step."""

    lang: Tensor  # (), differentiable
    vis: Tensor | None  # (), differentiable; None if no row has an image
    visual_weights: Tensor  # (tokens of rows with an image,), what vis weighs each by
    proxy: GradientProxy | None  # of the gradients of lang and vis; None unless steering is amortized

    def weighted(self, weights: Tensor) -> Tensor:
        """weights[0] * lang + weights[1] * vis, differentiable."""
        lang = weights[0].to(self.lang) * self.lang
        return lang if self.vis is None else lang + weights[1].to(self.vis) * self.vis


class StepRecord(NamedTuple):
    """What one step measured."""

    metrics: dict[str, Tensor | float]
    modules: Mapping[str, Tensor] = NO_MODULES  # the Gramian (2, 2) of each module that was asked for
    finite: bool = True  # False: there is no gradient to apply


class _Plan:
    """How one step gets its gradient; the same for all its micro-batches."""

    def __init__(self, model: nn.Module, policy: UnitGradients, *, apart: bool, single: bool) -> None:
        self.model = model
        self.policy = policy
        self.apart = apart  # two backward passes, weights from what they measure; otherwise one of the weighted sum
        self.single = single  # one micro-batch makes the step
        self.gradients = GradientPair(model.parameters())
        self.weights: Tensor | None = None  # (2,), of the one pass
        self.proxy: GradientProxy | None = None  # of the micro-batches so far, on this process
        self.proxy_squares: Tensor | None = None  # (2,), what stands for |g_lang|^2 and |g_vis|^2 over all processes

    def add(self, proxy: GradientProxy) -> None:
        self.proxy = proxy if self.proxy is None else self.proxy.plus(proxy)


class SteeringStep:
    """Makes steps, one after the other; each is

        plan(model, ...)                  how it gets its gradient
        with micro_batch():               around the passes of every micro-batch
            run_back(parts, ...)          the two parts of its loss
        finish()                          leaves the steered gradient in `.grad`

    What one step leaves to the next (gamma, predictions, the mean token weight) is its `state_dict`.
    """

    def __init__(
        self, settings: SteeringSettings, device: torch.device, guard: Guard = lambda gamma, ratio: (gamma, ratio)
    ) -> None:
        self._settings = settings
        self._guard = guard
        self.gamma: AdaptiveGamma | ScheduledGamma
        if settings.gamma == ADAPTIVE:
            self.gamma = AdaptiveGamma(settings.gamma_min, settings.gamma_max)
        else:
            self.gamma = ScheduledGamma(settings.gamma_schedule, settings.gamma_start, float(settings.gamma))
        self._predictor: GramianPredictor | None = None
        if settings.steering == "amortized":
            self._predictor = GramianPredictor(settings.refresh_every, settings.refresh_drift, device)
        self._token_weights = VisualTokenWeights(settings.weighs_tokens, device)
        self.weight_ratio = torch.tensor(math.nan, device=device)  # of the last update
        self._plan: _Plan | None = None

    @property
    def planned(self) -> bool:
        """Whether a step has been planned and not finished."""
        return self._plan is not None

    def plan(self, model: nn.Module, step: int, total_steps: int, micro_batches: int) -> None:
        """Decide, before the first micro-batch of a step, how it gets its gradient.

        `model`: as the launcher wrapped it. `step`: updates so far, out of `total_steps`.
        """
        settings, predictor = self._settings, self._predictor
        gamma, max_weight_ratio = self._guard(self.gamma.at(step, total_steps), settings.max_weight_ratio)
        policy = UnitGradients(gamma, max_weight_ratio, settings.steering_scale)
        apart = predictor is None or predictor.refresh_due()
        plan = _Plan(model, policy, apart=apart, single=micro_batches == 1)
        if predictor is not None and not apart and not plan.single:
            plan.weights = predictor.weights(policy)  # all micro-batches need the same, before the last is known
        self._token_weights.begin_step()
        self._plan = plan

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around the forward and backward passes of one micro-batch."""
        plan = self._planned()
        if not plan.apart:
            yield
            return
        with two_backward_passes(plan.model):
            yield
            plan.gradients.end_micro_batch()

    def run_back(self, parts: LossParts, backward: Callable[[Tensor], None]) -> Tensor:
        """Take in the loss of a micro-batch; return what is left to be run back, once.

        `backward` runs a loss back through a graph that is needed again: both parts come out of one operator.
        """
        plan = self._planned()
        self._token_weights.add(parts.visual_weights)
        if parts.proxy is not None:
            plan.add(parts.proxy.scaled(1.0 / process_count()))  # gradients are averaged over processes
        if not plan.apart:
            return parts.weighted(self._weights_of_one_pass(plan))
        plan.gradients.accumulate_lang()
        backward(parts.lang)
        plan.gradients.accumulate_vis()
        return no_gradient(parts.lang.device) if parts.vis is None else parts.vis

    def finish(self, modules: ModulesOf = lambda parameters: NO_MODULES) -> StepRecord:
        """Leave the steered gradient in `.grad`, after the last micro-batch.

        `modules`: what to measure by itself; asked only where the step measures at all.
        """
        plan = self._planned()
        self._plan = None
        metrics: dict[str, Tensor | float] = {"steering/gamma": plan.policy.gamma}
        if self._token_weights.enabled:
            metrics["steering/visual_token_weight"] = self._token_weights.mean()
        by_module = NO_MODULES
        if plan.apart:
            record = plan.gradients.combine(
                plan.policy,
                is_replicated(plan.model),
                modules(plan.gradients.parameters),
                self._token_weights.scales(),
            )
            if record is None:
                return StepRecord({})
            if not torch.isfinite(record.gramian).all():  # the policy would go on with the other part alone
                return StepRecord({}, finite=False)
            plan.weights, by_module = record.weights, record.modules
            metrics |= record.metrics()
            if self._predictor is not None:
                metrics |= self._refresh(self._predictor, plan, record)
        elif self._predictor is not None:
            self._predictor.observe(self._proxy_squares(plan))
        self._token_weights.end_step()
        assert plan.weights is not None
        metrics["steering/weight_ratio"] = self.weight_ratio = weight_ratio(plan.weights)
        return StepRecord(metrics, by_module)

    def discard(self) -> None:
        """Forget the planned step and its gradients."""
        self._plan = None

    def _planned(self) -> _Plan:
        assert self._plan is not None, "plan() comes first"
        return self._plan

    def _weights_of_one_pass(self, plan: _Plan) -> Tensor:
        """Of (lang, vis), (2,): from the step's own proxy where its only micro-batch is known, else from the plan."""
        if not plan.single:
            assert plan.weights is not None
            return plan.weights * self._token_weights.expected_scales()
        assert self._predictor is not None
        plan.weights = self._predictor.weights(plan.policy, self._proxy_squares(plan))
        return plan.weights * self._token_weights.scales()

    def _proxy_squares(self, plan: _Plan) -> Tensor:
        """What stands for |g_lang|^2 and |g_vis|^2 of the step, over all processes; asked for after its last loss."""
        if plan.proxy_squares is None:
            assert plan.proxy is not None
            squares = GradientProxy(*(sum_over_processes(part) for part in plan.proxy)).squares()
            plan.proxy_squares = squares * self._token_weights.scales().square()
        return plan.proxy_squares

    def _refresh(self, predictor: GramianPredictor, plan: _Plan, record: PairRecord) -> dict[str, Tensor | float]:
        """Measure anew; return how good the prediction for this very step would have been."""
        metrics: dict[str, Tensor | float] = {
            "steering/refreshed": 1.0,
            "steering/measured_weight_ratio": weight_ratio(record.weights),
        }
        proxy, predicted = self._proxy_squares(plan), None
        if predictor.ready:
            known = proxy if plan.single else None
            predicted = predictor.predict(known)
            weights = predictor.weights(plan.policy, known)
            metrics["steering/predicted_weight_ratio"] = weight_ratio(weights)
            metrics["steering/direction_cosine"] = direction_cosine(record.gramian, record.weights, weights)
        predictor.refresh(record.gramian, proxy, predicted)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "gamma": self.gamma.state_dict(),
            "predictor": None if self._predictor is None else self._predictor.state_dict(),
            "token_weights": self._token_weights.state_dict(),
            "weight_ratio": self.weight_ratio.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gamma.load_state_dict(state["gamma"])
        if self._predictor is not None:
            self._predictor.load_state_dict(state["predictor"])
        self._token_weights.load_state_dict(state["token_weights"])
        self.weight_ratio = self.weight_ratio.new_tensor(state["weight_ratio"])
