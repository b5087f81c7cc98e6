"""Fused kernels for visual gradient steering (VGS), usable from any PyTorch trainer.

Everything public is imported here; the design is in ARCHITECTURE.md.
"""

from .backend import BackendUnavailableError
from .combine_gradients import combine_gradients
from .decomposed_kl import decomposed_kl
from .decomposed_kl.old_types import DECOMPOSITIONS, DecomposedKL, HiddenGradients, LinearDecomposedKL
from .gradient_gramian import gradient_gramian
from .linear import linear_reverse_kl
from .linear_decomposed_kl import linear_decomposed_kl
from .report import backend_report
from .reverse_kl import reverse_kl
from .selftest import SelfTestResult, self_test
from .steering import VisualGradientSteering
from .torchjd_adapter import from_torchjd
from .types import LinearReverseKL, LMHead, RatioGuard, ReverseKL, SampledLogProbs, TokenSteering
from .version import __version__

__all__ = [
    "DECOMPOSITIONS",
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
    "TokenSteering",
    "VisualGradientSteering",
    "__version__",
    "backend_report",
    "combine_gradients",
    "decomposed_kl",
    "from_torchjd",
    "gradient_gramian",
    "linear_decomposed_kl",
    "linear_reverse_kl",
    "reverse_kl",
    "self_test",
]
