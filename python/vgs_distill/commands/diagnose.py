"""`vgs diagnose`: a student, its teacher and a few dozen prompts, measured before any training.

It takes what `vgs train` takes, so that a run's YAML file is all it needs, and trains nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console
from transformers import set_seed

from ..diagnosis.measure import Diagnosis, diagnose
from ..diagnosis.page import render, table
from ..diagnosis.recommend import Recommendation, recommend
from ..errors import InputError
from ..resilience.output_dir import check_output_dir
from .arguments import train_parser
from .train import build

# What a diagnosis measures whatever the file trains with: the paper's parts, of tokens that all weigh the same.
_MEASURED = (
    "--method=vgs",
    "--gamma=2",
    "--eta=measured",
    "--token_steering=0",
    "--plausibility=0",
    "--ratio_floor=0",
    "--save_strategy=no",
    "--eval_strategy=no",
    "--report_to=none",
    "--resume_from_checkpoint=false",
)


def run_diagnosis(
    arguments: Sequence[str], rows: int, output: Path, console: Console | None = None
) -> tuple[Diagnosis, Recommendation]:
    """Run `vgs diagnose` with these flags of `vgs train`; print the table, write the page and, beside it, its numbers.

    Raises:
        InputError: something handed in cannot work; nothing has been written.
    """
    if rows < 1:
        raise InputError(f"rows must be 1 or more, got {rows}")
    check_output_dir(output.parent)
    with tempfile.TemporaryDirectory() as scratch:
        (config, data, model), values = train_parser().parse([*arguments, *_MEASURED, f"--output_dir={scratch}/run"])
        batch = min(rows, config.per_device_train_batch_size)
        config.per_device_train_batch_size, config.gradient_accumulation_steps = batch, 1
        trainer, _ = build(config, data, model, values)
        set_seed(config.seed)
        found = diagnose(trainer, rows)
    advice = recommend(found)
    names = {
        "student": values["model_name_or_path"],
        "teacher": values["teacher_model_name_or_path"],
        "dataset": values["dataset_name"],
    }
    settings = yaml.safe_dump(dict(advice.settings), sort_keys=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, render(found, advice, names, settings))
    numbers = output.with_suffix(".json")
    _write(numbers, json.dumps({**names, "diagnosis": asdict(found), "recommendation": asdict(advice)}, indent=1))
    console = console or Console()
    console.print(table(found))
    console.print(f"Take {advice.title}: {advice.reason}", highlight=False)
    console.print(f"Written: {output}, {numbers}", soft_wrap=True, highlight=False)
    return found, advice


def _write(path: Path, text: str) -> None:
    try:
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}); choose another --output") from None
