"""The decomposed loss of one micro-batch: runs the streams that a decomposition needs and calls the kernels.

Called by the trainer; it hands in how to run a backbone, so that this file knows no wrappers and no devices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vgs_kernels import DecomposedKL, LinearDecomposedKL, linear_decomposed_kl

from .config import VGSConfig
from .inputs.families import EvidenceTokens, Family
from .masking import Batch, masked_view, rows_with_evidence, stack_views
from .models.heads import language_head
from .steering.proxy import GradientProxy

# Runs a backbone on a batch and returns the hidden states that predict the completion, (rows, completion, width).
RunBackbone = Callable[[PreTrainedModel, Batch], Tensor]


class MicroBatchLoss(NamedTuple):
    """Both parts of the loss of a micro-batch, and what is logged of it."""

    lang: Tensor  # (), sum over tokens / number of tokens of the step, differentiable
    vis: Tensor | None  # the same; None if no row has an image
    proxy: GradientProxy | None  # of the gradients of lang and vis; None unless steering is amortized
    tokens: DecomposedKL  # (valid tokens,) each, detached
    positions: Tensor  # (valid tokens, 2): row and completion position of each; rows with an image first
    visual_weights: Tensor  # (tokens of rows with an image,), what vis weighs each by
    contribution: Tensor  # (rows, completion), log q - log r of what was sampled; 0 where no image takes part

    def weighted(self, weights: Tensor) -> Tensor:
        """weights[0] * lang + weights[1] * vis, differentiable."""
        lang = weights[0].to(self.lang) * self.lang
        return lang if self.vis is None else lang + weights[1].to(self.vis) * self.vis

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
        vis = self.tokens.vis[: len(self.visual_weights)]
        bad = ~torch.isfinite(self.tokens.lang)
        bad[: len(vis)] |= ~torch.isfinite(vis) & (self.visual_weights != 0)
        return bad


def decomposed_loss(
    config: VGSConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    loss_mask: Tensor,  # (rows, completion)
    items_in_step: Tensor | float,
    tokens: EvidenceTokens,
    family: Family,
    run_student: RunBackbone,
    run_teacher: RunBackbone,
    span: Callable[[str], AbstractContextManager[None]],
    vocab_size: int | None = None,
) -> MicroBatchLoss:
    """Run the streams and split the loss. `span` times the passes that steering adds.

    `vocab_size`: entries of the vocabulary that both models have (they may be padded differently); None if the same.

    An image stands for what `config.modality` names. Rows with one are split by `config.decomposition`. A row without
    has no visual part: its masked view is the row itself, so all of its KL(student || teacher) is language.
    """
    has_image = rows_with_evidence(batch, tokens)
    image_mask = loss_mask.bool() & has_image[:, None]  # (rows, completion)
    text_mask = loss_mask.bool() & ~has_image[:, None]
    any_image, any_text = bool(image_mask.any()), bool(text_mask.any())

    masked_teacher_hidden = masked_student_hidden = None
    if not any_image:
        teacher_hidden = run_teacher(teacher, batch)  # (rows, completion, teacher width)
    else:
        masked = masked_view(config.image_mask, batch, tokens, family, student)
        if config.pack_teacher:
            teacher_hidden, masked_teacher_hidden = run_teacher(teacher, stack_views(batch, masked)).chunk(2)
        else:
            teacher_hidden = run_teacher(teacher, batch)
            with span("masked_teacher"):
                masked_teacher_hidden = run_teacher(teacher, masked)
        if config.decomposition != "teacher_prior":
            with span("masked_student"):
                masked_student_hidden = run_student(student, masked)
    student_hidden = run_student(student, batch)  # (rows, completion, width)

    head = language_head(student, student_hidden)
    teacher_head = language_head(teacher, student_hidden)

    needs_proxy = config.steering == "amortized" and torch.is_grad_enabled()

    def student_rows(hidden: Tensor, mask: Tensor) -> Tensor:
        rows = hidden[mask]
        # The proxy needs their gradients even where the backbone is frozen.
        return rows.requires_grad_() if needs_proxy and not rows.requires_grad else rows

    def teacher_rows(hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden[mask].to(student_hidden.dtype)

    results: list[LinearDecomposedKL] = []
    proxies: list[GradientProxy] = []
    lang = vis = None
    visual_weights = torch.empty(0, device=image_mask.device)
    contribution = torch.zeros(image_mask.shape, device=image_mask.device)
    if any_image:
        assert masked_teacher_hidden is not None
        rows = lang_rows = student_rows(student_hidden, image_mask)
        masked_rows = None
        if masked_student_hidden is not None:
            masked_rows = lang_rows = student_rows(masked_student_hidden, image_mask)
        result = linear_decomposed_kl(
            rows,
            head,
            teacher_rows(teacher_hidden, image_mask),
            teacher_head,
            masked_teacher_hidden=teacher_rows(masked_teacher_hidden, image_mask),
            masked_student_hidden=masked_rows,
            sampled_tokens=batch.completion_ids[image_mask],
            token_steering=config.token_steering,
            plausibility=config.plausibility,
            teacher_smoothing=config.teacher_smoothing,
            decomposition=config.decomposition,
            temperature=config.temperature,
            vocab_size=vocab_size,
        )
        lang, vis = result.lang, result.vis
        assert result.contribution is not None
        visual_weights, contribution[image_mask] = result.visual_weights, result.contribution.to(contribution)
        results.append(result)
        if needs_proxy:
            of_lang, of_vis, _ = result.hidden_gradients
            assert of_lang is not None
            assert of_vis is not None
            proxies.append(GradientProxy.of_tokens((lang_rows, of_lang), (rows, of_vis)))
    if any_text or not any_image:
        rows, text_teacher = student_rows(student_hidden, text_mask), teacher_rows(teacher_hidden, text_mask)
        # With r = q the teacher_prior split is lang = KL(p || q), vis = 0; the weight 0 spares the gradient of vis.
        result = linear_decomposed_kl(
            rows,
            head,
            text_teacher,
            teacher_head,
            masked_teacher_hidden=text_teacher,
            teacher_smoothing=config.teacher_smoothing,
            decomposition="teacher_prior",
            temperature=config.temperature,
            vocab_size=vocab_size,
            steering_weights=torch.tensor([1.0, 0.0], device=rows.device),
        )
        assert result.objective is not None
        lang = result.objective if lang is None else lang + result.objective
        results.append(result)
        if needs_proxy:
            assert result.hidden_gradients.objective is not None
            proxies.append(GradientProxy.of_tokens((rows, result.hidden_gradients.objective), None))
    assert lang is not None
    return MicroBatchLoss(
        lang / items_in_step,
        None if vis is None else vis / items_in_step,
        reduce(GradientProxy.plus, proxies).scaled(1.0 / items_in_step) if proxies else None,
        DecomposedKL(*(torch.cat(part) for part in zip(*(result.tokens for result in results), strict=True))),
        torch.cat([image_mask.nonzero(), text_mask.nonzero()]),
        visual_weights,
        contribution,
    )
