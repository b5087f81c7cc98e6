"""What the teacher itself answers to the prompts whose completions are recorded, written greedily.

It stands beside the student's answer in the report. Greedy decoding draws no random number, and the answer is no part
of any loss, so a run with and without it ends with the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..config import SHARD, VGSConfig
from ..inputs.modalities import MODALITIES
from ..masking import with_evidence

logger = logging.get_logger(__name__)


class TeacherAnswers:
    """Asks the teacher, where it stands whole beside the student; `silent` says why it is not asked, or is None."""

    def __init__(
        self,
        args: VGSConfig,
        teacher: PreTrainedModel,  # as placed, in its wrapper if it has one
        processor: Any,  # the student's, or a tokenizer
        sampling: GenerationConfig,  # of the student: which tokens end an answer, which must not be in one
        accelerator: Accelerator,
    ) -> None:
        self._teacher = teacher
        self._processor = processor
        self._tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._modality = MODALITIES[args.modality]
        self._chat_template_kwargs: Any = args.chat_template_kwargs or {}
        self._accelerator = accelerator
        self._config = GenerationConfig(
            do_sample=False,
            max_new_tokens=args.max_completion_length,
            pad_token_id=sampling.pad_token_id,
            eos_token_id=sampling.eos_token_id,
            suppress_tokens=sampling.suppress_tokens,
            disable_compile=True,
        )
        self.silent = _why_silent(args, accelerator)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Its answer to each dataset row; None for all where it is not asked."""
        if self.silent is not None:
            return [None] * len(rows)
        try:
            return list(self._answers(rows))
        except Exception as error:  # a family or a memory that cannot: no reason to end a run
            self.silent = f"it could not write: {type(error).__name__}"
            logger.warning("the report goes without the teacher's own answers, training goes on: %s", error)
            return [None] * len(rows)

    @torch.no_grad()
    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        teacher: Any = self._accelerator.unwrap_model(self._teacher).eval()
        inputs = self._inputs(rows).to(self._accelerator.device)
        with self._accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            written = teacher.generate(**inputs, generation_config=self._config)[:, inputs["input_ids"].size(1) :]
        ends = torch.isin(written, torch.tensor(self._config.eos_token_id, device=written.device)).cumsum(dim=1) > 0
        return [
            self._tokenizer.decode(ids[~end], skip_special_tokens=True) for ids, end in zip(written, ends, strict=True)
        ]

    def _inputs(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """What the processor makes of the rows, padded on the left as for sampling."""
        return self._processor.apply_chat_template(
            [with_evidence(row, self._modality) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **self._chat_template_kwargs,
        )


def _why_silent(args: VGSConfig, accelerator: Accelerator) -> str | None:
    if not args.record_teacher_answers:
        return "record_teacher_answers is off"
    if accelerator.distributed_type == DistributedType.DEEPSPEED or args.teacher_sharding == SHARD:
        return "it is sharded, and would write only with all processes at once"
    if args.teacher_device is not None:
        return f"it is not beside the student (teacher_device is {args.teacher_device!r})"
    return None
