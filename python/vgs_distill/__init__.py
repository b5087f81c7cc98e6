"""On-policy distillation of vision-language models with visual gradient steering, on TRL's `DistillationTrainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .compatibility import check_trl

check_trl()

if TYPE_CHECKING:
    from .config import VGSConfig
    from .trainer import VGSTrainer

__all__ = ["VGSConfig", "VGSTrainer"]


def __getattr__(name: str) -> Any:
    # On first use: torch, transformers and trl take seconds that `vgs --help` and the display of the demo do not need.
    if name == "VGSConfig":
        from .config import VGSConfig

        return VGSConfig
    if name == "VGSTrainer":
        from .trainer import VGSTrainer

        return VGSTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
