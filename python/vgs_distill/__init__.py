"""On-policy distillation of vision-language models with visual gradient steering: `VGSTrainer` on TRL's
`DistillationTrainer`, and the pieces of it that other trainers take, which need no TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compatibility import check_trl

if TYPE_CHECKING:
    from .config import VGSConfig
    from .decomposed_loss import DecomposedLoss, View
    from .inputs.data import load_rows
    from .inputs.families import EvidenceTokens
    from .inputs.formats import canonical_row
    from .masked_view import MaskedView
    from .masking import with_evidence, without_evidence
    from .settings import MethodSettings
    from .steering.steering import Steering
    from .trainer import VGSTrainer

__all__ = [
    "DecomposedLoss",
    "EvidenceTokens",
    "MaskedView",
    "MethodSettings",
    "Steering",
    "VGSConfig",
    "VGSTrainer",
    "View",
    "canonical_row",
    "load_rows",
    "with_evidence",
    "without_evidence",
]

# On first use: torch, transformers and trl take seconds that `vgs --help` and the display of the demo do not need.
_MODULES = {
    "DecomposedLoss": ".decomposed_loss",
    "EvidenceTokens": ".inputs.families",
    "MaskedView": ".masked_view",
    "MethodSettings": ".settings",
    "Steering": ".steering.steering",
    "VGSConfig": ".config",
    "VGSTrainer": ".trainer",
    "View": ".decomposed_loss",
    "canonical_row": ".inputs.formats",
    "load_rows": ".inputs.data",
    "with_evidence": ".masking",
    "without_evidence": ".masking",
}
_ON_TRL = ("VGSConfig", "VGSTrainer")  # the rest is for other trainers, too


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ON_TRL:
        check_trl()
    return getattr(import_module(_MODULES[name], __name__), name)
