"""`vgs eval`: accuracy by free generation and the divergence from a teacher, each with and without the image.

With another `modality`, read video or audio for image, here and in the names of the results. The model writes greedily.
With the image it reads the row as it is; without, the same row as text alone. An answer is right if it equals the
answer column after case, outer punctuation and repeated white space are put aside; where `answer_pattern` is given, the
answer is the last match of that expression in the completion, otherwise all of it.

The divergences are means per token over the model's own completions, in nats: KL(student || teacher) on what it wrote
with the image, the language and the visual part of `method` and how much the teacher depends on the image
(`vgs_kernels.decomposed_kl`), and the same on what it wrote without, where all of it is language.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from trl import ModelConfig

from ..config import VGSConfig
from ..errors import InputError, one_sentence
from ..inputs.data import has_splits, is_same_source, load_rows, where
from ..inputs.dataset_checks import RowCheck
from ..inputs.families import EvidenceTokens, Family, check_modality, family_of
from ..inputs.formats import canonical_rows
from ..inputs.modalities import MODALITIES, Modality
from ..loss import DistillationLoss, LossSettings, hidden_states
from ..masking import Batch, with_evidence, without_evidence
from ..models.sources import check_installed, check_tokenizers, student_source, teacher_source
from ..resilience.output_dir import check_output_dir
from ..resilience.run_folder import settings_of
from .arguments import DatasetArguments, EvalArguments, eval_parser, given
from .fields import require


@dataclass(frozen=True)
class Measured:
    """One model on one set of rows, with the image, video or audio or without."""

    accuracy: float  # share of rows, 0..1
    mean_length: float  # tokens of a completion
    completions: tuple[str, ...]
    # Means per token, in nats; None without a teacher, and where the method has no such part.
    standard: float | None = None  # KL(student || teacher)
    lang: float | None = None
    vis: float | None = None
    dependency: float | None = None  # KL(teacher || teacher without the image)
    entropy: float | None = None  # of the student


def evaluate(arguments: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Run `vgs eval` with these flags; print the table, write the JSON file and return what it holds.

    Raises:
        InputError: something handed in cannot work; nothing has been written.
    """
    (settings, data, model), values = eval_parser().parse(arguments)
    require("eval", given(values))
    pattern = _check(settings)
    output = Path(settings.output_file)
    check_output_dir(output.parent)
    _render_as_trained(settings, model.model_name_or_path)
    split = data.dataset_test_split or ("test" if has_splits(data.dataset_name) else None)
    judge, rows = _prepare(settings, data, model, pattern, split)
    measured = {name: judge.measure(rows, evidence=name == "with_image") for name in ("with_image", "without_image")}
    source = where(data.dataset_name, split)
    trained_on = _trained_on(model.model_name_or_path, data.dataset_name, split)
    results = {
        "settings": {**asdict(settings), **asdict(data), "model_name_or_path": values["model_name_or_path"]},
        "rows": len(rows),
        "source": source,
        "trained_on": trained_on,
        **{name: asdict(result) for name, result in measured.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    console = console or Console()
    console.print(_table(measured, f"{len(rows)} rows, from {source}"))
    if trained_on:
        remark = "The model was trained on these very rows: this measures what it remembers, not what it can do."
        console.print(remark, soft_wrap=True)
    console.print(f"Written: {output}", soft_wrap=True, highlight=False)
    return results


def _prepare(
    settings: EvalArguments,
    data: DatasetArguments,
    model: ModelConfig,
    pattern: re.Pattern[str] | None,
    split: str | None,
) -> tuple[_Evaluator, Dataset]:
    """The models and the rows; what is cheap to check is checked before weights are loaded."""
    loss_config = _loss_config(settings)
    check_installed(model.attn_implementation, use_liger_kernel=False)
    assert model.model_name_or_path is not None
    student = student_source(model.model_name_or_path, settings, model)
    modality = MODALITIES[settings.modality]
    config = student.check(modality)
    check_modality(config, modality)
    if family_of(config).needs_image:
        raise InputError(
            f"every question is also asked without its image, but the processor of model type {config.model_type!r} "
            "takes no prompt without one"
        )
    processor = student.processor_to_sample(config)
    teacher = None
    if settings.teacher_model_name_or_path is not None:
        teacher = teacher_source(settings.teacher_model_name_or_path, settings, model)
        teacher.check(modality)
        check_tokenizers(processor, teacher)
    tokens = EvidenceTokens.of(config, processor, modality)
    rows = _rows(settings, data, split, modality)
    RowCheck(modality, processor, tokens.texts(processor), name=f"the dataset {data.dataset_name!r}").check(rows)
    device = loss_config.device
    judge = _Evaluator(
        settings,
        loss_config,
        pattern,
        processor,
        family_of(config),
        tokens,
        student.load(device).eval(),
        None if teacher is None else teacher.load(device).eval(),
    )
    return judge, rows


def _rows(settings: EvalArguments, data: DatasetArguments, split: str | None, modality: Modality) -> Dataset:
    """The rows to evaluate on, with their answers."""
    assert data.dataset_name is not None
    rows: Any = load_rows(
        data.dataset_name,
        split=split,
        config=data.dataset_config,
        prompt_column=data.prompt_column,
        image_column=data.image_column,
        modality=modality,
    )
    if settings.answer_column not in rows.column_names:
        listing = ", ".join(map(repr, rows.column_names))
        raise InputError(
            f"the dataset {data.dataset_name!r} has no column {settings.answer_column!r} (it has {listing}); name the "
            "one that holds the right answers with answer_column"
        )
    return rows if settings.max_rows is None else rows.select(range(min(settings.max_rows, len(rows))))


def _trained_on(model: str, name: str, split: str | None) -> bool:
    """Whether the model lies where `vgs train` left it, and was trained on these very rows."""
    run = settings_of(Path(model))
    trained = run.get("dataset_name")
    return trained is not None and is_same_source(name, split, trained, run.get("dataset_train_split"))


def _render_as_trained(settings: EvalArguments, model: str) -> None:
    """Prompts are rendered as the run that left the model rendered them, unless the settings say otherwise."""
    run = settings_of(Path(model))
    if settings.system_prompt is None:
        settings.system_prompt = run.get("system_prompt")
    if settings.chat_template_kwargs is None:
        settings.chat_template_kwargs = run.get("chat_template_kwargs")
    if isinstance(settings.chat_template_kwargs, str):
        with suppress(ValueError):
            settings.chat_template_kwargs = json.loads(settings.chat_template_kwargs)
    if not isinstance(settings.chat_template_kwargs, dict | None):
        raise InputError(
            f"chat_template_kwargs must be a mapping, as in '{{\"a\": 1}}', got {settings.chat_template_kwargs!r}"
        )


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation or white space at either end."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def read_answer(completion: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a completion, or None where the pattern finds none."""
    if pattern is None:
        return completion
    matches = list(pattern.finditer(completion))
    return matches[-1][1 if pattern.groups else 0] if matches else None


def _check(settings: EvalArguments) -> re.Pattern[str] | None:
    """The compiled answer pattern; InputError if a setting is out of range."""
    for name in ("max_rows", "batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    try:
        return None if settings.answer_pattern is None else re.compile(settings.answer_pattern, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"answer_pattern is not a regular expression: {error}") from None


def _loss_config(settings: EvalArguments) -> VGSConfig:
    """The settings of the loss; InputError if one cannot be."""
    try:
        return VGSConfig(
            method=settings.method,
            modality=settings.modality,
            max_completion_length=settings.max_completion_length,
            use_cpu=settings.use_cpu,
            bf16=False,
        )
    except ValueError as error:
        raise InputError(one_sentence(error)) from error


class _Evaluator:
    """A model, its processor and perhaps its teacher, on one device."""

    def __init__(
        self,
        settings: EvalArguments,
        loss_config: VGSConfig,
        pattern: re.Pattern[str] | None,
        processor: ProcessorMixin,
        family: Family,
        evidence_tokens: EvidenceTokens,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
    ) -> None:
        self.settings = settings
        self.loss = DistillationLoss(
            loss_config.select(LossSettings),
            evidence_tokens,
            family,
            run_student=hidden_states,
            run_teacher=hidden_states,
        )
        self.pattern = pattern
        self.processor: Any = processor
        self.tokenizer: Any = self.processor.tokenizer
        self.evidence_tokens = evidence_tokens
        self.student: Any = student
        self.teacher = teacher

    @torch.no_grad()
    def measure(self, rows: Dataset, *, evidence: bool) -> Measured:
        """Generate for all rows, judge the answers and score the tokens."""
        completions: list[str] = []
        right: list[bool] = []
        tokens = 0.0
        sums = dict.fromkeys(self.loss.logged if self.teacher is not None else (), 0.0)
        for start in range(0, len(rows), self.settings.batch_size):
            numbers = range(start, min(start + self.settings.batch_size, len(rows)))
            chunk = canonical_rows(
                rows.select(numbers), self.evidence_tokens.modality, self.processor, self.settings.system_prompt
            )
            batch, mask = self._generate(chunk, evidence)
            texts = self.tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
            for text, row in zip(texts, chunk, strict=True):
                found = read_answer(text, self.pattern)
                answer = str(row[self.settings.answer_column])
                right.append(found is not None and normalise(found) == normalise(answer))
            completions += texts
            tokens += float(mask.sum())
            for name, total in self._divergences(batch, mask).items():
                sums[name] += total
        means = {name: total / max(tokens, 1.0) for name, total in sums.items()}
        return Measured(sum(right) / len(right), tokens / len(right), tuple(completions), **means)

    def _divergences(self, batch: Batch, mask: Tensor) -> dict[str, float]:
        """Name -> sum over the tokens, of what the method logs; nothing without a teacher."""
        if self.teacher is None:
            return {}
        micro_batch = self.loss.micro_batch(self.student, self.teacher, batch, mask, 1.0)
        for _ in micro_batch:  # every view runs; nothing is run back
            pass
        sums = micro_batch.result.sums()
        return {name: sums[name].item() for name in self.loss.logged}

    def _generate(self, rows: list[dict[str, Any]], evidence: bool) -> tuple[Batch, Tensor]:
        """Prompts of canonical rows with greedy completions, and which of their tokens count."""
        inputs = self._inputs(rows, evidence).to(self.student.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.settings.max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.student.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            suppress_tokens=self.evidence_tokens.banned_while_sampling,
            disable_compile=True,
        )
        prompt_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]
        written = self.student.generate(**inputs, generation_config=config)[:, prompt_ids.size(1) :]
        ends = torch.isin(written, torch.tensor(config.eos_token_id, device=written.device))
        mask = (ends.cumsum(dim=1) - ends.long() == 0).to(prompt_mask.dtype)  # up to the first end, itself included
        multimodal = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        for name, value in multimodal.items():
            if name.endswith("token_type_ids"):  # a completion is text
                multimodal[name] = torch.cat([value, value.new_zeros(written.shape)], dim=1)
        text = self._inputs(rows, evidence=False).to(prompt_ids.device)
        return (
            Batch(prompt_ids, prompt_mask, written, mask, multimodal, text["input_ids"], text["attention_mask"]),
            mask,
        )

    def _inputs(self, rows: list[dict[str, Any]], evidence: bool) -> Any:
        """What the processor makes of canonical rows, padded on the left."""
        modality = self.evidence_tokens.modality
        template: Any = self.settings.chat_template_kwargs or {}
        return self.processor.apply_chat_template(
            [with_evidence(row, modality) if evidence else without_evidence(row["prompt"]) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **template,
        )


def _table(measured: dict[str, Measured], rows: str) -> Table:
    table = Table(title=f"{rows}, greedy completions; divergences per token, in nats")
    table.add_column("")
    for name in measured:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row("accuracy", *(f"{result.accuracy:.1%}" for result in measured.values()))
    table.add_row("tokens per completion", *(f"{result.mean_length:.1f}" for result in measured.values()))
    labels = {
        "standard": "KL(student || teacher)",
        "lang": "language part",
        "vis": "visual part",
        "dependency": "KL(teacher || teacher blind)",
        "entropy": "entropy of the student",
    }
    for part, label in labels.items():
        values = [getattr(result, part) for result in measured.values()]
        if None not in values:
            table.add_row(label, *(f"{value:.4f}" for value in values))
    return table
