"""Puts `linear_reverse_kl` into trainers of other libraries, which are imported when they are asked for."""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .language_model import changes_logits, head_passes_through, language_head, unwrapped_model, whole_parameter
from .linear import linear_reverse_kl
from .types import LMHead

REVERSE_KL = 1.0  # TRL's beta


def patch_trl() -> ExitStack:
    """Let TRL's `DistillationTrainer` and its experimental `GKDTrainer` take their loss from `linear_reverse_kl`.

    One line before `train()`; trainers that exist already are patched, too. Only `beta=1.0`, the reverse KL divergence,
    is replaced; with any other beta TRL's own code runs. `GKDTrainer`, which forms the logits of whole sequences, then
    projects the completions alone, chunk by chunk; it stays TRL's for models that scale or cap their logits.

    Returns:
        A context manager that puts TRL's code back on leaving; without a ``with`` the patch stays.

    Raises:
        ImportError: TRL is not installed, or is a version whose trainers look different (written for TRL 1.16).

    Examples:
        >>> from vgs_kernels import patch_trl
        >>> with patch_trl():
        ...     pass  # DistillationTrainer(...).train()
    """
    try:
        from trl.experimental.gkd import GKDTrainer
        from trl.trainer import distillation_trainer

        own_loss, own_compute = distillation_trainer._chunked_divergence_loss, GKDTrainer.compute_loss
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"patch_trl() needs TRL 1.16, whose trainers it knows; install it with: pip install 'trl>=1.16,<1.17' "
            f"({error})"
        ) from error
    undo = ExitStack()
    if hasattr(own_loss, "__wrapped__"):  # patched before
        return undo
    undo.callback(setattr, distillation_trainer, "_chunked_divergence_loss", own_loss)
    undo.callback(setattr, GKDTrainer, "compute_loss", own_compute)
    distillation_trainer._chunked_divergence_loss = _distillation_loss(own_loss)
    setattr(GKDTrainer, "compute_loss", _gkd_loss(own_compute))  # noqa: B010 - mypy takes it for a method
    return undo


def _distillation_loss(own: Any) -> Any:
    """In the place of TRL's `_chunked_divergence_loss`: loss, sum of the student's entropy, number of tokens."""

    @wraps(own)
    def loss(
        student_hidden_states: Tensor,  # (rows, completion, width)
        teacher_hidden_states: Tensor,  # (rows, completion, teacher width)
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,  # (rows, completion)
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = (student_lm_head_weight, student_lm_head_bias, student_logit_scale, student_final_logit_softcapping)
        teacher = (teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale, teacher_final_logit_softcapping)
        if beta != REVERSE_KL:
            both = (student_hidden_states, teacher_hidden_states, student[0], teacher[0], completion_mask, beta)
            scales = (student[1], teacher[1], student[2], teacher[2], student[3], teacher[3])
            result: tuple[Tensor, Tensor, Tensor] = own(*both, num_items_in_batch, *scales, temperature)
            return result
        valid = (completion_mask.reshape(-1) != 0).to(torch.float32)
        count = valid.sum()
        result_ = linear_reverse_kl(
            student_hidden_states.flatten(0, 1),
            _head(student, student_hidden_states),
            teacher_hidden_states.flatten(0, 1).to(student_hidden_states.dtype),
            _head(teacher, student_hidden_states),
            token_weights=valid / _items(num_items_in_batch, count),
            temperature=temperature,
        )
        return result_.kl, result_.per_token.entropy.sum(), count

    return loss


def _gkd_loss(own: Any) -> Any:
    """In the place of `GKDTrainer.compute_loss`, where no logits are asked for."""

    @wraps(own)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        student, teacher = unwrapped_model(model), unwrapped_model(self.teacher_model)
        logits_change = changes_logits(student.config) or changes_logits(teacher.config)
        if self.beta != REVERSE_KL or return_outputs or logits_change:
            return own(self, model, inputs, return_outputs, num_items_in_batch)
        read = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with head_passes_through(model):
            hidden = model(**read).logits[:, :-1].flatten(0, 1)
        self.teacher_model.eval()
        with torch.no_grad(), head_passes_through(self.teacher_model):
            teacher_hidden = self.teacher_model(**read).logits[:, :-1].flatten(0, 1)
        valid = (inputs["labels"][:, 1:].flatten() != -100).to(torch.float32)
        return linear_reverse_kl(
            hidden,
            language_head(student, hidden),
            teacher_hidden.to(hidden.dtype),
            language_head(teacher, hidden),
            token_weights=valid / _items(num_items_in_batch, valid.sum()),
        ).kl

    return compute_loss


def _items(given: Tensor | int | None, counted: Tensor) -> Tensor:
    """What the sum is divided by: TRL's number of tokens in the step, or those here."""
    return counted.clamp(min=1) if given is None else torch.as_tensor(given, device=counted.device)


def _head(parts: tuple[Tensor, Tensor | None, float, float | None], like: Tensor) -> LMHead:
    weight, bias, scale, softcap = parts
    return LMHead(
        whole_parameter(weight).to(like.dtype),
        None if bias is None else whole_parameter(bias).to(like.dtype),
        logit_scale=scale,
        softcap=softcap,
    )
