"""`decomposed_kl`: the public function on logits. Validates, flattens, and puts the parts together.

Layer: public API. Calls `decomposed_kl/op.py`; chooses through `vgs_kernels.backend`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend as backends
from . import op
from .old_types import DECOMPOSITIONS, DecomposedKL, LogitTransform
from .reference import ENTROPY, FULL, MASKED, PRIOR, SHIFT, USES_MASKED_STUDENT
from .smoothing import smooth_, smoothed


def decomposed_kl(
    student_logits: Tensor,  # (..., vocab)
    teacher_logits: Tensor,  # (..., vocab)
    masked_teacher_logits: Tensor,  # (..., vocab)
    masked_student_logits: Tensor | None = None,  # (..., vocab)
    *,
    decomposition: str = "matched",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_smoothing: float = 0.0,
    backend: str | None = None,
) -> DecomposedKL:
    r"""Reverse KL divergence of a student from its teacher, per token, split into a language and a visual part.

    With the distributions over the vocabulary $p$ (student), $q$ (teacher), $r$ (teacher, image
    masked) and $p_0$ (student, image masked), each $\operatorname{softmax}(\operatorname{softcap}(s \cdot z) / \tau)$,

    | decomposition   | lang       | vis                                                               |
    |-----------------|------------|-------------------------------------------------------------------|
    | `teacher_prior` | KL(p ‖ r)  | KL(p ‖ q) − KL(p ‖ r) = Σ p (log r − log q)                       |
    | `bayes`         | KL(p₀ ‖ r) | Σ p [(log p − sg(log p₀)) − (log q − log r)], sg = stop gradient  |
    | `matched`       | KL(p₀ ‖ r) | KL(p ‖ q)                                                         |

    and in all three ``full`` = KL(p ‖ q), the mode-seeking direction: the expectation is under the student.
    In ``bayes`` and ``matched`` the gradient of ``lang`` reaches only the masked student's logits, the gradient of
    ``vis``, ``full`` and ``entropy`` only the student's. The teachers are constants.

    Args:
        student_logits: Shape ``(..., vocab)``, floating. Any strides; all four may be bf16, fp16, fp32 or fp64.
        teacher_logits: Like ``student_logits``, of the teacher that sees the image.
        masked_teacher_logits: Like ``student_logits``, of the teacher with the image masked.
        masked_student_logits: Like ``student_logits``, of the student with the image masked. Needed by ``bayes`` and
            ``matched``, refused by ``teacher_prior``.
        decomposition: ``"teacher_prior"``, ``"bayes"`` or ``"matched"``.
        temperature: τ > 0, divides every stream's logits, after scale and soft cap.
        vocab_size: Number of leading entries that are real tokens; every stream may be padded further. Required
            when the streams' last dimensions differ.
        student_logit_scale: Multiplier of the student's logits, before the soft cap.
        teacher_logit_scale: Multiplier of the teacher's logits, before the soft cap.
        student_softcap: If given, the student's logits become ``cap * tanh(logits / cap)``.
        teacher_softcap: The same for the teacher's.
        teacher_smoothing: ε in [0, 1), 0 for none: q and r become $(1 - \varepsilon)\,q + \varepsilon / V$ over the V
            real tokens, after everything above. It bounds $\log q - \log r$ and leaves no divergence from a teacher
            infinite.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        DecomposedKL: ``lang``, ``vis``, ``full``, ``entropy``, each of shape ``(...)``, in nats, float32
        (float64 for float64 logits), differentiable once with respect to the student's logits.

    Numerics: accumulation in float32 (float64). An entry at −inf in the student contributes 0. Student mass where a
    distribution of a part has none makes that part +inf for that token, never NaN, and gives it gradient 0. Results
    are deterministic.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: "Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual
    Grounding", arXiv 2606.00564; ``bayes`` is its chain, ``matched`` and ``teacher_prior`` are readings of it.

    Examples:
        >>> import torch
        >>> from vgs_kernels import decomposed_kl
        >>> student, teacher, masked_teacher = torch.randn(3, 4, 11).unbind()
        >>> parts = decomposed_kl(student, teacher, masked_teacher, decomposition="teacher_prior")
        >>> torch.allclose(parts.lang + parts.vis, parts.full, atol=1e-5)
        True
    """
    check_decomposition(decomposition, masked_student_logits is not None, "masked_student_logits")
    check_positive("temperature", temperature)
    streams = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "masked_teacher_logits": masked_teacher_logits,
    }
    if masked_student_logits is not None:
        streams["masked_student_logits"] = masked_student_logits
    check_streams(streams)
    vocab_size = resolve_vocab_size({name: t.shape[-1] for name, t in streams.items()}, vocab_size)

    check_fraction("teacher_smoothing", teacher_smoothing)
    transform = LogitTransform(
        decomposition,
        vocab_size,
        float(temperature),
        float(student_logit_scale),
        float(teacher_logit_scale),
        check_softcap("student_softcap", student_softcap),
        check_softcap("teacher_softcap", teacher_softcap),
    )

    if teacher_smoothing:
        for name in ("teacher_logits", "masked_teacher_logits"):
            streams[name] = _as_rows(streams[name]).detach().clone()
            smooth_(streams[name], teacher_smoothing, transform)
        transform = smoothed(transform)

    leading = student_logits.shape[:-1]
    rows = [None if t is None else _as_rows(t) for t in (*streams.values(), None)[:4]]
    chosen = backends.resolve("decomposed_kl", student_logits.device, backend, student_logits.dtype)
    values, _ = op.divergences(*rows, *transform, chosen)
    return DecomposedKL(*(part.reshape(leading) for part in combine_parts(decomposition, values)))


def combine_parts(decomposition: str, values: Tensor) -> DecomposedKL:
    """The algebra of the table above on the five divergences of `decomposed_kl/reference.py`, (tokens, 5)."""
    entropy, full = values[:, ENTROPY], values[:, FULL]
    if decomposition == "matched":
        return DecomposedKL(lang=values[:, MASKED], vis=full, full=full, entropy=entropy)
    prior = values[:, PRIOR]
    if decomposition == "teacher_prior":
        # inf - inf would be NaN, and finite - inf would call a missing token a gain.
        vis = torch.where(torch.isinf(full) | torch.isinf(prior), math.inf, full - prior)
        return DecomposedKL(lang=prior, vis=vis, full=full, entropy=entropy)
    shift = values[:, SHIFT]
    infinite = torch.isinf(full) | torch.isinf(prior) | torch.isinf(shift)
    vis = torch.where(infinite, math.inf, shift + full - prior)
    return DecomposedKL(lang=values[:, MASKED], vis=vis, full=full, entropy=entropy)


def check_decomposition(decomposition: str, has_masked_student: bool, name: str) -> None:
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition {decomposition!r}; choose one of {', '.join(DECOMPOSITIONS)}")
    needed = decomposition in USES_MASKED_STUDENT
    if needed and not has_masked_student:
        raise ValueError(
            f"decomposition {decomposition!r} needs {name} (the student run on the text-only prompt); "
            "pass it, or use decomposition='teacher_prior', which does without"
        )
    if has_masked_student and not needed:
        raise ValueError(f"decomposition 'teacher_prior' does not use {name}; leave it out or use 'matched'")


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 (off) and below 1, got {value}")


def check_softcap(name: str, value: float | None) -> float:
    """Return the soft cap, 0.0 for none."""
    if value is None:
        return 0.0
    check_positive(name, value)
    return float(value)


def check_streams(streams: dict[str, Tensor]) -> None:
    """Leading shapes, dtypes and devices of the logits must agree, and dtypes be floating."""
    (first_name, first), *rest = streams.items()
    if not first.dtype.is_floating_point:
        raise ValueError(f"{first_name} must be floating point, got {first.dtype}")
    if first.dim() < 1:
        raise ValueError(f"{first_name} must have a vocabulary dimension, got a scalar")
    for name, tensor in rest:
        for what, a, b in (
            ("leading shape", tuple(first.shape[:-1]), tuple(tensor.shape[:-1])),
            ("dtype", first.dtype, tensor.dtype),
            ("device", first.device, tensor.device),
        ):
            if a != b:
                raise ValueError(f"{name} has {what} {b}, but {first_name} has {a}; they must agree")


def resolve_vocab_size(sizes: dict[str, int], vocab_size: int | None) -> int:
    """The number of real tokens; `sizes` are the (possibly padded) vocabulary sizes of the streams or heads."""
    smallest = min(sizes.values())
    listing = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if vocab_size is None:
        if smallest != max(sizes.values()):
            raise ValueError(
                f"the vocabularies differ in size ({listing}): if the tokens are the same and the rest is padding, "
                "pass vocab_size=<number of real tokens>"
            )
        vocab_size = smallest
    if not 0 < vocab_size <= smallest:
        raise ValueError(f"vocab_size must be between 1 and the smallest vocabulary, got {vocab_size} ({listing})")
    return vocab_size


def _as_rows(logits: Tensor) -> Tensor:
    """View as (tokens, vocab) with unit stride along the vocabulary; copies only where no such view exists."""
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
