"""Writes `docs/families.md` from real runs: `python -m tests.families.table` (a few minutes)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from vgs_distill.inputs.modalities import MODALITIES
from vgs_distill.steering.methods import METHODS

from tests.families.models import SMALL_FAMILIES
from tests.families.training import make_trainer, processor_of, step_logs

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """\
# Model families

Written by `python -m tests.families.table` from real runs, not by hand. Every family is its own `transformers` class
and its own processor at a few ten thousand parameters; nothing is mocked. A mask is listed in a cell if three training
steps with it (rollout by `generate`, the views of teacher and student that the method needs, update) ended in finite
losses and gradients;
otherwise the error is below the table. The last two columns train batches that mix in rows without any image, video or
sound, and rows with three of them, with accumulation. `modality` is the setting of that name
([other modalities](how_it_works.md#other-modalities)).

"""


def attempt(family: str, failures: list[str], what: str, **settings: Any) -> bool:
    """Train; whether every logged step is finite. A failure is noted in its own words."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(family, folder, **settings)
            trainer.train()
    except Exception as error:  # the table's purpose is to show it
        failures.append(f"* `{family}`, {what}: {type(error).__name__}: {error}")
        return False
    logs = step_logs(trainer)
    numbers = [value for row in logs for key, value in row.items() if key.startswith(("loss", "gradient", "grad_norm"))]
    finite = len(logs) == settings.get("max_steps", 3) and torch.isfinite(torch.tensor(numbers)).all()
    if not finite:
        failures.append(f"* `{family}`, {what}: a loss or gradient is not finite")
    return bool(finite)


def row_of(family: str, failures: list[str]) -> str:
    small = SMALL_FAMILIES[family]
    cells = []
    for method in METHODS:
        works = [
            mask
            for mask in MODALITIES[small.modality].masks
            if attempt(family, failures, f"{method}, {mask}", method=method, image_mask=mask)
        ]
        cells.append(", ".join(works) or "none")
    mixed: Callable[[tuple[int, ...]], dict[str, Any]] = lambda counts: {  # noqa: E731
        "dataset": counts, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    for what, counts in (("rows without any", (0, 1)), ("several", (1, 3))):
        cells.append("yes" if attempt(family, failures, what, **mixed(counts)) else "no")
    model = small.model(processor_of(family), 1)
    names = f"`{type(model).__name__}`, `{type(processor_of(family)).__name__}`"
    return f"| {names} | {small.modality} | " + " | ".join(cells) + " |"


def main() -> None:
    logging.disable(logging.WARNING)
    failures: list[str] = []
    with open(devnull, "w") as sink, redirect_stdout(sink):
        rows = [row_of(family, failures) for family in SMALL_FAMILIES]
    columns = [*(f"`{name}`" for name in METHODS), "rows without any", "several"]
    lines = [
        "| model, processor | modality | " + " | ".join(columns) + " |",
        "|---" * (2 + len(columns)) + "|",
        *rows,
        "",
        *(["What does not work, in the words of the error:", "", *failures, ""] if failures else []),
        f"transformers {transformers.__version__}, TRL {trl.__version__}, torch {torch.__version__}. Another family: "
        "“Add a model family” in CONTRIBUTING.md.",
    ]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
