"""A step of a method in an engine that owns the loop: its losses run back, and the steered gradient left in `.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decomposed_loss import DecomposedLoss, View
from ..loss import MicroBatchLoss
from ..report.loss_meter import LossMeter
from ..settings import MethodSettings
from ..steering.step import Backward, SteeringSettings, SteeringStep


class MethodStep:
    """What `VGSTrainer` does between rollouts and the optimizer, for models in another engine's wrappers.

    step.micro_batch(student, teacher, seen, masked, items, at, backward)    # each micro-batch
    metrics = step.finish()                                                  # after the last
    """

    def __init__(
        self,
        settings: MethodSettings,
        device: torch.device,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        self.loss = DecomposedLoss(settings, temperature=temperature, vocab_size=vocab_size)
        self.steering = SteeringStep(settings.select(SteeringSettings), device)
        self._meter = LossMeter(self.loss.logged)

    def micro_batch(
        self,
        student: nn.Module,  # as the engine wrapped it
        teacher: nn.Module,
        seen: View,
        masked: View | None,
        items: Tensor | float,  # see DecomposedLoss.views
        at: tuple[int, int],  # updates so far, and of the whole run
        backward: Backward,  # takes a loss, and whether its graph is needed again
    ) -> MicroBatchLoss:
        """Run the passes of a micro-batch forward and back."""
        steering = self.steering
        if not steering.planned:
            steering.plan(student, *at)
        with steering.micro_batch():
            micro_batch = self.loss.views(student, teacher, seen, masked, items, steering.weights, steering.preserves)
            for view in micro_batch:
                last = steering.run_back(view, backward)
            assert last is not None
            backward(last, False)
        result = micro_batch.result
        self._meter.add(result.sums())
        steering.add_token_weights(result.vis_weights)
        return result

    def finish(self, student: nn.Module) -> dict[str, float]:
        """Leave the steered gradient in `.grad`, none where it or a loss is not finite on some process; what was
        measured, by the names of `VGSTrainer`'s log, the same on all processes."""
        values, not_finite, _ = self._meter.read(self.steering.weight_ratio)
        if not_finite:
            self.steering.discard()
        else:
            self.steering.observe(values)
            record = self.steering.finish()
            values |= {name: float(value) for name, value in record.metrics.items()}
            not_finite = not record.finite
        if not_finite:
            student.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        values["vgs/skipped"] = float(not_finite)
        return values

    def state_dict(self) -> dict[str, Any]:
        return self.steering.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steering.load_state_dict(state)
