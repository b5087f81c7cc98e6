"""Which tokens depend on the image, by their visual dependency score VDS = KL(q ‖ r) among those of a micro-batch.

The paper takes quantiles without saying over what; here they are over the tokens of a micro-batch that have an image.
Counts are fixed by the number of tokens, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BY_DEPENDENCY = "dependency"  # the value of token_steering that takes these factors
# Quantile up to which tokens get no visual part under token_steering="dependency", as in the paper.
LOWEST_STEERED = 0.4


def most_dependent(scores: Tensor, quantile: float) -> Tensor:
    """Indices of the tokens above the quantile, (count,), count = the nearest to (1 − quantile) · tokens."""
    return scores.topk(round((1.0 - quantile) * scores.shape[0]), sorted=False).indices


def graded(scores: Tensor, quantile: float) -> Tensor:
    """Factors of γ, (tokens,): 0 up to the 40th percentile, one half up to `quantile`, 1 above (paper, Appendix E)."""
    factors = torch.zeros_like(scores)
    factors[most_dependent(scores, LOWEST_STEERED)] = 0.5
    factors[most_dependent(scores, quantile)] = 1.0
    return factors
