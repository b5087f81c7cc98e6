"""The losses of one micro-batch: runs the views of student and teacher that a method needs and calls the kernels.

A view is a batch with its images, or without. The student's views run forward, and back, one after the other, so that
the activations of one are freed before the next begins: peak memory is that of the longer view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgs_kernels import (
    LinearDecomposedKL,
    LinearReverseKL,
    LMHead,
    RatioGuard,
    TokenSteering,
    language_head,
    linear_decomposed_kl,
    linear_reverse_kl,
)

from .distributed import on_any_process
from .inputs.families import EvidenceTokens, Family
from .masking import Batch, masked_view, rows_with_evidence, stack_views, with_row
from .micro_batch_loss import MicroBatchLoss
from .models.heads import backbone
from .steering.dependency import BY_DEPENDENCY, graded, most_dependent
from .steering.methods import METHODS
from .steering.step import ViewLoss

# Runs a backbone on a batch and returns the hidden states that predict the completion, (rows, completion, width).
RunBackbone = Callable[[PreTrainedModel, Batch], Tensor]


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The states that predict the completion, (rows, completion, width), of a model that nothing is wrapped around."""
    output = backbone(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.multimodal
    )
    states: Tensor = output.last_hidden_state[:, :-1][:, -batch.completion_ids.size(1) :]
    return states


# Per-token numbers of a row without an image, whose masked view is the row itself: p₀ = p and r = q.
_OF_TEXT = {"lang": "standard"}  # 0 where a name stands neither here nor in the row's own numbers


@dataclass(frozen=True)
class LossSettings:
    """What the loss computes. All but the last are settings of `VGSConfig`, which explains them."""

    method: str
    image_mask: str
    pack_teacher: bool
    token_steering: float | str
    plausibility: float
    dependency_quantile: float
    ratio_bound: float | None
    ratio_floor: float
    teacher_smoothing: float
    temperature: float
    chunk_tokens: int | None = None
    max_chunk_bytes: int | None = None
    vocab_size: int | None = None  # entries that both vocabularies share, where they are padded differently

    @property
    def ratio_guard(self) -> RatioGuard | None:
        return RatioGuard(self.ratio_bound, self.ratio_floor) if self.ratio_bound or self.ratio_floor else None

    @property
    def sampled_steering(self) -> TokenSteering | None:
        strength = 0.0 if isinstance(self.token_steering, str) else self.token_steering
        return TokenSteering(strength, self.plausibility) if strength or self.plausibility else None

    @property
    def kernel(self) -> dict[str, Any]:
        """Arguments of every kernel call."""
        return {
            "teacher_smoothing": self.teacher_smoothing,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "chunk_tokens": self.chunk_tokens,
            "max_chunk_bytes": self.max_chunk_bytes,
        }


class _Rows(NamedTuple):
    """Hidden states of the tokens that have an image, (tokens, width)."""

    teacher: Tensor
    masked_teacher: Tensor
    masked_student: Tensor | None
    sampled: Tensor  # (tokens,)


class DistillationLoss:
    """Makes the losses of `LossSettings.method`, a micro-batch at a time.

    An image stands for what `tokens.modality` names. A row without one is distilled by KL(student || teacher), which
    counts as the method's first part.

    `run_student` and `run_teacher` run a backbone: wrappers and devices are theirs. `span` times the passes that
    the masked views add. `stand_in` gives the prompt of one row with evidence, which a process runs, and does not
    count, where it has none and another has some; without it every process is on its own.
    """

    def __init__(
        self,
        settings: LossSettings,
        tokens: EvidenceTokens,
        family: Family,
        run_student: RunBackbone,
        run_teacher: RunBackbone,
        span: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        stand_in: Callable[[], Batch] | None = None,
    ) -> None:
        self.settings = settings
        self.method = METHODS[settings.method]
        self.tokens = tokens
        self.family = family
        self.run_student = run_student
        self.run_teacher = run_teacher
        self.span = span
        self.stand_in = stand_in

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the per-token numbers of a batch with images."""
        return {
            "opd": ("standard", "entropy"),
            "matched": ("standard", "lang", "entropy"),
            "teacher_prior": ("standard", "vis", "lang", "entropy"),
        }.get(self.settings.method, ("standard", "vis", "lang", "entropy", "dependency"))

    def rows_with_image(self, batch: Batch) -> Tensor:
        """(rows,) bool."""
        return rows_with_evidence(batch, self.tokens)

    def masked_view(self, batch: Batch, student: PreTrainedModel) -> Batch:
        return masked_view(self.settings.image_mask, batch, self.tokens, self.family, student)

    def micro_batch(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batch: Batch,
        loss_mask: Tensor,  # (rows, completion)
        items_in_step: Tensor | float,
        weights: Tensor | None = None,  # (3,)
        preserves: bool = False,
        adds_to_grad: bool = False,
    ) -> MicroBatch:
        """`weights`: of the parts, where they are known; None: the losses of the parts come apart. `preserves`: whether
        the third part takes part. `adds_to_grad`: the losses are run back as they are, not scaled, so that gradients of
        the head may go where they belong while they are formed."""
        return MicroBatch(self, student, teacher, batch, loss_mask, items_in_step, weights, preserves, adds_to_grad)


class MicroBatch:
    """Iterates over the losses of the student's views; `result` holds after the last what there is to log."""

    def __init__(
        self,
        loss: DistillationLoss,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batch: Batch,
        loss_mask: Tensor,
        items_in_step: Tensor | float,
        weights: Tensor | None,
        preserves: bool,
        adds_to_grad: bool,
    ) -> None:
        self._loss, self._settings, self._method = loss, loss.settings, loss.method
        self._student, self._teacher, self._batch = student, teacher, batch
        self._items, self._weights, self._preserves = items_in_step, weights, preserves
        self._adds_to_grad = adds_to_grad and weights is not None
        has_image = loss.rows_with_image(batch)
        seeing = loss_mask.bool() & has_image[:, None]  # (rows, completion), tokens of rows with an image
        text = loss_mask.bool() & ~has_image[:, None]  # (rows, completion), tokens of the others
        seeing, text = self._agree(seeing, text, has_image)
        # Found here, before the passes: a mask as an index makes the host wait for all that is queued.
        self._seeing, self._text = (mask.nonzero(as_tuple=True) for mask in (seeing, text))  # (tokens,) each of two
        self._of_seeing: dict[str, Tensor] = {}  # per token
        self._of_text: dict[str, Tensor] = {}
        self._teacher_head: LMHead | None = None
        self._bad_language: Tensor | None = None  # (tokens with an image,)
        self._masked_log_probs: Tensor | None = None  # (tokens with an image,), log r of what was sampled
        self._vis_weights = torch.empty(0, device=seeing.device)
        self._contribution = torch.zeros(seeing.shape, device=seeing.device)

    def _agree(self, seeing: Tensor, text: Tensor, has_image: Tensor) -> tuple[Tensor, Tensor]:
        """Find out what the micro-batches of all processes hold: each runs what any of them needs. Returns the masks of
        the batch that it runs."""
        stand_in = self._loss.stand_in
        own = [seeing.any(), text.any(), has_image.any()]
        self._any_seeing, self._any_text, any_image = on_any_process(own, alone=stand_in is None)
        if any_image and stand_in is not None and self._loss.tokens.modality.features not in self._batch.multimodal:
            self._batch = with_row(self._batch, stand_in())  # so that the tower runs here, too
            seeing, text = (nn.functional.pad(mask, (0, 0, 0, 1)) for mask in (seeing, text))
        return seeing, text

    def __iter__(self) -> Iterator[ViewLoss]:
        method = self._method
        view = None
        if self._any_seeing and method.masks_teacher:
            view = self._loss.masked_view(self._batch, self._student)
        teacher, masked_teacher = self._run_teacher(view)
        rows = None
        if view is not None:
            sampled = self._batch.completion_ids[self._seeing]
            rows = _Rows(teacher[self._seeing], masked_teacher[self._seeing], None, sampled)
            if "lang" in (method.first, method.second):
                hidden = self._run_masked_student(view)[self._seeing]
                yield self._language_view(hidden, rows)
                rows = rows._replace(masked_student=hidden.detach())
            elif method.masks_student:
                # Run again below where language is preserved: the graph of this pass would lie in memory beside the
                # longer view's, while a text-only pass is short.
                with torch.no_grad():
                    rows = rows._replace(masked_student=self._run_masked_student(view)[self._seeing])
        again = view is not None and method.preserved == "lang" and self._preserves and torch.is_grad_enabled()
        yield self._seeing_view(teacher, rows, last=not again)
        if again:
            assert view is not None
            assert rows is not None
            yield self._preserved_view(self._run_masked_student(view)[self._seeing], rows)

    @property
    def result(self) -> MicroBatchLoss:
        per_token = self._of_seeing
        if self._of_text:
            none = torch.zeros_like(self._of_text["standard"])
            of_text = {name: self._of_text.get(_OF_TEXT.get(name, name), none) for name in self._loss.logged}
            seeing = self._of_seeing
            per_token = {n: torch.cat([seeing[n], values]) if seeing else values for n, values in of_text.items()}
        positions = torch.cat([torch.stack(places, 1) for places in (self._seeing, self._text)])
        contribution = self._contribution if self._method.masks_teacher else None
        return MicroBatchLoss(per_token, positions, self._bad(per_token), contribution, self._vis_weights)

    # ------------------------------------------------------------------ passes

    def _run_teacher(self, view: Batch | None) -> tuple[Tensor, Tensor]:
        """Hidden states of both views, (rows, completion, width); the first twice where there is no second."""
        loss, batch = self._loss, self._batch
        if view is not None and self._settings.pack_teacher:
            both = loss.run_teacher(self._teacher, stack_views(batch, view)).chunk(2)
            return both[0], both[1]
        hidden = loss.run_teacher(self._teacher, batch)
        if view is None:
            return hidden, hidden
        with loss.span("masked_teacher"):
            return hidden, loss.run_teacher(self._teacher, view)

    def _run_masked_student(self, view: Batch) -> Tensor:
        with self._loss.span("masked_student"):
            return self._loss.run_student(self._student, view)

    # ------------------------------------------------------------------ losses of a view

    def _language_view(self, hidden: Tensor, rows: _Rows) -> ViewLoss:
        """`lang` as a part of the method: KL(p₀ ‖ r) of all tokens with an image."""
        result = self._reverse_kl(hidden, rows.masked_teacher, rows.sampled)
        self._of_seeing["lang"] = result.per_token.kl
        assert result.sampled is not None
        self._masked_log_probs = result.sampled.teacher
        return self._view({self._index("lang"): result.kl}, last=False)

    def _preserved_view(self, hidden: Tensor, rows: _Rows) -> ViewLoss:
        """`lang` of the tokens that depend most on the image."""
        chosen = most_dependent(self._of_seeing["dependency"], self._settings.dependency_quantile)
        result = self._reverse_kl(hidden[chosen], rows.masked_teacher[chosen])
        self._bad_language = torch.zeros_like(self._of_seeing["lang"], dtype=torch.bool)
        self._bad_language[chosen] = ~torch.isfinite(result.per_token.kl)
        return self._view({2: result.kl}, last=True)

    def _seeing_view(self, teacher: Tensor, rows: _Rows | None, last: bool) -> ViewLoss:
        """Everything that the student with the image is trained on."""
        hidden = self._loss.run_student(self._student, self._batch)
        losses: dict[int, Tensor] = {}
        if self._any_seeing:
            losses |= self._seeing_tokens(hidden[self._seeing], teacher[self._seeing], rows)
        if self._any_text or not self._any_seeing:  # of no token at all: a zero with a graph
            result = self._reverse_kl(hidden[self._text], teacher[self._text])
            self._of_text = result.per_token._asdict()
            self._of_text["standard"] = self._of_text.pop("kl")
            kl = result.kl if self._weights is None else self._weights[0].to(result.kl) * result.kl
            losses[0] = losses[0] + kl if 0 in losses else kl
        if self._weights is not None:
            losses = {0: torch.stack(list(losses.values())).sum()}
        return self._view(losses, last, weighted=True)

    def _seeing_tokens(self, hidden: Tensor, teacher: Tensor, rows: _Rows | None) -> dict[int, Tensor]:
        """Part -> its loss; with known weights 0 -> their weighted sum."""
        sampled = self._batch.completion_ids[self._seeing]
        if rows is None or self._method.name == "matched":
            plain = self._reverse_kl(hidden, teacher, sampled)
            numbers = plain.per_token._asdict()
            self._of_seeing |= {"standard": numbers["kl"], "entropy": numbers["entropy"]}
            index = self._index("standard")
            if rows is not None:
                assert plain.sampled is not None
                assert self._masked_log_probs is not None  # the language view comes first
                self._contribute(plain.sampled.teacher - self._masked_log_probs)
            return {index: plain.kl} if self._weights is None else {0: self._weights[index].to(plain.kl) * plain.kl}
        result, parts = self._decomposed_kl(hidden, rows)
        numbers = {name: values for name, values in result.per_token._asdict().items() if values is not None}
        self._of_seeing = numbers | self._of_seeing  # lang with the gradient's own rounding, where there is one
        self._vis_weights = result.applied_vis_weights
        assert result.sampled is not None
        assert result.sampled.masked_teacher is not None
        self._contribute(result.sampled.teacher - result.sampled.masked_teacher)
        if result.objective is not None:
            return {0 if self._weights is not None else next(iter(parts)): result.objective}
        return {index: getattr(result, part) for index, part in parts.items()}

    def _decomposed_kl(self, hidden: Tensor, rows: _Rows) -> tuple[LinearDecomposedKL, dict[int, str]]:
        """The kernel's result, and which of the method's parts it holds: index -> attribute."""
        settings, method, prior = self._settings, self._method, self._method.first == "prior"
        names = {"prior": "lang", "evidence": "vis"} if prior else {"standard": "standard", "vis": "vis"}
        parts = {
            index: names[part]
            for index, part in enumerate(method.parts)
            if part in names and (part != method.preserved or self._preserves)
        }
        of = {part: index for index, part in parts.items()}
        objective = None
        if self._weights is not None or len(parts) == 1:
            known = self._weights
            objective = tuple(
                0.0 if part not in of else 1.0 if known is None else known[of[part]]
                for part in ("standard", "vis", "lang")
            )
        student, student_head, teacher_head = self._heads(hidden)
        vis_weights = None
        if not prior and (settings.token_steering == BY_DEPENDENCY or method.preserved == "vis"):
            scores = self._dependency(rows, teacher_head)
            if method.preserved == "vis":
                vis_weights = torch.zeros_like(scores)
                vis_weights[most_dependent(scores, settings.dependency_quantile)] = 1.0
            else:
                vis_weights = graded(scores, settings.dependency_quantile)
        result = linear_decomposed_kl(
            student,
            student_head,
            rows.teacher.to(student.dtype),
            teacher_head,
            rows.masked_teacher.to(student.dtype),
            None if prior or rows.masked_student is None else rows.masked_student.to(student.dtype),
            decomposition="teacher_prior" if prior else "vgs",
            objective=objective,  # type: ignore[arg-type] # a tuple of three
            token_weights=self._token_weights(student),
            vis_weights=vis_weights,
            sampled_tokens=rows.sampled,
            accumulate_head_grad=self._adds_to_grad and objective is not None and _has_grad(student_head),
            token_steering=settings.sampled_steering,
            ratio_guard=None if prior else settings.ratio_guard,
            **settings.kernel,
        )
        return result, parts

    def _reverse_kl(self, hidden: Tensor, teacher: Tensor, sampled: Tensor | None = None) -> LinearReverseKL:
        student, student_head, teacher_head = self._heads(hidden)
        return linear_reverse_kl(
            student,
            student_head,
            teacher.to(student.dtype),
            teacher_head,
            token_weights=self._token_weights(student),
            sampled_tokens=sampled,
            # Where it is the only part, its weight is 1; elsewhere the loss is yet to be multiplied by one.
            accumulate_head_grad=self._adds_to_grad and self._method.second is None and _has_grad(student_head),
            **self._settings.kernel,
        )

    def _dependency(self, rows: _Rows, teacher_head: LMHead) -> Tensor:
        """VDS = KL(q ‖ r) of every token, (tokens,), where it is needed before the loss: two projections more. Of the
        teacher as it is: `teacher_smoothing` would smooth r alone here."""
        with torch.no_grad():
            teacher = rows.teacher.to(teacher_head.weight.dtype)
            masked = rows.masked_teacher.to(teacher.dtype)
            options = {**self._settings.kernel, "teacher_smoothing": 0.0}
            return linear_reverse_kl(teacher, teacher_head, masked, teacher_head, **options).per_token.kl

    # ------------------------------------------------------------------ small parts

    def _heads(self, hidden: Tensor) -> tuple[Tensor, LMHead, LMHead]:
        if self._teacher_head is None:  # once: it may have to be gathered
            self._teacher_head = language_head(self._teacher, hidden)
        # Under autocast the kernels cast, and add to the gradient of the parameter itself.
        autocast = torch.is_autocast_enabled(hidden.device.type)
        own = self._student.get_output_embeddings().weight if autocast else hidden
        return hidden, language_head(self._student, own), self._teacher_head

    def _token_weights(self, hidden: Tensor) -> Tensor:
        """1 / items of the step for every token."""
        weight = self._items if isinstance(self._items, Tensor) else hidden.new_tensor(self._items)
        return weight.to(hidden.device).reciprocal().to(torch.float32).expand(hidden.shape[0])

    def _index(self, part: str) -> int:
        return self._method.parts.index(part)

    def _contribute(self, log_ratio: Tensor) -> None:  # (tokens with an image,)
        self._contribution[self._seeing] = log_ratio.to(self._contribution)

    def _view(self, losses: dict[int, Tensor], last: bool, weighted: bool = False) -> ViewLoss:
        """The losses as they are run back: with known weights their weighted sum."""
        if self._weights is None or weighted:
            return ViewLoss(losses, last)
        ((index, loss),) = losses.items()
        return ViewLoss({0: self._weights[index].to(loss) * loss}, last)

    def _bad(self, per_token: dict[str, Tensor]) -> Tensor:
        """Tokens whose loss takes part in training and is not finite, (valid tokens,)."""
        method = self._method
        bad = torch.zeros_like(per_token["standard"], dtype=torch.bool)
        seeing = len(self._of_seeing.get("standard", ()))
        bad[seeing:] |= ~torch.isfinite(per_token["standard"][seeing:])
        for part in method.parts:
            name = method.label.get(part, part)
            if part == method.preserved or name not in self._of_seeing:
                continue
            values = ~torch.isfinite(self._of_seeing[name])
            if name == "vis" and len(self._vis_weights):
                values &= self._vis_weights != 0
            bad[:seeing] |= values
        if self._bad_language is not None:
            bad[:seeing] |= self._bad_language
        return bad


def _has_grad(head: LMHead) -> bool:
    """Whether the head's own parameters are what the kernel gets: not a cast, and not what FSDP2 gathered."""
    return all(tensor.is_leaf for tensor in (head.weight, head.bias) if tensor is not None)
