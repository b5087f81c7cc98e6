"""The fields of `vgs train` and `vgs eval` as their dataclasses declare them, read without importing any library.

torch, transformers and TRL take several seconds to import. Help and the refusal of a flag that does not exist need the
names, defaults and help texts alone, and those stand in the sources as literals. `arguments.py` holds the parser.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..docstrings import attribute_texts
from ..errors import InputError, nearest
from ..renamed import OLD_NAMES, renamed


@dataclass(frozen=True)
class Field:
    """One field: a key of the YAML file and a flag."""

    name: str
    kind: str  # as it is shown: INT, true|false, ...
    default: str | None  # None where it says nothing
    help: str
    summary: str  # of help
    section: str  # of --help-all: what first declares it


@dataclass(frozen=True)
class _Source:
    """One dataclass: its package, its file in it, its name, and where --help-all lists the fields it declares."""

    package: str
    file: str
    name: str
    section: str


_STEERING, _EVALUATION, _DATA, _MODELS = "steering (vgs)", "evaluation (vgs)", "data", "models"
_TRL, _TRANSFORMERS = "distillation and rollouts (TRL)", "training (transformers)"

# In the order of inheritance: what comes later overrides defaults and help, not the section.
_CONFIG = (
    _Source("transformers", "training_args.py", "TrainingArguments", _TRANSFORMERS),
    _Source("trl", "trainer/base_config.py", "_BaseConfig", _TRL),
    _Source("trl", "trainer/distillation_config.py", "DistillationConfig", _TRL),
    _Source("vgs_distill", "settings.py", "MethodSettings", _STEERING),
    _Source("vgs_distill", "config.py", "VGSConfig", _STEERING),
)
_ROWS = _Source("vgs_distill", "commands/arguments.py", "DatasetArguments", _DATA)
_MODEL = _Source("trl", "trainer/model_config.py", "ModelConfig", _MODELS)
_SOURCES = {
    "train": (*_CONFIG, _ROWS, _Source("vgs_distill", "commands/arguments.py", "DataArguments", _DATA), _MODEL),
    "eval": (_Source("vgs_distill", "commands/arguments.py", "EvalArguments", _EVALUATION), _ROWS, _MODEL),
}
_OF_MODELS = re.compile("(teacher_)?model_.*|trust_remote_code|teacher_.*")  # in other classes than ModelConfig

# What `--help` shows, of each command: the fields that people set.
COMMON = {
    "train": {
        "needed": ("output_dir", "model_name_or_path", "teacher_model_name_or_path", "dataset_name"),
        "steering": (
            "method", "eta", "gamma", "language_preservation", "image_mask", "modality",
        ),
        "data": (
            "prompt_column", "image_column", "dataset_train_split", "dataset_test_split", "eval_dataset_name",
            "dataset_streaming", "max_prompt_length",
        ),
        "student and teacher": (
            "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "teacher_device",
        ),
        "rollouts": ("max_completion_length", "temperature", "use_vllm"),
        "training": (
            "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps",
            "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "seed",
            "use_cpu",
        ),
        "on the way": (
            "logging_steps", "report_to", "eval_strategy", "eval_steps", "save_steps", "save_total_limit",
            "resume_from_checkpoint",
        ),
    },
    "eval": {
        "needed": ("model_name_or_path", "dataset_name"),
        "evaluation": (
            "teacher_model_name_or_path", "output_file", "max_rows", "answer_column", "answer_pattern",
            "max_completion_length", "batch_size", "method", "modality", "use_cpu",
        ),
        "data and models": (
            "dataset_config", "prompt_column", "image_column", "dataset_test_split", "dtype", "attn_implementation",
        ),
    },
}  # fmt: skip

DESCRIPTIONS = {
    "train": "Distil a vision-language teacher into a student on the student's own answers, with visual gradient "
    "steering. Every field is a key of the YAML file and a flag; a flag wins. The output folder receives checkpoints, "
    "the final model with its processor, and run.yaml, from which the run can be repeated.",
    "eval": "Measure a model with and without its images: accuracy by free generation against an answer column and, "
    "with a teacher, the divergence from it on the model's own completions. Prints a table and writes JSON.",
}

# Where the text of the library speaks of something else, or says nothing.
_HELP = {
    "train": {
        "output_dir": "Folder of the run: checkpoints, the final model, run.yaml, what the report reads.",
        "model_name_or_path": "The student: a folder or a name of the hub.",
        "teacher_model_name_or_path": "The teacher: the same; a model of the student's family.",
        "dtype": "In which dtype both models are loaded: float32, bfloat16, float16 or auto.",
        "attn_implementation": "sdpa, eager, flash_attention_2, ...; by default what transformers chooses.",
        "use_peft": "Train a LoRA adapter: by default on all linear layers of the language model and the connector.",
        "lora_r": "Rank of the adapter.",
        "lora_alpha": "The adapter's output is multiplied by lora_alpha / lora_r.",
        "lora_target_modules": "Other layers for the adapter: ends of their names, or 'all-linear'.",
        "max_steps": "Optimizer steps to take; -1 for num_train_epochs.",
        "num_train_epochs": "How often to go through the dataset.",
        "learning_rate": "Peak learning rate.",
        "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup, ...",
        "warmup_steps": "Steps of linear warmup, or below 1 their share of all steps.",
        "per_device_train_batch_size": "Rows per device and micro-batch.",
        "gradient_accumulation_steps": "Micro-batches per optimizer step.",
        "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
        "bf16": "bfloat16 autocast; by default on unless fp16 is.",
        "use_cpu": "Train on the CPU, also where there is a GPU.",
        "logging_steps": "Steps from one line of the log to the next.",
        "report_to": "none, tensorboard, wandb, trackio, ...",
        "eval_strategy": "When to evaluate: no, steps or epoch.",
        "eval_steps": "Steps from one evaluation to the next; logging_steps by default.",
        "save_steps": "Steps from one checkpoint to the next.",
        "save_total_limit": "How many checkpoints to keep; all by default.",
        "resume_from_checkpoint": "true for the last whole checkpoint in output_dir, or the folder of one.",
    },
    "eval": {
        "model_name_or_path": "The model to measure: a folder (of a run, a checkpoint or an adapter, too) or a name of "
        "the hub.",
        "dtype": "In which dtype the models are loaded: float32, bfloat16, float16 or auto.",
        "attn_implementation": "sdpa, eager, flash_attention_2, ...; by default what transformers chooses.",
    },
}

# Names that people try, of other trainers or of habit.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "use_lora": "use_peft",
    "lora": "use_peft",
    "peft": "use_peft",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "model": "model_name_or_path",
    "student": "model_name_or_path",
    "student_model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "out": "output_dir",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "torch_dtype": "dtype",
    "warmup": "warmup_steps",
    "mask": "image_mask",
    "cpu": "use_cpu",
    "vllm": "use_vllm",
    "wandb": "report_to",
    "limit": "max_rows",
}


_LOOK = {
    "dry-run": ("", "Check and load everything, say what would be trained, and leave nothing behind."),
    "preview": ("[N]", "The same, and N rows as the models read them, with and without the image, and a completion."),
    "plan": ("[TOKENS]", "Say what the run takes on 1, 8 and 16 GPUs, for prompts of so many tokens (1024), and stop."),
}  # flags of `vgs train` that are no fields


def fields_of(command: str) -> dict[str, Field]:
    """The fields of `vgs train` or `vgs eval`, by name."""
    found: dict[str, Field] = {}
    for source in _SOURCES[command]:
        declared = _class(source)
        described = attribute_texts(ast.get_docstring(declared))
        for name, annotation, value in _declared(declared):
            options = _options(value)
            section = _MODELS if _OF_MODELS.fullmatch(name) else source.section
            section = found[name].section if name in found else section
            metadata = options.get("metadata", {})
            kind = metadata.get("metavar") or _kind(annotation)
            text = _HELP[command].get(name) or described.get(name) or str(metadata.get("help", "")).replace("%%", "%")
            summary = re.split(r"(?<=\.) (?=[A-Z0-9'])", text)[0] if text == described.get(name) else text
            found[name] = Field(name, kind, _default(options), text, summary, section)
    return found


def answer(command: str, arguments: Sequence[str]) -> bool:
    """Print the help that the arguments ask for, if any; return whether they did.

    Raises:
        InputError: a flag or a key of the YAML file is none of the command's, or a field that it needs is missing.
    """
    fields = fields_of(command)
    if "--help-all" in arguments:
        sections: dict[str, list[Field]] = {name: [] for name in (_STEERING, _EVALUATION, _DATA, _MODELS)}
        for field in fields.values():
            sections.setdefault(field.section, []).append(field)
        print(_page(command, {title: listed for title, listed in sections.items() if listed}))
        return True
    if "--help" in arguments or "-h" in arguments:
        common = {
            title: [replace(fields[name], help=fields[name].summary) for name in names]
            for title, names in COMMON[command].items()
        }
        print(_page(command, common))
        print(f"\n`vgs {command} --help-all` lists all {len(fields)} fields.")
        return True
    _check(command, arguments, fields)
    return False


def check(command: str, arguments: Sequence[str]) -> None:
    """InputError where a flag or a key of the YAML file is none of the command's, or a needed one is missing."""
    _check(command, arguments, fields_of(command))


def hint(name: str, known: Mapping[str, object]) -> str:
    """What was probably meant by the name of a field that does not exist, as the end of a sentence."""
    name = name.lower().replace("-", "_")
    other = _OTHER_NAMES.get(name)
    return f"; did you mean {other!r}?" if other in known else nearest(name, known)


def unknown_flag(command: str, argument: str, known: Mapping[str, object], value: str = "") -> InputError:
    """What is said of an argument that is no flag of the command; `value`: the argument behind it."""
    flag, _, own_value = argument.partition("=")
    if (name := flag.removeprefix("--").replace("-", "_")) in OLD_NAMES:
        return InputError(renamed(name, own_value or value))
    if not flag.startswith("-"):
        return InputError(f"vgs {command} takes flags only, but got {flag!r}; a settings file is given with --config")
    return InputError(f"vgs {command} has no flag {flag!r}{hint(flag.lstrip('-'), known)}")


def unknown_key(path: Path, key: str, value: object, known: Mapping[str, object]) -> InputError:
    """What is said of a key of the YAML file that is no field of the command."""
    if key in OLD_NAMES:
        return InputError(renamed(key, value))
    return InputError(f"{str(path)!r} has an unknown key {key!r}{hint(key, known)}")


def require(command: str, given: Collection[str]) -> None:
    """InputError that names those of the fields the command needs which are not among the given ones."""
    if missing := [name for name in COMMON[command]["needed"] if name not in given]:
        *others, last = missing
        listing = f"{', '.join(others)} and {last}" if others else last
        raise InputError(f"{listing} must be given, in the YAML file or as a flag")


def _check(command: str, arguments: Sequence[str], fields: Mapping[str, Field]) -> None:
    given: set[str] = set()
    for index, argument in enumerate(arguments):
        flag = argument.partition("=")[0]
        if index and not re.match("--?[A-Za-z]", flag):  # a value
            continue
        name = flag.removeprefix("--").replace("-", "_")
        if name != "config" and not {name, name.removeprefix("no_")} & fields.keys():
            raise unknown_flag(command, argument, fields, "".join(arguments[index + 1 : index + 2]))
        given.add(name)
    if "config" in given:
        from .settings_file import find_config, read_settings

        path = find_config(arguments)
        assert path is not None
        for key, (_, value) in read_settings(path).items():
            if key not in fields and key != "env":
                raise unknown_key(path, key, value, fields)
            given |= {key} if value is not None else set()
    require(command, given)


def _class(source: _Source) -> ast.ClassDef:
    found = importlib.util.find_spec(source.package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {source.package!r}", name=source.package)
    text = Path(found.submodule_search_locations[0], source.file).read_text(encoding="utf-8")
    nodes = ast.parse(text).body
    return next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == source.name)


def _declared(declared: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    """Name, annotation and value of every field that the class itself declares."""
    for node in declared.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            options = _options(node.value)
            if not annotation.startswith("ClassVar") and options.get("init", True):
                yield node.target.id, annotation, node.value


def _options(value: ast.expr | None) -> dict[str, Any]:
    """The arguments of `field(...)`, or a default alone; an expression that is no literal stands for itself."""
    if value is None:
        return {}
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        return {word.arg: _literal(word.value) for word in value.keywords if word.arg is not None}
    return {"default": _literal(value)}


def _literal(node: ast.expr) -> object:
    """A literal's value; of a mapping what is literal in it; None for other expressions."""
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _default(options: Mapping[str, Any]) -> str | None:
    default = options.get("default")
    if default in (None, "", []):
        return None
    return str(default).lower() if isinstance(default, bool) else str(default)


def _kind(annotation: str) -> str:
    """`float | None` -> FLOAT; the widest of what a union allows."""
    for name, shown in (("dict", "JSON"), ("list", "WORD..."), ("Literal", "WORD"), ("str", "WORD")):
        if name in annotation:
            return shown
    for name, shown in (("float", "FLOAT"), ("int", "INT"), ("bool", "true|false")):
        if name in annotation:
            return shown
    return "WORD"


def _page(command: str, sections: Mapping[str, Sequence[Field]]) -> str:
    if command == "train":
        look = [Field(name, kind, None, text, text, "") for name, (kind, text) in _LOOK.items()]
        sections = {**sections, "before training": look}
    width = min(shutil.get_terminal_size().columns, 120)
    column = 2 + max(len(f"--{field.name} {field.kind}") for listed in sections.values() for field in listed) + 2
    column = min(column, 44)
    lines = [f"usage: vgs {command} --config run.yaml [--FIELD VALUE]...", ""]
    lines += textwrap.wrap(DESCRIPTIONS[command], width)
    for title, listed in sections.items():
        lines += ["", f"{title}:"]
        for field in listed:
            said = field.help if field.default is None else f"{field.help} (default: {field.default})"
            flag = f"  --{field.name} {field.kind}".rstrip()
            block = textwrap.wrap(said, max(width - column, 20), break_on_hyphens=False) or [""]
            if len(flag) + 2 > column:
                lines.append(flag)
            else:
                block[0] = flag.ljust(column) + block[0]
                lines.append(block.pop(0))
            lines += [" " * column + line for line in block]
    return "\n".join(lines)
