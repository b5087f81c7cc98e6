"""One optimizer step of steering: the losses of its micro-batches in, one gradient in `.grad` out.

A step that measures keeps the gradients of the parts of the loss apart; after the last micro-batch the Gramian of two
of them gives the weights that they are combined with. Every other step knows its weights beforehand, and `backward`
adds up one gradient. With ``eta="measured"`` every step measures, with ``"amortized"`` one in `refresh_every` does, and
with a number, or without a second part, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgs_kernels import UnitGradients, VisualGradientSteering

from ..distributed import average_grad, is_replicated, several_backward_passes
from .averages import GramianAverage
from .gamma import ADAPTIVE, AdaptiveGamma, ScheduledGamma
from .gradients import NO_MODULES, CombinationRecord, PartGradients, direction_cosine, no_gradient
from .methods import METHODS
from .preservation import ADAPTIVE as ADAPTIVE_PRESERVATION
from .preservation import AdaptivePreservation, ConstantPreservation
from .token_weights import VisualTokenWeights

MEASURED, AMORTIZED = "measured", "amortized"


class Bounds(NamedTuple):
    """What a step is steered with; a guard may change it."""

    gamma: float
    max_weight_ratio: float | None
    preservation: float  # λ


Guard = Callable[[Bounds], Bounds]
# Takes the trained parameters, returns names of modules with the indices of their parameters.
ModulesOf = Callable[[Sequence[nn.Parameter]], Mapping[str, Sequence[int]]]
# Takes a loss, and whether its graph is needed again.
Backward = Callable[[Tensor, bool], None]


@dataclass(frozen=True)
class SteeringSettings:
    """How steps are steered: settings of `VGSConfig`, which explains them."""

    method: str
    eta: float | str
    gamma: float | str
    gamma_min: float
    gamma_max: float
    gamma_schedule: str
    gamma_start: float
    language_preservation: float | str
    max_weight_ratio: float | None
    steering_scale: str
    refresh_every: int
    weighs_tokens: bool


class ViewLoss(NamedTuple):
    """The losses of one view of a micro-batch, to be run back before the next view runs forward."""

    parts: Mapping[
        int, Tensor
    ]  # 0, 1, 2 for the method's first, second and preserved part; 0 alone: their weighted sum
    last: bool  # no view follows


class StepRecord(NamedTuple):
    """What one step measured."""

    metrics: dict[str, Tensor | float]
    modules: Mapping[str, Tensor] = NO_MODULES  # the Gramian (2, 2) of each module that was asked for
    finite: bool = True  # False: there is no gradient to apply


class _Plan:
    """How one step gets its gradient; the same for all its micro-batches."""

    def __init__(self, model: nn.Module, bounds: Bounds, policy: Any, weights: Tensor | None, parts: int) -> None:
        self.model = model
        self.bounds = bounds
        self.policy = policy
        self.weights = weights  # (3,), of the parts; None: they are kept apart and measured
        self.gradients = PartGradients(model.parameters(), parts)

    @property
    def apart(self) -> bool:
        return self.weights is None


class SteeringStep:
    """Makes steps, one after the other; each is

        plan(model, ...)                  how it gets its gradient
        with micro_batch():               around the passes of every micro-batch
            run_back(view, ...)           the losses of each of its views
        finish()                          leaves the steered gradient in `.grad`

    What one step leaves to the next (gamma, λ, averages) is its `state_dict`.
    """

    def __init__(self, settings: SteeringSettings, device: torch.device, guard: Guard = lambda bounds: bounds) -> None:
        self._settings = settings
        self._device = device
        self._guard = guard
        self.method = METHODS[settings.method]
        self.gamma: AdaptiveGamma | ScheduledGamma
        if settings.gamma == ADAPTIVE:
            self.gamma = AdaptiveGamma(settings.gamma_min, settings.gamma_max)
        else:
            self.gamma = ScheduledGamma(settings.gamma_schedule, settings.gamma_start, float(settings.gamma))
        self.preservation: AdaptivePreservation | ConstantPreservation
        if settings.language_preservation == ADAPTIVE_PRESERVATION:
            self.preservation = AdaptivePreservation()
        else:
            self.preservation = ConstantPreservation(float(settings.language_preservation))
        self._average = GramianAverage(settings.refresh_every, device) if settings.eta == AMORTIZED else None
        self._token_weights = VisualTokenWeights(settings.weighs_tokens, device)
        self.weight_ratio = torch.tensor(math.nan, device=device)  # of the last update
        self._plan: _Plan | None = None

    @property
    def planned(self) -> bool:
        """Whether a step has been planned and not finished."""
        return self._plan is not None

    @property
    def weights(self) -> Tensor | None:
        """Of the parts of the loss in the planned step, (3,); None where they are to be kept apart."""
        return self._planned().weights

    @property
    def preserves(self) -> bool:
        """Whether the planned step has the third part."""
        return self.method.preserved is not None and self._planned().bounds.preservation > 0

    def plan(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Decide, before the first micro-batch of a step, how it gets its gradient.

        `model`: as the launcher wrapped it. `step`: updates so far, out of `total_steps`.
        """
        settings = self._settings
        bounds = self._guard(
            Bounds(self.gamma.at(step, total_steps), settings.max_weight_ratio, self.preservation.weight)
        )
        policy: Any = VisualGradientSteering(bounds.gamma)
        if self.method.unit:
            policy = UnitGradients(bounds.gamma, bounds.max_weight_ratio, settings.steering_scale)
        self._token_weights.begin_step()
        self._plan = _Plan(model, bounds, policy, self._known_weights(bounds, policy), len(self.method.parts))

    def _known_weights(self, bounds: Bounds, policy: Any) -> Tensor | None:
        """(3,), or None where the step measures them."""
        eta = self._settings.eta
        if self.method.second is None:
            pair = self._pair(1.0, 0.0)
        elif not isinstance(eta, str):
            pair = self._pair(eta, eta * bounds.gamma)
        elif self._average is None or self._average.refresh_due:
            return None
        else:
            pair = policy(self._average.gramian())
        return torch.cat([pair * self._token_weights.expected_scales(), pair[:1] * bounds.preservation])

    def _pair(self, first: float, second: float) -> Tensor:
        """(2,), filled on the device: copied numbers would wait for it."""
        return torch.cat([torch.full((1,), value, device=self._device) for value in (first, second)])

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around the forward and backward passes of one micro-batch."""
        plan = self._planned()
        with several_backward_passes(plan.model, apart=plan.apart):
            yield
            if plan.apart:
                plan.gradients.end_micro_batch()

    def run_back(self, view: ViewLoss, backward: Backward) -> Tensor | None:
        """Run back the losses of a view, all but the last of the last view: that is returned, for the caller to run."""
        plan = self._planned()
        left = len(view.parts)
        for part, loss in view.parts.items():
            left -= 1
            if plan.apart:
                plan.gradients.into(part)
            if view.last and not left:
                return loss
            backward(loss, left > 0)
        return no_gradient(self._device) if view.last else None

    def add_token_weights(self, weights: Tensor) -> None:  # (tokens with an image,)
        """What the visual part of a micro-batch weighed its tokens by."""
        self._token_weights.add(weights)

    def observe(self, losses: Mapping[str, float]) -> None:
        """Take in the means of a step's losses, the same on all processes, all finite."""
        if "loss/lang" in losses:
            self.preservation.observe(losses["loss/lang"])
            second = "loss/vis" if "loss/vis" in losses else f"loss/{self.method.second}"
            self.gamma.observe(losses["loss/lang"], losses[second])

    def finish(self, modules: ModulesOf = lambda parameters: NO_MODULES) -> StepRecord:
        """Leave the steered gradient in `.grad`, after the last micro-batch.

        `modules`: what to measure by itself; asked only where the step measures at all.
        """
        plan = self._planned()
        self._plan = None
        metrics: dict[str, Tensor | float] = {}
        if self.method.second is not None:
            metrics["steering/gamma"] = plan.bounds.gamma
        if self.method.preserved is not None:
            metrics["steering/language_preservation"] = plan.bounds.preservation
        if self._token_weights.enabled:
            metrics["steering/visual_token_weight"] = self._token_weights.mean()
        by_module = NO_MODULES
        if plan.weights is not None:
            if is_replicated(plan.model):
                average_grad(plan.gradients.parameters)
            if self._average is not None and self.method.second is not None:
                self._average.skip()
            weights = plan.weights[:2] / self._token_weights.expected_scales()
        else:
            record = plan.gradients.combine(
                plan.policy,
                is_replicated(plan.model),
                plan.bounds.preservation if self.method.preserved is not None else 0.0,
                modules(plan.gradients.parameters),
                self._token_weights.scales(),
            )
            if record is None:
                return StepRecord({})
            if not torch.isfinite(record.gramian).all():  # the policy would go on with one part alone
                return StepRecord({}, finite=False)
            weights, by_module = record.weights, record.modules
            metrics |= self._measured(record, plan)
        self._token_weights.end_step()
        if self.method.second is not None:
            if not self.method.unit:
                metrics["steering/eta"] = weights[0]
            metrics["steering/weight_ratio"] = self.weight_ratio = weights[1] / weights[0]
        return StepRecord(metrics, by_module)

    def discard(self) -> None:
        """Forget the planned step and its gradients."""
        self._plan = None

    def _planned(self) -> _Plan:
        assert self._plan is not None, "plan() comes first"
        return self._plan

    def _measured(self, record: CombinationRecord, plan: _Plan) -> dict[str, Tensor | float]:
        """What is logged of a measurement; at a refresh also how far the averages of those before were off."""
        norms = record.norms()
        metrics: dict[str, Tensor | float] = {
            f"gradient/norm_{name}": norms[i] for i, name in enumerate(self.method.pair)
        }
        metrics["gradient/cosine"] = record.cosine()
        if self._average is None:
            return metrics
        metrics["steering/refreshed"] = 1.0
        if self._average.known:
            expected = plan.policy(self._average.gramian())
            metrics["steering/direction_cosine"] = direction_cosine(record.gramian, record.weights, expected)
        self._average.refresh(record.gramian)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "gamma": self.gamma.state_dict(),
            "preservation": self.preservation.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "token_weights": self._token_weights.state_dict(),
            "weight_ratio": self.weight_ratio.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gamma.load_state_dict(state["gamma"])
        self.preservation.load_state_dict(state["preservation"])
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])
        self._token_weights.load_state_dict(state["token_weights"])
        self.weight_ratio = self.weight_ratio.new_tensor(state["weight_ratio"])
