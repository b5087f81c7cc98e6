"""Teachers mixed with the uniform distribution, as logits that every backend reads like any others.

Layer: tensors in, tensors out. Called by `decomposed_kl/api.py` and `linear_decomposed_kl/op.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import accumulation_dtype
from .old_types import LogitTransform

# Logits at a time, in float32: on a CPU so few that they stay in its second-level cache from step to step, on a GPU so
# many that launches do not matter.
_LOGITS_AT_A_TIME = {"cpu": 2**18, "cuda": 2**26}


def smoothed(transform: LogitTransform) -> LogitTransform:
    """The transform that reads what `smooth_` wrote: scale and soft cap are in it already, the temperature is not."""
    return transform._replace(teacher_scale=1.0, teacher_softcap=0.0)


def smooth_(logits: Tensor, epsilon: float, transform: LogitTransform) -> None:
    """Overwrite a teacher's raw logits, (rows, >= vocab), by temperature * log((1 - epsilon) q + epsilon / vocab).

    q is what `transform` makes of them. A row that is -inf throughout becomes uniform; NaN stays.
    """
    logits = logits[:, : transform.vocab_size]
    at_a_time = _LOGITS_AT_A_TIME.get(logits.device.type, _LOGITS_AT_A_TIME["cuda"])
    for part in logits.split(max(1, at_a_time // transform.vocab_size)):
        x = part.to(accumulation_dtype(part.dtype))  # the part itself where it is wide enough
        x.mul_(transform.teacher_scale)
        if transform.teacher_softcap:
            x.div_(transform.teacher_softcap).tanh_().mul_(transform.teacher_softcap)
        x.div_(transform.temperature)
        top = x.amax(-1, keepdim=True)
        x.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_()
        total = x.sum(-1, keepdim=True)
        x.mul_((1.0 - epsilon) / torch.where(total == 0, 1.0, total)).add_(epsilon / transform.vocab_size)
        x.log_().mul_(transform.temperature)
        if x is not part:
            part.copy_(x)
