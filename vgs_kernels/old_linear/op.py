"""The registered operators of `linear_decomposed_kl`: projection, losses and gradients, a chunk of tokens at a time.

`(tokens, vocab)` logits never exist as a whole. A chunk of tokens is projected, the divergences and the logit gradients
are formed in that chunk while it is hot, and multiplied back into hidden and head gradients at once. Cost in units of
one tokens x width x vocab product: 3 projections (4 with the masked student), then dH and dW once for `objective`,
once per component for `lang` and `vis`.

Two operators: `vgs_kernels::linear_decomposed_kl` computes values and gradients and knows nothing of autograd;
`vgs_kernels::attach_gradients` ties the three scalars to the gradients that belong to them, which `backward` only
scales (out of place, so that it can run twice).

Called by `linear_decomposed_kl/api.py` only; the logit work is that of the backends of `decomposed_kl`, the products
are in `products.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import backend as backends
from ..decomposed_kl.old_api import combine_parts
from ..decomposed_kl.old_types import LogitTransform
from ..decomposed_kl.reference import VALUES, component_coefficients
from ..decomposed_kl.smoothing import smooth_, smoothed
from ..linear.column_filter import ColumnFilter
from ..linear.op import first_order_only
from ..linear.products import Products, projection_dtype
from ..pages import use_huge_pages, zeros_like
from ..types import accumulation_dtype
from .visual_weights import SampledTokens

# Gathering rows of the head costs more than multiplying all of them where a larger part of the columns is kept.
_WORTH_GATHERING = 0.2

Rows = slice | Tensor  # of the tokens of a chunk: a slice, or indices


@torch.library.custom_op("vgs_kernels::linear_decomposed_kl", mutates_args=("weight_grad", "bias_grad"))
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
    visual_weights: Tensor | None,  # (tokens,), factors of the visual parts
    sampled_tokens: Tensor | None,  # (tokens,)
    steering_weights: Tensor | None,  # (2,)
    weight_grad: Tensor | None,  # (>= vocab, student width): the objective's gradient is added to it
    bias_grad: Tensor | None,  # (>= vocab,): the same
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
    needs_bias_grad: bool,
    chunk_tokens: int,
    gradient_filter: float,
    token_steering: float,
    plausibility: float,
    teacher_smoothing: float,
    decomposition: str,
    vocab_size: int,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Return lang, vis, objective, values, logit Gramian, the factors of the visual parts (tokens,), log q - log r of
    the sampled tokens (tokens,), then the gradients of the two components.

    The gradients are (hidden, head weight, head bias) of lang, then of vis; with `steering_weights` those of the one
    objective stand in the place of vis, except for the masked student's hidden states, which only lang has.
    What does not apply is an empty tensor.
    """
    raw = LogitTransform(
        decomposition, vocab_size, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap
    )
    transform = smoothed(raw) if teacher_smoothing else raw
    kernels = backends.load("decomposed_kl", backend)
    tokens = student_hidden.shape[0]
    dtype = accumulation_dtype(student_hidden.dtype)
    values = student_hidden.new_zeros((tokens, VALUES), dtype=dtype)
    row_gramians = student_hidden.new_zeros((tokens, 3), dtype=dtype)
    visual = values.new_ones(tokens) if visual_weights is None else visual_weights.to(dtype, copy=True)
    contribution = values.new_zeros(0 if sampled_tokens is None else tokens)
    products = Products(student_hidden.device, student_hidden.dtype, backend == "native")
    gradients = _Gradients(
        student_hidden, student_weight, student_bias, masked_student_hidden is not None, steering_weights is not None,
        needs_hidden_grad, needs_weight_grad, needs_bias_grad, weight_grad, bias_grad, gradient_filter, products,
    )  # fmt: skip
    gradients.begin()
    logits = _Logits(student_hidden, student_weight, teacher_weight, masked_student_hidden is not None)
    for rows in _chunks(token_weights, chunk_tokens):
        weights = token_weights[rows].to(dtype)
        student_rows = _gather((student_hidden, masked_student_hidden), rows, weights)
        teacher_rows = _gather((teacher_hidden, masked_teacher_hidden), rows, weights)
        chunk = logits.of_chunk(weights.shape[0])
        products.project(student_rows, student_weight, student_bias, chunk.students)
        products.project(teacher_rows, teacher_weight, teacher_bias, chunk.teachers)
        if teacher_smoothing:
            smooth_(chunk.teachers, teacher_smoothing, raw)
        chunk_values, statistics = kernels.divergences(
            chunk.student, chunk.teacher, chunk.masked_teacher, chunk.masked_student, transform, weights
        )
        values[rows] = chunk_values
        if sampled_tokens is not None:
            sampled = SampledTokens(
                sampled_tokens[rows], chunk.teacher, chunk.masked_teacher, chunk_values, statistics, transform
            )
            contribution[rows] = torch.where(weights == 0, 0.0, sampled.contribution)
            visual[rows] *= sampled.weights(token_steering, plausibility)
        if gradients.wanted:
            lang, vis = component_coefficients(decomposition, weights, weights * visual[rows])
            row_gramians[rows] = gradients.add_chunk(
                kernels, transform, rows, student_rows, chunk, chunk_values, statistics, lang, vis,
                steering_weights,
            )  # fmt: skip
    gradients.finish()

    # Where the weight is 0 the value is 0, and 0 * inf cannot arise.
    parts = combine_parts(decomposition, values)
    weights = token_weights.to(dtype)
    visual = torch.where(weights == 0, 0.0, visual)
    vis_weights = weights * visual
    lang = (parts.lang * weights).sum()
    vis = torch.where(vis_weights == 0, 0.0, parts.vis * vis_weights).sum()
    if steering_weights is None:
        objective = lang.new_zeros(())
    else:
        pair = steering_weights.to(dtype)
        # A weight of 0 switches a part off, even one that is infinite.
        objective = torch.where(pair[0] == 0, 0.0, pair[0] * lang) + torch.where(pair[1] == 0, 0.0, pair[1] * vis)
    sums = (row_gramians * torch.stack([weights.square(), weights * vis_weights, vis_weights.square()], 1)).sum(0)
    gramian = torch.stack([sums[0], sums[1], sums[1], sums[2]]).reshape(2, 2)
    return lang, vis, objective, values, gramian, visual, contribution, *gradients.outputs()


def _chunks(token_weights: Tensor, chunk_tokens: int) -> Iterator[Rows]:
    """Rows of every chunk. On a CPU tokens of weight 0 are left out; on a GPU counting them would wait for it."""
    tokens = token_weights.shape[0]
    if not token_weights.is_cuda:
        active = token_weights.nonzero().squeeze(1)
        if active.shape[0] < tokens:
            yield from active.split(chunk_tokens) if active.numel() else ()
            return
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


def _gather(streams: tuple[Tensor, Tensor | None], rows: Rows, weights: Tensor) -> Tensor:
    """The rows of a chunk of one or two streams, stacked. Those of weight 0 are 0: they may hold NaN, and 0 * NaN
    would reach the head gradient through the products."""
    stacked = torch.cat([hidden[rows] for hidden in streams if hidden is not None])  # (streams * n, width)
    if isinstance(rows, Tensor):
        return stacked
    skipped = (weights == 0).repeat(stacked.shape[0] // weights.shape[0])
    return stacked.masked_fill_(skipped[:, None], 0)


class _Chunk:
    """Views of the logits of n tokens. Rows of one model are adjacent; so are those of the masked teacher and the
    student where their vocabularies are equally long, so that both gradients of teacher_prior make one matrix."""

    def __init__(self, teachers: Tensor, students: Tensor, n: int, joined: Tensor | None) -> None:
        self.teachers, self.students = teachers, students  # (2 * n, vocab), (n or 2 * n, vocab)
        self.teacher, self.masked_teacher = teachers[:n], teachers[n:]
        self.student = students[:n]
        self.masked_student = students[n:] if students.shape[0] > n else None
        self.masked_teacher_and_student = None if joined is None else joined[n : 3 * n]


class _Logits:
    """The logit buffer of one call, reused by every chunk: fresh memory costs as much as the pass that fills it."""

    def __init__(
        self, hidden: Tensor, student_weight: Tensor, teacher_weight: Tensor, has_masked_student: bool
    ) -> None:
        self._students = 2 if has_masked_student else 1
        self._vocab = student_weight.shape[0], teacher_weight.shape[0]
        self._like = hidden
        self._buffer: Tensor | None = None

    def of_chunk(self, n: int) -> _Chunk:
        student_vocab, teacher_vocab = self._vocab
        size = n * (2 * teacher_vocab + self._students * student_vocab)
        if self._buffer is None:
            self._buffer = self._like.new_empty(size, dtype=projection_dtype(self._like))
            use_huge_pages(self._buffer)
        split = 2 * n * teacher_vocab
        teachers = self._buffer[:split].view(2 * n, teacher_vocab)
        students = self._buffer[split:size].view(self._students * n, student_vocab)
        joined = self._buffer[:size].view(-1, student_vocab) if student_vocab == teacher_vocab else None
        return _Chunk(teachers, students, n, joined)


class _Gradients:
    """The gradient buffers of one call, filled chunk by chunk. Index 0 is lang; 1 is vis, or the objective."""

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
        weight_grad: Tensor | None = None,
        bias_grad: Tensor | None = None,
        gradient_filter: float = 0.0,
        products: Products | None = None,
    ) -> None:
        self.combined = combined
        self.has_masked_student = has_masked_student
        self.products = products or Products(student_hidden.device, student_hidden.dtype, native=False)
        self.filter = ColumnFilter(gradient_filter, self.products.native) if gradient_filter else None
        self._squares: Tensor | None = None  # of the columns of a chunk's logit gradients, with a filter
        self.student_weight, self.student_bias = student_weight, student_bias
        nothing = student_weight.new_empty(0)
        lang_hidden = needs_hidden and (has_masked_student or not combined)
        self.hidden = [
            torch.empty_like(student_hidden, memory_format=torch.contiguous_format) if wanted else nothing
            for wanted in (lang_hidden, needs_hidden)
        ]
        # Partial sums over chunks are kept in the accumulation dtype where the device multiplies into it for free.
        head_dtype = projection_dtype(student_weight)
        self.weight = [
            nothing if not wanted
            else zeros_like(student_weight, head_dtype) if self.filter  # few of its rows are written
            else torch.empty_like(student_weight, dtype=head_dtype, memory_format=torch.contiguous_format)
            for wanted in (needs_weight and not combined, needs_weight and weight_grad is None)
        ]  # fmt: skip
        self.bias = [
            torch.empty_like(student_bias, dtype=accumulation_dtype(student_bias.dtype))
            if wanted and student_bias is not None
            else nothing
            for wanted in (needs_bias and not combined, needs_bias and bias_grad is None)
        ]
        # What the chunks add to: the buffers above, or the gradients that the caller wants to be added to.
        self.into_weight = [self.weight[0], self.weight[1] if weight_grad is None else weight_grad]
        self.into_bias = [self.bias[0], self.bias[1] if bias_grad is None else bias_grad]
        self.wanted = needs_hidden or any(t.numel() for t in (*self.into_weight, *self.into_bias))
        self._accumulates = weight_grad is not None or self.filter is not None

    def begin(self) -> None:
        """Prepare the memory. The first chunk writes into the head gradient; zeros would cost a pass of their own."""
        for bias in self.bias:
            bias.zero_()
        for hidden in self.hidden:
            hidden.zero_()

    def finish(self) -> None:
        """Without a chunk (no tokens, or all of weight 0) nothing was written yet."""
        if not self._accumulates:
            for weight in self.weight:
                weight.zero_()

    def add_chunk(
        self,
        kernels: ModuleType,
        transform: LogitTransform,
        rows: Rows,
        student_rows: Tensor,  # (streams * n, width)
        chunk: _Chunk,  # logits; overwritten with their gradient where dtypes allow
        values: Tensor,
        statistics: Tensor,
        lang: Tensor,  # (n, 5)
        vis: Tensor,  # (n, 5)
        steering_weights: Tensor | None,
    ) -> Tensor:
        """Add the gradients of a chunk, return its rows of the logit Gramian, (n, 3)."""
        n = chunk.student.shape[0]
        row_gramian = values.new_empty((n, 3))
        if steering_weights is not None:
            pair = steering_weights.to(lang.dtype)
            lang, vis = lang * pair[0], vis * pair[1]
        squares = self._column_squares(1 if chunk.masked_student is None and self.combined else 2, transform.vocab_size)
        column_squares = None if self.filter is None else squares
        # Gradients go to the dtype of the hidden states, in place over the logits when that is their dtype too.
        reuse = chunk.student.dtype == student_rows.dtype
        streams = (chunk.student, chunk.teacher, chunk.masked_teacher, chunk.masked_student, values, statistics)
        if chunk.masked_student is not None:
            both: Tensor | None = (
                chunk.students if reuse else torch.empty_like(chunk.students, dtype=student_rows.dtype)
            )
            assert both is not None
            kernels.logit_gradients(
                *streams, lang + vis, transform,
                out_student=both[:n], out_masked_student=both[n:], row_gramian=row_gramian,
                column_squares=column_squares,
            )  # fmt: skip
            if self.combined:
                hidden = self._add(1, both, student_rows, squares.sum(0))
            else:
                hidden = torch.cat([
                    self._add(1, both[:n], student_rows[:n], squares[0]),
                    self._add(0, both[n:], student_rows[n:], squares[1]),
                ])  # fmt: skip
            self._write_hidden(1, rows, hidden[:n])
            self._write_hidden(0, rows, hidden[n:])
        elif self.combined:
            out = chunk.student if reuse else torch.empty_like(chunk.student, dtype=student_rows.dtype)
            kernels.logit_gradients(
                *streams, lang + vis, transform, out_student=out, row_gramian=row_gramian, column_squares=column_squares
            )
            self._write_hidden(1, rows, self._add(1, out, student_rows, squares[0]))
        else:
            both = chunk.masked_teacher_and_student if reuse else None
            if both is None:
                both = student_rows.new_empty((2 * n, chunk.student.shape[1]))
            kernels.logit_gradients(
                *streams, vis, transform,
                out_student=both[n:], second_coefficients=lang, out_second=both[:n], row_gramian=row_gramian,
                column_squares=column_squares,
            )  # fmt: skip
            if self.filter is None:
                self._add_head(0, both[:n], student_rows)
                self._add_head(1, both[n:], student_rows)
                hidden = self._hidden_product(both)
            else:
                hidden = torch.cat([
                    self._add(0, both[:n], student_rows, squares[1]), self._add(1, both[n:], student_rows, squares[0])
                ])  # fmt: skip
            self._write_hidden(0, rows, hidden[:n])
            self._write_hidden(1, rows, hidden[n:])
        self._accumulates = True
        return row_gramian

    def _column_squares(self, outputs: int, vocab: int) -> Tensor:
        """Where the kernels write the squares of the columns, (outputs, vocab); without a filter (outputs, 0)."""
        if self._squares is None:
            columns = 0 if self.filter is None else vocab
            self._squares = self.student_weight.new_empty((outputs, columns), dtype=torch.float32)
        return self._squares

    def _add(self, component: int, logit_gradient: Tensor, hidden: Tensor, squares: Tensor) -> Tensor:
        """Add to the head gradients; return the hidden gradient, (rows, width), empty rows where it is not wanted."""
        if self.filter is None:
            self._add_head(component, logit_gradient, hidden)
            return self._hidden_product(logit_gradient)
        for_hidden, among_them = self.filter.columns(squares)
        for_head = for_hidden[among_them]
        worth_gathering = _WORTH_GATHERING * logit_gradient.shape[1]
        if for_head.shape[0] > worth_gathering:  # and so has for_hidden
            self._add_head(component, logit_gradient, hidden)
            return self._hidden_product(logit_gradient)
        if not self.hidden[1].numel() or for_hidden.shape[0] > worth_gathering:
            self._add_head_columns(component, self.products.gather(logit_gradient, for_head), hidden, for_head)
            return self._hidden_product(logit_gradient)
        kept = self.products.gather(logit_gradient, for_hidden)
        self._add_head_columns(component, self.products.gather(kept, among_them), hidden, for_head)
        out = kept.new_empty(kept.shape[0], self.student_weight.shape[1])
        self.products.gathered_hidden_gradient(kept, self.student_weight, for_hidden, out)
        return out

    def _add_head(self, component: int, logit_gradient: Tensor, hidden: Tensor) -> None:
        weight, bias = self.into_weight[component], self.into_bias[component]
        if weight.numel():
            self.products.head_gradient(logit_gradient, hidden, weight, self._accumulates)
        if bias.numel():
            bias.add_(logit_gradient.sum(0, dtype=bias.dtype))

    def _add_head_columns(self, component: int, kept: Tensor, hidden: Tensor, columns: Tensor) -> None:
        """`kept` (rows, columns): those columns of the logit gradient."""
        weight, bias = self.into_weight[component], self.into_bias[component]
        if weight.numel():
            self.products.gathered_head_gradient(kept, hidden, columns, weight)
        if bias.numel():
            bias.index_add_(0, columns, kept.sum(0, dtype=bias.dtype))

    def _hidden_product(self, logit_gradient: Tensor) -> Tensor:
        if not self.hidden[1].numel():
            return logit_gradient.new_empty(logit_gradient.shape[0], 0)
        out = logit_gradient.new_empty(logit_gradient.shape[0], self.student_weight.shape[1])
        self.products.hidden_gradient(logit_gradient, self.student_weight, out)
        return out

    def _write_hidden(self, component: int, rows: Rows, gradient: Tensor) -> None:
        if self.hidden[component].numel():
            self.hidden[component][rows] = gradient

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        weight = [w.to(self.student_weight.dtype) for w in self.weight]
        bias = self.bias if self.student_bias is None else [b.to(self.student_bias.dtype) for b in self.bias]
        return tuple(  # type: ignore[return-value]
            # An operator may not return one tensor twice: what does not apply is a new empty tensor each time.
            t if t.numel() else t.new_empty(t.shape)
            for t in (self.hidden[0], weight[0], bias[0], self.hidden[1], weight[1], bias[1])
        )


def chunk_length(hidden: Tensor, has_masked_student: bool, vocab_sizes: Iterable[int], max_bytes: int) -> int:
    """The number of tokens whose logits (and gradients, where they cannot overwrite the logits) fit `max_bytes`."""
    student_vocab, teacher_vocab = vocab_sizes
    itemsize = projection_dtype(hidden).itemsize
    students = 2 if has_masked_student else 1
    row_bytes = (students * student_vocab + 2 * teacher_vocab) * itemsize
    if itemsize != hidden.element_size() or (students == 1 and student_vocab != teacher_vocab):
        row_bytes += 2 * student_vocab * hidden.element_size()
    return max(1, max_bytes // row_bytes)


@linear_decomposed_kl.register_fake
def _(  # type: ignore[no-untyped-def]
    student_hidden, masked_student_hidden, teacher_hidden, masked_teacher_hidden, student_weight, student_bias,
    teacher_weight, teacher_bias, token_weights, visual_weights, sampled_tokens, steering_weights, weight_grad,
    bias_grad, needs_hidden_grad, needs_weight_grad, needs_bias_grad, *_settings,
):  # fmt: skip
    dtype = accumulation_dtype(student_hidden.dtype)
    gradients = _Gradients(
        student_hidden, student_weight, student_bias, masked_student_hidden is not None, steering_weights is not None,
        needs_hidden_grad, needs_weight_grad, needs_bias_grad, weight_grad, bias_grad,
    )  # fmt: skip
    scalars = [student_hidden.new_empty((), dtype=dtype) for _ in range(3)]
    tokens = student_hidden.shape[0]
    values = student_hidden.new_empty((tokens, VALUES), dtype=dtype)
    visual, contribution = values.new_empty(tokens), values.new_empty(0 if sampled_tokens is None else tokens)
    gramian = values.new_empty((2, 2))
    return *scalars, values, gramian, visual, contribution, *gradients.outputs()


@torch.library.custom_op("vgs_kernels::attach_gradients", mutates_args=())
def attach_gradients(
    lang: Tensor,  # ()
    vis: Tensor,  # ()
    objective: Tensor,  # ()
    student_hidden: Tensor,
    masked_student_hidden: Tensor | None,
    student_weight: Tensor,
    student_bias: Tensor | None,
    lang_hidden: Tensor,  # gradients, in the order in which `linear_decomposed_kl` returns them; empty for none
    lang_weight: Tensor,
    lang_bias: Tensor,
    vis_hidden: Tensor,
    vis_weight: Tensor,
    vis_bias: Tensor,
    combined: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of the scalars whose gradients are those given: of `objective` alone if `combined`."""
    return lang.clone(), vis.clone(), objective.clone()


@attach_gradients.register_fake
def _(lang, vis, objective, *_others):  # type: ignore[no-untyped-def]
    return torch.empty_like(lang), torch.empty_like(vis), torch.empty_like(objective)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.has_masked_student = inputs[4] is not None
    ctx.combined = inputs[-1]
    ctx.save_for_backward(*inputs[7:13], inputs[3])


def _scaled(scale: Tensor | None, gradient: Tensor) -> Tensor | None:
    """scale * gradient, out of place; None where either is missing."""
    if scale is None or gradient.numel() == 0:
        return None
    # Head-sized: a copy costs a tenth of a projection. Reading the scale on a GPU would wait for it, and there is
    # nothing to read while a graph is traced.
    if not scale.is_cuda and not is_in_torch_dispatch_mode() and scale.item() == 1.0:
        return gradient
    return gradient * scale.to(gradient.dtype)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _backward(ctx, grad_lang, grad_vis, grad_objective):  # type: ignore[no-untyped-def]
    lang_hidden, lang_weight, lang_bias, vis_hidden, vis_weight, vis_bias, source = ctx.saved_tensors
    if ctx.combined:
        grad_lang = grad_vis = grad_objective
    from_lang, from_vis = _scaled(grad_lang, lang_hidden), _scaled(grad_vis, vis_hidden)
    if ctx.has_masked_student:
        grad_student, grad_masked = from_vis, from_lang
    else:
        grad_student, grad_masked = _sum(from_lang, from_vis), None
    grad_weight = _sum(_scaled(grad_lang, lang_weight), _scaled(grad_vis, vis_weight))
    grad_bias = _sum(_scaled(grad_lang, lang_bias), _scaled(grad_vis, vis_bias))
    gradients = [grad_student, grad_masked, grad_weight, grad_bias]
    if torch.is_grad_enabled():  # create_graph=True
        gradients = [None if g is None else first_order_only(g, source) for g in gradients]
    return (None, None, None, *gradients, *(None,) * 7)


attach_gradients.register_autograd(_backward, setup_context=_setup_context)
