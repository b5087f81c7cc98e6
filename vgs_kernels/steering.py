"""Steering policies: functions from the 2x2 Gramian of (lang, vis) gradients to their two weights.

Everything happens on the device of the Gramian, without host synchronisation: `torch.where` stands in the place of
branches. Layer: public API; pure torch on tensors of four numbers, so there is no backend to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor


class VisualGradientSteering:
    r"""Normalise both gradients and recombine them towards vision.

    .. math:: g = (1 - \gamma) \frac{g_\mathrm{lang}}{\lVert g_\mathrm{lang} \rVert}
                + \gamma \frac{g_\mathrm{vis}}{\lVert g_\mathrm{vis} \rVert}

    Called with the Gramian of (g_lang, g_vis), shape (2, 2), returns the two weights
    ``[(1 - gamma) / |g_lang|, gamma / |g_vis|]``, shape (2,), same dtype and device. A component whose norm is zero or
    not finite gets weight 0, so that the weights are always finite.

    Args:
        gamma: In [0, 1]; 0 follows language alone, 1 vision alone. The paper uses 0.7 to 0.9.
        max_weight_ratio: Upper bound on ``weights[1] / weights[0]``, kept by lowering the visual weight. It bounds how
            far a student whose language drifts can be pushed. None for no bound; no effect where the language
            weight is 0.

    Raises:
        ValueError: gamma outside [0, 1], max_weight_ratio not positive, or a Gramian that is not 2×2.

    Source: arXiv 2606.00564, the steering rule.

    Example:
        >>> import torch
        >>> from vgs_kernels import VisualGradientSteering
        >>> VisualGradientSteering(gamma=0.8)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.1000, 0.8000])
    """

    def __init__(self, gamma: float = 0.8, max_weight_ratio: float | None = None) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if max_weight_ratio is not None and not max_weight_ratio > 0:
            raise ValueError(f"max_weight_ratio must be positive or None, got {max_weight_ratio}")
        self.gamma = gamma
        self.max_weight_ratio = max_weight_ratio

    def __call__(self, gramian: Tensor) -> Tensor:
        if gramian.shape != (2, 2):
            raise ValueError(f"gramian must have shape (2, 2), got {tuple(gramian.shape)}")
        norms = gramian.diagonal().clamp(min=0.0).sqrt()  # clamp keeps NaN
        # Below the smallest normal number the quotient overflows.
        usable = torch.isfinite(norms) & (norms > torch.finfo(norms.dtype).tiny)
        scales = torch.where(usable, 1.0 / torch.where(usable, norms, 1.0), 0.0)
        lang, vis = (1.0 - self.gamma) * scales[0], self.gamma * scales[1]
        if self.max_weight_ratio is not None:
            vis = torch.where(lang > 0, torch.minimum(vis, self.max_weight_ratio * lang), vis)
        return torch.stack([lang, vis])

    def __repr__(self) -> str:
        return f"VisualGradientSteering(gamma={self.gamma}, max_weight_ratio={self.max_weight_ratio})"
