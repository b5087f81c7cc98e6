"""`VGSTrainer`: TRL's `DistillationTrainer` with the loss split in two and the two gradients steered towards vision.

What is TRL's stays TRL's: rollouts, data, generation, checkpoints, logging back ends. This file overrides where the
loss becomes gradients. Layer: trainer; calls `loss.py`, `steering.py` and, through them, `vgs_kernels`.

How a step that measures both gradients runs, once per micro-batch:

    training_step -> compute_loss -> decomposed_loss          both parts of the loss
                                  -> backward(lang)           into the language gradient
                     backward(vis), by the Trainer            into the visual gradient
    and after the last micro-batch: Gramian -> weights -> combine into .grad, which the Trainer clips and applies.

With `steering="exact"` that is every step. With `"amortized"` it is one in `refresh_every`; in the others the weights
are predicted, and the Trainer runs back the weighted sum once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging
from trl import DistillationTrainer
from trl.trainer.utils import pad

from vgs_kernels import VisualGradientSteering

from .config import ADAPTIVE, OFFLOAD, VGSConfig
from .distributed import allow_fsdp_on_cpu, is_replicated, sum_over_processes, two_backward_passes
from .errors import InputError
from .inputs.dataset_checks import check_dataset
from .inputs.families import (
    EvidenceTokens,
    check_image_mask,
    check_modality,
    check_teacher_reads_the_same,
    family_of,
    placeholder_ids,
)
from .inputs.modalities import IMAGE, MODALITIES, Modality
from .loss import MicroBatchLoss, decomposed_loss
from .masking import Batch, with_evidence, without_evidence
from .models.heads import backbone, compile_backbone, without_compile_wrapper
from .models.modules import parameters_by_module
from .models.teacher import load_student, load_teacher, place_teacher, shared_vocabulary, student_config
from .report.model_card import ModelCards
from .report.recording import RunRecorder
from .report.teacher_answers import TeacherAnswers
from .report.timing import StepTimer
from .report.trackers import Trackers
from .resilience.checkpoints import AtomicCheckpoints
from .resilience.interruption import Interruption
from .resilience.nonfinite import SkippedUpdates, describe_rows, describe_step
from .resilience.output_dir import check_output_dir
from .resilience.runaway import RunawayMonitor
from .resilience.sampler import EpochOrder
from .steering.adaptive_gamma import AdaptiveGamma
from .steering.gradient_pair import (
    GradientPair,
    GramianPredictor,
    SteeringRecord,
    direction_cosine,
    no_gradient,
    weight_ratio,
)
from .steering.proxy import GradientProxy
from .steering.schedule import gamma_at
from .steering.token_weights import VisualTokenWeights

logger = logging.get_logger(__name__)

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_MULTIMODAL_KEYS = (*(key for modality in MODALITIES.values() for key in modality.keys), *_TOKEN_TYPES)


class _StepPlan:
    """How one optimizer step gets its gradient; the same for all its micro-batches."""

    def __init__(
        self,
        gamma: float,
        policy: VisualGradientSteering,
        token_weights: VisualTokenWeights,
        *,
        apart: bool,
        weights: Tensor | None = None,
    ) -> None:
        self.gamma = gamma
        self.policy = policy
        self.token_weights = token_weights
        self.apart = apart  # two backward passes, weights from what they measure; otherwise one of the weighted sum
        self.weights = weights  # (2,) of the one pass; None: from the proxy of the step's only micro-batch
        self.micro_batch_loss = torch.zeros(())
        self._proxy: GradientProxy | None = None  # of the micro-batches so far, on this process
        self._proxy_squares: Tensor | None = None

    def add_proxy(self, proxy: GradientProxy) -> None:
        self._proxy = proxy if self._proxy is None else self._proxy.plus(proxy)

    def proxy_squares(self) -> Tensor:
        """What stands for |g_lang|^2 and |g_vis|^2 of the step, over all processes; asked for after its last loss."""
        if self._proxy_squares is None:
            assert self._proxy is not None
            squares = GradientProxy(*(sum_over_processes(part) for part in self._proxy)).squares()
            self._proxy_squares = squares * self.token_weights.scales().square()
        return self._proxy_squares


class VGSTrainer(ModelCards, AtomicCheckpoints, DistillationTrainer):  # type: ignore[misc] # TRL's own card differs, too
    """On-policy distillation of a model that sees or hears, with visual gradient steering.

    Takes what TRL's `DistillationTrainer` takes, with a `VGSConfig`. Per step it logs, besides TRL's metrics and
    through the same `report_to`:

    * ``loss/full``: KL(student || teacher), mean per token, in nats
    * ``loss/lang``, ``loss/vis``: its language and visual part (`vgs_kernels.decomposed_kl`), mean per token, in nats
    * ``entropy``: of the student, mean per token, in nats
    * ``gradient/norm_lang``, ``gradient/norm_vis``, ``gradient/cosine``: of the two accumulated parameter gradients
      (where they are measured: every step, or every refresh of ``"amortized"``)
    * ``steering/gamma``: share of the visual direction
    * ``steering/weight_ratio``: weight of the visual gradient over that of the language gradient
    * ``steering/visual_token_weight``: mean weight of a token in the visual part, before the part is divided by it
      (with ``token_steering`` or ``plausibility``)
    * ``steering/refreshed`` and, at a refresh of ``"amortized"``, ``steering/predicted_weight_ratio``,
      ``steering/measured_weight_ratio`` and the ``steering/direction_cosine`` between predicted and measured update
    * ``runaway/divergence_growth``, ``runaway/weight_growth``, ``runaway/cut_off_rise``: what `runaway.RunawayMonitor`
      goes by; ``runaway/alarm``: 1 from its alarm on
    * ``time/rollout``, ``time/teacher``, ``time/student`` (forward and backward), ``time/steering``: seconds; and of
      the forward passes ``time/masked_teacher`` and ``time/masked_student``, which are part of teacher and student

    A loss that is not finite (the student puts mass where a teacher has none) or a gradient that is not skips the
    update of its step, named in a warning; `max_skipped_steps` of them in a row end training with `TrainingStopped`.
    A student that runs away from its teacher is met as `runaway_action` says.

    Raises:
        ValueError: the model does not read the modality, a dataset row has no prompt or a broken image, or the
            output directory cannot be written.

    Source: arXiv 2606.00564 (steering), arXiv 2306.13649 (on-policy distillation).
    """

    args: VGSConfig
    model: PreTrainedModel
    _signature_columns: Any
    _tag_names = ["trl", "distillation", "vgs"]  # noqa: RUF012 - TRL's class attribute
    _name = "VGS"

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: VGSConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, VGSConfig):
            raise ValueError(f"args must be a VGSConfig, got {type(args).__name__}; build one with VGSConfig(...)")
        if args.output_dir is not None:
            check_output_dir(args.output_dir)
        self._modality = MODALITIES[args.modality]
        check_dataset(train_dataset, args.check_dataset_rows, self._modality, processing_class)
        check_modality(student_config(model, args) if isinstance(model, str) else model.config, self._modality)
        if isinstance(model, str) and self._modality is not IMAGE:  # TRL would look for its image token
            model = load_student(model, args)
        if args.distributed_state is not None:
            allow_fsdp_on_cpu(args.distributed_state)
        with nullcontext() if isinstance(model, str) else _image_token_named(model.config, self._modality):
            super().__init__(
                model=model,
                teacher_model=None,  # placed below, where it may also be elsewhere or have another padded vocabulary
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                **kwargs,
            )
        teacher = load_teacher(teacher_model, args) if isinstance(teacher_model, str) else teacher_model
        check_teacher_reads_the_same(self.model.config, teacher.config, self._modality)
        self._vocab_size = shared_vocabulary(
            self.model.config, teacher.config, len(self._tokenizer), padding=args.steering != "none"
        )
        self.teacher_model = place_teacher(teacher, self.accelerator, args.teacher_device)
        self._family = family_of(self.model.config)
        self._evidence_tokens = EvidenceTokens.of(self.model.config, self.processing_class, self._modality)
        if args.steering != "none":
            check_image_mask(self.model.config, args.image_mask)
        if args.torch_compile:
            compile_backbone(self.model, args.torch_compile_backend, args.torch_compile_mode)
        padding = range(self._vocab_size, self.model.config.get_text_config().vocab_size)
        own = self.generation_config.suppress_tokens or []
        banned = {*self._evidence_tokens.banned_while_sampling, *padding, *own}
        self.generation_config.suppress_tokens = sorted(banned)
        self.generation_kwargs["suppress_tokens"] = sorted(banned)
        if args.use_vllm:  # whose sampling takes the tokens' text
            words = self._tokenizer.convert_ids_to_tokens(self._evidence_tokens.banned_while_sampling)
            options = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {**options, "bad_words": [*options.get("bad_words", []), *words]}

        self._unknown_to_trl: dict[str, Any] = {}  # inputs of the micro-batch that its loss does not hand on
        self._stand_in: dict[str, Any] | None = None  # the last row whose prompt was not too long
        self._timer = StepTimer(self.accelerator.device)
        self._gradients: Any = None  # GradientPair, once the model is prepared
        self._predictor = None
        if args.steering == "amortized":
            self._predictor = GramianPredictor(args.refresh_every, args.refresh_drift)
        self._token_weights = VisualTokenWeights(args.weighs_tokens, self.accelerator.device)
        self._adaptive_gamma = None
        if args.gamma == ADAPTIVE:
            self._adaptive_gamma = AdaptiveGamma(args.gamma_min, args.gamma_max)
        self._plan: _StepPlan | None = None
        self._sums: Tensor | None = None  # of MicroBatchLoss.sums, over the micro-batches of a step
        self._skipped = SkippedUpdates(args.max_skipped_steps)
        self._skip_update = False  # the same on all processes
        self._runaway = RunawayMonitor(args.runaway_action)
        self.add_callback(self._runaway)
        self._weight_ratio = torch.tensor(math.nan)  # of the last update
        self._cut_off = math.nan  # share of the last rollouts without an end
        self._interruption = Interruption()
        self.add_callback(self._interruption)
        answers = TeacherAnswers(
            args, self.teacher_model, self.processing_class, self.generation_config, self.accelerator
        )
        trackers = Trackers(self.callback_handler.callbacks)
        self._recorder = RunRecorder(args, self.model, self.teacher_model, answers, trackers)
        self.add_callback(self._recorder)

    # ------------------------------------------------------------------ the step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        wrapped = without_compile_wrapper(model)
        if self._plan is None and self.args.steering != "none":
            self._plan = self._make_plan()
        apart = self._plan is not None and self._plan.apart
        with self._timer.span("step"), two_backward_passes(self.accelerator, wrapped) if apart else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
            if apart:
                self._gradients.end_micro_batch()
            if self._plan is not None:
                loss = self._plan.micro_batch_loss
                if self.accelerator.sync_gradients:
                    with self._timer.span("steering"):
                        self._finish_step(wrapped, self._plan)
        if self.accelerator.sync_gradients:
            self._plan = None
            self._record_times()
        return loss

    def _make_plan(self) -> _StepPlan:
        """Decide, before the first micro-batch of a step, how the step gets its gradient."""
        if self._adaptive_gamma is None:
            gamma = gamma_at(self.args, self.state.global_step, self.state.max_steps)
        else:
            gamma = self._adaptive_gamma.gamma
        gamma, max_weight_ratio = self._runaway.bounded(gamma, self.args.max_weight_ratio)
        policy = VisualGradientSteering(gamma, max_weight_ratio, self.args.steering_scale)
        if self._gradients is None:
            # Not in __init__: sharding replaces the parameters when the Trainer prepares the model.
            self._gradients = GradientPair(self.model.parameters())
        self._token_weights.begin_step()
        predictor = self._predictor
        if predictor is None or predictor.refresh_due():
            return _StepPlan(gamma, policy, self._token_weights, apart=True)
        if self.current_gradient_accumulation_steps == 1:
            return _StepPlan(gamma, policy, self._token_weights, apart=False)
        weights = predictor.weights(policy)
        return _StepPlan(gamma, policy, self._token_weights, apart=False, weights=weights)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return what the Trainer is to run back: the weighted sum, or the visual part after the language part."""
        model = without_compile_wrapper(model)
        if self.args.steering == "none":
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self._metrics[self._mode]["loss/full"].append(loss.detach())
            self._record_completions(inputs, None)
            return (loss, None) if return_outputs else loss

        if self._training:
            # DDP and FSDP average gradients over processes; the sum over tokens must not be divided twice.
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        else:
            items = inputs["completion_mask"].sum().clamp(min=1)
        unwrapped = self.accelerator.unwrap_model(model)
        result = self._forward_redirection(model, unwrapped, self._compute_loss, unwrapped, inputs, items)
        self._record_loss(result, inputs)
        self._record_completions(inputs, result.contribution)
        full = result.tokens.full.sum() / items
        plan = self._plan
        if plan is None:
            return (full, None) if return_outputs else full

        plan.micro_batch_loss = full
        self._token_weights.add(result.visual_weights)
        if result.proxy is not None:
            plan.add_proxy(result.proxy.scaled(1.0 / self.accelerator.num_processes))  # gradients are averaged
        if not plan.apart:
            scales = self._token_weights.expected_scales()
            if plan.weights is None:
                assert self._predictor is not None
                plan.weights = self._predictor.weights(plan.policy, plan.proxy_squares())
                scales = self._token_weights.scales()
            objective = result.weighted(plan.weights * scales)
            return (objective, None) if return_outputs else objective
        with torch.autocast(self.accelerator.device.type, enabled=False):
            self._gradients.accumulate_lang()
            self.accelerator.backward(result.lang, retain_graph=True)  # both parts come out of one operator
        self._gradients.accumulate_vis()
        vis = no_gradient(full.device) if result.vis is None else result.vis
        return (vis, None) if return_outputs else vis

    def _compute_loss(self, unwrapped_student: PreTrainedModel, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Run inside the student wrapper's forward. TRL's monolithic loss, or both parts of the decomposed one."""
        if self.args.steering == "none":
            self._unknown_to_trl = {name: inputs[name] for name in _MULTIMODAL_KEYS if name in inputs}
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        self.teacher_model.eval()
        with self.accelerator.autocast():
            return decomposed_loss(
                self.args,
                unwrapped_student,
                self.accelerator.unwrap_model(self.teacher_model),
                _batch_of(inputs),
                _loss_mask(inputs),
                num_items_in_batch,
                self._evidence_tokens,
                self._family,
                run_student=self._run_backbone,
                run_teacher=self._run_teacher,
                span=self._timer.span,
                vocab_size=self._vocab_size,
            )

    def _run_backbone(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return self._get_last_hidden_state(
            model, batch.input_ids, batch.attention_mask, batch.completion_ids.size(1), **batch.multimodal
        )

    def _run_teacher(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Through the teacher's own wrapper, which may hold it sharded."""
        with torch.no_grad():
            return self._forward_redirection(self.teacher_model, model, self._run_backbone, model, batch)

    def _get_last_hidden_state(
        self,
        unwrapped_model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **multimodal: Any,
    ) -> Tensor:
        """TRL's, timed, and for whatever inputs a family or a mask needs besides those that TRL knows."""
        multimodal = {**self._unknown_to_trl, **multimodal}
        teacher = unwrapped_model is self.accelerator.unwrap_model(self.teacher_model)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **multimodal}
        if teacher and self.args.teacher_device not in (None, OFFLOAD):
            inputs = send_to_device(inputs, self.args.teacher_device)
        # accelerate casts in a model's own forward, which is not called: the loss needs no logits.
        with self._timer.span("teacher") if teacher else nullcontext(), self.accelerator.autocast():
            output = backbone(unwrapped_model)(use_cache=False, **inputs)
        return output.last_hidden_state[:, :-1][:, -logits_to_keep:].to(input_ids.device)

    # ------------------------------------------------------------------ rollouts

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's, without the features of other micro-batches where a micro-batch has no evidence: towers fail."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self._evidence_tokens.is_placeholder(inputs["prompt_ids"]).any():
            inputs = {name: value for name, value in inputs.items() if name not in self._modality.keys}
        elif self._modality is not IMAGE:
            inputs = {**inputs, **{name: torch.cat(inputs[name]) for name in self._modality.keys if name in inputs}}
        elif self._family.counts_images:
            counts = [count for count in inputs["num_images"] if count]
            inputs = {**inputs, "batch_num_images": torch.tensor(counts, device=inputs["prompt_ids"].device)}
        return inputs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._family.needs_image and not all(self._evidence_count(row) for row in inputs):
            raise InputError(
                f"a row has no image, but the processor of model type {self.model.config.model_type!r} takes no prompt "
                "without one; filter such rows out"
            )
        left_out: list[int] = []
        if self.args.max_prompt_length is not None:
            inputs, left_out = self._without_long_prompts(inputs, self.args.max_prompt_length)
        # Sampling changes shapes with every token, which torch.compile would follow with as many graphs.
        with self._timer.span("rollout"), torch.compiler.set_stance("force_eager"):
            if self._modality is IMAGE:
                output = super()._generate_and_score_completions(inputs)
            else:
                rows = [{"prompt": self._messages(row)} for row in inputs]
                output = super()._generate_and_score_completions(rows)
                output |= self._features(rows, output)
        if self.args.max_prompt_length is not None:
            output["completion_mask"][left_out] = 0
            output["num_items_in_batch"] = self.accelerator.gather(_loss_mask(output).sum()).sum()
        if self._family.pads_images:
            output.pop("num_images", None)  # TRL would cut by images what is laid out by rows
        if self._family.bidirectional_prompt and "token_type_ids" in output:
            # TRL writes 0, as it does for other families; here that would let completion tokens see later ones.
            output["token_type_ids"][:, output["prompt_ids"].size(1) :] = 1
        if self.args.steering != "none" and self.args.image_mask == "drop" and self._modality.features in output:
            output |= self._text_prompts(inputs, output["prompt_ids"], output["prompt_mask"])
        if self._training:
            self._cut_off = self._metrics["train"]["completions/clipped_ratio"][-1]
            with self._timer.span("recording"):
                self._recorder.mark_examples(self.state.global_step + 1, output, inputs)
        return output

    def _without_long_prompts(self, inputs: list[dict[str, Any]], limit: int) -> tuple[list[dict[str, Any]], list[int]]:
        """The rows with another one in place of each whose prompt is too long, and where those are.

        An image is worth nothing when cut, and a question without its end little, so such rows are left out whole. The
        stand-ins keep batches rectangular; their completions do not count.
        """
        lengths = [len(self._tokenize_prompts([self._messages(row)])[0][0]) for row in inputs]
        left_out = [index for index, length in enumerate(lengths) if length > limit]
        if len(left_out) < len(inputs):
            self._stand_in = inputs[lengths.index(min(lengths))]
        if not left_out:
            return inputs, left_out
        if self._stand_in is None:
            raise InputError(
                f"every prompt so far is longer than max_prompt_length={limit} tokens, {self._modality.plural} "
                f"included (the shortest has {min(lengths)}); raise the limit or make them smaller"
            )
        logger.warning(
            "step %d: %d of %d prompts are longer than max_prompt_length=%d tokens, %s included (the longest has %d), "
            "and are left out.",
            self.state.global_step + 1, len(left_out), len(inputs), limit, self._modality.plural, max(lengths),
        )  # fmt: skip
        return [self._stand_in if index in left_out else row for index, row in enumerate(inputs)], left_out

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if not self._family.one_prompt_at_a_time:
            return super()._tokenize_prompts(prompts)
        rows = [super(VGSTrainer, self)._tokenize_prompts([prompt]) for prompt in prompts]
        names = rows[0][2].keys() - {"labels"}  # of no use in sampling
        fields = {name: [value for row in rows for value in row[2][name]] for name in names}
        return [row[0][0] for row in rows], [(row[1] or [None])[0] for row in rows], fields

    def _text_prompts(self, inputs: list[dict[str, Any]], prompt_ids: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
        """The prompts without their evidence, tokenized and padded."""
        if self._family.needs_image:  # no way to render them: what the processor adds for an image is its placeholders
            kept = prompt_mask.bool() & ~self._evidence_tokens.is_placeholder(prompt_ids)
            rows = [ids[keep] for ids, keep in zip(prompt_ids, kept, strict=True)]
        else:
            prompts = [without_evidence(row["prompt"]) for row in inputs]
            rows = [torch.tensor(ids) for ids in self._tokenize_prompts(prompts)[0]]
        padded = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
        return {"text_prompt_ids": padded.to(prompt_ids.device), "text_prompt_mask": mask.to(prompt_ids.device)}

    def _features(self, rows: list[dict[str, Any]], rollout: dict[str, Any]) -> dict[str, Any]:
        """What TRL keeps of images only: what the processor makes of the evidence, by row, and types of all tokens."""
        counts = [self._evidence_count(row) for row in rows]
        if not any(counts):
            return {}
        fields = self._tokenize_prompts([row["prompt"] for row in rows])[2]
        device = self.accelerator.device
        tensors = {name: torch.as_tensor(np.asarray(fields[name])) for name in self._modality.keys if name in fields}
        output: dict[str, Any] = self._modality.split_by_row(send_to_device(tensors, device), counts)
        total = rollout["prompt_ids"].size(1) + rollout["completion_ids"].size(1)
        for name in _TOKEN_TYPES:
            if name in fields:  # a completion is text, of type 0
                ends = rollout["completion_ids"].size(1)
                types = pad([F.pad(torch.tensor(row), (0, ends)) for row in fields[name]], padding_side="left")
                output[name] = F.pad(types, (total - types.size(1), 0)).to(device)
        return output

    def _messages(self, row: dict[str, Any]) -> Any:
        """The prompt of a row with its evidence in it."""
        return with_evidence(row, self._modality, self.processing_class)

    def _evidence_count(self, row: dict[str, Any]) -> int:
        messages = self._messages(row)
        contents = [] if isinstance(messages, str) else [message["content"] for message in messages]
        return sum(part["type"] == self._modality.name for content in contents for part in content)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "answer", *IMAGE.columns, *self._modality.columns]

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's, with an empty list for a row without images: image processors do not take TRL's None."""
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        if images is not None:
            images = [row_images or [] for row_images in images]
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    # ------------------------------------------------------------------ the end of a step

    def _finish_step(self, model: nn.Module, plan: _StepPlan) -> None:
        """Leave the steered gradient in `.grad`, or none at all where a loss was not finite on any process."""
        if self._skip_update:
            self._gradients.discard()
            self._drop_update(model)
            return
        metrics: dict[str, Tensor | float] = {"steering/gamma": plan.gamma}
        if self._token_weights.enabled:
            metrics["steering/visual_token_weight"] = self._token_weights.mean()
        weights = plan.weights
        if plan.apart:
            record = self._gradients.combine(
                plan.policy, is_replicated(model), self._modules_to_record(), self._token_weights.scales()
            )
            if record is None:
                return
            if not torch.isfinite(record.gramian).all():  # the policy would go on with the other part alone
                self._skip_update = True
                self._note_gradient()
                self._drop_update(model)
                return
            weights = record.weights
            metrics |= record.metrics()
            self._recorder.record_modules(self.state.global_step + 1, record.modules)
            if self._predictor is not None:
                metrics |= self._refresh(self._predictor, plan.policy, record, plan.proxy_squares())
        elif self._predictor is not None:
            self._predictor.observe(plan.proxy_squares())
        self._token_weights.end_step()
        assert weights is not None
        metrics["steering/weight_ratio"] = self._weight_ratio = weight_ratio(weights)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last stop before the optimizer, where all processes know the norm of the gradient it would apply."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._skip_update and not self.is_deepspeed_enabled:
            if math.isfinite(norm):
                self._skipped.in_a_row = 0
            else:
                self._note_gradient()
                self._drop_update(model)
        self._skip_update = False
        return norm

    def _drop_update(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
        self._skipped.skip(self.state.global_step + 1)

    def _note_gradient(self) -> None:
        rows = describe_step(self._buffered_inputs, self._tokenizer)
        self._skipped.note(f"the gradient is not finite, of {rows}")

    def _refresh(
        self, predictor: GramianPredictor, policy: VisualGradientSteering, record: SteeringRecord, proxy: Tensor
    ) -> dict[str, Tensor | float]:
        """Measure anew; return how good the prediction for this very step would have been."""
        metrics: dict[str, Tensor | float] = {
            "steering/refreshed": 1.0,
            "steering/measured_weight_ratio": weight_ratio(record.weights),
        }
        predicted = None
        if predictor.ready:
            known = proxy if self.current_gradient_accumulation_steps == 1 else None
            predicted = predictor.predict(known)
            weights = predictor.weights(policy, known)
            metrics["steering/predicted_weight_ratio"] = weight_ratio(weights)
            metrics["steering/direction_cosine"] = direction_cosine(record.gramian, record.weights, weights)
        predictor.refresh(record.gramian, proxy, predicted)
        return metrics

    # ------------------------------------------------------------------ interruptions

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As TRL's, with `AtomicCheckpoints`; SIGTERM and SIGINT save a checkpoint and end it in `SystemExit`.

        Raises:
            TrainingStopped: too many updates in a row were skipped, the disk refused a checkpoint, or the student ran
                away from its teacher and `runaway_action` is ``"stop"``.
        """
        with self._interruption:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._runaway.stop_if_asked()
        return output

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "predictor": None if self._predictor is None else self._predictor.state_dict(),
            "token_weights": self._token_weights.state_dict(),
            "skipped_in_a_row": self._skipped.in_a_row,
            "adaptive_gamma": None if self._adaptive_gamma is None else self._adaptive_gamma.state_dict(),
            "runaway": self._runaway.state_dict(),
            "weight_ratio": self._weight_ratio.item(),
        }

    def _restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        if self._predictor is not None:
            self._predictor.load_state_dict(state["predictor"], self.accelerator.device)
        self._token_weights.load_state_dict(state["token_weights"], self.accelerator.device)
        self._skipped.in_a_row = state["skipped_in_a_row"]
        if self._adaptive_gamma is not None and state["adaptive_gamma"] is not None:
            self._adaptive_gamma.load_state_dict(state["adaptive_gamma"])
        self._runaway.load_state_dict(state["runaway"])
        self._weight_ratio = torch.tensor(state["weight_ratio"])

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochOrder:
        sampler: Any = super()._get_train_sampler(dataset)
        return EpochOrder(sampler, epoch=lambda: int(self.state.epoch or 0))

    # ------------------------------------------------------------------ what is logged

    @property
    def _training(self) -> bool:
        return self.model.training

    @property
    def _mode(self) -> str:
        return "train" if self._training else "eval"

    def _record_loss(self, result: MicroBatchLoss, inputs: dict[str, Any]) -> None:
        sums = result.sums()
        bad = result.non_finite()
        if self._training and len(bad):
            row, position = bad[0].tolist()
            token = self._tokenizer.decode(inputs["completion_ids"][row, position])
            rows = describe_rows(inputs, bad[:, 0].unique().tolist(), self._tokenizer)
            self._skipped.note(
                f"the loss of {len(bad)} token(s) is not finite, first at completion position {position} ({token!r}) "
                f"of row {row}, in {rows} of the micro-batch: the student put probability where a teacher has none, or "
                "an input is not finite"
            )
        self._sums = sums if self._sums is None else self._sums + sums
        if self._training and not self.accelerator.sync_gradients:
            return
        sums = sum_over_processes(self._sums)
        self._sums = None
        # The one wait for the device before the backward pass.
        *totals, tokens, bad_tokens, ratio = torch.cat([sums, self._weight_ratio.to(sums).reshape(1)]).tolist()
        means = [total / max(tokens, 1.0) for total in totals]
        values = dict(zip(("loss/full", "loss/lang", "loss/vis", "entropy"), means, strict=True))
        if self._training:
            self._skip_update = bad_tokens > 0
            if self._adaptive_gamma is not None and not self._skip_update:
                self._adaptive_gamma.observe(values["loss/lang"], values["loss/vis"])
            values |= self._runaway.observe(self.state.global_step + 1, values["loss/full"], ratio, self._cut_off)
        for name, value in values.items():
            self._metrics[self._mode][name].append(value)

    def _record_completions(self, inputs: dict[str, Any], contribution: Tensor | None) -> None:
        with self._timer.span("recording"):
            self._recorder.record_completions(self.state.global_step + 1, inputs, contribution, self._tokenizer)

    def _modules_to_record(self) -> dict[str, list[int]]:
        if not self._recorder.modules_due(self.state.global_step + 1):
            return {}
        return parameters_by_module(
            self.accelerator.unwrap_model(self.model), self._gradients.parameters, self._modality
        )

    def _record_times(self) -> None:
        times = self._timer.flush()
        step = times.pop("step") - times.pop("recording", 0.0)
        parts = {name: times.get(name, 0.0) for name in ("rollout", "teacher", "steering")}
        parts["student"] = step - sum(parts.values())
        if self.args.steering != "none":
            parts |= {name: times.get(name, 0.0) for name in ("masked_teacher", "masked_student")}
        for name, seconds in parts.items():
            self._metrics["train"][f"time/{name}"].append(seconds)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        self._timer.flush()  # its rollouts and passes belong to no training step
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Metrics stay on the device until they are logged: one synchronisation per logging step, not per step.
        for values in self._metrics[self._mode].values():
            values[:] = [value.item() if isinstance(value, Tensor) else value for value in values]
        super().log(logs, start_time)


def _batch_of(inputs: dict[str, Any]) -> Batch:
    return Batch(
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        inputs["completion_ids"],
        inputs["completion_mask"],
        {name: inputs[name] for name in _MULTIMODAL_KEYS if name in inputs},
        inputs.get("text_prompt_ids"),
        inputs.get("text_prompt_mask"),
    )


@contextmanager
def _image_token_named(config: PretrainedConfig, modality: Modality) -> Iterator[None]:
    """TRL asks the config of every model with a processor for its image token, which one that only hears lacks."""
    if modality is IMAGE or hasattr(config, "image_token_id"):
        yield
        return
    config.image_token_id = placeholder_ids(config, modality=modality)[0]
    try:
        yield
    finally:
        del config.image_token_id


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
