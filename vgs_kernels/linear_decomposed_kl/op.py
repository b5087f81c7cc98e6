"""The registered operator of `linear_decomposed_kl`: projection, losses and gradients, a chunk of tokens at a time.

`(tokens, vocab)` logits never exist as a whole. A chunk of tokens is projected, the divergences and the logit gradients
are formed in that chunk while it is hot, and multiplied back into hidden and head gradients at once: the gradients are
outputs of the forward pass, and `backward` only scales them (out of place, so that it can run twice). Cost in units of
one tokens x width x vocab product: 3 projections (4 with the masked student), then dH and dW once for `objective`,
once per component for `lang` and `vis`.

Called by `linear_decomposed_kl/api.py` only; the logit work is that of the backends of `decomposed_kl`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from .. import backend as backends
from ..decomposed_kl.api import combine_parts
from ..decomposed_kl.reference import VALUES, component_coefficients
from ..types import LogitTransform, accumulation_dtype


@torch.library.custom_op("vgs_kernels::linear_decomposed_kl", mutates_args=())
def linear_decomposed_kl(
    student_hidden: Tensor,  # (tokens, student width)
    masked_student_hidden: Tensor | None,  # (tokens, student width)
    teacher_hidden: Tensor,  # (tokens, teacher width)
    masked_teacher_hidden: Tensor,  # (tokens, teacher width)
    student_weight: Tensor,  # (>= vocab, student width)
    student_bias: Tensor | None,  # (>= vocab,)
    teacher_weight: Tensor,  # (>= vocab, teacher width)
    teacher_bias: Tensor | None,  # (>= vocab,)
    token_weights: Tensor,  # (tokens,)
    steering_weights: Tensor | None,  # (2,)
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
    needs_bias_grad: bool,
    chunk_tokens: int,
    decomposition: str,
    vocab_size: int,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lang, vis, objective, values, logit Gramian, then the gradients of the two components.

    The gradients are (hidden, head weight, head bias) of lang, then of vis; with `steering_weights` those of the one
    objective stand in the place of vis, except for the masked student's hidden states, which only lang has.
    What does not apply is an empty tensor.
    """
    transform = LogitTransform(
        decomposition, vocab_size, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap
    )
    kernels = backends.load("decomposed_kl", backend)
    tokens = student_hidden.shape[0]
    dtype = accumulation_dtype(student_hidden.dtype)
    values = student_hidden.new_zeros((tokens, VALUES), dtype=dtype)
    row_gramians = student_hidden.new_zeros((tokens, 3), dtype=dtype)
    gradients = _Gradients(
        student_hidden, student_weight, student_bias, masked_student_hidden is not None, steering_weights is not None,
        needs_hidden_grad, needs_weight_grad, needs_bias_grad,
    )  # fmt: skip
    student_buffer = teacher_buffer = None
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        count = rows.stop - rows.start
        weights = token_weights[rows].to(dtype)
        # A skipped token may hold NaN, and 0 * NaN would reach the head gradient through the products below.
        skipped = (weights == 0)[:, None]
        students = [student_hidden[rows].masked_fill(skipped, 0)]
        if masked_student_hidden is not None:
            students.append(masked_student_hidden[rows].masked_fill(skipped, 0))
        student_rows = torch.cat(students)  # (streams * count, student width)
        teacher_rows = torch.cat([teacher_hidden[rows], masked_teacher_hidden[rows]]).masked_fill(
            skipped.repeat(2, 1), 0
        )
        student_logits = student_buffer = _project(student_rows, student_weight, student_bias, student_buffer)
        teacher_logits = teacher_buffer = _project(teacher_rows, teacher_weight, teacher_bias, teacher_buffer)
        student, masked_student = (
            student_logits[:count],
            student_logits[count:] if len(students) == 2 else None,
        )
        teacher, masked_teacher = teacher_logits[:count], teacher_logits[count:]

        chunk_values, log_normalizers = kernels.divergences(
            student, teacher, masked_teacher, masked_student, transform, weights
        )
        values[rows] = chunk_values
        if gradients.wanted:
            lang, vis = component_coefficients(decomposition, weights)
            gradients.add_chunk(
                kernels, transform, rows, student_rows, student, teacher, masked_teacher, masked_student,
                chunk_values, log_normalizers, lang, vis, steering_weights, row_gramians[rows],
            )  # fmt: skip

    # Where the weight is 0 the value is 0, and 0 * inf cannot arise.
    parts = combine_parts(decomposition, values)
    weights = token_weights.to(dtype)
    lang, vis = (parts.lang * weights).sum(), (parts.vis * weights).sum()
    if steering_weights is None:
        objective = lang.new_zeros(())
    else:
        pair = steering_weights.to(dtype)
        # A weight of 0 switches a part off, even one that is infinite.
        objective = torch.where(pair[0] == 0, 0.0, pair[0] * lang) + torch.where(pair[1] == 0, 0.0, pair[1] * vis)
    sums = (row_gramians * weights.square()[:, None]).sum(0)
    gramian = torch.stack([sums[0], sums[1], sums[1], sums[2]]).reshape(2, 2)
    return lang, vis, objective, values, gramian, *gradients.outputs()


class _Gradients:
    """The gradient buffers of one call, filled chunk by chunk."""

    def __init__(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        has_masked_student: bool,
        combined: bool,
        needs_hidden: bool,
        needs_weight: bool,
        needs_bias: bool,
    ) -> None:
        self.combined = combined
        self.has_masked_student = has_masked_student
        self.wanted = needs_hidden or needs_weight or needs_bias
        lang_hidden = needs_hidden and (has_masked_student or not combined)
        self.hidden = [
            torch.empty_like(student_hidden, memory_format=torch.contiguous_format)
            if wanted
            else student_hidden.new_empty(0)
            for wanted in (lang_hidden, needs_hidden)
        ]
        # Partial sums over chunks are kept in the accumulation dtype where the device multiplies into it for free.
        head_dtype = _projection_dtype(student_weight)
        self.weight = [
            torch.zeros_like(student_weight, dtype=head_dtype, memory_format=torch.contiguous_format)
            if wanted
            else student_weight.new_empty(0)
            for wanted in (needs_weight and not combined, needs_weight)
        ]
        self.bias = [
            torch.zeros_like(student_bias, dtype=accumulation_dtype(student_bias.dtype))
            if wanted and student_bias is not None
            else student_weight.new_empty(0)
            for wanted in (needs_bias and not combined, needs_bias)
        ]
        self.student_weight = student_weight
        self.student_bias = student_bias

    def add_chunk(
        self,
        kernels: ModuleType,
        transform: LogitTransform,
        rows: slice,
        student_rows: Tensor,  # (streams * count, width)
        student: Tensor,  # (count, vocab) logits; overwritten with their gradient where dtypes allow
        teacher: Tensor,
        masked_teacher: Tensor,
        masked_student: Tensor | None,
        values: Tensor,
        log_normalizers: Tensor,
        lang: Tensor,  # (count, 5)
        vis: Tensor,  # (count, 5)
        steering_weights: Tensor | None,
        row_gramian: Tensor,  # (count, 3)
    ) -> None:
        count = student.shape[0]
        if steering_weights is not None:
            pair = steering_weights.to(lang.dtype)
            lang, vis = lang * pair[0], vis * pair[1]
        # Gradients go to the dtype of the hidden states, in place over the logits when that is their dtype too.
        reuse = student.dtype == student_rows.dtype
        if masked_student is not None:
            both: Tensor = (
                _joined(student, masked_student) if reuse else student_rows.new_empty(2 * count, student.shape[1])
            )
            kernels.logit_gradients(
                student, teacher, masked_teacher, masked_student, values, log_normalizers, lang + vis, transform,
                out_student=both[:count], out_masked_student=both[count:], row_gramian=row_gramian,
            )  # fmt: skip
            if self.combined:
                self._accumulate(1, both, student_rows)
            else:
                self._accumulate(0, both[count:], student_rows[count:])
                self._accumulate(1, both[:count], student_rows[:count])
            for component, part in enumerate((both[count:], both[:count])):
                self._write_hidden(component, rows, part)
            return
        separate = not self.combined
        out_student = student if reuse else torch.empty_like(student, dtype=student_rows.dtype)
        out_second = None
        if separate:
            fits = reuse and masked_teacher.shape == student.shape  # padded vocabularies may differ
            out_second = masked_teacher if fits else torch.empty_like(out_student)
        kernels.logit_gradients(
            student, teacher, masked_teacher, None, values, log_normalizers, vis if separate else lang + vis, transform,
            out_student=out_student, second_coefficients=lang if separate else None, out_second=out_second,
            row_gramian=row_gramian,
        )  # fmt: skip
        for component, gradient in ((0, out_second), (1, out_student)):
            if gradient is not None:
                self._accumulate(component, gradient, student_rows)
                self._write_hidden(component, rows, gradient)

    def _write_hidden(self, component: int, rows: slice, logit_gradient: Tensor) -> None:
        out = self.hidden[component]
        if out.numel():
            torch.mm(_narrowed(logit_gradient, self.student_weight), self.student_weight, out=out[rows])

    def _accumulate(self, component: int, logit_gradient: Tensor, hidden: Tensor) -> None:
        weight, bias = self.weight[component], self.bias[component]
        if weight.numel():
            if weight.dtype == hidden.dtype:
                weight.addmm_(logit_gradient.t(), hidden)
            else:
                weight.add_(torch.mm(logit_gradient.t(), hidden, out_dtype=weight.dtype))
        if bias.numel():
            bias.add_(logit_gradient.sum(0, dtype=bias.dtype))

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        weight = [w.to(self.student_weight.dtype) for w in self.weight]
        bias = self.bias if self.student_bias is None else [b.to(self.student_bias.dtype) for b in self.bias]
        return self.hidden[0], weight[0], bias[0], self.hidden[1], weight[1], bias[1]


def _narrowed(logit_gradient: Tensor, weight: Tensor) -> Tensor:
    return logit_gradient if logit_gradient.dtype == weight.dtype else logit_gradient.to(weight.dtype)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The one tensor whose two halves of rows `first` and `second` are."""
    return first.as_strided((first.shape[0] + second.shape[0], first.shape[1]), first.stride())


def _projection_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of projected logits: GPUs multiply bf16 and fp16 into fp32 at no extra cost, CPUs do not."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return hidden.dtype


def chunk_length(hidden: Tensor, has_masked_student: bool, vocab_sizes: Iterable[int], max_bytes: int) -> int:
    """The number of tokens whose logits (and gradients, where they cannot overwrite the logits) fit `max_bytes`."""
    student_vocab, teacher_vocab = vocab_sizes
    itemsize = torch.empty((), dtype=_projection_dtype(hidden), device="meta").element_size()
    students = 2 if has_masked_student else 1
    row_bytes = (students * student_vocab + 2 * teacher_vocab) * itemsize
    if itemsize != hidden.element_size():
        row_bytes += 2 * student_vocab * hidden.element_size()
    return max(1, max_bytes // row_bytes)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias, (rows, vocab), into the first rows of `buffer` when there is one."""
    dtype = _projection_dtype(hidden)
    if dtype != hidden.dtype:
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        if buffer is None:
            buffer = hidden.new_empty(hidden.shape[0], weight.shape[0])
        logits = torch.mm(hidden, weight.t(), out=buffer[: hidden.shape[0]])
    return logits if bias is None else logits.add_(bias)


@linear_decomposed_kl.register_fake
def _(  # type: ignore[no-untyped-def]
    student_hidden, masked_student_hidden, teacher_hidden, masked_teacher_hidden, student_weight, student_bias,
    teacher_weight, teacher_bias, token_weights, steering_weights, needs_hidden_grad, needs_weight_grad,
    needs_bias_grad, *_settings,
):  # fmt: skip
    dtype = accumulation_dtype(student_hidden.dtype)
    gradients = _Gradients(
        student_hidden, student_weight, student_bias, masked_student_hidden is not None, steering_weights is not None,
        needs_hidden_grad, needs_weight_grad, needs_bias_grad,
    )  # fmt: skip
    scalars = [student_hidden.new_empty((), dtype=dtype) for _ in range(3)]
    values = student_hidden.new_empty((student_hidden.shape[0], VALUES), dtype=dtype)
    return *scalars, values, student_hidden.new_empty((2, 2), dtype=dtype), *gradients.outputs()


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    masked_student_hidden = inputs[1]
    _lang, _vis, _objective, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.inputs = len(inputs)
    ctx.has_masked_student = masked_student_hidden is not None
    ctx.combined = inputs[9] is not None
    ctx.save_for_backward(*others[2:])


def _scaled(scale: Tensor | None, gradient: Tensor) -> Tensor | None:
    """scale * gradient, out of place; None where either is missing."""
    if scale is None or gradient.numel() == 0:
        return None
    if not scale.is_cuda and scale.item() == 1.0:
        return (
            gradient  # head-sized: a copy costs a tenth of a projection. Reading the scale on a GPU would wait for it.
        )
    return gradient * scale.to(gradient.dtype)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _backward(ctx, grad_lang, grad_vis, grad_objective, *_others):  # type: ignore[no-untyped-def]
    lang_hidden, lang_weight, lang_bias, vis_hidden, vis_weight, vis_bias = ctx.saved_tensors
    if ctx.combined:
        grad_lang = grad_vis = grad_objective
    from_lang, from_vis = _scaled(grad_lang, lang_hidden), _scaled(grad_vis, vis_hidden)
    if ctx.has_masked_student:
        grad_student, grad_masked = from_vis, from_lang
    else:
        grad_student, grad_masked = _sum(from_lang, from_vis), None
    grad_weight = _sum(_scaled(grad_lang, lang_weight), _scaled(grad_vis, vis_weight))
    grad_bias = _sum(_scaled(grad_lang, lang_bias), _scaled(grad_vis, vis_bias))
    return (grad_student, grad_masked, None, None, grad_weight, grad_bias, *(None,) * (ctx.inputs - 6))


linear_decomposed_kl.register_autograd(_backward, setup_context=_setup_context)
