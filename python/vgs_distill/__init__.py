"""On-policy distillation of vision-language models with visual gradient steering, on TRL's `DistillationTrainer`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compatibility import check_trl

if TYPE_CHECKING:
    from .config import VGSConfig
    from .inputs.data import load_rows
    from .inputs.families import EvidenceTokens
    from .inputs.formats import canonical_row
    from .masking import with_evidence, without_evidence
    from .trainer import VGSTrainer

__all__ = [
    "EvidenceTokens",
    "VGSConfig",
    "VGSTrainer",
    "canonical_row",
    "load_rows",
    "with_evidence",
    "without_evidence",
]

# On first use: torch, transformers and trl take seconds that `vgs --help` and the display of the demo do not need.
_MODULES = {
    "EvidenceTokens": ".inputs.families",
    "VGSConfig": ".config",
    "VGSTrainer": ".trainer",
    "canonical_row": ".inputs.formats",
    "load_rows": ".inputs.data",
    "with_evidence": ".masking",
    "without_evidence": ".masking",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_trl()
    return getattr(import_module(_MODULES[name], __name__), name)
