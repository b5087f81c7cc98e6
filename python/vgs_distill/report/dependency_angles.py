"""Angles between the gradients of the parts of a loss, by how much tokens depend on the image: an analysis of a run.

The tokens of a micro-batch that have an image are sorted by VDS = KL(q ‖ r) and cut into ten groups of equal counts.
For each group the gradients of `standard`, `vis` and `lang` over all parameters are formed, of the mean over its
tokens. Nothing of it stays: `.grad` is put back as it was, and so is the random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgs_kernels import gradient_gramian, language_head, linear_decomposed_kl, linear_reverse_kl

from ..loss import DistillationLoss, RunBackbone
from ..masking import Batch, masked_view, rows_with_evidence
from ..steering.gradients import Gradients

GROUPS = 10
PARTS = ("standard", "vis", "lang")
PAIRS = (("lang", "vis"), ("standard", "vis"), ("standard", "lang"))


class DependencyAngles(NamedTuple):
    """One entry a group, from the tokens that depend least on the image to those that depend most."""

    tokens: list[int]
    dependency: list[float]  # mean VDS, in nats
    norms: dict[str, list[float]]  # part -> norm of the gradient of the mean over the group's tokens
    angles: dict[str, list[float | None]]  # "lang_vis" etc. -> degrees; None where a gradient is zero or not finite


def why_not_measured(accelerator: Accelerator) -> str | None:
    """Why there are no angles in a run like this, or None."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return "gradients are sharded, and would be measured only with all processes at once"
    return None


def dependency_angles(
    loss: DistillationLoss,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    loss_mask: Tensor,  # (rows, completion)
    run: RunBackbone,
) -> DependencyAngles | None:
    """Of one micro-batch, on this process alone; None where it has no token with an image.

    `run`: runs a backbone, without the wrapper of a launcher. Both views of the student run forward once and stay in
    memory; each group runs back three times.
    """
    seeing = loss_mask.bool() & rows_with_evidence(batch, loss.tokens)[:, None]
    if not seeing.any():
        return None
    parameters = [p for p in student.parameters() if p.requires_grad]
    with _leaving_no_trace(parameters, seeing.device):
        scores, losses_of = _losses(loss, student, teacher, batch, seeing, run)
        groups = scores.argsort(stable=True).tensor_split(min(GROUPS, len(scores)))
        gramians = [_gramians(losses_of, group, parameters) for group in groups]
    products = torch.stack(gramians).double().tolist()  # (groups, pairs, 2, 2)
    return DependencyAngles(
        tokens=[len(group) for group in groups],
        dependency=torch.stack([scores[group].mean() for group in groups]).tolist(),
        norms={part: [_norm(products_of_group, part) for products_of_group in products] for part in PARTS},
        angles={
            "_".join(pair): [_degrees(products_of_group[index]) for products_of_group in products]
            for index, pair in enumerate(PAIRS)
        },
    )


LossesOf = Callable[[Tensor], dict[str, Tensor]]


def _losses(
    loss: DistillationLoss,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    seeing: Tensor,  # (rows, completion)
    run: RunBackbone,
) -> tuple[Tensor, LossesOf]:
    """VDS of every token with an image, (tokens,), and what gives the three losses, means over the tokens chosen."""
    settings = loss.settings
    view = masked_view(settings.image_mask, batch, loss.tokens, loss.family, student)
    hidden, masked_hidden = (run(student, inputs)[seeing] for inputs in (batch, view))
    with torch.no_grad():
        of_teacher, of_masked_teacher = (run(teacher, inputs)[seeing].to(hidden.dtype) for inputs in (batch, view))
    student_head, teacher_head = language_head(student, hidden), language_head(teacher, hidden)

    def decomposed(chosen: Tensor | slice, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        result = linear_decomposed_kl(
            hidden[chosen],
            student_head,
            of_teacher[chosen],
            teacher_head,
            of_masked_teacher[chosen],
            masked_hidden[chosen].detach(),
            decomposition="vgs",
            token_weights=weights,
            ratio_guard=settings.ratio_guard,
            **settings.kernel,
        )
        assert result.per_token.dependency is not None
        return result.standard, result.vis, result.per_token.dependency

    def losses_of(chosen: Tensor) -> dict[str, Tensor]:
        weights = torch.full(chosen.shape, 1.0 / len(chosen), device=hidden.device)
        standard, vis, _ = decomposed(chosen, weights)
        lang = linear_reverse_kl(
            masked_hidden[chosen],
            student_head,
            of_masked_teacher[chosen],
            teacher_head,
            token_weights=weights,
            **settings.kernel,
        ).kl
        return {"standard": standard, "vis": vis, "lang": lang}

    with torch.no_grad():
        scores = decomposed(slice(None), None)[2]
    return scores, losses_of


def _gramians(losses_of: LossesOf, group: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Of each of `PAIRS`, (pairs, 2, 2)."""
    gradients = {part: _gradient(part_loss, parameters) for part, part_loss in losses_of(group).items()}
    return torch.stack([gradient_gramian(gradients[first], gradients[second]) for first, second in PAIRS])


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Through `.grad`, as `PartGradients` does and for its reasons."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(retain_graph=True)
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


@contextmanager
def _leaving_no_trace(parameters: list[nn.Parameter], device: torch.device) -> Iterator[None]:
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    of_device = {} if device.type == "cpu" else {"device_type": device.type}
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if of_device else [], **of_device):
            yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def _norm(products: list[list[list[float]]], part: str) -> float:
    """From the first of the Gramians that holds the part."""
    index, place = next((i, pair.index(part)) for i, pair in enumerate(PAIRS) if part in pair)
    return math.sqrt(products[index][place][place])


def _degrees(gramian: list[list[float]]) -> float | None:
    (first, product), (_, second) = gramian
    size = math.sqrt(first) * math.sqrt(second)
    if not (0.0 < size < math.inf and math.isfinite(product)):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, product / size))))
