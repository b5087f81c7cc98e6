"""`Steering`: any two losses in, one steered gradient in `.grad` out, in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import average_grad, is_replicated, several_backward_passes
from ..errors import InputError, TrainingStopped
from .averages import GramianAverage
from .gradients import NO_MODULES, CombinationRecord, PartGradients, Policy
from .step import AMORTIZED, MEASURED

# Runs a loss back: `accelerator.backward`, Lightning's `manual_backward`. Takes retain_graph.
Run = Callable[..., Any]


def run_back(loss: Tensor, **options: Any) -> None:
    loss.backward(**options)


class Steering:
    r"""Steers a step by two losses, over all its micro-batches and processes.

        steering = Steering(model.parameters(), VisualGradientSteering(gamma=2.0))
        for batch in batches_of_the_step:
            with steering.micro_batch(model):
                first, second = losses(model, batch)
                steering.backward(first, second)
        steering.finish()
        optimizer.step()

    $$\text{grad} = w_0 \nabla\text{first} + w_1 \nabla\text{second}, \qquad w = \text{policy}(G)$$

    with G the 2×2 `gradient_gramian` of the two gradients of the whole step. One process, DDP and FSDP2. Divide the
    losses as for one backward pass: their gradients are added over micro-batches and averaged over processes.

    Args:
        parameters: What is trained, as the optimizer has them; those that need no gradient are passed over.
        policy: From the Gramian, (2, 2), to two weights, (2,): `VisualGradientSteering`, `UnitGradients`.
        mode: ``"measured"``: the Gramian of every step, which costs a second backward pass; ``"amortized"``: of one
            step in `refresh_every`; in between the average of what was measured gives the weights, and one pass does.
        refresh_every: Steps from one measurement to the next, with ``"amortized"``.
        check_processes: Raise where processes disagree on the Gramian, at the price of an exchange and a wait a step.

    Raises:
        InputError: another mode, or a model wrapped by DeepSpeed or FSDP1, where gradients do not meet in `.grad`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        policy: Policy,
        mode: str = MEASURED,
        *,
        refresh_every: int = 16,
        check_processes: bool = False,
    ) -> None:
        if mode not in (MEASURED, AMORTIZED):
            raise InputError(f"mode must be {MEASURED!r} or {AMORTIZED!r}, got {mode!r}")
        self.policy = policy
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self._parameters:
            raise InputError("none of the parameters needs a gradient; hand in those that are trained")
        device = self._parameters[0].device
        self._average = GramianAverage(refresh_every, device) if mode == AMORTIZED else None
        self._check_processes = check_processes
        self._gradients: PartGradients | None = None  # of the step under way, where it measures
        self._weights: Tensor | None = None  # (2,), of the step under way, where they are known
        self._replicated = False

    @contextmanager
    def micro_batch(self, model: nn.Module) -> Iterator[None]:
        """Around the forward and backward passes of a micro-batch; `model`: as its launcher wrapped it.

        Under DDP it switches synchronisation off, since DDP is silent about every backward pass but the first of a
        step; under FSDP2 it leaves it on, since gradients that wait for it would mix.
        """
        _check_wrapper(model)
        if self._gradients is None and self._weights is None:
            self._begin()
        self._replicated = is_replicated(model)
        with several_backward_passes(model, apart=self._gradients is not None):
            yield
        if self._gradients is not None:
            self._gradients.end_micro_batch()

    def backward(self, first: Tensor, second: Tensor, run: Run = run_back) -> None:
        """Run both losses back; they may share a graph. `run`: how the engine does it, with `retain_graph`."""
        if self._weights is not None:
            weights = self._weights.to(first.device)
            run(weights[0] * first + weights[1] * second)
            return
        gradients = self._measuring()
        gradients.into(0)
        run(first, retain_graph=True)
        gradients.into(1)
        run(second)

    def sequential(self, first: Callable[[], Tensor], second: Callable[[], Tensor], run: Run = run_back) -> None:
        """As `backward`, for losses of forward passes of their own: the second starts when the first has run back, so
        that one graph is alive at a time."""
        for part, loss in enumerate((first, second)):
            if self._weights is not None:
                value = loss()
                run(self._weights[part].to(value.device) * value)
            else:
                self._measuring().into(part)
                run(loss())

    def finish(self) -> CombinationRecord | None:
        """Leave the steered gradient in `.grad`, after the last micro-batch of a step; None if there was none at all.

        The record's Gramian is that of the step, or what the average of measurements says where the step made none.
        """
        gradients, weights = self._gradients, self._weights
        self._gradients = self._weights = None
        if weights is not None:
            assert self._average is not None
            if self._replicated:
                average_grad(self._parameters)
            self._average.skip()
            return CombinationRecord(self._average.gramian(), weights, NO_MODULES)
        if gradients is None:
            raise InputError("no micro-batch has been run since the last step; call finish() after backward()")
        record = gradients.combine(self.policy, self._replicated)
        if record is None:
            return None
        if self._check_processes:
            _check_agreement(record.gramian)
        if self._average is not None:
            self._average.refresh(record.gramian)
        return record

    def state_dict(self) -> dict[str, Any]:
        """What one step leaves to the next; plain values, for JSON."""
        return {"average": None if self._average is None else self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])

    def _begin(self) -> None:
        if self._average is None or self._average.refresh_due:
            self._gradients = PartGradients(self._parameters, 2)
        else:
            self._weights = self.policy(self._average.gramian())

    def _measuring(self) -> PartGradients:
        if self._gradients is None:
            raise InputError("run losses back inside `with steering.micro_batch(model):`")
        return self._gradients


def _check_wrapper(model: nn.Module) -> None:
    """By name, so that neither library is imported."""
    wrapper = type(model).__name__
    if wrapper in ("DeepSpeedEngine", "FullyShardedDataParallel"):
        raise InputError(
            f"the model is wrapped by {wrapper}, whose gradients do not meet in .grad; use DDP or FSDP2 (fully_shard)"
        )


def _check_agreement(gramian: Tensor) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    largest, smallest = gramian.clone(), gramian.clone()
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    if not torch.equal(largest, smallest):
        raise TrainingStopped(
            f"processes disagree on the Gramian of the two gradients ({smallest.tolist()} to {largest.tolist()}): "
            "gradients were not averaged; run every pass inside micro_batch(model), with the wrapped model"
        )
