"""Steering policies: functions from the 2x2 Gramian of two gradients to their two weights.

Everything happens on the device of the Gramian, without host synchronisation: `torch.where` stands in the place of
branches. Pure torch on tensors of four numbers, so there is no backend to choose. The rules of TorchJD are policies,
too: `torchjd_adapter.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class VisualGradientSteering:
    r"""Add the visual gradient to that of distillation, and keep the length of the latter.

    $$g = \eta\,(g_\text{standard} + \gamma\, g_\text{vis}), \quad
      \eta = \frac{\lVert g_\text{standard} \rVert}{\lVert g_\text{standard} + \gamma\, g_\text{vis} \rVert}$$

    Called with the Gramian of (g_standard, g_vis), shape (2, 2), returns the two weights ``eta * [1, gamma]``, shape
    (2,), same dtype and device. A visual gradient whose norm is zero or not finite gets weight 0, and eta is then 1; a
    standard gradient like that leaves no length to keep, and both weights are 0. The weights are always finite.

    Args:
        gamma: At least 0; 0 is distillation alone. The paper uses 2.

    Raises:
        ValueError: gamma negative or not finite, or a Gramian that is not 2×2.

    Source: arXiv 2606.00564, equations 13 to 18. There eta is a constant of a run; here it is measured.

    Examples:
        >>> import torch
        >>> from vgs_kernels import VisualGradientSteering
        >>> VisualGradientSteering(gamma=2.0)(torch.tensor([[9.0, 0.0], [0.0, 4.0]]))
        tensor([0.6000, 1.2000])
    """

    def __init__(self, gamma: float = 2.0) -> None:
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma must be a finite number of at least 0, got {gamma}")
        self.gamma = gamma

    def __call__(self, gramian: Tensor) -> Tensor:
        usable = usable_components(gramian)
        usable = usable & usable[0]  # without a length to keep there is no step
        one = torch.ones_like(gramian[0, 0])  # filled on the device: copied numbers would wait for it
        weights = torch.where(usable, torch.stack([one, one * self.gamma]), 0.0)
        norms, _ = _normalised(gramian, usable)
        return weights * (norms[0] / _length_of_combination(gramian, usable, weights))

    def __repr__(self) -> str:
        return f"VisualGradientSteering(gamma={self.gamma})"


class UnitGradients:
    r"""Normalise both gradients and recombine them towards vision.

    $$g = (1 - \gamma) \frac{g_\text{lang}}{\lVert g_\text{lang} \rVert}
        + \gamma \frac{g_\text{vis}}{\lVert g_\text{vis} \rVert}$$

    Called with the Gramian of (g_lang, g_vis), shape (2, 2), returns the two weights
    ``[(1 - gamma) / |g_lang|, gamma / |g_vis|]``, shape (2,), same dtype and device. A component whose norm is zero or
    not finite gets weight 0, so that the weights are always finite.

    Args:
        gamma: In [0, 1]; 0 follows language alone, 1 vision alone.
        max_weight_ratio: Upper bound on ``weights[1] / weights[0]``, kept by lowering the visual weight. It bounds how
            far a student whose language drifts can be pushed. None for no bound; no effect where the language
            weight is 0.
        scale: ``"unit"``: g as above, of norm at most 1, so that the learning rate alone sets the size of
            a step. ``"preserve"``: g rescaled to the norm of the plain sum g_lang + g_vis of the usable components, for
            learning rates, clipping and warm-up that were tuned without steering.

    Raises:
        ValueError: gamma outside [0, 1], max_weight_ratio not positive, an unknown scale, or a Gramian that is not 2×2.

    Source: a summary page of arXiv 2606.00564. The paper itself has another rule, `VisualGradientSteering`.

    Examples:
        >>> import torch
        >>> from vgs_kernels import UnitGradients
        >>> UnitGradients(gamma=0.8)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.1000, 0.8000])
    """

    SCALES = ("unit", "preserve")

    def __init__(self, gamma: float = 0.8, max_weight_ratio: float | None = None, scale: str = "unit") -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if max_weight_ratio is not None and not max_weight_ratio > 0:
            raise ValueError(f"max_weight_ratio must be positive or None, got {max_weight_ratio}")
        if scale not in self.SCALES:
            raise ValueError(f"scale must be one of {', '.join(self.SCALES)}, got {scale!r}")
        self.gamma = gamma
        self.max_weight_ratio = max_weight_ratio
        self.scale = scale

    def __call__(self, gramian: Tensor) -> Tensor:
        usable = usable_components(gramian)
        norms = gramian.diagonal().clamp(min=0.0).sqrt()
        inverse = torch.where(usable, 1.0 / torch.where(usable, norms, 1.0), 0.0)
        lang, vis = (1.0 - self.gamma) * inverse[0], self.gamma * inverse[1]
        if self.max_weight_ratio is not None:
            vis = torch.where(lang > 0, torch.minimum(vis, self.max_weight_ratio * lang), vis)
        weights = torch.stack([lang, vis])
        if self.scale == "preserve":
            weights = weights * _length_of_sum(gramian, usable) / _length_of_combination(gramian, usable, weights)
        return weights

    def __repr__(self) -> str:
        return f"UnitGradients(gamma={self.gamma}, max_weight_ratio={self.max_weight_ratio}, scale={self.scale!r})"


def usable_components(gramian: Tensor) -> Tensor:
    """Whether the norm of each gradient is finite and not zero; shape (2,), bool."""
    if gramian.shape != (2, 2):
        raise ValueError(f"gramian must have shape (2, 2), got {tuple(gramian.shape)}")
    norms = gramian.diagonal().clamp(min=0.0).sqrt()  # clamp keeps NaN
    # Below the smallest normal number the quotient overflows.
    return torch.isfinite(norms) & (norms > torch.finfo(norms.dtype).tiny)


def _normalised(gramian: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Norms, and the Gramian of the gradients over their norms; 0 where a component is not usable.

    Squares of weights times entries of the Gramian leave float32's range long before their products do.
    """
    norms = torch.where(usable, gramian.diagonal().clamp(min=0.0).sqrt(), 0.0)
    divisor = torch.where(usable, norms, 1.0)
    cosines = gramian / divisor[:, None] / divisor
    return norms, torch.where(usable[:, None] & usable, cosines, 0.0)


def _length_of_sum(gramian: Tensor, usable: Tensor) -> Tensor:
    norms, cosines = _normalised(gramian, usable)
    largest = norms.max()
    shares = norms / torch.where(largest > 0, largest, 1.0)
    return largest * (shares[:, None] * cosines * shares).sum().clamp(min=0.0).sqrt()


def _length_of_combination(gramian: Tensor, usable: Tensor, weights: Tensor) -> Tensor:
    """At least what rounding of the Gramian leaves of parts that cancel, so that dividing by it amplifies no noise; 1
    where there is nothing."""
    norms, cosines = _normalised(gramian, usable)
    parts = weights * norms
    largest = parts.abs().max()
    shares = parts / torch.where(largest > 0, largest, 1.0)
    square = (shares[:, None] * cosines * shares).sum()
    noise = 16 * torch.finfo(gramian.dtype).eps * (shares * shares).sum()
    return torch.where(largest > 0, largest * torch.maximum(square, noise).sqrt(), 1.0)
