"""`VGSTrainer`: TRL's `DistillationTrainer` with a loss that steers the student towards what the teacher sees.

How one step runs:

    training_step
        SteeringStep.plan              before the first micro-batch: known weights, or parts kept apart to be measured
        compute_loss                   for every micro-batch
            DistillationLoss           the losses of each view of the student, one view after the other
                SteeringStep.run_back  runs them back; the last one is left to the Trainer
        SteeringStep.finish            after the last: one gradient in `.grad`, which the Trainer clips and applies
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .config import OFFLOAD, VGSConfig
from .inputs.families import check_image_mask, check_teacher_reads_the_same
from .loss import DistillationLoss, LossSettings, hidden_states
from .masking import Batch
from .micro_batch_loss import MicroBatchLoss
from .models.heads import backbone, compile_backbone, without_compile_wrapper
from .models.modules import parameters_by_module
from .models.sources import student_source, teacher_source
from .models.teacher import place_teacher
from .models.vocabulary import shared_vocabulary
from .report.dependency_angles import dependency_angles, why_not_measured
from .report.loss_meter import LossMeter
from .report.model_card import ModelCards
from .report.recording import RunRecorder
from .report.teacher_answers import TeacherAnswers
from .report.trackers import Trackers
from .resilience.checkpoints import AtomicCheckpoints
from .resilience.interruption import Interruption
from .resilience.nonfinite import SkippedUpdates, describe_step, describe_tokens
from .resilience.output_dir import check_output_dir
from .resilience.runaway import RunawayMonitor
from .rollouts import Rollouts, loss_mask
from .steering.methods import METHODS
from .steering.step import SteeringSettings, SteeringStep


class VGSTrainer(ModelCards, AtomicCheckpoints, Rollouts):  # type: ignore[misc] # TRL's own card differs, too
    """On-policy distillation of a model that sees or hears, with visual gradient steering.

    Takes what TRL's `DistillationTrainer` takes, with a `VGSConfig`. Per step it logs, besides TRL's metrics and
    through the same `report_to`:

    * ``loss/standard``: KL(student || teacher), mean per token, in nats
    * ``loss/lang``, ``loss/vis``: the language and the visual part of the method (`vgs_kernels.decomposed_kl`), mean
      per token, in nats; ``dependency``: KL(teacher || teacher without the image), the same
    * ``entropy``: entropy of the student, mean per token, in nats
    * ``gradient/norm_standard``, ``gradient/norm_vis``, ``gradient/norm_lang``, ``gradient/cosine``: norms and cosine
      of the two accumulated parameter gradients that the method weighs, at steps that measure them
    * ``steering/gamma``; ``steering/eta`` (``vgs`` and ``language``); ``steering/language_preservation``: λ
    * ``steering/weight_ratio``: weight of the second gradient over that of the first
    * ``steering/visual_token_weight``: mean weight of a token in the visual part, before the part is divided by it
      (with a number for ``token_steering``, or ``plausibility``)
    * ``steering/refreshed`` and ``steering/direction_cosine``, at a refresh of ``eta="amortized"``: 1, and the cosine
      between the update of the average and that of the measurement
    * ``runaway/divergence_growth``, ``runaway/weight_growth``, ``runaway/cut_off_rise``,
      ``runaway/language_growth``: the readings of
      `RunawayMonitor`; ``runaway/alarm``: 1 from its alarm on
    * ``time/rollout``, ``time/teacher``, ``time/student`` (forward and backward), ``time/steering``: seconds; and of
      the forward passes ``time/masked_teacher`` and ``time/masked_student``, which are part of teacher and student

    Where a loss is not finite (the student puts mass where a teacher has none) or a gradient is not, the update of the
    step is skipped, with a warning that names the rows; `max_skipped_steps` in a row end training with
    `TrainingStopped`. `runaway_action` says what happens when the student runs away from its teacher.

    Raises:
        ValueError: the model does not read the modality, a dataset row cannot be read, there are fewer rows than one
            step takes, or the output directory cannot be written.

    Source: arXiv 2606.00564 (steering), arXiv 2306.13649 (on-policy distillation).
    """

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
        teacher = teacher_source(teacher_model, args)
        teacher.check()
        super().__init__(
            student_source(model, args),
            args,
            train_dataset,
            processing_class,
            teacher_model=None,  # TRL would put it beside the student, and take no other padding of the vocabulary
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            **kwargs,
        )
        vocab_size = self._take_teacher(teacher.load())
        self._never_sample(vocab_size)
        if args.torch_compile:
            compile_backbone(self.model, args.torch_compile_backend, args.torch_compile_mode)
        self._skipped = SkippedUpdates(args.max_skipped_steps)
        self._skip_update = False  # the same on all processes
        method = METHODS[args.method]
        self._runaway = RunawayMonitor(args.runaway_action if method.second else "none", "vis" in method.parts)
        self._cut_off = math.nan  # share of the last completions that end at the length limit
        self._interruption = Interruption()
        self._recorder = self._make_recorder()
        for callback in (self._runaway, self._interruption, self._recorder):
            self.add_callback(callback)
        if METHODS[args.method].masks_teacher:
            check_image_mask(self.model.config, args.image_mask)
        self._steering = SteeringStep(
            args.select(SteeringSettings), self.accelerator.device, guard=self._runaway.bounded
        )
        self.checkpoint_parts = {"skipped": self._skipped, "runaway": self._runaway, "steering": self._steering}
        self._loss = DistillationLoss(
            args.select(LossSettings, vocab_size=vocab_size),
            self._evidence_tokens,
            self._family,
            run_student=self._run_student,
            run_teacher=self._run_teacher,
            span=self._timer.span,
            stand_in=self._stand_in_prompt,
        )
        self._meter = LossMeter(self._loss.logged)
        self._micro_batch_loss = torch.zeros(())  # KL(student || teacher), for the log

    def _take_teacher(self, teacher: PreTrainedModel) -> int:
        """Check and place the teacher; return how many entries its vocabulary shares with the student's."""
        args, student = self.args, self.model.config
        check_teacher_reads_the_same(student, teacher.config, self._modality)
        shared = shared_vocabulary(student, teacher.config, len(self._tokenizer))
        self.teacher_model = place_teacher(teacher, self.accelerator, args.teacher_device, args.teacher_sharding)
        return shared

    def _make_recorder(self) -> RunRecorder:
        teacher = self.teacher_model
        answers = TeacherAnswers(self.args, teacher, self.processing_class, self.generation_config, self.accelerator)
        trackers = Trackers(self.callback_handler.callbacks)
        return RunRecorder(
            self.args, self.model, teacher, answers, trackers, angles_silent=why_not_measured(self.accelerator)
        )

    def loss_of(self, method: str) -> DistillationLoss:
        """The loss of any method over the models as they are, for what measures them outside of training."""
        settings = replace(self._loss.settings, method=method)
        return DistillationLoss(settings, self._evidence_tokens, self._family, hidden_states, hidden_states)

    # ------------------------------------------------------------------ the step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        steering = self._steering
        with self._timer.span("step"):
            if not steering.planned:
                steering.plan(without_compile_wrapper(model), self.state.global_step, self.state.max_steps)
            with steering.micro_batch():
                super().training_step(model, inputs, num_items_in_batch)  # runs back what compute_loss returns
            if self.accelerator.sync_gradients:
                with self._timer.span("steering"):
                    self._finish_step(steering, model)
        if self.accelerator.sync_gradients:
            self._record_times()
        return self._micro_batch_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the loss that is left for the Trainer to run back, in evaluation KL(student || teacher)."""
        model, steering = without_compile_wrapper(model), self._steering
        self._wrapped_student = model
        if self._training:
            # DDP and FSDP average gradients over processes; the sum over tokens must not be divided twice.
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        else:
            items = inputs["completion_mask"].sum().clamp(min=1)
        self.teacher_model.eval()
        if self._training:
            self._record_angles(inputs)
        micro_batch = self._loss.micro_batch(
            self.accelerator.unwrap_model(model),
            self.accelerator.unwrap_model(self.teacher_model),
            Batch.of(inputs),
            loss_mask(inputs),
            items,
            steering.weights if self._training else None,
            self._training and steering.preserves,
            adds_to_grad=self._training and self.accelerator.scaler is None and not self.is_deepspeed_enabled,
        )
        left = None
        with self.accelerator.autocast():
            for view in micro_batch:
                if self._training:
                    left = steering.run_back(view, self._run_back)
        result = micro_batch.result
        self._record_loss(steering, result, inputs)
        self._record_completions(inputs, result)
        loss = self._micro_batch_loss = result.per_token["standard"].sum() / items
        if self._training:
            assert left is not None
            steering.add_token_weights(result.vis_weights)
            loss = left
        return (loss, None) if return_outputs else loss

    def _run_back(self, loss: Tensor, keep: bool) -> None:
        with torch.autocast(self.accelerator.device.type, enabled=False):
            self.accelerator.backward(loss, retain_graph=keep)

    def _run_student(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Through the wrapper of the student: what is trained leaves by its output, as FSDP2 needs."""
        return self._forward_redirection(self._wrapped_student, model, self._run_backbone, model, batch)

    def _run_backbone(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return self._get_last_hidden_state(
            model, batch.input_ids, batch.attention_mask, batch.completion_ids.size(1), **batch.multimodal
        )

    def _run_teacher(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Through the wrapper of the teacher, whose weights may be sharded."""
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
        """As TRL's, but timed, and with every input that a family or a mask needs."""
        teacher = unwrapped_model is self.accelerator.unwrap_model(self.teacher_model)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **multimodal}
        if teacher and self.args.teacher_device not in (None, OFFLOAD):
            inputs = send_to_device(inputs, self.args.teacher_device)
        # accelerate casts in a model's own forward, which is not called: the loss needs no logits.
        with self._timer.span("teacher") if teacher else nullcontext(), self.accelerator.autocast():
            output = backbone(unwrapped_model)(use_cache=False, **inputs)
        return output.last_hidden_state[:, :-1][:, -logits_to_keep:].to(input_ids.device)

    # ------------------------------------------------------------------ the end of a step

    def _finish_step(self, steering: SteeringStep, model: nn.Module) -> None:
        """Leave the steered gradient in `.grad`; none where it or a loss is not finite on some process."""
        if self._skip_update:
            steering.discard()
        else:
            record = steering.finish(self._modules_to_record)
            if record.finite:
                self._recorder.record_modules(self.state.global_step + 1, record.modules)
                for name, value in record.metrics.items():
                    self._metrics["train"][name].append(value)
                return
            self._skip_update = True
            self._note_gradient()
        self._drop_update(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called right before the optimizer, when all processes know the norm of the gradient it would apply."""
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

    # ------------------------------------------------------------------ interruptions

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As TRL's, from whole checkpoints; SIGTERM and SIGINT save one at the end of the step and raise `SystemExit`.

        Raises:
            TrainingStopped: too many updates in a row were skipped, the disk refused a checkpoint, or the student ran
                away from its teacher and `runaway_action` is ``"stop"``.
        """
        with self._interruption:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._runaway.stop_if_asked()
        return output

    # ------------------------------------------------------------------ what is logged

    @property
    def _training(self) -> bool:
        return self.model.training

    @property
    def _mode(self) -> str:
        return "train" if self._training else "eval"

    def _rolled_out(self, rows: list[dict[str, Any]], rollout: dict[str, Any]) -> None:
        if self._training:
            self._cut_off = self._metrics["train"]["completions/clipped_ratio"][-1]
            with self._timer.span("recording"):
                self._recorder.mark_examples(self.state.global_step + 1, rollout, rows)

    def _record_loss(self, steering: SteeringStep, result: MicroBatchLoss, inputs: dict[str, Any]) -> None:
        self._meter.add(result.sums())
        bad = result.non_finite()
        if self._training and len(bad):
            self._skipped.note(describe_tokens(inputs, bad, self._tokenizer))
        if self._training:
            self._recorder.add_losses(result)
        if self._training and not self.accelerator.sync_gradients:
            return
        values, not_finite, ratio = self._meter.read(steering.weight_ratio)
        if self._training:
            self._skip_update = not_finite
            if all(map(math.isfinite, values.values())):
                steering.observe(values)
            values |= self._runaway.observe(self.state.global_step + 1, values, ratio, self._cut_off)
        for name, value in values.items():
            self._metrics[self._mode][name].append(value)

    def _record_completions(self, inputs: dict[str, Any], result: MicroBatchLoss) -> None:
        with self._timer.span("recording"):
            self._recorder.record_completions(
                self.state.global_step + 1, inputs, result.contribution, result.dependency(), self._tokenizer
            )

    def _record_angles(self, inputs: dict[str, Any]) -> None:
        """Where it is due, measure the micro-batch; before its own passes, whose activations would lie beside."""
        step = self.state.global_step + 1
        if not self._recorder.angles_due(step):
            return
        student, teacher = map(self.accelerator.unwrap_model, (self.model, self.teacher_model))
        with self._timer.alone("recording"), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            angles = dependency_angles(
                self._loss, student, teacher, Batch.of(inputs), loss_mask(inputs), self._run_backbone
            )
            self._recorder.record_angles(step, angles)

    def _modules_to_record(self, parameters: Sequence[nn.Parameter]) -> dict[str, list[int]]:
        if not self._recorder.modules_due(self.state.global_step + 1):
            return {}
        return parameters_by_module(self.accelerator.unwrap_model(self.model), parameters, self._modality)

    def _record_times(self) -> None:
        times = self._timer.flush()
        step = times.pop("step") - times.pop("recording", 0.0)
        parts = {name: times.get(name, 0.0) for name in ("rollout", "teacher", "steering")}
        parts["student"] = step - sum(parts.values())
        method = self._steering.method
        for name, runs in (("masked_teacher", method.masks_teacher), ("masked_student", method.masks_student)):
            if runs:
                parts[name] = times.get(name, 0.0)
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
