"""The gradients of the parts of a loss, kept apart over the micro-batches of a step and then combined.

Norms are those of the accumulated batch gradients, not of micro-batches: normalising each micro-batch would weight
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
Gradients = list[Tensor | None]  # one per parameter
NO_MODULES: Mapping[str, Any] = MappingProxyType({})


class CombinationRecord(NamedTuple):
    """What one combination measured; tensors on the device."""

    gramian: Tensor  # (2, 2), of the first two gradients
    weights: Tensor  # (2,), of them
    modules: Mapping[str, Tensor]  # the Gramian of each module that was asked for

    def norms(self) -> Tensor:  # (2,)
        return self.gramian.diagonal().clamp(min=0.0).sqrt()

    def cosine(self) -> Tensor:
        """NaN where a gradient is zero."""
        norms = self.norms()
        return self.gramian[0, 1] / (norms[0] * norms[1])


def direction_cosine(gramian: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosine between the two combinations of two gradients that two pairs of weights give, from their Gramian."""
    products = torch.stack([first, second]) @ gramian @ torch.stack([first, second]).T
    return products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()


def rescaled(gramian: Tensor, scales: Tensor) -> Tensor:
    """The Gramian of (scales[0] a, scales[1] b), from that of (a, b)."""
    scales = scales.to(gramian)
    return scales[:, None] * gramian * scales


class PartGradients:
    """Holds up to three gradients per parameter. `backward` fills `.grad`; this class swaps which of them that is.

    Working through `.grad` (instead of `torch.autograd.grad`) keeps gradient checkpointing of both kinds, FSDP and
    hooks on gradients working. Swapping moves references, not data.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], parts: int) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._kept: list[Gradients] = [[None] * len(self.parameters) for _ in range(parts)]
        self._attached: int | None = None

    def into(self, part: int) -> None:
        """From here on `backward` adds to the gradient of this part."""
        self._detach()
        for parameter, gradient in zip(self.parameters, self._kept[part], strict=True):
            parameter.grad = gradient
        self._attached = part

    def end_micro_batch(self) -> None:
        """No gradient is in `.grad` any more: none alone may meet an optimizer."""
        self._detach()

    def combine(
        self,
        policy: Policy,
        replicated: bool,
        preservation: float = 0.0,
        modules: Mapping[str, Sequence[int]] = NO_MODULES,
        scales: Tensor | None = None,  # (2,)
    ) -> CombinationRecord | None:
        """Put w₀ a + w₁ b + w₀ λ c into `.grad` and forget the parts a, b, c; None if there was no gradient at all.

        `policy`: (w₀, w₁) from the Gramian of (a, b). `preservation`: λ.
        `replicated`: every process holds whole gradients of its own part of the batch (DDP), to be averaged first.
        `scales`: factors that a and b are yet to be multiplied by; policy and record see the products.
        `modules`: name -> indices into `parameters`; each also gets a Gramian of its own in the record.
        """
        self._detach()
        if replicated:
            self._kept = [average_gradients(self.parameters, gradients) for gradients in self._kept]
        present = [
            index for index in range(len(self.parameters)) if any(kept[index] is not None for kept in self._kept)
        ]
        if not present:
            return None
        first, second, *third = ([kept[index] for index in present] for kept in self._kept)
        self._kept = []
        out = [next(g for g in parts if g is not None) for parts in zip(first, second, *third, strict=True)]
        scales = torch.ones(2, device=out[0].device) if scales is None else scales
        if all(gradient is None for gradient in (*first, *second)):  # nothing to take a length from
            return None
        by_module = {
            name: rescaled(gradient_gramian(*pair), scales)
            for name, indices in modules.items()
            if (pair := _of_module(first, second, present, indices))[0]
        }
        gramian = gradient_gramian(first, second)
        measured = rescaled(gramian, scales)
        weights = policy(measured)
        if third and preservation and any(gradient is not None for gradient in third[0]):
            out = [torch.zeros_like(gradient) for gradient in out]  # also where only c has a gradient
            combine_gradients(first, second, weights * scales.to(weights), out=out, gramian=gramian)
            combine_gradients(
                out, third[0], torch.stack([torch.ones_like(weights[0]), weights[0] * preservation]), out=out
            )
        else:
            combine_gradients(first, second, weights * scales.to(weights), out=out, gramian=gramian)
        for index, gradient in zip(present, out, strict=True):
            self.parameters[index].grad = gradient
        return CombinationRecord(measured, weights, by_module)

    def _detach(self) -> None:
        if self._attached is None:
            return
        self._kept[self._attached] = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self._attached = None


def _of_module(
    first: Gradients, second: Gradients, present: Sequence[int], indices: Sequence[int]
) -> tuple[Gradients, Gradients]:
    """The gradients of some parameters, without those that neither part reaches."""
    own = set(indices)
    kept = [
        at for at, index in enumerate(present) if index in own and (first[at] is not None or second[at] is not None)
    ]
    return [first[at] for at in kept], [second[at] for at in kept]


def no_gradient(device: torch.device) -> Tensor:
    """A zero that `backward` accepts and that reaches no parameter: nothing is left to be run back."""
    return torch.zeros((), device=device, requires_grad=True)
