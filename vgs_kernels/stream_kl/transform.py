"""From raw logits to the logits z of a softmax: scale, soft cap, temperature and padding, in one place.

`z = softcap(scale * x)[:vocab_size] / temperature` with `softcap(x) = cap * tanh(x / cap)`. A teacher may also be mixed
with the uniform distribution (`smooth_`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import accumulation_dtype

# Logits at a time, in float32: on a CPU so few that they stay in its second-level cache from step to step, on a GPU so
# many that launches do not matter.
_LOGITS_AT_A_TIME = {"cpu": 2**18, "cuda": 2**26}


class LogitTransform(NamedTuple):
    """What lies between the raw logits of every stream and its probabilities, and what bounds the visual target."""

    vocab_size: int
    temperature: float = 1.0
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_softcap: float = 0.0  # 0 means none
    teacher_softcap: float = 0.0  # 0 means none
    ratio_bound: float = 0.0  # nats, 0 means none: log p0 - log r within the visual target is clamped to it
    ratio_floor: float = 0.0  # 0 means none: log p0 - log r counts as 0 where q is below this part of its maximum

    def arguments(self) -> tuple[int, Tensor, float, float, float, float, float, float]:
        """For a registered operator: the temperature as a float64 tensor () of the CPU. A number would be a constant of
        the compiled graph, and a temperature that changes would compile it anew each time."""
        temperature = torch.ones((), dtype=torch.float64, device="cpu") * self.temperature
        return (self.vocab_size, temperature, *self[2:])

    @property
    def guarded(self) -> bool:
        return bool(self.ratio_bound or self.ratio_floor)

    def student(self, logits: Tensor) -> Tensor:  # (tokens, >= vocab) -> (tokens, vocab)
        """z of the student's logits, in the accumulation dtype."""
        return self._apply(logits, self.student_scale, self.student_softcap)

    def teacher(self, logits: Tensor) -> Tensor:  # (tokens, >= vocab) -> (tokens, vocab)
        """z of a teacher's logits, in the accumulation dtype."""
        return self._apply(logits, self.teacher_scale, self.teacher_softcap)

    def student_slope(self, z: Tensor) -> Tensor | float:
        """d z / d raw logit, of the student."""
        slope = self.student_scale / self.temperature
        if not self.student_softcap:
            return slope
        return slope * (1.0 - (z * (self.temperature / self.student_softcap)).square())

    def _apply(self, logits: Tensor, scale: float, softcap: float) -> Tensor:
        z = logits[:, : self.vocab_size].to(accumulation_dtype(logits.dtype)) * scale
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        return z / self.temperature


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
        x = transform.teacher(part)
        top = x.amax(-1, keepdim=True)
        x.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_()
        total = x.sum(-1, keepdim=True)
        x.mul_((1.0 - epsilon) / torch.where(total == 0, 1.0, total)).add_(epsilon / transform.vocab_size)
        part.copy_(x.log_().mul_(transform.temperature))
