"""A training engine for verl whose step is a method's: chosen by VERL_ENGINE_VENDOR=vgs, on FSDP2.

    VERL_ENGINE_VENDOR=vgs
    VGS_TEACHER=Qwen/Qwen3-VL-8B-Instruct               beside the actor in every process: the whole vocabulary counts
    VGS_SETTINGS='{"method": "vgs", "gamma": 2.0}'      of MethodSettings; optional

It takes the place of the actor's loss: what verl's own loss function would return is not computed. Rollouts, data and
checkpoints stay verl's. Written for verl 0.9, whose engines are not a stable interface.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForImageTextToText
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ..decomposed_loss import View
from ..errors import InputError
from ..inputs.families import check_teacher_reads_the_same
from ..masked_view import MaskedView
from ..models.vocabulary import shared_vocabulary
from ..settings import MethodSettings
from ..steering.gradients import no_gradient
from .method_step import MethodStep

VERL = "0.9"
VENDOR = "vgs"  # the value of VERL_ENGINE_VENDOR, in verl_plugin.py as well
if not version("verl").startswith(f"{VERL}."):
    raise InputError(
        f"it is written for verl {VERL}, but {version('verl')} is installed; install it with: "
        f"pip install 'verl=={VERL}.*'"
    )


def settings_from_environment() -> MethodSettings:
    """VGS_SETTINGS, a JSON object; InputError where it is none, or names what is no setting."""
    text = os.environ.get("VGS_SETTINGS", "{}")
    try:
        return MethodSettings(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(f"VGS_SETTINGS must be a JSON object of MethodSettings, got {text!r}: {error}") from error


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device=["cuda", "npu", "cpu"], vendor=VENDOR)
class VGSEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine, with the teacher in its process."""

    teacher: Any = None
    method_step: MethodStep

    def initialize(self) -> None:
        super().initialize()
        if self.engine_config.forward_only:
            return
        settings, config = settings_from_environment(), self.model_config.hf_config
        self._check(settings)
        # Deferred gradients of the parts would mix: the engine's config is frozen against everything but this.
        self.engine_config.__dict__["use_no_sync_for_gradient_accumulation"] = False
        processor = self.model_config.get_processor()
        self._masked_view = MaskedView(config, processor)
        self.teacher = self._load_teacher()
        check_teacher_reads_the_same(config, self.teacher.config)
        tokenizer = getattr(processor, "tokenizer", processor)
        shared = shared_vocabulary(config, self.teacher.config, len(tokenizer))
        self.method_step = MethodStep(settings, torch.device(get_device_id()), vocab_size=shared)
        self._updates = 0

    def _load_teacher(self) -> Any:
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        attention = self.model_config.hf_config._attn_implementation
        teacher = AutoModelForImageTextToText.from_pretrained(
            os.environ["VGS_TEACHER"], dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
        return teacher.to(get_device_id()).eval().requires_grad_(False)

    def _check(self, settings: MethodSettings) -> None:
        for refused, needs, instead in (
            (not os.environ.get("VGS_TEACHER"), "a teacher", "set VGS_TEACHER to its name or folder"),
            (self.engine_config.use_remove_padding, "padded rows", "set use_remove_padding=False"),
            (self.ulysses_sequence_parallel_size > 1, "whole rows", "set ulysses_sequence_parallel_size=1"),
            (self.model_config.use_fused_kernels, "the model's own forward", "set use_fused_kernels=False"),
            (getattr(self, "scaler", None) is not None, "gradients as they are", "train in bf16 or fp32, not in fp16"),
        ):
            if refused:
                raise InputError(f"the method {settings.method!r} under verl needs {needs}; {instead}")

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable[..., Any], forward_only: bool) -> Any:
        if forward_only or self.teacher is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        tokens = tu.get_non_tensor_data(micro_batch, "batch_num_tokens", None)
        processes = tu.get_non_tensor_data(micro_batch, "dp_size", 1)
        items = max(tokens, 1) / processes  # FSDP2 averages over processes
        total = self.optimizer_config.total_training_steps
        with self._autocast():
            result = self.method_step.micro_batch(
                self.module, self.teacher, self._view(micro_batch), self._view(self._without_images(micro_batch)),
                items, (self._updates, total), self._run_back,
            )  # fmt: skip
        loss = float(result.per_token["standard"].sum() / items)
        # All has run back; what verl runs back now reaches nothing.
        return no_gradient(torch.device(get_device_id())), {"model_output": {}, "loss": loss, "metrics": {}}

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if not forward_only and self.teacher is not None:
            output["metrics"] |= self.method_step.finish(self.module)
            self._updates += 1
        return output

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        return nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)

    def _run_back(self, loss: Tensor, keep: bool) -> None:
        with torch.autocast(get_device_name(), enabled=False):
            loss.backward(retain_graph=keep)

    def _without_images(self, micro_batch: TensorDict) -> TensorDict:
        jagged = {name: value for name, value in micro_batch.items() if isinstance(value, Tensor) and value.is_nested}
        masked = micro_batch.copy()
        for name, value in self._masked_view.drop_tokens(jagged).items():
            masked[name] = value
        if "multi_modal_inputs" in masked.keys():  # noqa: SIM118 - a TensorDict
            tu.pop(masked, "multi_modal_inputs")
        return masked

    def _view(self, micro_batch: TensorDict) -> View:
        """As the engine feeds the model, padded on the right; the tokens of the answers that count."""
        inputs, _ = self.prepare_model_inputs(micro_batch)
        lengths = micro_batch["input_ids"].offsets().diff()  # (rows,)
        responses, mask = micro_batch["responses"].unbind(), micro_batch["response_mask"].unbind()
        predicts = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool, device=lengths.device)
        for row, (length, counts) in enumerate(zip(lengths.tolist(), mask, strict=True)):
            predicts[row, length - len(counts) - 1 : length - 1] = counts.bool()
        tokens = torch.cat([ids[counts.bool()] for ids, counts in zip(responses, mask, strict=True)])
        return View({**inputs, "use_cache": False}, predicts, tokens)
