"""What a run leaves behind for its report: a log that grows line by line and survives SIGKILL, and small pictures.

    RUN_DIR/recording/log.jsonl    one JSON object a line, `kind` says which (below)
    RUN_DIR/recording/images/      pictures that completions belong to, named by their content

    start        a (resumed) training begins at `step`, of `max_steps`; `settings` of the run; why there are no answers
                 of the teacher, `teacher_silent`, and no angles, `angles_silent`, null where there are. What was logged
                 before for later steps is superseded.
    metrics      `values`: what the trainer logged after `step`
    completion   one of `step`: `prompt`, `images` (file names), `tokens` (texts), and `log_ratios`, log q - log r of
                 each token in nats, teacher with against teacher without the image, and `dependency`, its VDS in nats;
                 null where no masked teacher ran, or the method has no VDS;
                 `reference`, the row's column `answer`, and `teacher`, what it writes itself: null where there is none
    modules      `norms_first`, `norms_second`, `cosines` of the gradients of two `parts` at `step`, per module in
                 `names`
    dependency   `tokens`, mean VDS `dependency`, `norm_...` of the gradients of standard, vis and lang and `angle_...`
                 between them (degrees; null where one is zero), per group of tokens of a micro-batch, by rising VDS
    thirds       `standard`, `vis`, `lang`: mean loss of the `tokens` of each third by VDS, since the record before
    end          training returned at `step`

Every record carries `step` and `time` (seconds since 1970). A line is appended by one write; one that a crash cut off
is no JSON, and the reader (`log.py`) passes over it. What is recorded decides nothing about training.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.image_utils import load_image
from transformers.utils import logging
from trl import DistillationConfig

from ..config import VGSConfig
from ..micro_batch_loss import MicroBatchLoss
from ..steering.methods import METHODS
from .dependency_angles import DependencyAngles
from .dependency_losses import DependencyLosses
from .log import IMAGE_FOLDER, LOG_FILE
from .model_card import model_name
from .teacher_answers import TeacherAnswers
from .trackers import Trackers

logger = logging.get_logger(__name__)

COMPLETIONS_PER_RECORD = 4
_LONGEST_SIDE = 384  # of a kept picture, in pixels: sharp at the width of a phone
_PNG_UP_TO = 128  # pixels; JPEG blurs what is that small, and saves nothing
_TRL_SETTINGS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_completion_length",
    "temperature",
    "max_grad_norm",
    "seed",
)


@dataclass(frozen=True)
class Marked:
    """A dataset row whose completion is to be recorded, as it travels with its batch."""

    row: Mapping[str, Any]
    teacher: str | None  # what the teacher itself answers


class RunRecorder(TrainerCallback):
    """Appends to the log of a run, on the main process only. A disk that refuses ends the recording, not the run."""

    def __init__(
        self,
        config: VGSConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        teacher_answers: TeacherAnswers,
        trackers: Trackers,
        angles_silent: str | None = None,  # why angles cannot be measured
    ) -> None:
        self._teacher_answers = teacher_answers
        self._trackers = trackers
        self._run_dir = Path(config.output_dir or ".")
        self._completions = _Interval(config.record_completions_every)
        self._modules = _Interval(config.record_modules_every)
        self._parts = METHODS[config.method].pair
        self._angles = _Interval(config.record_dependency_every)
        self._angles_silent = angles_silent if config.record_dependency_every else None
        self._thirds = DependencyLosses(config.device) if "vis" in METHODS[config.method].parts else None
        self._settings = {"student": model_name(student), "teacher": model_name(teacher)}
        self._settings |= {name: getattr(config, name) for name in (*_TRL_SETTINGS, *_own_settings())}
        self._recording = False

    # ------------------------------------------------------------------ callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recording = state.is_world_process_zero
        with self._disk():
            (self._run_dir / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
            _end_last_line(self._run_dir / LOG_FILE)
        self._append(
            "start",
            state.global_step,
            max_steps=state.max_steps,
            settings=self._settings,
            teacher_silent=self._teacher_answers.silent,
            angles_silent=self._angles_silent,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._append("metrics", state.global_step, values=_finite_numbers(logs or {}))
        thirds = self._thirds.read() if self._thirds is not None else None
        if thirds is not None:
            self._append("thirds", state.global_step, **thirds)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trackers.show(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._append("end", state.global_step)
        self._recording = False

    # ------------------------------------------------------------------ records

    def mark_examples(self, step: int, batch: dict[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
        """Where `step` is due, send the first few dataset rows along with their batch, which is shuffled and split."""
        if self._completions.due(step):
            rows = [dict(example) for example in examples[:COMPLETIONS_PER_RECORD]]
            answers = self._teacher_answers(rows) if self._recording else [None] * len(rows)
            marked = [Marked(row, answer) for row, answer in zip(rows, answers, strict=True)]
            batch["examples"] = [*marked, *[None] * (len(examples) - len(marked))]

    @staticmethod
    def marked_rows(batch: Mapping[str, Any]) -> list[int]:
        """The rows of a micro-batch whose completions are to be recorded."""
        return [row for row, example in enumerate(batch.get("examples", [])) if example is not None]

    def record_completions(
        self,
        step: int,
        batch: Mapping[str, Any],
        log_ratios: Tensor | None,  # (rows, completion)
        dependency: Tensor | None,  # (rows, completion)
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Write down the marked rows of a micro-batch."""
        for row in self.marked_rows(batch) if self._recording else []:
            length = int(batch["completion_mask"][row].sum())
            marked = batch["examples"][row]
            images: list[str] = []
            with self._disk():
                images.extend(map(self._keep_image, marked.row.get("images", [])))
            completion = {
                "prompt": _prompt_text(marked.row["prompt"]),
                "images": images,
                "tokens": token_texts(tokenizer, batch["completion_ids"][row, :length].tolist()),
                "log_ratios": None if log_ratios is None else _rounded(log_ratios[row, :length]),
                "dependency": None if dependency is None else _rounded(dependency[row, :length]),
                "reference": _reference(marked.row),
                "teacher": marked.teacher,
            }
            self._append("completion", step, **completion)
            self._trackers.add(completion, [self._run_dir / IMAGE_FOLDER / name for name in images])

    def modules_due(self, step: int) -> bool:
        return self._modules.due(step)

    def record_modules(self, step: int, gramians: Mapping[str, Tensor]) -> None:
        """Norms and cosine of the two gradients of each module, from its Gramian (2, 2); nothing for no modules."""
        if not gramians:
            return
        norms_first, norms_second, cosines = [], [], []
        for gramian in gramians.values():
            (first, cross), (_, second) = gramian.tolist()
            norms_first.append(math.sqrt(first))
            norms_second.append(math.sqrt(second))
            cosines.append(cross / math.sqrt(first * second) if first * second > 0 else None)
        self._append(
            "modules",
            step,
            parts=self._parts,
            names=list(gramians),
            norms_first=norms_first,
            norms_second=norms_second,
            cosines=cosines,
        )

    def angles_due(self, step: int) -> bool:
        """Whether the micro-batch at hand, the first of `step`, is to be measured here."""
        return self._recording and self._angles_silent is None and self._angles.due(step)

    def record_angles(self, step: int, angles: DependencyAngles | None) -> None:
        """None: the micro-batch had no token with an image."""
        if angles is None:
            return
        norms = {
            f"norm_{part}": [norm if math.isfinite(norm) else None for norm in norms]
            for part, norms in angles.norms.items()
        }
        values = {f"angle_{pair}": degrees for pair, degrees in angles.angles.items()}
        means = [mean if math.isfinite(mean) else None for mean in angles.dependency]
        self._append("dependency", step, tokens=angles.tokens, dependency=means, **norms, **values)

    def add_losses(self, result: MicroBatchLoss) -> None:
        """Take in a micro-batch of training."""
        if self._thirds is not None and "dependency" in result.per_token:
            self._thirds.add(result)

    def _keep_image(self, image: Any) -> str:
        """Save a small copy, once per content and in one piece, and return its name."""
        small = load_image(image)
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        file_format = "PNG" if max(small.size) <= _PNG_UP_TO else "JPEG"
        buffer = io.BytesIO()
        small.save(buffer, format=file_format, optimize=True)
        content = buffer.getvalue()
        path = self._run_dir / IMAGE_FOLDER / f"{hashlib.sha256(content).hexdigest()[:16]}.{file_format.lower()}"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(content)
            part.replace(path)
        return path.name

    def _append(self, kind: str, step: int, **values: Any) -> None:
        """Write one line, in one piece; the kernel keeps it when the process is killed."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        if self._recording:
            with self._disk(), (self._run_dir / LOG_FILE).open("ab", buffering=0) as log:
                log.write(json.dumps(record).encode() + b"\n")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("the recording of the run stops here, training goes on: %s", error)
            self._recording = False


def _end_last_line(path: Path) -> None:
    """A run that was killed may have left half a line; what is appended must not become part of it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as log:
            log.write(b"\n")


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of every token; together they read as the whole does.

    A token that ends inside a character has the empty text, and the one that completes the character has it all.
    Decoded in a short window that starts at a boundary: tokenizers drop or add a space at the start of what they
    decode, and decoding every prefix would be quadratic.
    """
    texts: list[str] = []
    start = read = 0  # the window begins at `start`; its text up to `read` has been given out
    for end in range(1, len(ids) + 1):
        known, text = (str(tokenizer.decode(ids[start:to])) for to in (read, end))
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        start, read = read, end
    return texts


class _Interval:
    """Due at the first step asked for and then whenever a multiple of `every` has been reached; 0 is never."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._last: int | None = None

    def due(self, step: int) -> bool:
        if not self._every or (self._last is not None and step // self._every == self._last // self._every):
            return False
        self._last = step
        return True


def _own_settings() -> list[str]:
    inherited = {field.name for field in fields(DistillationConfig)}
    return [field.name for field in fields(VGSConfig) if field.name not in inherited]


def _finite_numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Strict JSON has no NaN and no infinity, and nothing else of a log can be drawn."""
    return {
        name: float(value) for name, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _rounded(values: Tensor) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


def _prompt_text(prompt: list[dict[str, Any]]) -> str:
    """What the prompt of a canonical row says: the text of its messages, without roles and images."""
    parts = [part for message in prompt for part in message["content"]]
    return "\n\n".join(part["text"] for part in parts if part.get("text"))


def _reference(example: Mapping[str, Any]) -> str | None:
    """The right answer, where the row has one; several right ones in a line."""
    answer = example.get("answer")
    if isinstance(answer, list | tuple):
        return " | ".join(map(str, answer))
    return None if answer is None else str(answer)
