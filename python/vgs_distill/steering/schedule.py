"""The value of gamma at a step: constant, linear or cosine. Read by the trainer at every optimizer step."""

from __future__ import annotations

import math

from ..config import VGSConfig


def gamma_at(config: VGSConfig, step: int, total_steps: int) -> float:
    """gamma for the update number `step` (from 0) out of `total_steps`; the last has `config.gamma`, a number."""
    assert not isinstance(config.gamma, str)
    if config.gamma_schedule == "constant" or total_steps <= 1:
        return config.gamma
    progress = min(step / (total_steps - 1), 1.0)
    if config.gamma_schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.gamma_start + progress * (config.gamma - config.gamma_start)
