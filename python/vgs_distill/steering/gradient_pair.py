"""Exact steering: the two parameter gradients of a step, kept apart over its micro-batches and then combined.

The norms are those of the accumulated batch gradients, not of micro-batches: normalising each micro-batch would weight
them by the inverse of their own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgs_kernels import combine_gradients, gradient_gramian

from ..distributed import average_gradients

Policy = Callable[[Tensor], Tensor]
NO_MODULES: Mapping[str, Any] = MappingProxyType({})


class PairRecord(NamedTuple):
    """What one combination measured; tensors on the device."""

    gramian: Tensor  # (2, 2), of the parameter gradients (g_lang, g_vis)
    weights: Tensor  # (2,), of (g_lang, g_vis)
    modules: Mapping[str, Tensor]  # the Gramian of each module that was asked for

    def metrics(self) -> dict[str, Tensor]:
        norms = self.gramian.diagonal().clamp(min=0.0).sqrt()
        cosine = self.gramian[0, 1] / (norms[0] * norms[1])  # NaN where a gradient is zero; NaN is not logged
        return {"gradient/norm_lang": norms[0], "gradient/norm_vis": norms[1], "gradient/cosine": cosine}


def weight_ratio(weights: Tensor) -> Tensor:
    """Weight of the visual gradient over that of the language gradient."""
    return weights[1] / weights[0]


def direction_cosine(gramian: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosine between the two combinations of (g_lang, g_vis) that two pairs of weights give, from their Gramian."""
    products = torch.stack([first, second]) @ gramian @ torch.stack([first, second]).T
    return products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()


def rescaled(gramian: Tensor, scales: Tensor) -> Tensor:
    """The Gramian of (scales[0] g_lang, scales[1] g_vis)."""
    scales = scales.to(gramian)
    return scales[:, None] * gramian * scales


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
        self,
        policy: Policy,
        replicated: bool,
        modules: Mapping[str, Sequence[int]] = NO_MODULES,
        scales: Tensor | None = None,  # (2,)
    ) -> PairRecord | None:
        """Put the steered gradient into `.grad` and forget the two; None if there was no gradient at all.

        `replicated`: every process holds whole gradients of its own part of the batch (DDP), to be averaged first.
        `scales`: factors that the two gradients are yet to be multiplied by; policy and record see the products.
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
        scales = torch.ones(2, device=out[0].device) if scales is None else scales
        by_module = {
            name: rescaled(gradient_gramian([lang[i] for i in own], [vis[i] for i in own]), scales)
            for name, indices in modules.items()
            if (own := [i for i in indices if i in present])
        }
        lang, vis = [lang[i] for i in present], [vis[i] for i in present]
        gramian = gradient_gramian(lang, vis)
        measured = rescaled(gramian, scales)
        weights = policy(measured)
        combine_gradients(lang, vis, weights * scales.to(weights), out=out, gramian=gramian)
        for i, gradient in zip(present, out, strict=True):
            self.parameters[i].grad = gradient
        return PairRecord(measured, weights, by_module)

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
