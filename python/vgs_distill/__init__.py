"""On-policy distillation of vision-language models with visual gradient steering, on TRL's `DistillationTrainer`."""

from .compatibility import check_trl

check_trl()

from .config import VGSConfig  # noqa: E402 - the check must come before the first import of trl
from .trainer import VGSTrainer  # noqa: E402

__all__ = ["VGSConfig", "VGSTrainer"]
