"""The decomposed loss of one micro-batch: runs the streams that a decomposition needs and calls the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vgs_kernels import LMHead
from vgs_kernels import OldDecomposedKL as DecomposedKL
from vgs_kernels import OldLinearDecomposedKL as LinearDecomposedKL
from vgs_kernels import old_linear_decomposed_kl as linear_decomposed_kl

from .inputs.families import EvidenceTokens, Family
from .masking import Batch, masked_view, rows_with_evidence, stack_views
from .models.heads import language_head
from .steering.proxy import GradientProxy
from .steering.step import LossParts

# Runs a backbone on a batch and returns the hidden states that predict the completion, (rows, completion, width).
RunBackbone = Callable[[PreTrainedModel, Batch], Tensor]
_Heads = tuple[LMHead, LMHead]  # of the student and of the teacher


@dataclass(frozen=True)
class LossSettings:
    """What the loss computes. All but the last two are settings of `VGSConfig`, which explains them."""

    decomposition: str
    image_mask: str
    pack_teacher: bool
    token_steering: float
    plausibility: float
    teacher_smoothing: float
    temperature: float
    vocab_size: int | None = None  # entries that both vocabularies share, where they are padded differently
    wants_proxy: bool = False  # whether `LossParts.proxy` is asked for


class MicroBatchLoss(NamedTuple):
    """The loss of a micro-batch, and what is logged and recorded of it."""

    parts: LossParts
    tokens: DecomposedKL  # (valid tokens,) each, detached
    positions: Tensor  # (valid tokens, 2): row and completion position of each; rows with an image first
    contribution: Tensor  # (rows, completion), log q - log r of what was sampled; 0 where no image takes part

    def sums(self) -> Tensor:
        """Sums of full, lang, vis and entropy over the tokens, how many there are and how many are not finite; (6,)."""
        parts = [self.tokens.full, self.tokens.lang, self.tokens.vis, self.tokens.entropy]
        bad = self._bad()
        counts = [parts[0].new_tensor(bad.numel()), bad.sum().to(parts[0].dtype)]
        return torch.stack([part.sum() for part in parts] + counts)

    def non_finite(self) -> Tensor:
        """Row and completion position of every token whose loss is not finite, (count, 2)."""
        return self.positions[self._bad()]

    def _bad(self) -> Tensor:
        weights = self.parts.visual_weights
        bad = ~torch.isfinite(self.tokens.lang)
        bad[: len(weights)] |= ~torch.isfinite(self.tokens.vis[: len(weights)]) & (weights != 0)
        return bad


class _Streams(NamedTuple):
    """Last hidden states of whole completions, (rows, completion, width), or of chosen tokens, (tokens, width)."""

    student: Tensor
    teacher: Tensor
    masked_teacher: Tensor | None = None
    masked_student: Tensor | None = None


class _Split(NamedTuple):
    """The loss of tokens of one kind (with an image or without), as sums over them."""

    lang: Tensor  # (), differentiable
    vis: Tensor | None  # (), differentiable; None without images
    proxy: GradientProxy | None
    kernel: LinearDecomposedKL


class DecomposedLoss:
    """Splits KL(student || teacher) into a language and a visual part, as `LossSettings.decomposition` says.

    An image stands for what `tokens.modality` names. A row without one has no visual part: its masked view is the row
    itself, so all of its divergence is language.

    `run_student` and `run_teacher` run a backbone: wrappers and devices are theirs. `span` times the passes that
    steering adds.
    """

    def __init__(
        self,
        settings: LossSettings,
        tokens: EvidenceTokens,
        family: Family,
        run_student: RunBackbone,
        run_teacher: RunBackbone,
        span: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        self.settings = settings
        self._tokens = tokens
        self._family = family
        self._run_student = run_student
        self._run_teacher = run_teacher
        self._span = span

    def __call__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batch: Batch,
        loss_mask: Tensor,  # (rows, completion)
        items_in_step: Tensor | float,
    ) -> MicroBatchLoss:
        has_image = rows_with_evidence(batch, self._tokens)
        seeing = loss_mask.bool() & has_image[:, None]  # (rows, completion), tokens of rows with an image
        text = loss_mask.bool() & ~has_image[:, None]  # (rows, completion), tokens of the others
        any_seeing, any_text = bool(seeing.any()), bool(text.any())

        streams = self._run(student, teacher, batch, masked=any_seeing)
        heads = language_head(student, streams.student), language_head(teacher, streams.student)
        splits: list[_Split] = []
        if any_seeing:
            splits.append(self._split_seeing(self._tokens_of(streams, seeing), heads, batch.completion_ids[seeing]))
        if any_text or not any_seeing:
            splits.append(self._split_text(self._tokens_of(_Streams(streams.student, streams.teacher), text), heads))

        first = splits[0]
        contribution = torch.zeros(seeing.shape, device=seeing.device)
        if first.kernel.contribution is not None:
            contribution[seeing] = first.kernel.contribution.to(contribution)
        proxies = [split.proxy for split in splits if split.proxy is not None]
        parts = LossParts(
            reduce(torch.add, (split.lang for split in splits)) / items_in_step,
            None if first.vis is None else first.vis / items_in_step,
            first.kernel.visual_weights if any_seeing else torch.empty(0, device=seeing.device),
            reduce(GradientProxy.plus, proxies).scaled(1.0 / items_in_step) if proxies else None,
        )
        tokens = DecomposedKL(*map(torch.cat, zip(*(split.kernel.tokens for split in splits), strict=True)))
        return MicroBatchLoss(parts, tokens, torch.cat([seeing.nonzero(), text.nonzero()]), contribution)

    def _run(self, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, masked: bool) -> _Streams:
        """Run the forward passes; with `masked`, also those of the masked view that the decomposition needs."""
        if not masked:
            teacher_hidden = self._run_teacher(teacher, batch)
            return _Streams(self._run_student(student, batch), teacher_hidden)
        view = masked_view(self.settings.image_mask, batch, self._tokens, self._family, student)
        if self.settings.pack_teacher:
            teacher_hidden, masked_teacher = self._run_teacher(teacher, stack_views(batch, view)).chunk(2)
        else:
            teacher_hidden = self._run_teacher(teacher, batch)
            with self._span("masked_teacher"):
                masked_teacher = self._run_teacher(teacher, view)
        masked_student = None
        if self.settings.decomposition != "teacher_prior":
            with self._span("masked_student"):
                masked_student = self._run_student(student, view)
        return _Streams(self._run_student(student, batch), teacher_hidden, masked_teacher, masked_student)

    def _split_seeing(self, streams: _Streams, heads: _Heads, sampled: Tensor) -> _Split:
        """Split the loss of tokens whose row has an image; `sampled`: their ids, (tokens,)."""
        result = self._kernel(
            streams,
            heads,
            masked_student_hidden=streams.masked_student,
            sampled_tokens=sampled,
            token_steering=self.settings.token_steering,
            plausibility=self.settings.plausibility,
            decomposition=self.settings.decomposition,
        )
        proxy = None
        if self._wants_proxy:
            of_lang, of_vis, _ = result.hidden_gradients
            assert of_lang is not None
            assert of_vis is not None
            lang_states = streams.student if streams.masked_student is None else streams.masked_student
            proxy = GradientProxy.of_tokens((lang_states, of_lang), (streams.student, of_vis))
        return _Split(result.lang, result.vis, proxy, result)

    def _split_text(self, streams: _Streams, heads: _Heads) -> _Split:
        """All language: the loss of tokens whose row has no image."""
        # With r = q the teacher_prior split is lang = KL(p || q), vis = 0; the weight 0 spares the gradient of vis.
        result = self._kernel(
            streams._replace(masked_teacher=streams.teacher),
            heads,
            decomposition="teacher_prior",
            steering_weights=torch.tensor([1.0, 0.0], device=streams.student.device),
        )
        assert result.objective is not None
        proxy = None
        if self._wants_proxy:
            assert result.hidden_gradients.objective is not None
            proxy = GradientProxy.of_tokens((streams.student, result.hidden_gradients.objective), None)
        return _Split(result.objective, None, proxy, result)

    def _kernel(self, streams: _Streams, heads: _Heads, **options: Any) -> LinearDecomposedKL:
        assert streams.masked_teacher is not None
        return linear_decomposed_kl(
            streams.student,
            heads[0],
            streams.teacher,
            heads[1],
            masked_teacher_hidden=streams.masked_teacher,
            teacher_smoothing=self.settings.teacher_smoothing,
            temperature=self.settings.temperature,
            vocab_size=self.settings.vocab_size,
            **options,
        )

    @property
    def _wants_proxy(self) -> bool:
        return self.settings.wants_proxy and torch.is_grad_enabled()

    def _tokens_of(self, streams: _Streams, mask: Tensor) -> _Streams:  # mask: (rows, completion)
        """The hidden states of chosen tokens, all in the student's dtype."""

        def of_student(hidden: Tensor) -> Tensor:
            rows = hidden[mask]
            # The proxy needs their gradients even where the backbone is frozen.
            return rows.requires_grad_() if self._wants_proxy and not rows.requires_grad else rows

        def of_teacher(hidden: Tensor) -> Tensor:
            return hidden[mask].to(streams.student.dtype)

        return _Streams(
            of_student(streams.student),
            of_teacher(streams.teacher),
            None if streams.masked_teacher is None else of_teacher(streams.masked_teacher),
            None if streams.masked_student is None else of_student(streams.masked_student),
        )
