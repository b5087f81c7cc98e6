"""Rollouts on prompts with images, video or audio, by TRL's `DistillationTrainer`.

TRL samples the completions. This file gives it prompts that the processor can take, and adds to what it returns: the
features of video and audio, and the prompts without their evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging
from trl import DistillationTrainer
from trl.trainer.utils import pad

from .config import VGSConfig
from .distributed import allow_fsdp_on_cpu, on_any_process, use_one_gpu
from .errors import InputError
from .inputs.dataset_checks import RowCheck
from .inputs.families import EvidenceTokens, check_modality, family_of, placeholder_ids
from .inputs.formats import PROMPT_COLUMNS, canonical_rows
from .inputs.modalities import IMAGE, MODALITIES, Modality
from .inputs.stand_in import stand_in
from .masking import TOKEN_TYPES, Batch, multimodal_inputs, with_evidence, without_evidence
from .models.sources import ModelSource, check_no_adapter
from .report.timing import StepTimer
from .resilience.sampler import EpochOrder
from .steering.methods import METHODS

logger = logging.get_logger(__name__)


def loss_mask(rollout: dict[str, Any]) -> Tensor:
    """The tokens that the student wrote itself, (rows, completion)."""
    mask: Tensor = rollout["completion_mask"]
    return mask if "tool_mask" not in rollout else mask * rollout["tool_mask"]


class Rollouts(DistillationTrainer):
    """A `DistillationTrainer` whose rollouts hold all that a model reads, with its evidence and without.

    Raises:
        ValueError: the model does not read the modality, a dataset row cannot be read, or there are fewer rows than one
            step takes.
    """

    args: VGSConfig
    model: PreTrainedModel
    _signature_columns: Any

    def __init__(
        self,
        student: ModelSource,
        args: VGSConfig,
        train_dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        **kwargs: Any,
    ) -> None:
        self._modality = MODALITIES[args.modality]
        config = student.check()
        check_modality(config, self._modality)
        check_no_adapter(student)
        processing_class = student.processor_to_sample(config, processing_class)
        rows = RowCheck.of(args, config, processing_class)
        rows.check(train_dataset)
        rows.check_evaluation(kwargs.get("eval_dataset"))
        model = student.model
        if model is None:
            model = student.load(quantization_config=kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None  # TRL would say that it ignores them
        if args.distributed_state is not None:
            allow_fsdp_on_cpu(args.distributed_state)
        use_one_gpu(args)
        with _image_token_named(model.config, self._modality):
            super().__init__(
                model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
            )
        collate: Any = partial(
            canonical_rows,
            modality=self._modality,
            processor=self.processing_class,
            system_prompt=args.system_prompt,
        )
        self.data_collator = collate  # rows of every form become one where the data loader hands them on
        self._family = family_of(self.model.config)
        self._evidence_tokens = EvidenceTokens.of(self.model.config, self.processing_class, self._modality)
        self._stand_in = stand_in(self._modality, self.processing_class)
        self._any_short_prompt = False  # on any process, so far
        if self.is_fsdp_enabled:
            sampler: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            # transformers lets a process sample on until all have ended only where it has sharded the model itself.
            sampler._is_fsdp_managed_module = True
        self._timer = StepTimer(self.accelerator.device)

    def _never_sample(self, vocab_size: int) -> None:
        """Ban placeholders of evidence, and what pads the vocabulary beyond `vocab_size` entries, from completions."""
        padding = range(vocab_size, self.model.config.get_text_config().vocab_size)
        own = self.generation_config.suppress_tokens or []
        banned = {*self._evidence_tokens.banned_while_sampling, *padding, *own}
        self.generation_config.suppress_tokens = sorted(banned)
        self.generation_kwargs["suppress_tokens"] = sorted(banned)
        if self.args.use_vllm:  # which takes banned tokens as text
            words = self._tokenizer.convert_ids_to_tokens(self._evidence_tokens.banned_while_sampling)
            options = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {**options, "bad_words": [*options.get("bad_words", []), *words]}

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """As TRL's, but a micro-batch without evidence gets no features of other micro-batches: towers fail on them."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self._evidence_tokens.is_placeholder(inputs["prompt_ids"]).any():
            inputs = {name: value for name, value in inputs.items() if name not in self._modality.keys}
        elif self._modality is not IMAGE:
            inputs = {**inputs, **{name: torch.cat(inputs[name]) for name in self._modality.keys if name in inputs}}
        elif self._family.counts_images:
            counts = [count for count in inputs["num_images"] if count]
            inputs = {**inputs, "batch_num_images": torch.tensor(counts, device=inputs["prompt_ids"].device)}
        return inputs

    def roll_out(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Prompts of these rows, with their evidence and without, and a completion of each as training samples them."""
        collate: Any = self.data_collator
        return self._generate_and_score_completions(collate(rows))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._family.needs_image and not all(row[self._modality.plural] for row in inputs):
            raise InputError(
                f"a row has no image, but the processor of model type {self.model.config.model_type!r} takes no prompt "
                "without one; filter such rows out"
            )
        with self._timer.span("rollout"):
            rows, left_out = self._without_long_prompts(inputs)
            rollout = self._sample(rows)
            if self.args.max_prompt_length is not None:
                rollout["completion_mask"][left_out] = 0
                rollout["num_items_in_batch"] = self.accelerator.gather(loss_mask(rollout).sum()).sum()
            if (
                METHODS[self.args.method].masks_teacher
                and self.args.image_mask == "drop"
                and self._modality.features in rollout
            ):
                rollout |= self._text_prompts(rows, rollout["prompt_ids"], rollout["prompt_mask"])
        self._rolled_out(rows, rollout)
        return rollout

    def _rolled_out(self, rows: list[dict[str, Any]], rollout: dict[str, Any]) -> None:
        """A hook for records of rollouts; `rows`: what completions were sampled for, stand-ins included."""

    def _sample(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, completed for video, audio and the families that need more."""
        # Shapes change with every sampled token: torch.compile would make a graph for each.
        with torch.compiler.set_stance("force_eager"):
            if self._modality is IMAGE:
                rollout: dict[str, Any] = super()._generate_and_score_completions(rows)
            else:
                rollout = super()._generate_and_score_completions([{"prompt": self._messages(row)} for row in rows])
                rollout |= self._features(rows, rollout)
        if self._family.pads_images:
            rollout.pop("num_images", None)  # TRL would cut by images what is laid out by rows
        if self._family.bidirectional_prompt and "token_type_ids" in rollout:
            # TRL writes 0, as it does for other families; here that would let completion tokens see later ones.
            rollout["token_type_ids"][:, rollout["prompt_ids"].size(1) :] = 1
        return rollout

    def _without_long_prompts(self, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """The rows with a stand-in for each whose prompt is too long, and the indices of those.

        Nothing is cut: half an image is worth nothing, and a question without its end little. Stand-ins keep batches
        rectangular; their completions do not count.
        """
        limit = self.args.max_prompt_length
        if limit is None:
            return inputs, []
        lengths = [len(self._tokenize_prompts([self._messages(row)])[0][0]) for row in inputs]
        left_out = [index for index, length in enumerate(lengths) if length > limit]
        if not self._any_short_prompt:
            (self._any_short_prompt,) = on_any_process(
                [torch.tensor(len(left_out) < len(inputs), device=self.accelerator.device)]
            )
        if not self._any_short_prompt:
            raise InputError(
                f"every prompt so far is longer than max_prompt_length={limit} tokens, {self._modality.plural} "
                f"included (the shortest has {min(lengths)}); raise the limit or make them smaller"
            )
        if left_out:
            logger.warning(
                "step %d: %d of %d prompts are longer than max_prompt_length=%d tokens, %s included (the longest has "
                "%d), and are left out.",
                self.state.global_step + 1, len(left_out), len(inputs), limit, self._modality.plural, max(lengths),
            )  # fmt: skip
        return [self._stand_in if index in left_out else row for index, row in enumerate(inputs)], left_out

    def _stand_in_prompt(self) -> Batch:
        """The stand-in as the inputs of a forward pass, without a completion."""
        ids, _, fields = self._tokenize_prompts([self._messages(self._stand_in)])
        tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in fields.items()}
        if self._family.counts_images:
            tensors["batch_num_images"] = torch.tensor([1])
        prompt: dict[str, Any] = {"prompt_ids": torch.tensor(ids), "prompt_mask": torch.ones_like(torch.tensor(ids))}
        prompt |= self._text_prompts([self._stand_in], prompt["prompt_ids"], prompt["prompt_mask"])
        prompt |= {"completion_ids": prompt["prompt_ids"][:, :0], "completion_mask": prompt["prompt_mask"][:, :0]}
        return Batch.of(send_to_device(prompt | multimodal_inputs(tensors), self.accelerator.device))

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """As TRL's; where weights are sharded and another process runs the tower, this one does, too."""
        seeing = torch.tensor(self._modality.features in multimodal_fields, device=self.accelerator.device)
        run: Any = partial(super()._generate_single_turn, *args, **kwargs)
        if self.use_vllm or not self.is_fsdp_enabled or not on_any_process([seeing])[0] or seeing:
            completions: list[list[int]] = run(prompt_ids, images, multimodal_fields)
            return completions
        ids, _, fields = self._tokenize_prompts([self._messages(self._stand_in)])
        types = {
            name: [*([0] * len(row) for row in prompt_ids), *fields[name]] for name in TOKEN_TYPES if name in fields
        }
        completions = run([*prompt_ids, *ids], images, {**fields, **types})
        return completions[:-1]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if not self._family.one_prompt_at_a_time:
            return super()._tokenize_prompts(prompts)
        rows = [super(Rollouts, self)._tokenize_prompts([prompt]) for prompt in prompts]
        names = rows[0][2].keys() - {"labels"}  # of no use in sampling
        fields = {name: [value for row in rows for value in row[2][name]] for name in names}
        return [row[0][0] for row in rows], [(row[1] or [None])[0] for row in rows], fields

    def _text_prompts(self, inputs: list[dict[str, Any]], prompt_ids: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
        """The prompts without their evidence, tokenized and padded."""
        if self._family.needs_image:
            # It cannot render them without; but what it adds for an image is image tokens only.
            kept = prompt_mask.bool() & ~self._evidence_tokens.is_placeholder(prompt_ids)
            rows = [ids[keep] for ids, keep in zip(prompt_ids, kept, strict=True)]
        else:
            prompts = [without_evidence(row["prompt"]) for row in inputs]
            rows = [torch.tensor(ids) for ids in self._tokenize_prompts(prompts)[0]]
        padded = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
        return {"text_prompt_ids": padded.to(prompt_ids.device), "text_prompt_mask": mask.to(prompt_ids.device)}

    def _features(self, rows: list[dict[str, Any]], rollout: dict[str, Any]) -> dict[str, Any]:
        """The processor's features of the evidence, by row, and types of all tokens: TRL keeps those of images only."""
        counts = [len(row[self._modality.plural]) for row in rows]
        if not any(counts):
            return {}
        fields = self._tokenize_prompts([self._messages(row) for row in rows])[2]
        device = self.accelerator.device
        tensors = {name: torch.as_tensor(np.asarray(fields[name])) for name in self._modality.keys if name in fields}
        output: dict[str, Any] = self._modality.split_by_row(send_to_device(tensors, device), counts)
        total = rollout["prompt_ids"].size(1) + rollout["completion_ids"].size(1)
        for name in TOKEN_TYPES:
            if name in fields:  # a completion is text, of type 0
                ends = rollout["completion_ids"].size(1)
                types = pad([F.pad(torch.tensor(row), (0, ends)) for row in fields[name]], padding_side="left")
                output[name] = F.pad(types, (total - types.size(1), 0)).to(device)
        return output

    def _messages(self, row: dict[str, Any]) -> Any:
        """The prompt of a row with its evidence in it."""
        return with_evidence(row, self._modality)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*PROMPT_COLUMNS, "answer", *self._modality.columns]

    def _generate(self, prompts: list[Any]) -> Any:
        """As TRL's, but with an empty list for a row without images: image processors do not take None."""
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        if any(tool_images):
            raise InputError(
                "a tool returned an image, which the views without images would keep; let tools return text, or train "
                "without them"
            )
        if images is not None:
            images = [row_images or [] for row_images in images]
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochOrder:
        sampler: Any = super()._get_train_sampler(dataset)
        return EpochOrder(sampler, epoch=lambda: int(self.state.epoch or 0))


@contextmanager
def _image_token_named(config: PretrainedConfig, modality: Modality) -> Iterator[None]:
    """TRL asks every model that has a processor for its image token; one that only hears has none."""
    if modality is IMAGE or hasattr(config, "image_token_id"):
        yield
        return
    config.image_token_id = placeholder_ids(config, modality=modality)[0]
    try:
        yield
    finally:
        del config.image_token_id
