"""What stands for the parameter gradients of the two parts of the loss before any backward pass has run.

The kernel forms the gradients of the last hidden states in the forward pass. With h_t the hidden state of token t and
d_t its gradient, the squared norm of a parameter gradient is a double sum over tokens: how alike what went into the
parameter was, times how alike the gradients are. Two sums of that form need no backward pass: coherent, with h_t for
what went in, |sum_t h_t d_t^T|^2; and incoherent, as if no two tokens shared anything, sum_t |h_t|^2 |d_t|^2. Deeper
parameters see something of both: the geometric mean of the two stands for them, up to a factor that
`predictor.py` learns.

The part of d_t along h_t is left out: the norm layer before the head lets none of it through. The Gramian of the logit
gradients would not do: it does not see whether the gradients of tokens add up or cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HiddenStates = tuple[Tensor, Tensor]  # last hidden states and their gradients, (tokens, width)


class GradientProxy(NamedTuple):
    """The two sums for lang and vis, before squaring, so that those of micro-batches and processes add up."""

    coherent: Tensor  # (2, width, width), sum over tokens of h d^T
    incoherent: Tensor  # (2,), sum over tokens of |h|^2 |d|^2

    @classmethod
    def of_tokens(cls, lang: HiddenStates, vis: HiddenStates | None) -> GradientProxy:
        """Of tokens that have both components, or only lang."""
        of_lang = _sums(*lang)
        of_vis = [torch.zeros_like(part) for part in of_lang] if vis is None else _sums(*vis)
        return cls(*(torch.stack(pair) for pair in zip(of_lang, of_vis, strict=True)))

    def plus(self, other: GradientProxy) -> GradientProxy:
        return GradientProxy(self.coherent + other.coherent, self.incoherent + other.incoherent)

    def scaled(self, factor: Tensor | float) -> GradientProxy:
        """Of gradients that are `factor` times as long."""
        return GradientProxy(self.coherent * factor, self.incoherent * factor**2)

    def squares(self) -> Tensor:
        """What stands for |g_lang|^2 and |g_vis|^2, (2,)."""
        # Two roots, not the root of a product: the product leaves float32's range long before they do.
        return self.coherent.square().sum((1, 2)).sqrt() * self.incoherent.sqrt()


def _sums(hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        h = hidden.detach()
        h, d = (t if t.dtype == torch.float64 else t.float() for t in (h, gradient))
        length = h.square().sum(1)  # (tokens,)
        d = d - h * ((h * d).sum(1) / length.clamp(min=torch.finfo(h.dtype).tiny))[:, None]
        return h.t() @ d, length @ d.square().sum(1)
