"""`vgs train --plan`: what a run takes on every GPU and in a step, from configs alone, without weights or rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig
from trl import ModelConfig

from ..config import SHARD, VGSConfig
from ..errors import InputError
from ..inputs.modalities import MODALITIES
from ..models.sources import adapter_config, check_no_adapter, student_source, teacher_source
from ..planning.cost import Launch, Rows, memory, operations
from ..planning.sizes import ModelSize, model_size
from .arguments import given, train_parser
from .fields import require

_OF_IMAGES = 0.75  # of them
_LAUNCHES = (Launch(1, False), Launch(8, False), Launch(8, True), Launch(16, True))


def plan(arguments: Sequence[str], prompt: int, console: Console | None = None) -> dict[str, Any]:
    """Print the plan of a run with these flags, for prompts of so many tokens; return its numbers.

    Raises:
        InputError: something handed in cannot work.
    """
    (config, _, model), values = _parse(arguments)
    require("train", given(values))
    student, teacher = (
        source(values[f"{role}model_name_or_path"], config, model)
        for source, role in ((student_source, ""), (teacher_source, "teacher_"))
    )
    modality = MODALITIES[config.modality]
    configs = student.check(modality), teacher.check(modality)
    check_no_adapter(student)
    rows = _rows(prompt, config, configs[0])
    sizes = {peft: _size(configs[0], config, model, peft) for peft in (False, True)}
    dtype = _dtype((config.teacher_model_init_kwargs or {}).get("dtype"), torch.bfloat16)
    of_teacher = model_size(configs[1], dtype, modality)
    own = sizes[bool(model.use_peft)]
    launches = [replace(launch, on_gpu=not values["use_cpu"]) for launch in _LAUNCHES]
    parts = {launch.name: memory(config, own, of_teacher, rows, launch) for launch in launches}
    totals = {
        "LoRA" if peft else "all parameters": {
            sharding: {launch.name: _total(config, size, of_teacher, rows, launch, sharding) for launch in launches}
            for sharding in ("replicate", SHARD)
        }
        for peft, size in sizes.items()
    }
    passes = operations(config, own, of_teacher, rows, 1)
    _print(console or Console(), rows, own, of_teacher, parts, totals, passes)
    return {"memory": parts, "totals": totals, "operations": dict(passes)}


def _parse(arguments: Sequence[str]) -> Any:
    """A machine without a GPU may plan for one that has some: bf16 is refused here, if the CPU is not asked for."""
    try:
        return train_parser().parse(arguments)
    except InputError as error:
        if "use_cpu" not in str(error):
            raise
    filled, values = train_parser().parse([*arguments, "--use_cpu"])
    return filled, {**values, "use_cpu": False}


def _rows(prompt: int, config: VGSConfig, student: PretrainedConfig) -> Rows:
    image = round(_OF_IMAGES * prompt)
    vision: Any = getattr(student, "vision_config", None)
    merged = (getattr(vision, "spatial_merge_size", 1) or 1) ** 2
    assert config.max_completion_length is not None
    return Rows(prompt, image, image * merged, config.max_completion_length)


def _size(config: PretrainedConfig, run: VGSConfig, model: ModelConfig, peft: bool) -> ModelSize:
    modality = MODALITIES[run.modality]
    asked = replace(model, use_peft=peft)
    autocast = torch.bfloat16 if run.bf16 else None
    return model_size(
        config,
        _dtype(model.dtype, torch.float32),
        modality,
        adapter=lambda student: adapter_config(asked, student, modality),
        autocast=autocast,
    )


def _dtype(name: Any, default: torch.dtype) -> torch.dtype:
    found = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else default


def _total(
    config: VGSConfig, student: ModelSize, teacher: ModelSize, rows: Rows, launch: Launch, sharding: str
) -> float | None:
    if sharding == SHARD and launch.processes == 1:
        return None
    before, config.teacher_sharding = config.teacher_sharding, sharding
    total = sum(memory(config, student, teacher, rows, launch).values())
    config.teacher_sharding = before
    return total


def _print(
    console: Console,
    rows: Rows,
    student: ModelSize,
    teacher: ModelSize,
    parts: dict[str, dict[str, float]],
    totals: dict[str, dict[str, dict[str, float | None]]],
    passes: Any,
) -> None:
    console.print(
        f"student {student.parameters / 1e9:.2f} B parameters ({student.trained / 1e9:.3g} B trained), teacher "
        f"{teacher.parameters / 1e9:.2f} B; rows of {rows.prompt} prompt tokens ({rows.image} of images) and "
        f"{rows.completion} of answers (--plan TOKENS for other prompts)",
        highlight=False,
    )
    table = Table(title="GiB on every GPU at the fullest moment of a step")
    for name in ("", *parts):
        table.add_column(name, justify="right" if name else "left")
    for part in dict.fromkeys(name for column in parts.values() for name in column):
        table.add_row(part, *(_gib(column.get(part)) for column in parts.values()))
    table.add_section()
    for trained, shardings in totals.items():
        for sharding, column in shardings.items():
            whole = "teacher whole" if sharding != SHARD else "teacher sharded"
            table.add_row(f"sum, {trained}, {whole}", *map(_gib, column.values()))
    console.print(table)
    table = Table(title="operations of a step for every process, in TFLOP")
    for title in ("pass", "TFLOP", "share"):
        table.add_column(title, justify="left" if title == "pass" else "right")
    whole_step = sum(passes.values())
    for name, number in passes.items():
        table.add_row(name, f"{number / 1e12:.4g}", f"{number / whole_step:.0%}")
    table.add_row("sum", f"{whole_step / 1e12:.4g}", "")
    console.print(table)


def _gib(number: float | None) -> str:
    return "" if number is None else f"{number / 2**30:.1f}"
