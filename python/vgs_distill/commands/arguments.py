"""What `vgs train` and `vgs eval` are told, in a YAML file and by flags, and the parser of both.

TRL's conventions: every field of the dataclasses is a key of the YAML file and a flag, a flag wins over the file, and
`env:` sets environment variables. `VGSConfig` holds the settings of a run, TRL's `ModelConfig` the student and its
LoRA; the dataclasses here are what those two leave out.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import ModelConfig, TrlParser

from ..config import VGSConfig
from ..errors import InputError, one_sentence
from .fields import unknown_flag, unknown_key
from .parsing import refused
from .settings_file import find_config, read_settings


@dataclass
class DatasetArguments:
    """Where prompts and images come from; the names are those of TRL's scripts."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset of the Hugging Face hub, a folder written by save_to_disk, a folder of images with "
            "metadata, or a .jsonl or .parquet file. Columns: 'prompt' (text, or messages with role and content), "
            "'messages' or 'conversations' (ShareGPT: from and value), whose last answer is left out; and 'image' or "
            "'images': image files, or in .jsonl files their paths, relative to the file, or base64. '<image>' in a "
            "text is the place of an image; without one images come first. With another modality 'video' or 'videos', "
            "'audio' or 'audios'."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column to read as the prompt; by default the first there is of those in dataset_name."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column to read as the image, or as the video or audio of another modality."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, in training only if eval_strategy asks for it. By default 'test'; a single "
            "file has no splits and is read whole."
        },
    )


@dataclass
class DataArguments(DatasetArguments):
    """What training reads besides."""

    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of before it; needs max_steps."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset of its own for evaluation, as in dataset_name; eval_strategy needs one if dataset_name "
            "is a single file, which holds no other split."
        },
    )


@dataclass
class EvalArguments:
    """What `vgs eval` measures, and where it writes it."""

    output_file: str = field(default="eval.json", metadata={"help": "The JSON file to write."})
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher to measure the divergence from; without one, accuracy alone."}
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision of the teacher."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model repository ships."})
    max_rows: int | None = field(default=None, metadata={"help": "Evaluate the first rows only; all by default."})
    answer_column: str = field(default="answer", metadata={"help": "Column that holds the right answer, as text."})
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": r"Regular expression that finds the answer in a completion: its last match, the first group if it "
            r"has one, for example 'answer\s*:\s*(\w+)'. By default the whole completion is the answer. Both sides "
            r"are compared without case, outer punctuation and repeated white space."
        },
    )
    max_completion_length: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    method: str = field(
        default="vgs",
        metadata={
            "help": "Whose parts of the loss to measure, by the names of vgs train: 'vgs' has the paper's, 'opd' the "
            "whole alone."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The system message of every conversation that has none of its own; by default that of the run "
            "which left the model."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More arguments of the chat template, as '{\"enable_thinking\": false}'; by default those of the "
            "run which left the model."
        },
    )
    modality: str = field(default="image", metadata={"help": "What is left out: 'image', 'video' or 'audio'."})
    batch_size: int = field(default=8, metadata={"help": "Rows that are generated and scored at a time."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where a GPU is present."})


class SettingsParser(TrlParser):
    """TRL's parser with wrong names answered by the nearest right one, and no tracebacks; help is in `fields.py`."""

    def __init__(self, command: str, dataclass_types: Sequence[Any]) -> None:
        self.command = command
        self._hints: dict[str, Any] = {}
        self._environment: dict[str, str] = {}
        super().__init__(dataclass_types, prog=f"vgs {command}", add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    def parse(self, arguments: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """The filled dataclasses, and every value as it stands in a YAML file.

        Raises:
            InputError: a file, key, flag or value is wrong.
        """
        path = find_config(arguments)
        from_file = [] if path is None else self._flags_of(path)
        namespace, unknown = self.parse_known_args([*from_file, *arguments])
        if unknown:
            raise unknown_flag(self.command, unknown[0], self._hints, "".join(unknown[1:2]))
        values = vars(namespace)
        del values["config"]
        filled = []
        for kind in self.dataclass_types:
            try:
                filled.append(kind(**{item.name: values[item.name] for item in fields(kind) if item.init}))
            except (ValueError, TypeError, OSError, ImportError) as error:
                if "use_cpu" in str(error):  # transformers' remark comes in a second sentence
                    raise InputError(
                        "there is no GPU here that computes in bf16; add --use_cpu to train on the CPU, or --bf16 false"
                    ) from error
                raise InputError(one_sentence(error)) from error
            except RecursionError:
                raise InputError("a value is nested too deeply; write it flat, or leave it out") from None
        return filled, {"env": self._environment, **values} if self._environment else values

    def error(self, message: str) -> NoReturn:
        """argparse's way to refuse a value, without its usage text."""
        raise refused(message)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints = get_type_hints(dtype)
        self._hints |= {item.name: hints[item.name] for item in fields(dtype) if item.init}
        for item in fields(dtype):
            if item.init:
                item.type = hints[item.name]
                self._parse_dataclass_field(self, item)
                # Of which transformers would take numbers only.
                if _kinds(hints[item.name]) - {type(None)} == {float, str}:
                    self._option_string_actions[f"--{item.name}"].type = _float_or_name

    def _flags_of(self, path: Path) -> list[str]:
        """The file as flags, so that both are read by the same rules; what no flag can say becomes a default."""
        flags: list[str] = []
        for key, (scalar, value) in read_settings(path).items():
            if key == "env" and isinstance(scalar, dict):
                self._environment = {name: str(setting) for name, setting in scalar.items()}
                os.environ.update(self._environment)
                continue
            if key not in self._hints:
                raise unknown_key(path, key, scalar, self._hints)
            kinds = _kinds(self._hints[key])
            if value is None:
                if type(None) not in kinds and self.get_default(key) is not None:
                    raise InputError(f"{key} has no value in {str(path)!r}; give it one or remove the line")
                self.set_defaults_with_config(**{key: None})
            elif isinstance(value, dict):
                if dict not in kinds:
                    raise InputError(f"{key} is a mapping in {str(path)!r}, where one value is expected")
                flags.append(f"--{key}={json.dumps(value)}")
            elif isinstance(value, list):
                if list not in kinds:
                    raise InputError(f"{key} is a list in {str(path)!r}, where one value is expected")
                if value and str not in kinds:
                    flags += [f"--{key}", *scalar]
                else:
                    self.set_defaults_with_config(**{key: value})
            else:
                flags.append(f"--{key}={scalar}")
        return flags


def _float_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a hint such as `dict[str, Any] | str | None` allows."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def train_parser() -> SettingsParser:
    """The parser of `vgs train`: VGSConfig, DataArguments, ModelConfig."""
    return SettingsParser("train", (VGSConfig, DataArguments, ModelConfig))


def eval_parser() -> SettingsParser:
    """The parser of `vgs eval`: EvalArguments, DatasetArguments, ModelConfig."""
    return SettingsParser("eval", (EvalArguments, DatasetArguments, ModelConfig))


def given(values: dict[str, Any]) -> set[str]:
    """The names of the fields that have a value."""
    return {name for name, value in values.items() if value is not None}
