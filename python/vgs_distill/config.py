"""`VGSConfig`: every setting of a distillation run, with all defaults, in one serialisable dataclass.

It extends TRL's `DistillationConfig`, which extends transformers' `TrainingArguments`, with the steering settings only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from trl import DistillationConfig

from vgs_kernels import OLD_DECOMPOSITIONS as DECOMPOSITIONS
from vgs_kernels import UnitGradients

from .docstrings import attribute_texts
from .inputs.modalities import MODALITIES
from .steering.gamma import ADAPTIVE, GAMMA_SCHEDULES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

STEERING_MODES = ("exact", "amortized", "none")
IMAGE_MASKS = ("drop", "blank", "attention")
RUNAWAY_ACTIONS = ("fallback", "warn", "stop", "none")
OFFLOAD = "offload"

Kind = TypeVar("Kind", bound="DataclassInstance")


# Fields that hold a mapping, never the name of a file.
_MAPPINGS = (
    "model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs", "chat_template_kwargs",
    "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
)  # fmt: skip

# What numbers may be, and the words for it. NaN is in no range.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "max_completion_length", "max_prompt_length", "max_skipped_steps",
        ),
        lambda value: value >= 1,
        "1 or more",
    ),
    (("max_steps",), lambda value: value == -1 or value >= 1, "1 or more, or -1 to go by num_train_epochs"),
    (
        ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps"),
        lambda value: 0 <= value < math.inf,
        "0 or more, and finite",
    ),
    (("token_steering",), lambda value: 0 <= value < math.inf, "0 (off) or a positive finite number"),
    (("plausibility", "teacher_smoothing"), lambda value: 0 <= value < 1, "at least 0 (off) and below 1"),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (
        (
            "check_dataset_rows", "dataloader_num_workers", "seed", "top_k", "logging_steps", "eval_steps",
            "save_steps", "save_total_limit",
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        ("refresh_every", "record_completions_every", "record_modules_every"),
        lambda value: value >= 0,
        "0 (never) or more",
    ),
    (("temperature", "repetition_penalty", "num_train_epochs"), lambda value: 0 < value < math.inf, "positive"),
    (("max_weight_ratio",), lambda value: value > 0, "positive or None"),
    (("refresh_drift",), lambda value: value > 1, "above 1"),
    (("top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("gamma_start", "min_p"), lambda value: 0 <= value <= 1, "in [0, 1]"),
)  # fmt: skip


def _described_by_docstring(kind: type[Kind]) -> type[Kind]:
    """Every field's help on a command line is what the docstring of its dataclass says of it."""
    for name, text in attribute_texts(kind.__doc__).items():
        item = kind.__dataclass_fields__[name]
        item.metadata = MappingProxyType({**item.metadata, "help": text.replace("%", "%%")})
    return kind


@_described_by_docstring
@dataclass
class VGSConfig(DistillationConfig):
    """Settings of a `VGSTrainer` run; everything not listed here is TRL's and means what it means there.

    Attributes:
        steering: How a step gets its gradient: ``"exact"``, ``"amortized"`` or ``"none"``. ``"exact"`` measures the
            gradients of the language and the visual part over the whole accumulated batch and recombines them, at the
            price of a second backward pass; ``"amortized"`` runs one backward pass of the weighted sum, with weights
            predicted from the gradients of the last hidden states, and measures exactly every `refresh_every` steps;
            ``"none"`` is monolithic on-policy distillation, KL(student || teacher), by TRL's own loss, with no masked
            passes.
        decomposition: How the loss is split: ``"matched"``, ``"bayes"`` or ``"teacher_prior"`` (equations:
            `vgs_kernels.decomposed_kl`).
        gamma: Share of the visual direction in [0, 1], the value a schedule ends at; or ``"adaptive"``. That gives the
            part of the loss that has made less progress the larger share (`vgs_distill.steering.gamma`).
        gamma_min, gamma_max: Bounds of an adaptive gamma; it starts in their middle.
        gamma_schedule: ``"constant"``, or ``"linear"`` / ``"cosine"`` from `gamma_start` at the first step to `gamma`
            at the last.
        gamma_start: Where a schedule starts, in [0, 1].
        max_weight_ratio: Upper bound on (weight of the visual gradient) / (weight of the language gradient), or None.
            It slows a language part that drifts; alone it does not keep ``teacher_prior`` from running away.
        steering_scale: ``"unit"``, as in the paper: the steered gradient has norm at most 1; ``"preserve"``: the norm
            of the sum of the two gradients, for optimizers whose step follows the size of the gradient.
        token_steering: Up to how much more tokens that hinge on the image weigh in the visual part: s ≥ 0, 0 for none.
            With q and r the probabilities that the teacher gives a sampled token with and without the image, it weighs
            1 + s (1 - min(q, r) / max(q, r)) in the visual part, between 1 and 1 + s; the language part keeps equal
            weights. The visual part of a step is divided by the mean weight of its tokens (all micro-batches and
            processes, rows with an image). After arXiv 2605.21924.
        plausibility: Leaves tokens implausible to the teacher out of the visual part: α in [0, 1), 0 for none. Such is
            a sampled token with q < α max q and r < α max r. After arXiv 2210.15097.
        teacher_smoothing: Share of the uniform distribution in both teachers: ε in [0, 1), 0 for none. They become
            (1 - ε) q + ε / V over the V tokens of the vocabulary, so that no divergence from them is infinite and no
            log-ratio beyond log(V / ε).
        refresh_every: Steps from one exact measurement to the next, with ``"amortized"``. 0 never measures and takes
            the ratio that the hidden gradients suggest for that of the parameter gradients.
        refresh_drift: Measure early when the ratio that the hidden gradients suggest, averaged over the last steps, has
            changed by this factor since the last measurements.
        modality: What the teacher is given besides text, and the masked view leaves out: ``"image"``, ``"video"`` or
            ``"audio"``. Rows hold it in the columns `image` or `images`, `video` or `videos`, `audio` or `audios`.
        image_mask: What the masked view of a prompt is: ``"drop"``, ``"blank"`` or ``"attention"``. With another
            modality read video or audio for image. ``"drop"``: the prompt is what the chat template writes without the
            image, and positions follow; ``"blank"``: every pixel takes the image processor's mean colour, which audio
            has none of; ``"attention"``: image tokens stay, but nothing attends to them.
        max_skipped_steps: How many updates in a row may be skipped, because a loss or a gradient is not finite, before
            training stops.
        runaway_action: What to do when the student runs away from its teacher: ``"fallback"``, ``"warn"``, ``"stop"``
            or ``"none"``. With steering only (`vgs_distill.resilience.runaway`): ``"fallback"`` warns and lowers gamma
            to at most 0.5 and the weight ratio to at most 1 for the rest of the run; ``"warn"`` warns only; ``"stop"``
            saves a checkpoint and ends training in `TrainingStopped`; ``"none"`` does not watch.
        teacher_device: Where the teacher runs: None for beside the student, a device such as ``"cuda:1"`` or ``"cpu"``,
            or ``"offload"`` to keep its weights in CPU memory and bring them to the student's device layer by layer.
            Given by name, it is loaded in bf16 for a GPU that computes in it, unless `teacher_model_init_kwargs` holds
            another ``dtype``.
        pack_teacher: Run both views of the teacher in one batch. None decides: yes where it wastes no padding (masks
            that keep the length of the prompt: ``blank``, ``attention``) or where weights travel (``offload``). False
            needs the least memory.
        max_prompt_length: Longest prompt in tokens, image tokens included; None for no limit. Nothing is ever cut: a
            row above the limit takes no part in its step, with a warning.
        check_dataset_rows: How many rows of a map-style dataset have their images decoded before training starts (all
            have their prompt checked); None for all, 0 for no check at all. A JPEG of a million pixels takes 8 ms, a
            PNG 30 ms.
        record_completions_every: Steps from one record of sampled completions to the next, for the report: a few rows
            with their images and log q - log r of every token, from passes that the step runs anyway; 0 for none.
        record_teacher_answers: Record beside a completion what the teacher itself answers, greedily. It costs as many
            passes of the teacher over a few rows as its longest answer has tokens, at recording steps only, and changes
            nothing in the run. A teacher that is sharded or not beside the student is not asked.
        record_modules_every: Steps from one record of the gradients' norms and cosine in every module to the next (with
            ``"amortized"`` at the first refresh from there on); 0 for none.
    """

    steering: str = "exact"
    decomposition: str = "matched"
    gamma: float | str = field(default=0.8, metadata={"metavar": "FLOAT|adaptive"})
    gamma_min: float = 0.5
    gamma_max: float = 0.9
    gamma_schedule: str = "constant"
    gamma_start: float = 0.5
    max_weight_ratio: float | None = None
    steering_scale: str = "unit"
    token_steering: float = 0.0
    plausibility: float = 0.0
    teacher_smoothing: float = 0.0
    refresh_every: int = 16
    refresh_drift: float = 2.0
    modality: str = "image"
    image_mask: str = "drop"
    max_skipped_steps: int = 8
    runaway_action: str = "fallback"
    teacher_device: str | None = None
    pack_teacher: bool | None = None
    max_prompt_length: int | None = None
    check_dataset_rows: int | None = 10_000
    record_completions_every: int = 100
    record_teacher_answers: bool = True
    record_modules_every: int = 0

    def __post_init__(self) -> None:
        # Before transformers starts what the launcher asked for: DeepSpeed, process groups.
        self._check()
        if self.pack_teacher is None:
            self.pack_teacher = self.image_mask != "drop" or self.teacher_device == OFFLOAD
        super().__post_init__()

    def select(self, kind: type[Kind], **more: Any) -> Kind:
        """What one part of the engine needs: its dataclass `kind` filled by name, and with `more`."""
        names = [item.name for item in fields(kind) if hasattr(self, item.name)]
        return kind(**{name: getattr(self, name) for name in names}, **more)

    @property
    def weighs_tokens(self) -> bool:
        """Whether the tokens of a step may have unequal weights in the visual part."""
        return self.token_steering > 0 or self.plausibility > 0

    def _check(self) -> None:
        self._check_names()
        self._check_gamma()
        self._check_numbers()
        if self.steering == "none":
            for name in ("token_steering", "plausibility", "teacher_smoothing"):
                if getattr(self, name):
                    raise ValueError(
                        f"steering='none' is TRL's loss, which has no {name}; set it to 0, or steering to 'exact' or "
                        "'amortized'"
                    )
        else:
            self._check_steered()

    def _check_names(self) -> None:
        for name, choices in (
            ("steering", STEERING_MODES),
            ("decomposition", DECOMPOSITIONS),
            ("gamma_schedule", GAMMA_SCHEDULES),
            ("modality", tuple(MODALITIES)),
            ("image_mask", IMAGE_MASKS),
            ("steering_scale", UnitGradients.SCALES),
            ("runaway_action", RUNAWAY_ACTIONS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        for name in _MAPPINGS:
            value = getattr(self, name)
            if isinstance(value, str) and not value.lstrip().startswith("{"):
                raise ValueError(f"{name} must be a mapping, as in '{{\"a\": 1}}', got {value!r}")
        masks = MODALITIES[self.modality].masks
        if self.image_mask not in masks:
            raise ValueError(
                f"image_mask={self.image_mask!r} has no meaning for modality={self.modality!r}; choose "
                f"{' or '.join(map(repr, masks))}"
            )
        if self.use_vllm and self.modality != "image":
            raise ValueError(f"TRL hands vLLM images only, but modality is {self.modality!r}; leave use_vllm off")

    def _check_gamma(self) -> None:
        if self.gamma != ADAPTIVE:
            if isinstance(self.gamma, str) or not 0.0 <= self.gamma <= 1.0:
                raise ValueError(f"gamma must be in [0, 1] or {ADAPTIVE!r}, got {self.gamma!r}")
            return
        if not 0.0 <= self.gamma_min < self.gamma_max <= 1.0:
            raise ValueError(
                f"gamma_min must be below gamma_max, both in [0, 1], got {self.gamma_min} and {self.gamma_max}"
            )
        if self.gamma_schedule != "constant":
            raise ValueError(
                f"gamma='adaptive' moves gamma itself, but gamma_schedule is {self.gamma_schedule!r}; "
                "leave it at 'constant'"
            )
        if self.decomposition == "teacher_prior":
            raise ValueError(
                "gamma='adaptive' compares how far both parts of the loss have fallen, but those of 'teacher_prior' do "
                "not fall to zero; use 'matched' or 'bayes', or a number"
            )

    def _check_numbers(self) -> None:
        for names, in_range, words in _RANGES:
            for name in names:
                value = getattr(self, name)
                if isinstance(value, int | float) and not in_range(value):
                    raise ValueError(f"{name} must be {words}, got {value}")
        if self.teacher_device not in (None, OFFLOAD):
            self._check_teacher_device()

    def _check_teacher_device(self) -> None:
        try:
            device = torch.device(str(self.teacher_device))
            module = torch.get_device_module(device)
            there = module.is_available() and (device.index or 0) < module.device_count()
        except RuntimeError:  # no such word, or no such backend in this torch
            there = False
        if not there:
            raise ValueError(
                f"teacher_device={self.teacher_device!r} is no device of this machine; give 'cpu', a device such as "
                f"'cuda:1', or {OFFLOAD!r}"
            )

    def _check_steered(self) -> None:
        """What two gradients that are kept apart do not go with."""
        if self.beta != 1.0:
            raise ValueError(
                f"visual gradient steering splits the reverse KL divergence, beta=1.0, but beta is {self.beta}; "
                "leave beta at 1.0 or set steering='none'"
            )
        if self.fp16:
            raise ValueError(
                f"steering={self.steering!r} normalises gradients, which undoes the loss scaling of fp16; "
                "use bf16=True or fp32"
            )
        deepspeed = self.deepspeed is not None or _launched_with("DEEPSPEED")
        if deepspeed and not (self.steering == "amortized" and self.refresh_every == 0):
            raise ValueError(
                f"steering={self.steering!r} measures both gradients before the optimizer step, but DeepSpeed steps "
                "inside backward; use FSDP2 or DDP, or steering='amortized' with refresh_every=0, which never measures"
            )
        if _launched_with("FSDP") and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError(
                "visual gradient steering keeps two sharded gradients apart, which FSDP2 can and FSDP1 cannot; "
                "set fsdp_version: 2 in the configuration of accelerate"
            )


def _launched_with(engine: str) -> bool:
    """Whether `accelerate launch` was told to use this engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
