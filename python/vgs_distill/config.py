"""`VGSConfig`: every setting of a distillation run, with all defaults, in one serialisable dataclass.

It extends TRL's `DistillationConfig`, which extends transformers' `TrainingArguments`, with the steering settings only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from trl import DistillationConfig

from vgs_kernels import UnitGradients

from .docstrings import attribute_texts
from .inputs.modalities import MODALITIES
from .renamed import OLD_NAMES, renamed
from .steering.dependency import BY_DEPENDENCY
from .steering.gamma import ADAPTIVE, GAMMA_SCHEDULES
from .steering.methods import METHODS, Method
from .steering.preservation import ADAPTIVE as ADAPTIVE_PRESERVATION
from .steering.step import AMORTIZED, MEASURED

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
            "refresh_every",
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
    (
        ("plausibility", "teacher_smoothing", "ratio_floor"),
        lambda value: 0 <= value < 1,
        "at least 0 (off) and below 1",
    ),
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
        ("record_completions_every", "record_modules_every", "record_dependency_every"),
        lambda value: value >= 0,
        "0 (never) or more",
    ),
    (("temperature", "repetition_penalty", "num_train_epochs"), lambda value: 0 < value < math.inf, "positive"),
    (("max_weight_ratio", "ratio_bound"), lambda value: value > 0, "positive or None"),
    (("top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("dependency_quantile", "min_p"), lambda value: 0 <= value <= 1, "in [0, 1]"),
)  # fmt: skip


def _refuses_old_names(kind: type[Kind]) -> type[Kind]:
    filled = kind.__init__

    @wraps(filled)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        for name in OLD_NAMES.keys() & settings.keys():
            raise ValueError(renamed(name, settings[name]))
        filled(self, *args, **settings)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


def _described_by_docstring(kind: type[Kind]) -> type[Kind]:
    """Every field's help on a command line is what the docstring of its dataclass says of it."""
    for name, text in attribute_texts(kind.__doc__).items():
        item = kind.__dataclass_fields__[name]
        item.metadata = MappingProxyType({**item.metadata, "help": text.replace("%", "%%")})
    return kind


@_refuses_old_names
@_described_by_docstring
@dataclass
class VGSConfig(DistillationConfig):
    """Settings of a `VGSTrainer` run; everything not listed here is TRL's and means what it means there.

    Attributes:
        method: What a step follows: ``"vgs"``, ``"opd"``, ``"vgs_unit"``, ``"matched"``, ``"teacher_prior"`` or
            ``"language"``. With p the student, q the teacher, p0 and r both with the image masked, q* ∝ p0 q / r and ĝ
            a gradient over its norm: ``"vgs"`` is the paper's η [KL(p‖q) + γ KL(p‖q*) + λ KL(p0‖r)], the last term on
            the tokens that depend most on the image; ``"opd"`` is on-policy distillation, KL(p‖q); ``"vgs_unit"``
            follows (1 - γ) ĝ(KL(p0‖r)) + γ ĝ(KL(p‖q*)), the rule of a summary of the paper; ``"matched"`` (1 - γ)
            ĝ(KL(p0‖r)) + γ ĝ(KL(p‖q)), ours; ``"teacher_prior"`` (1 - γ) ĝ(KL(p‖r)) + γ ĝ(KL(p‖q) - KL(p‖r));
            ``"language"`` η [KL(p‖q) + γ KL(p0‖r) + λ KL(p‖q*)], the paper's negative control.
        eta: How the weights of the two gradients are found: ``"measured"``, ``"amortized"``, a number or None.
            ``"measured"`` takes the norms of both gradients over the whole accumulated batch at every step, which
            costs ``"vgs"`` and ``"teacher_prior"`` a second backward pass; ``"amortized"`` at one step in
            `refresh_every`, and their average in between; a number is η itself, for ``"vgs"`` and ``"language"``:
            nothing is measured (the paper has 0.41 and 0.36). None: ``"amortized"`` for ``"vgs"`` and ``"language"``,
            ``"measured"`` for the others, which need no pass more for it.
        gamma: Weight of the second part: γ ≥ 0 for ``"vgs"`` and ``"language"``, a share in [0, 1] for the others, or
            ``"adaptive"``. It is the value a schedule ends at; None for the method's own, 2 for ``"vgs"``, 1 for
            ``"language"`` and 0.8 for the others. ``"adaptive"``, for shares, gives the part of the loss that has made
            less progress the larger one (`vgs_distill.steering.gamma`).
        language_preservation: λ ≥ 0 of the third term of ``"vgs"`` and ``"language"``, or ``"adaptive"``. The paper has
            0.01. ``"adaptive"`` raises it while KL(p0‖r) is above where it started
            (`vgs_distill.steering.preservation`).
        dependency_quantile: Quantile of KL(q‖r) above which tokens depend on the image, for the third term and
            ``token_steering="dependency"``; of the tokens of a micro-batch that have an image. The paper has 0.7.
        ratio_bound: Largest absolute value of log p0 - log r in q*, in nats, or None: beyond, it is clamped.
        ratio_floor: p0 / r counts in q* only where q is at least this share of its largest entry; 0 for everywhere.
        gamma_min, gamma_max: Bounds of an adaptive gamma; it starts in their middle.
        gamma_schedule: ``"constant"``, or ``"linear"`` / ``"cosine"`` from `gamma_start` at the first step to `gamma`
            at the last.
        gamma_start: Where a schedule starts, in [0, 1].
        max_weight_ratio: Upper bound on (weight of the visual gradient) / (weight of the language gradient), or None.
            It slows a language part that drifts; alone it does not keep ``teacher_prior`` from running away.
        steering_scale: Length of the update of ``"vgs_unit"``, ``"matched"`` and ``"teacher_prior"``: ``"unit"`` for at
            most 1, ``"preserve"`` for that of the sum of the two gradients, for optimizers whose step follows the size
            of the gradient.
        token_steering: How much more tokens that hinge on the image weigh in the visual part: s ≥ 0, 0 for none, or
            ``"dependency"``. With q and r the probabilities that the teacher gives a sampled token with and without the
            image, it weighs 1 + s (1 - min(q, r) / max(q, r)), between 1 and 1 + s, and the visual part of a step is
            divided by the mean weight of its tokens (all micro-batches and processes, rows with an image), after arXiv
            2605.21924. ``"dependency"`` is the paper's γ_t: 0 up to the 40th percentile of KL(q‖r) over the vocabulary,
            γ / 2 up to `dependency_quantile`, γ above; it costs two more products with the teacher's head.
        plausibility: Leaves tokens implausible to the teacher out of the visual part: α in [0, 1), 0 for none. Such is
            a sampled token with q < α max q and r < α max r. After arXiv 2210.15097.
        teacher_smoothing: Share of the uniform distribution in both teachers: ε in [0, 1), 0 for none. They become
            (1 - ε) q + ε / V over the V tokens of the vocabulary, so that no divergence from them is infinite and no
            log-ratio beyond log(V / ε).
        refresh_every: Steps from one measurement to the next, with ``eta="amortized"``.
        modality: What the teacher is given besides text, and the masked view leaves out: ``"image"``, ``"video"`` or
            ``"audio"``. Rows hold it in the columns `image` or `images`, `video` or `videos`, `audio` or `audios`.
        image_mask: What the masked view of a prompt is: ``"drop"``, ``"blank"`` or ``"attention"``. With another
            modality read video or audio for image. ``"drop"``: the prompt is what the chat template writes without the
            image, and positions follow; ``"blank"``: every pixel takes the image processor's mean colour, which audio
            has none of; ``"attention"``: image tokens stay, but nothing attends to them.
        max_skipped_steps: How many updates in a row may be skipped, because a loss or a gradient is not finite, before
            training stops.
        runaway_action: What to do when the student runs away from its teacher, or unlearns its language:
            ``"fallback"``, ``"warn"``, ``"stop"`` or ``"none"``. Not with ``"opd"``
            (`vgs_distill.resilience.runaway`). ``"fallback"`` warns and for the rest of the run lowers gamma to at most
            0.5 and the weight ratio to at most 1, and raises λ to at least 1; ``"warn"`` warns only; ``"stop"`` saves a
            checkpoint and ends training in `TrainingStopped`; ``"none"`` does not watch.
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
        record_dependency_every: Steps from one record of the angles between the gradients of standard, vis and lang, by
            tenths of the tokens by KL(q‖r), to the next; 0 for none. With ``"vgs"``, ``"vgs_unit"`` or ``"language"``,
            of the first micro-batch of such a step on the main process. It costs two forward passes of each model and
            30 backward passes over the micro-batch (three a tenth), and the memory of both views' activations and four
            gradients; it changes nothing in the run (`vgs_distill.report.dependency_angles`). Nothing is recorded
            where gradients are sharded.
    """

    method: str = "vgs"
    eta: float | str | None = field(default=None, metadata={"metavar": "measured|amortized|FLOAT"})
    gamma: float | str | None = field(default=None, metadata={"metavar": "FLOAT|adaptive"})
    gamma_min: float = 0.5
    gamma_max: float = 0.9
    gamma_schedule: str = "constant"
    gamma_start: float = 0.5
    language_preservation: float | str = field(default=0.01, metadata={"metavar": "FLOAT|adaptive"})
    dependency_quantile: float = 0.7
    ratio_bound: float | None = None
    ratio_floor: float = 0.0
    max_weight_ratio: float | None = None
    steering_scale: str = "unit"
    token_steering: float | str = field(default=0.0, metadata={"metavar": "FLOAT|dependency"})
    plausibility: float = 0.0
    teacher_smoothing: float = 0.0
    refresh_every: int = 16
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
    record_dependency_every: int = 0

    def __post_init__(self) -> None:
        # Before transformers starts what the launcher asked for: DeepSpeed, process groups.
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        if self.gamma is None:
            self.gamma = method.gamma
        if self.eta is None:
            self.eta = MEASURED if method.unit else AMORTIZED
        self._check(method)
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
        return self.plausibility > 0 or (not isinstance(self.token_steering, str) and self.token_steering > 0)

    def _check(self, method: Method) -> None:
        self._check_names()
        self._check_gamma(method)
        self._check_numbers()
        self._check_method(method)

    def _check_names(self) -> None:
        for name, choices in (
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

    def _check_gamma(self, method: Method) -> None:
        for name in ("gamma", "gamma_start"):
            value = getattr(self, name)
            if name == "gamma" and value == ADAPTIVE:
                continue
            if isinstance(value, str) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0{_or_adaptive(name)}, got {value!r}")
            if method.unit and not value <= 1.0:
                raise ValueError(
                    f"{name} is a share in [0, 1] with method={method.name!r}{_or_adaptive(name)}, got {value!r}"
                )
        if self.gamma != ADAPTIVE:
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
        if method.name not in ("vgs_unit", "matched"):
            raise ValueError(
                "gamma='adaptive' compares how far the two parts of the loss have fallen, by shares, which those of "
                f"method={method.name!r} do not allow; use 'matched' or 'vgs_unit', or a number"
            )

    def _check_numbers(self) -> None:
        for names, in_range, words in _RANGES:
            for name in names:
                value = getattr(self, name)
                if isinstance(value, int | float) and not in_range(value):
                    raise ValueError(f"{name} must be {words}, got {value}")
        for name, word in (("token_steering", BY_DEPENDENCY), ("language_preservation", ADAPTIVE_PRESERVATION)):
            value = getattr(self, name)
            if value != word and (isinstance(value, str) or not 0.0 <= value < math.inf):
                raise ValueError(f"{name} must be 0 (off), a positive finite number or {word!r}, got {value!r}")
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

    def _check_method(self, method: Method) -> None:
        """What a method does not go with."""
        if self.beta != 1.0:
            raise ValueError(f"every method distils by the reverse KL divergence, beta=1.0, but beta is {self.beta}")
        measures = method.second is not None and isinstance(self.eta, str)
        if isinstance(self.eta, str):
            if self.eta not in (MEASURED, AMORTIZED):
                raise ValueError(f"eta must be {MEASURED!r}, {AMORTIZED!r} or a positive number, got {self.eta!r}")
        elif self.eta is None or not 0.0 < self.eta < math.inf:
            raise ValueError(f"eta must be {MEASURED!r}, {AMORTIZED!r} or a positive number, got {self.eta!r}")
        elif method.unit:
            raise ValueError(
                f"method={method.name!r} has a weight for each of two gradients, which no single number is; use "
                f"eta={MEASURED!r} or {AMORTIZED!r}"
            )
        if not {"vis", "evidence"} & {method.first, method.second}:
            for name in ("token_steering", "plausibility"):
                if getattr(self, name):
                    raise ValueError(f"method={method.name!r} has no visual part that {name} could weigh; set it to 0")
        if self.record_dependency_every and "vis" not in method.parts:
            raise ValueError(
                f"method={method.name!r} does not compute the parts whose angles record_dependency_every asks for; set "
                f"it to 0, or use method 'vgs', 'vgs_unit' or 'language'"
            )
        if self.record_dependency_every and self.fp16:
            raise ValueError(
                "record_dependency_every measures gradients, which are lost in fp16 without its loss scaling; set it "
                "to 0, or use bf16=True or fp32"
            )
        if measures and self.fp16:
            raise ValueError(
                f"eta={self.eta!r} measures gradients, which the loss scaling of fp16 changes; use bf16=True or fp32"
            )
        deepspeed = self.deepspeed is not None or _launched_with("DEEPSPEED")
        preserves = method.preserved is not None and self.language_preservation != 0
        if deepspeed and (measures or preserves):
            raise ValueError(
                "DeepSpeed steps inside backward, so a step can have one backward pass only; use FSDP2 or DDP, or "
                "method='opd', or method='vgs' with a number for eta and language_preservation=0"
            )
        if _launched_with("FSDP") and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError(
                "the engine runs several backward passes over sharded gradients, which FSDP2 can and FSDP1 cannot; "
                "set fsdp_version: 2 in the configuration of accelerate"
            )


def _or_adaptive(name: str) -> str:
    return f" or {ADAPTIVE!r}" if name == "gamma" else ""


def _launched_with(engine: str) -> bool:
    """Whether `accelerate launch` was told to use this engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
