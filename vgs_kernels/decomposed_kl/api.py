"""`decomposed_kl`: the public function on logits of three and four streams."""

from __future__ import annotations

from torch import Tensor

from .. import backend as backends
from ..checks import as_rows, check_logits, checked_transform, resolve_vocab_size
from ..stream_kl import op
from ..types import DecomposedKL, RatioGuard
from .decompositions import find_decomposition


def decomposed_kl(
    student_logits: Tensor,  # (..., vocab)
    teacher_logits: Tensor,  # (..., vocab)
    masked_teacher_logits: Tensor,  # (..., vocab)
    masked_student_logits: Tensor | None = None,  # (..., vocab)
    *,
    decomposition: str,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_smoothing: float = 0.0,
    ratio_guard: RatioGuard | None = None,
    backend: str | None = None,
) -> DecomposedKL:
    r"""Reverse KL divergence of a student from its teacher, per token, beside its visual and its language part.

    With the distributions over the vocabulary $p$ (student), $q$ (teacher), $r$ (teacher, image masked) and $p_0$
    (student, image masked), each $\operatorname{softmax}(\operatorname{softcap}(s \cdot z) / \tau)$,

    | decomposition   | standard   | vis                     | lang       | dependency |
    |-----------------|------------|-------------------------|------------|------------|
    | `vgs`           | KL(p ‖ q)  | KL(p ‖ q*)              | KL(p₀ ‖ r) | KL(q ‖ r)  |
    | `teacher_prior` | KL(p ‖ q)  | KL(p ‖ q) − KL(p ‖ r)   | KL(p ‖ r)  | none       |

    where the visual target $q^* \propto q\,p_0 / r$ is the student's own prior with the teacher's evidence. Reverse:
    the expectation is under the first distribution. In `vgs` the parts do not add up to ``standard``; in
    `teacher_prior` lang + vis does.

    **Only the student's logits get a gradient.** The teachers and the masked student are constants, so in `vgs`
    ``lang`` and ``dependency`` have none: ``lang`` with a gradient is `reverse_kl` of the masked student and the masked
    teacher.

    Args:
        student_logits: Shape ``(..., vocab)``, any strides; all four may be fp32, bf16, fp16 or fp64.
        teacher_logits: Like ``student_logits``, of the teacher that sees the image.
        masked_teacher_logits: Like ``student_logits``, of the teacher with the image masked.
        masked_student_logits: Like ``student_logits``, of the student with the image masked. Needed by ``vgs``, refused
            by ``teacher_prior``.
        decomposition: ``"vgs"`` or ``"teacher_prior"``.
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
        ratio_guard: Bounds on $\log p_0 - \log r$ within q* (``vgs``), which is wild in the tails; see `RatioGuard`.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        DecomposedKL: ``standard``, ``vis``, ``lang``, ``entropy`` (of the student) and ``dependency`` (the teacher's
        visual dependency score; None in ``teacher_prior``), each of shape ``(...)``, in nats, float32 (float64 for
        float64 logits), differentiable once with respect to the student's logits.

    Numerics: accumulation in float32 (float64). An entry at −inf in every stream contributes 0. Mass where the other
    distribution of a part has none makes that part +inf for that token, never NaN, and gives it gradient 0; ``vis`` of
    ``vgs`` is +inf also where r has no mass and q and p₀ have some. A probability below the smallest normal number
    counts as none. Deterministic, no host synchronisation.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says which and what to do.
        vgs_kernels.BackendUnavailableError: The named backend cannot run here.

    Source: "Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual
    Grounding", arXiv 2606.00564, equations 6 and 9 to 11, for ``vgs``; ``teacher_prior`` is the student against both
    teacher contexts.

    Examples:
        >>> import torch
        >>> from vgs_kernels import decomposed_kl
        >>> student, teacher, masked_teacher, masked_student = torch.randn(4, 3, 11).unbind()
        >>> parts = decomposed_kl(student, teacher, masked_teacher, masked_student, decomposition="vgs")
        >>> parts.vis.shape
        torch.Size([3])
    """
    named = find_decomposition(decomposition, masked_student_logits is not None, "masked_student_logits")
    given = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "masked_teacher_logits": masked_teacher_logits,
        "masked_student_logits": masked_student_logits,
    }
    streams = {name: logits for name, logits in given.items() if logits is not None}
    check_logits(streams)
    transform = checked_transform(
        resolve_vocab_size({name: logits.shape[-1] for name, logits in streams.items()}, vocab_size),
        temperature,
        (student_logit_scale, student_softcap),
        (teacher_logit_scale, teacher_softcap),
        ratio_guard,
        teacher_smoothing,
    )
    teachers = [as_rows(logits).detach() for logits in (teacher_logits, masked_teacher_logits)]
    masked_student = None if masked_student_logits is None else as_rows(masked_student_logits).detach()
    chosen = backends.resolve("stream_kl", student_logits.device, backend, student_logits.dtype)
    values, _ = op.stream_kl(as_rows(student_logits), *teachers, masked_student, *transform.arguments(), chosen)
    parts = named.per_token(values)
    leading = student_logits.shape[:-1]
    return DecomposedKL._make(None if part is None else part.reshape(leading) for part in parts)
