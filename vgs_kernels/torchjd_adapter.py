"""TorchJD's weightings as steering policies.

A TorchJD `Weighting` maps the Gramian of several gradients to one weight each, which is what a steering policy does for
two. TorchJD is an optional dependency, imported when a policy is made.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .steering import usable_components


class TorchJDSteering:
    r"""A policy that follows a rule of TorchJD: ``weights = weighting(gramian)``. Make one with `from_torchjd`.

    Same interface as `VisualGradientSteering`: called with the Gramian of two gradients, shape (2, 2), it returns their
    two weights, shape (2,), same dtype and device. A component whose norm is zero or not
    finite enters the rule as zero and gets weight 0, and so does one whose weight the rule leaves undefined.

    Whether the host waits for the device is the rule's choice: those that solve a quadratic program (UPGrad, DualProj,
    CAGrad) do it on the host.
    """

    def __init__(self, weighting: Any) -> None:
        self.weighting = weighting

    def __call__(self, gramian: Tensor) -> Tensor:
        usable = usable_components(gramian)
        weights = self.weighting(torch.where(usable[:, None] & usable, gramian, 0.0))
        if weights.shape != (2,):
            raise ValueError(f"{self.weighting} returned weights of shape {tuple(weights.shape)}, not (2,)")
        weights = weights.detach().to(dtype=gramian.dtype, device=gramian.device)
        return torch.where(usable & torch.isfinite(weights), weights, 0.0)

    def __repr__(self) -> str:
        return f"from_torchjd({self.weighting})"


def from_torchjd(rule: Any) -> TorchJDSteering:
    """Make a steering policy of a rule of TorchJD.

    Args:
        rule: A weighting that works on Gramians (``PCGradWeighting()``, ``MGDAWeighting()``, ``UPGradWeighting()``,
            ``CAGradWeighting(c=0.5)``, ``MeanWeighting()``, ...), or an aggregator that holds one (``UPGrad()``).

    Raises:
        ImportError: TorchJD is not installed.
        TypeError: ``rule`` is neither; its message says why.

    Examples:
        >>> import torch
        >>> from torchjd.aggregation import MeanWeighting
        >>> from vgs_kernels import from_torchjd
        >>> from_torchjd(MeanWeighting())(torch.eye(2))
        tensor([0.5000, 0.5000])
    """
    if importlib.util.find_spec("torchjd") is None:
        raise ImportError("from_torchjd needs TorchJD: `pip install torchjd`")
    from torchjd.aggregation import Aggregator, GramianWeightedAggregator, Weighting

    if isinstance(rule, GramianWeightedAggregator):
        return TorchJDSteering(rule.gramian_weighting)
    if isinstance(rule, Aggregator):
        raise TypeError(f"{rule} does not weigh gradients by their Gramian; pass a rule that does, such as UPGrad()")
    if not isinstance(rule, Weighting):
        raise TypeError(f"expected a weighting or aggregator of torchjd.aggregation, got {type(rule).__name__}")
    return TorchJDSteering(rule)
