"""`VGSConfig`: every setting of a distillation run, with all defaults, in one serialisable dataclass.

It extends TRL's `DistillationConfig`, which extends transformers' `TrainingArguments`, with `MethodSettings` and what a
run needs beside them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from trl import DistillationConfig

from .inputs.modalities import MODALITIES
from .settings import MethodSettings, Range, check_choices, check_ranges, described_by_docstring, refuses_old_names
from .steering.methods import METHODS, Method

IMAGE_MASKS = ("drop", "blank", "attention")
RUNAWAY_ACTIONS = ("fallback", "warn", "stop", "none")
OFFLOAD = "offload"
REPLICATE, SHARD = "replicate", "shard"

# Fields that hold a mapping, never the name of a file.
_MAPPINGS = (
    "model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs", "chat_template_kwargs",
    "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
)  # fmt: skip

_RANGES: tuple[Range, ...] = (
    (
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "max_completion_length", "max_prompt_length", "max_skipped_steps",
            "chunk_tokens", "max_chunk_bytes",
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
    (("top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("min_p",), lambda value: 0 <= value <= 1, "in [0, 1]"),
)  # fmt: skip


@refuses_old_names
@described_by_docstring
@dataclass
class VGSConfig(MethodSettings, DistillationConfig):
    """Settings of a `VGSTrainer` run: those of `MethodSettings` and these; everything else is TRL's and means what it
    means there.

    Attributes:
        modality: What the teacher is given besides text, and the masked view leaves out: ``"image"``, ``"video"`` or
            ``"audio"``. Rows hold it in the columns `image` or `images`, `video` or `videos`, `audio` or `audios`.
        image_mask: What the masked view of a prompt is: ``"drop"``, ``"blank"`` or ``"attention"``. With another
            modality read video or audio for image. ``"drop"``: the prompt is what the chat template writes without the
            image, and positions follow; ``"blank"``: every pixel takes the image processor's mean colour, which audio
            has none of; ``"attention"``: image tokens stay, but nothing attends to them.
        system_prompt: The system message of every conversation that has none of its own; None for none.
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
        teacher_sharding: What each of several processes holds of the teacher: ``"replicate"`` for all of it, or
            ``"shard"`` for its share of every layer, gathered layer by layer in every pass: less memory, more traffic.
            Under DDP and FSDP2; DeepSpeed has its own way.
        pack_teacher: Run both views of the teacher in one batch. None decides: yes where it wastes no padding (masks
            that keep the length of the prompt: ``blank``, ``attention``) or where weights travel (``offload``). False
            needs the least memory.
        max_prompt_length: Longest prompt in tokens, image tokens included; None for no limit. Nothing is ever cut: a
            row above the limit takes no part in its step, with a warning.
        check_dataset_rows: How many rows of a map-style dataset have their images decoded before training starts (all
            have their prompt checked); None for all, 0 for no check at all. A JPEG of a million pixels takes 8 ms, a
            PNG 30 ms.
        chunk_tokens: Tokens of a chunk of the loss, whose logit gradients are multiplied back into the head at once;
            None for 1,024 on a GPU, as many as `max_chunk_bytes` holds on a CPU. Every chunk reads and writes the
            gradient of the whole head (`vgs_kernels.linear_decomposed_kl`).
        max_chunk_bytes: Upper bound on the logits and logit gradients that the loss holds at a time, in bytes; None for
            149 MiB on a CPU and half of the free memory on a GPU.
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

    modality: str = "image"
    image_mask: str = "drop"
    system_prompt: str | None = None
    max_skipped_steps: int = 8
    runaway_action: str = "fallback"
    teacher_device: str | None = None
    teacher_sharding: str = "replicate"
    pack_teacher: bool | None = None
    max_prompt_length: int | None = None
    check_dataset_rows: int | None = 10_000
    chunk_tokens: int | None = None
    max_chunk_bytes: int | None = None
    record_completions_every: int = 100
    record_teacher_answers: bool = True
    record_modules_every: int = 0
    record_dependency_every: int = 0

    def __post_init__(self) -> None:
        MethodSettings.__post_init__(self)
        self._check_names()
        check_ranges(self, _RANGES)
        if self.teacher_device not in (None, OFFLOAD):
            self._check_teacher_device()
        self._check_method_in_a_run(METHODS[self.method])
        if self.pack_teacher is None:
            self.pack_teacher = self.image_mask != "drop" or self.teacher_device == OFFLOAD
        # Last: here transformers starts what the launcher asked for, DeepSpeed and process groups.
        DistillationConfig.__post_init__(self)

    def _check_names(self) -> None:
        check_choices(
            self,
            modality=tuple(MODALITIES),
            image_mask=IMAGE_MASKS,
            runaway_action=RUNAWAY_ACTIONS,
            teacher_sharding=(REPLICATE, SHARD),
        )
        if self.teacher_sharding == SHARD and self.teacher_device is not None:
            raise ValueError(
                f"teacher_sharding='shard' keeps a part of the teacher beside every student, and teacher_device="
                f"{self.teacher_device!r} puts it elsewhere; leave one of them out"
            )
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

    def _check_method_in_a_run(self, method: Method) -> None:
        """What a method does not go with."""
        if self.beta != 1.0:
            raise ValueError(f"every method distils by the reverse KL divergence, beta=1.0, but beta is {self.beta}")
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
        if self.measures and self.fp16:
            raise ValueError(
                f"eta={self.eta!r} measures gradients, which the loss scaling of fp16 changes; use bf16=True or fp32"
            )
        deepspeed = self.deepspeed is not None or _launched_with("DEEPSPEED")
        preserves = method.preserved is not None and self.language_preservation != 0
        if deepspeed and (self.measures or preserves):
            raise ValueError(
                "DeepSpeed steps inside backward, so a step can have one backward pass only; use FSDP2 or DDP, or "
                "method='opd', or method='vgs' with a number for eta and language_preservation=0"
            )
        if _launched_with("FSDP") and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError(
                "the engine runs several backward passes over sharded gradients, which FSDP2 can and FSDP1 cannot; "
                "set fsdp_version: 2 in the configuration of accelerate"
            )


def _launched_with(engine: str) -> bool:
    """Whether `accelerate launch` was told to use this engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
