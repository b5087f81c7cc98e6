"""From raw logits to the logits z of a softmax: scale, soft cap, temperature, padding and smoothing, in one place.

`z = softcap(scale * x)[:vocab_size] / temperature` with `softcap(x) = cap * tanh(x / cap)`. Teachers may also be mixed
with the uniform distribution: z = log((1 - epsilon) softmax(z) + epsilon / vocab_size), which needs a look at the whole
row before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import accumulation_dtype


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
    teacher_smoothing: float = 0.0  # epsilon, 0 means none

    def arguments(self) -> tuple[int, Tensor, float, float, float, float, float, float, float]:
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

    def smooth(self, z: Tensor, normalizer: Tensor) -> Tensor:
        """Mix a teacher with the uniform distribution. `normalizer` is log sum exp of a row's z, less
        log(1 - epsilon); 0 for a row without mass, which becomes uniform. Without smoothing z is as it was."""
        if not self.teacher_smoothing:
            return z
        return ((z - normalizer).exp() + self.teacher_smoothing / self.vocab_size).log()

    def of_teachers(self) -> LogitTransform:
        """The transform of a problem whose student is a teacher as well, not smoothed."""
        return LogitTransform(
            self.vocab_size, self.temperature, self.teacher_scale, self.teacher_scale, self.teacher_softcap,
            self.teacher_softcap,
        )  # fmt: skip

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
