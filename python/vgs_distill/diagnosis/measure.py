"""What can be measured of a student and its teacher before any training, on completions that the student samples.

Nothing is learned: the trainer's rollouts and losses run as in a step, and gradients are looked at and dropped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgs_kernels import VisualGradientSteering, gradient_gramian

from ..errors import InputError
from ..loss import DistillationLoss, hidden_states
from ..masking import Batch
from ..report.dependency_angles import DependencyAngles, dependency_angles
from ..rollouts import loss_mask

if TYPE_CHECKING:
    from ..trainer import VGSTrainer

NEEDS_IMAGE = 0.1  # nats of VDS above which a token counts as one that needs the image
GAMMAS = (1.0, 2.0, 4.0)
_PARTS = ("standard", "lang", "vis", "entropy", "dependency")
_TIMED = 3  # passes; their median is reported, after one that warms up


@dataclass(frozen=True)
class Price:
    """What a step costs, apart from the optimizer."""

    seconds: float  # sampling, both models' passes and the backward pass
    kept_bytes: int  # what autograd keeps between forward and backward pass, of the largest view
    peak_bytes: int | None  # of the device's memory, weights included; None on the CPU, which does not count


@dataclass(frozen=True)
class Diagnosis:
    """Means are over the tokens of completions that have an image, in nats."""

    rows: int
    tokens: int
    standard: float  # KL(p ‖ q), student to teacher
    lang: float  # KL(p₀ ‖ r), both without the image
    vis: float  # KL(p ‖ q*), q* ∝ p₀ q / r
    entropy: float  # of the student
    dependency: float  # VDS = KL(q ‖ r)
    dependency_quantiles: tuple[float, ...]  # of VDS: the lowest, every tenth, the highest
    lang_of_dependent: float  # KL(p₀ ‖ r) over the tenths 8 to 10 by VDS, what language preservation holds
    needs_image: float  # share of tokens with VDS above `NEEDS_IMAGE`
    cut_off: float  # share of completions without an end
    cosine: float  # of the gradients of standard and vis
    norms: dict[str, float]  # of those gradients
    eta: dict[str, float]  # γ -> η
    angles: dict[str, Any]  # `DependencyAngles`
    prices: dict[str, Price]  # of "opd" and "vgs"

    @property
    def step_ratio(self) -> float:
        """Seconds of a step of `vgs` over those of one of OPD."""
        return self.prices["vgs"].seconds / self.prices["opd"].seconds


def diagnose(trainer: VGSTrainer, rows: int) -> Diagnosis:
    """Measure on the first `rows` rows of the trainer's dataset, in batches of its size; leaves no trace in the models.

    Raises:
        InputError: no row has an image, or there are several processes.
    """
    if trainer.accelerator.num_processes > 1:
        raise InputError("a diagnosis takes one process; call vgs diagnose without accelerate launch")
    models = trainer.model, trainer.teacher_model
    were_training = [model.training for model in models]
    for model in models:
        model.eval()  # no dropout
    try:
        with torch.enable_grad(), trainer.accelerator.autocast():
            return _diagnosis(trainer, list(_rollouts(trainer, rows)))
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


@dataclass(frozen=True)
class _Rollout:
    batch: Batch
    mask: Tensor  # (rows, completion)
    seconds: float  # of sampling
    cut_off: int  # completions without an end


def _rollouts(trainer: VGSTrainer, rows: int) -> Iterator[_Rollout]:
    dataset: Any = trainer.train_dataset
    examples = iter(dataset)
    while rows > 0 and (chunk := list(islice(examples, min(rows, trainer.args.train_batch_size)))):
        rows -= len(chunk)
        began = _now(trainer)
        rollout = trainer.roll_out(chunk)
        seconds = _now(trainer) - began
        mask = loss_mask(rollout)
        ends = torch.isin(rollout["completion_ids"], torch.tensor(trainer.eos_token_ids, device=mask.device)) & (
            rollout["completion_mask"] > 0
        )
        yield _Rollout(Batch.of(rollout), mask, seconds, int((~ends.any(dim=1)).sum()))


def _diagnosis(trainer: VGSTrainer, rollouts: Sequence[_Rollout]) -> Diagnosis:
    loss = trainer.loss_of("vgs")
    student, teacher = trainer.model, trainer.teacher_model
    per_token = _per_token(trainer, loss, rollouts)
    if not len(per_token["dependency"]):
        raise InputError("no row that was read has an image, so there is nothing to steer by; give others")
    scores = per_token["dependency"]
    dependent = per_token["lang"][scores.argsort(descending=True)[: max(1, round(0.3 * len(scores)))]]
    first = rollouts[0]
    gramian = _gramian(trainer, loss, first)
    angles = dependency_angles(loss, student, teacher, first.batch, first.mask, hidden_states)
    assert angles is not None
    (standard, cross), (_, vis) = gramian.double().tolist()
    return Diagnosis(
        rows=sum(len(one.mask) for one in rollouts),
        tokens=len(scores),
        **{name: values.mean().item() for name, values in per_token.items()},
        dependency_quantiles=tuple(torch.quantile(scores.float(), torch.linspace(0, 1, 11)).tolist()),
        lang_of_dependent=dependent.mean().item(),
        needs_image=(scores > NEEDS_IMAGE).float().mean().item(),
        cut_off=sum(one.cut_off for one in rollouts) / sum(len(one.mask) for one in rollouts),
        cosine=cross / max(standard * vis, 1e-300) ** 0.5,
        norms={"standard": standard**0.5, "vis": vis**0.5},
        eta={f"{gamma:g}": VisualGradientSteering(gamma)(gramian)[0].item() for gamma in GAMMAS},
        angles=angles._asdict(),
        prices={method: _price(trainer, method, rollouts) for method in ("opd", "vgs")},
    )


def _per_token(trainer: VGSTrainer, loss: DistillationLoss, rollouts: Sequence[_Rollout]) -> dict[str, Tensor]:
    """Name -> (tokens with an image,), on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in _PARTS}
    for one in rollouts:
        with torch.no_grad():
            micro_batch = loss.micro_batch(trainer.model, trainer.teacher_model, one.batch, one.mask, 1.0)
            for _ in micro_batch:
                pass
        result = micro_batch.result
        with_image = len(result.vis_weights)  # those come first
        for name, values in found.items():
            values.append(result.per_token[name][:with_image].float().cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def _gramian(trainer: VGSTrainer, loss: DistillationLoss, rollout: _Rollout) -> Tensor:
    """Of the gradients of standard and vis over all parameters, (2, 2)."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients: dict[int, Any] = {}
    items = rollout.mask.sum().clamp(min=1)
    for view in loss.micro_batch(trainer.model, trainer.teacher_model, rollout.batch, rollout.mask, items):
        for part, value in view.parts.items():
            gradients[part] = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return gradient_gramian(list(gradients[0]), list(gradients[1])).cpu()


def _price(trainer: VGSTrainer, method: str, rollouts: Sequence[_Rollout]) -> Price:
    """Of a step at known weights, as all but one in `refresh_every` are."""
    loss = trainer.loss_of(method)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    weights = torch.tensor([1.0, 2.0, 1.0], device=trainer.accelerator.device)
    first = rollouts[0]
    on_gpu = trainer.accelerator.device.type == "cuda"
    kept = [0]
    weights_of_model = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}

    def run() -> None:
        items = first.mask.sum().clamp(min=1)
        views = iter(
            loss.micro_batch(
                trainer.model, trainer.teacher_model, first.batch, first.mask, items, weights, method == "vgs"
            )
        )
        while True:
            with _counting_kept(kept, weights_of_model):
                view = next(views, None)
            if view is None:
                return
            for value in view.parts.values():
                torch.autograd.grad(value, parameters, allow_unused=True)

    run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.accelerator.device)
    seconds = [_timed(trainer, run) for _ in range(_TIMED)]
    return Price(
        seconds=statistics.median(seconds) + statistics.median(one.seconds for one in rollouts),
        kept_bytes=max(kept),
        peak_bytes=torch.cuda.max_memory_allocated(trainer.accelerator.device) if on_gpu else None,
    )


@contextmanager
def _counting_kept(found: list[int], known: Collection[int]) -> Iterator[None]:
    """Append the bytes of all storages that autograd keeps of what is run inside, those `known` aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    found.append(sum(storages.values()))


def _timed(trainer: VGSTrainer, run: Callable[[], None]) -> float:
    began = _now(trainer)
    run()
    return _now(trainer) - began


def _now(trainer: VGSTrainer) -> float:
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize(trainer.accelerator.device)
    return time.perf_counter()


def angles_of(diagnosis: Diagnosis) -> DependencyAngles:
    return DependencyAngles(**diagnosis.angles)


def from_plain(values: Mapping[str, Any]) -> Diagnosis:
    """What `dataclasses.asdict` made of one, or JSON of that."""
    prices = {name: Price(**price) for name, price in values["prices"].items()}
    return Diagnosis(**{**values, "prices": prices, "dependency_quantiles": tuple(values["dependency_quantiles"])})
