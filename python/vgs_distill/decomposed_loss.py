"""`DecomposedLoss`: the parts of a method's loss for an engine of one's own, from what its models read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgs_kernels import head_passes_through, unwrapped_model

from .errors import InputError
from .inputs.families import EvidenceTokens, Family
from .inputs.modalities import IMAGE
from .loss import DistillationLoss, LossSettings, MicroBatch
from .masked_view import IGNORED
from .settings import MethodSettings


class View(NamedTuple):
    """What a forward pass reads, and where it predicts a token that counts."""

    inputs: Mapping[str, Any]  # of the model's forward, without labels
    predicts: Tensor  # (rows, length) bool
    tokens: Tensor | None = None  # (tokens,), what is predicted there; of the view that sees

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> View:
        """Of inputs with `labels`, (rows, length), -100 where no token counts."""
        labels = inputs["labels"][:, 1:]
        counts = labels != IGNORED
        predicts = torch.cat([counts, torch.zeros_like(counts[:, :1])], dim=1)
        return cls({name: value for name, value in inputs.items() if name != "labels"}, predicts, labels[counts])


class _Views(NamedTuple):
    """A micro-batch as `MicroBatch` reads it: one row of all the tokens that count."""

    completion_ids: Tensor  # (1, tokens)
    view: View
    masked: View | None


class DecomposedLoss(DistillationLoss):
    """The losses of a method's parts, from models that run in an engine's own wrappers.

        loss = DecomposedLoss(MethodSettings(method="vgs"))
        for view in loss.views(student, teacher, View.of(seen), View.of(masked), items):
            steering.run_back(view, backward)

    Iterating runs forward passes: those of the teacher first, then each view of the student, whose losses are to be run
    back before the next is asked for. `result` of the iterator holds what there is to log.

    A row without an image is its own masked view: it costs a pass more, and every process runs the same passes.

    Args:
        settings: Which method, and how; those of steering are not read here.
        temperature: That completions are sampled at; both distributions are divided by it.
        vocab_size: Entries that both vocabularies share, where they are padded differently.
    """

    def __init__(self, settings: MethodSettings, *, temperature: float = 1.0, vocab_size: int | None = None) -> None:
        super().__init__(
            settings.select(
                LossSettings, image_mask="drop", pack_teacher=False, temperature=temperature, vocab_size=vocab_size
            ),
            EvidenceTokens(IMAGE, (), ()),
            Family(()),
            run_student=self._run_student,
            run_teacher=self._run_teacher,
        )
        self._student: nn.Module
        self._teacher: nn.Module

    def views(
        self,
        student: nn.Module,  # in the wrapper of its launcher
        teacher: nn.Module,
        seen: View,
        masked: View | None,  # None: the method needs none
        items_in_step: Tensor | float,  # tokens of the step, over processes, divided by their number where they average
        weights: Tensor | None = None,  # (3,), of the parts, where they are known
        preserves: bool = False,
    ) -> MicroBatch:
        """The losses of a micro-batch, to be iterated over once.

        Raises:
            InputError: a masked view is missing, or the views count different tokens.
        """
        if self.method.masks_teacher and masked is None:
            raise InputError(f"method={self.method.name!r} compares with the view without the image; hand in `masked`")
        if masked is not None and int(masked.predicts.sum()) != int(seen.predicts.sum()):
            raise InputError(
                f"the views count different tokens, {int(seen.predicts.sum())} with the image and "
                f"{int(masked.predicts.sum())} without; no completion may hold an image token: ban them while sampling"
            )
        if seen.tokens is None:
            raise InputError("the view that sees needs the tokens it predicts; build it with View.of, or set `tokens`")
        self._student, self._teacher = student, teacher
        ids = seen.tokens[None]
        batch: Any = _Views(ids, seen, masked)
        return self.micro_batch(
            unwrapped_model(student),
            unwrapped_model(teacher),
            batch,
            torch.ones_like(ids),
            items_in_step,
            weights,
            preserves,
        )

    def rows_with_image(self, batch: Any) -> Tensor:
        return torch.ones(1, dtype=torch.bool, device=batch.completion_ids.device)

    def masked_view(self, batch: Any, student: PreTrainedModel) -> Any:
        return batch._replace(view=batch.masked)

    def _run_student(self, model: PreTrainedModel, batch: Any) -> Tensor:
        return hidden_states(self._student, batch.view)[None]

    def _run_teacher(self, model: PreTrainedModel, batch: Any) -> Tensor:
        with torch.no_grad():
            return hidden_states(self._teacher, batch.view)[None]


def hidden_states(model: nn.Module, view: View) -> Tensor:
    """The last hidden states that predict the tokens of a view, (tokens, width); `model`: wrapped or not."""
    with head_passes_through(model):
        return model(**view.inputs).logits[view.predicts]
