"""ms-swift's GKD with a method of this project: what a plugin given to `swift rlhf --external_plugins` registers.

    from vgs_distill import MethodSettings
    from vgs_distill.integrations.swift import register

    register(MethodSettings(method="vgs", gamma=2.0))

Swift keeps data, templates, rollouts (vLLM among them), adapters and checkpoints; only the loss and how its gradients
are combined differ. Written for ms-swift 4.6, whose `GKDTrainer` is not a stable interface.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import swift
import torch
from swift.rlhf_trainers import GKDTrainer
from swift.rlhf_trainers.utils import encode_sample
from swift.trainers import disable_gradient_checkpointing
from swift.trainers.trainer_factory import TrainerFactory
from swift.utils import to_device
from torch import Tensor, nn

from vgs_kernels import unwrapped_model

from ..decomposed_loss import View
from ..errors import InputError
from ..inputs.families import EvidenceTokens
from ..masking import without_evidence
from ..models.vocabulary import shared_vocabulary
from ..settings import MethodSettings
from .method_step import MethodStep

SWIFT = "4.6"
_TAGS = re.compile(r"<(?:image|video|audio)>\n?")  # how swift writes where a piece of evidence goes


def register(settings: MethodSettings) -> None:
    """Let `--rlhf_type gkd` train by these settings.

    Raises:
        InputError: another version of ms-swift is installed.
    """
    if not swift.__version__.startswith(f"{SWIFT}."):
        raise InputError(
            f"the ms-swift integration is written for ms-swift {SWIFT}, but {swift.__version__} is installed; "
            f"install it with: pip install 'ms-swift=={SWIFT}.*'"
        )
    VGSGKDTrainer.settings = settings
    TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.{VGSGKDTrainer.__name__}"


class VGSGKDTrainer(GKDTrainer):
    """Swift's GKD trainer, whose step is a method's."""

    settings = MethodSettings()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._check()
        model, teacher = unwrapped_model(self.model), unwrapped_model(self.teacher_model)
        tokens = EvidenceTokens.of(model.config, self.template.processor)
        # An image token in a completion would promise features that do not exist.
        model.generation_config.suppress_tokens = list(tokens.banned_while_sampling)
        tokenizer = self.template.tokenizer
        self._step_of_method = MethodStep(
            self.settings,
            self.accelerator.device,
            temperature=self.temperature,
            vocab_size=shared_vocabulary(model.config, teacher.config, len(tokenizer)),
        )

    def _check(self) -> None:
        template = self.template
        for refused, what, instead in (
            (self.teacher_model is None, "a teacher in the trainer's own process", "pass --teacher_model"),
            (self.beta != 1.0, "the reverse KL divergence", "pass --beta 1.0"),
            (self.args.sft_alpha > 0, "no supervised part", "leave --sft_alpha out"),
            (self.use_liger_gkd_loss, "its own loss", "leave --use_liger_kernel out"),
            (template.padding_free or template.sequence_parallel_size > 1, "padded rows",
             "leave --padding_free, --packing and --sequence_parallel_size out"),
            (self.is_deepspeed_enabled, "gradients in .grad, which DeepSpeed keeps elsewhere", "use DDP or FSDP2"),
        ):  # fmt: skip
            if refused:
                raise InputError(f"the method {self.settings.method!r} under ms-swift needs {what}; {instead}")

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        """Swift's, and of every micro-batch the same rows without their images, as the template writes them."""
        batches: list[dict[str, Any]] = super()._prepare_batch_inputs(samples)
        for batch, rows in zip(batches, self.split_by_mini_batches(samples), strict=True):
            with self._template_context(self.template):
                encoded = [encode_sample(without_images(row), self.template) for row in rows]
                for row in encoded:
                    row.pop("_extra_kwargs", None)
                batch["masked_model_inputs"] = to_device(self.template.data_collator(encoded), self.accelerator.device)
        return batches

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        seen, masked = View.of(inputs["model_inputs"]), View.of(inputs["masked_model_inputs"])
        accumulated = self.current_gradient_accumulation_steps
        # Swift's mean: over the tokens of a micro-batch, then over micro-batches.
        items = seen.predicts.sum().clamp(min=1) * accumulated
        without_checkpointing = disable_gradient_checkpointing(
            self.teacher_model, self.args.gradient_checkpointing_kwargs
        )
        with self.compute_loss_context_manager(), without_checkpointing:
            result = self._step_of_method.micro_batch(
                model, self.teacher_model, seen, masked, items, (self.state.global_step, self.state.max_steps),
                self._run_back,
            )  # fmt: skip
        if self.accelerator.sync_gradients:
            for name, value in self._step_of_method.finish(model).items():
                self._metrics["train"][name].append(value)
        return result.per_token["standard"].sum() / items

    def _run_back(self, loss: Tensor, keep: bool) -> None:
        with torch.autocast(self.accelerator.device.type, enabled=False):
            self.accelerator.backward(loss, retain_graph=keep)


def without_images(sample: Any) -> Any:
    """A sample of swift's without its images, videos and sounds."""
    masked = copy.copy(sample)
    masked.images, masked.videos, masked.audios = [], [], []
    masked.messages = [
        {**message, "content": _TAGS.sub("", message["content"])}
        if isinstance(message["content"], str)
        else without_evidence([message])[0]
        for message in sample.messages
    ]
    return masked
