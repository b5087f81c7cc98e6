"""Steering inside a training step: two gradients kept apart and combined, or one weighted backward pass.

`GradientPair` is exact steering: the two parameter gradients of a step, accumulated over its micro-batches. The norms
are those of the accumulated batch gradients, not of micro-batches: normalising each micro-batch would weight them by
the inverse of their own gradients. `GramianPredictor` is what lets most steps do without the second backward pass.

Called by the trainer; the mathematics is `vgs_kernels`, what crosses processes is `distributed.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgs_kernels import combine_gradients, gradient_gramian

from .distributed import average_gradients, shard_group

Policy = Callable[[Tensor], Tensor]
_NO_MODULES: Mapping[str, Sequence[int]] = MappingProxyType({})


class SteeringRecord(NamedTuple):
    """What one combination measured; tensors on the device."""

    gramian: Tensor  # (2, 2), of the parameter gradients (g_lang, g_vis)
    weights: Tensor  # (2,), of (g_lang, g_vis)
    modules: Mapping[str, Tensor]  # the Gramian of each module that was asked for

    def metrics(self) -> dict[str, Tensor]:
        norms = self.gramian.diagonal().clamp(min=0.0).sqrt()
        cosine = self.gramian[0, 1] / (norms[0] * norms[1])  # NaN, and so not logged, where a gradient is zero
        return {"gradient/norm_lang": norms[0], "gradient/norm_vis": norms[1], "gradient/cosine": cosine}


def weight_ratio(weights: Tensor) -> Tensor:
    """Weight of the visual gradient over that of the language gradient."""
    return weights[1] / weights[0]


def direction_cosine(gramian: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosine between the two combinations of (g_lang, g_vis) that two pairs of weights give, from their Gramian."""
    products = torch.stack([first, second]) @ gramian @ torch.stack([first, second]).T
    return products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()


class GradientPair:
    """Holds two gradients per parameter. `backward` fills `.grad`; this class swaps which of the two that is.

    Working through `.grad` (instead of `torch.autograd.grad`) keeps gradient checkpointing of both kinds, FSDP and
    hooks on gradients working. Swapping moves references, not data.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._lang: list[Tensor | None] = []
        self._vis: list[Tensor | None] = []
        self.discard()

    def accumulate_lang(self) -> None:
        """From here on `backward` adds to the language gradient."""
        self._attach(self._lang)

    def accumulate_vis(self) -> None:
        """From here on `backward` adds to the visual gradient."""
        self._lang = self._detach()
        self._attach(self._vis)

    def end_micro_batch(self) -> None:
        """No gradient is in `.grad` any more: neither half alone may meet an optimizer."""
        self._vis = self._detach()

    def combine(
        self, policy: Policy, replicated: bool, modules: Mapping[str, Sequence[int]] = _NO_MODULES
    ) -> SteeringRecord | None:
        """Put the steered gradient into `.grad` and forget the two; None if there was no gradient at all.

        `replicated`: every process holds whole gradients of its own part of the batch (DDP), to be averaged first.
        `modules`: name -> indices into `parameters`; each also gets a Gramian of its own in the record.
        """
        lang, vis = self._lang, self._vis
        self.discard()
        if replicated:
            lang = average_gradients(self.parameters, lang)
            vis = average_gradients(self.parameters, vis)
        out: list[Tensor] = []
        present: list[int] = []
        for index, (a, b) in enumerate(zip(lang, vis, strict=True)):
            gradient = a if a is not None else b
            if gradient is not None:
                out.append(gradient)
                present.append(index)
        if not present:
            return None
        group = shard_group(out)
        by_module = {
            name: gradient_gramian([lang[i] for i in own], [vis[i] for i in own], process_group=group)
            for name, indices in modules.items()
            if (own := [i for i in indices if i in present])
        }
        lang, vis = [lang[i] for i in present], [vis[i] for i in present]
        gramian = gradient_gramian(lang, vis, process_group=group)
        weights = policy(gramian)
        combine_gradients(lang, vis, weights, out=out, gramian=gramian)
        for i, gradient in zip(present, out, strict=True):
            self.parameters[i].grad = gradient
        return SteeringRecord(gramian, weights, by_module)

    def discard(self) -> None:
        """Forget both gradients; `.grad` stays as it is."""
        self._lang = [None] * len(self.parameters)
        self._vis = [None] * len(self.parameters)

    def _attach(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _detach(self) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


def no_gradient(device: torch.device) -> Tensor:
    """A zero that `backward` accepts and that reaches no parameter: the visual part of a batch without images."""
    return torch.zeros((), device=device, requires_grad=True)


class GramianPredictor:
    """Predicts the Gramian of the parameter gradients from that of the logit gradients, which the kernel gives free.

    At a refresh both are known, and their ratio rho = (parameter norm)^2 / (logit norm)^2 is kept per component, with
    the cosine. Until the next refresh the prediction is rho times a logit Gramian: that of the step itself, or of the
    last one where the weights must be known before the step's losses are (accumulation). A refresh is due
    every `refresh_every` steps, and early when the two logit norms have moved against each other by more than
    `drift` (a ratio) since the last one.

    `refresh_every` 0 never measures: rho is 1, the logit Gramian stands for that of the parameters, and the first step
    takes both components as equal. It is what engines that step inside `backward` (DeepSpeed) can do.

    A component that was absent (norm 0) at the refresh has no rho: it is predicted as 0 until the next, which is due
    as soon as that component appears.
    """

    def __init__(self, refresh_every: int, drift: float) -> None:
        self.refresh_every = refresh_every
        self.drift = drift
        self._rho: Tensor | None = None  # (2,)
        self._cosine: Tensor | None = None  # ()
        self._logit: Tensor | None = None  # (2, 2), of the last step
        self._reference: float = 0.0  # log of the logit norm ratio at the last refresh
        self._since_refresh = 0
        if refresh_every == 0:
            self._rho, self._cosine, self._logit = torch.ones(2), torch.zeros(()), torch.eye(2)

    @property
    def ready(self) -> bool:
        """Whether there has been a refresh, so that `predict` has something to go by."""
        return self._rho is not None

    def refresh_due(self) -> bool:
        if self.refresh_every == 0:
            return False
        if self._rho is None or self._logit is None or self._since_refresh >= self.refresh_every:
            return True
        return abs(_log_norm_ratio(self._logit) - self._reference) > math.log(self.drift)

    def predict(self, logit_gramian: Tensor | None = None) -> Tensor:
        """The predicted Gramian of the parameter gradients, (2, 2); only after a refresh. None: by the last step's."""
        logit = self._logit if logit_gramian is None else logit_gramian
        assert self._rho is not None
        assert self._cosine is not None
        assert logit is not None
        squares = self._rho.to(logit) * logit.diagonal()
        cross = self._cosine.to(squares) * squares.prod().sqrt()
        return torch.stack([squares[0], cross, cross, squares[1]]).reshape(2, 2)

    def observe(self, logit_gramian: Tensor) -> None:
        """Take in the logit Gramian of a step that ran on a prediction."""
        self._logit = logit_gramian
        self._since_refresh += 1

    def refresh(self, gramian: Tensor, logit_gramian: Tensor) -> None:
        """Take in both Gramians of a step that measured the parameter gradients."""
        squares, logit_squares = gramian.diagonal(), logit_gramian.diagonal().to(gramian.dtype)
        self._rho = torch.where(logit_squares > 0, squares / logit_squares, 0.0)
        cosine = gramian[0, 1] / squares.prod().sqrt()
        self._cosine = torch.where(torch.isfinite(cosine), cosine, 0.0)
        self._logit = logit_gramian.to(gramian.dtype)
        self._reference = _log_norm_ratio(self._logit)
        self._since_refresh = 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "rho": None if self._rho is None else self._rho.tolist(),
            "cosine": None if self._cosine is None else self._cosine.item(),
            "logit_gramian": None if self._logit is None else self._logit.tolist(),
            "since_refresh": self._since_refresh,
            "log_norm_ratio": self._reference,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        def restore(value: Any) -> Tensor | None:
            return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)

        self._rho, self._cosine = restore(state["rho"]), restore(state["cosine"])
        self._logit = restore(state["logit_gramian"])
        self._since_refresh = int(state["since_refresh"])
        self._reference = float(state["log_norm_ratio"])


def _log_norm_ratio(logit_gramian: Tensor) -> float:
    """log(|logit gradient of vis| / |logit gradient of lang|); one appearing or vanishing is an infinite change."""
    lang, vis = (max(value, 0.0) for value in logit_gramian.diagonal().tolist())
    tiny = 1e-300
    return 0.5 * (math.log(max(vis, tiny)) - math.log(max(lang, tiny)))
