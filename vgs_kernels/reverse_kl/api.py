"""`reverse_kl`: the public function on logits of two streams."""

from __future__ import annotations

from torch import Tensor

from .. import backend as backends
from ..checks import as_rows, check_logits, checked_transform, resolve_vocab_size
from ..stream_kl import op
from ..stream_kl.reference import ENTROPY, STANDARD
from ..types import ReverseKL


def reverse_kl(
    student_logits: Tensor,  # (..., vocab)
    teacher_logits: Tensor,  # (..., vocab)
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_smoothing: float = 0.0,
    backend: str | None = None,
) -> ReverseKL:
    r"""Reverse KL divergence of a student from its teacher, per token: the loss of on-policy distillation.

    $$\text{kl} = \operatorname{KL}(p \,\Vert\, q) = \sum_v p_v\,(\log p_v - \log q_v) \qquad
      \text{entropy} = -\sum_v p_v \log p_v$$

    with $p$ (student) and $q$ (teacher) each $\operatorname{softmax}(\operatorname{softcap}(s \cdot z) / \tau)$ over
    the vocabulary. Reverse, the mode-seeking direction: the expectation is under the student. The teacher is constant.

    Args:
        student_logits: Shape ``(..., vocab)``, any strides; fp32, bf16, fp16 or fp64.
        teacher_logits: Like ``student_logits``. Its vocabulary may be padded differently.
        temperature: τ > 0, divides both streams' logits, after scale and soft cap.
        vocab_size: Number of leading entries that are real tokens; both streams may be padded further. Required when
            their last dimensions differ.
        student_logit_scale: Multiplier of the student's logits, before the soft cap.
        teacher_logit_scale: Multiplier of the teacher's logits, before the soft cap.
        student_softcap: If given, the student's logits become ``cap * tanh(logits / cap)``.
        teacher_softcap: The same for the teacher's.
        teacher_smoothing: ε in [0, 1), 0 for none: q becomes $(1 - \varepsilon)\,q + \varepsilon / V$ over the V real
            tokens, after everything above. It leaves no divergence from the teacher infinite.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        ReverseKL: ``kl`` and ``entropy``, each of shape ``(...)``, in nats, float32 (float64 for float64 logits),
        differentiable once with respect to the student's logits.

    Numerics: accumulation in float32 (float64). An entry at −inf in the student contributes 0; student mass where the
    teacher has none makes the token's ``kl`` +inf, never NaN, and its gradient 0. A probability below the smallest
    normal number counts as none. Deterministic, no host synchronisation.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: "On-Policy Distillation of Language Models", arXiv 2306.13649, and MiniLLM, arXiv 2306.08543, for the
    direction.

    Examples:
        >>> import torch
        >>> from vgs_kernels import reverse_kl
        >>> student, teacher = torch.randn(2, 4, 11, requires_grad=True).unbind()
        >>> reverse_kl(student, teacher).kl.mean().backward()
    """
    check_logits({"student_logits": student_logits, "teacher_logits": teacher_logits})
    sizes = {"student_logits": student_logits.shape[-1], "teacher_logits": teacher_logits.shape[-1]}
    transform = checked_transform(
        resolve_vocab_size(sizes, vocab_size),
        temperature,
        (student_logit_scale, student_softcap),
        (teacher_logit_scale, teacher_softcap),
        teacher_smoothing=teacher_smoothing,
    )
    teacher = as_rows(teacher_logits).detach()
    chosen = backends.resolve("stream_kl", student_logits.device, backend, student_logits.dtype)
    values, _ = op.stream_kl(as_rows(student_logits), teacher, None, None, *transform.arguments(), chosen)
    leading = student_logits.shape[:-1]
    return ReverseKL(values[:, STANDARD].reshape(leading), values[:, ENTROPY].reshape(leading))
