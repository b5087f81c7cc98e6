"""Exact steering: keeps the two parameter gradients apart over the micro-batches of a step, then combines them.

The norms are those of the accumulated batch gradients, not of micro-batches: normalising each micro-batch would weight
them by the inverse of their own gradients. Called by the trainer; the mathematics is `vgs_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgs_kernels import VisualGradientSteering, combine_gradients, gradient_gramian


class SteeringRecord(NamedTuple):
    """What one combination measured; tensors on the device."""

    gramian: Tensor  # (2, 2), of (g_lang, g_vis)
    weights: Tensor  # (2,), of (g_lang, g_vis)

    def metrics(self) -> dict[str, Tensor]:
        norms = self.gramian.diagonal().clamp(min=0.0).sqrt()
        cosine = self.gramian[0, 1] / (norms[0] * norms[1])  # NaN, and so not logged, where a gradient is zero
        return {
            "gradient/norm_lang": norms[0],
            "gradient/norm_vis": norms[1],
            "gradient/cosine": cosine,
            "steering/weight_ratio": self.weights[1] / self.weights[0],
        }


class ExactSteering:
    """Holds two gradients per parameter. `backward` fills `.grad`; this class swaps which of the two that is.

    Working through `.grad` (instead of `torch.autograd.grad`) keeps gradient checkpointing of both kinds and hooks on
    gradients working. Swapping moves references, not data.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._lang: list[Tensor | None] = [None] * len(self._parameters)
        self._vis: list[Tensor | None] = [None] * len(self._parameters)

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

    def combine(self, policy: VisualGradientSteering) -> SteeringRecord | None:
        """Put the steered gradient into `.grad` and forget the two; None if there was no gradient at all."""
        lang, vis = self._lang, self._vis
        self.discard()
        out: list[Tensor] = []
        present: list[int] = []
        for index, (a, b) in enumerate(zip(lang, vis, strict=True)):
            gradient = a if a is not None else b
            if gradient is not None:
                out.append(gradient)
                present.append(index)
        if not present:
            return None
        lang, vis = [lang[i] for i in present], [vis[i] for i in present]
        gramian = gradient_gramian(lang, vis)
        weights = policy(gramian)
        combine_gradients(lang, vis, weights, out=out, gramian=gramian)
        for i, gradient in zip(present, out, strict=True):
            self._parameters[i].grad = gradient
        return SteeringRecord(gramian, weights)

    def discard(self) -> None:
        """Forget both gradients; `.grad` stays None, and an optimizer skips parameters without a gradient."""
        self._lang = [None] * len(self._parameters)
        self._vis = [None] * len(self._parameters)

    def _attach(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _detach(self) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return gradients


def no_gradient(device: torch.device) -> Tensor:
    """A zero that `backward` accepts and that reaches no parameter: the visual part of a batch without images."""
    return torch.zeros((), device=device, requires_grad=True)
