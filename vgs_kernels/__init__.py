"""Fused kernels for visual gradient steering (VGS), usable from any PyTorch trainer.

Everything public is imported here; the design is in ARCHITECTURE.md.
"""

from .backend import BackendUnavailableError
from .combine_gradients import combine_gradients
from .decomposed_kl import decomposed_kl
from .gradient_gramian import gradient_gramian
from .integrations import patch_trl
from .language_model import head_passes_through, language_head, unwrapped_model
from .linear import linear_decomposed_kl, linear_reverse_kl
from .report import active_backends, backend_report
from .reverse_kl import reverse_kl
from .selftest import SelfTestResult, self_test
from .steer import Steered, steer_
from .steering import UnitGradients, VisualGradientSteering
from .torchjd_adapter import from_torchjd
from .types import (
    DecomposedKL,
    HiddenGradients,
    LinearDecomposedKL,
    LinearReverseKL,
    LMHead,
    RatioGuard,
    ReverseKL,
    SampledLogProbs,
    TokenSteering,
)
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "DecomposedKL",
    "HiddenGradients",
    "LMHead",
    "LinearDecomposedKL",
    "LinearReverseKL",
    "RatioGuard",
    "ReverseKL",
    "SampledLogProbs",
    "SelfTestResult",
    "Steered",
    "TokenSteering",
    "UnitGradients",
    "VisualGradientSteering",
    "__version__",
    "active_backends",
    "backend_report",
    "combine_gradients",
    "decomposed_kl",
    "from_torchjd",
    "gradient_gramian",
    "head_passes_through",
    "language_head",
    "linear_decomposed_kl",
    "linear_reverse_kl",
    "patch_trl",
    "reverse_kl",
    "self_test",
    "steer_",
    "unwrapped_model",
]
