"""Recorded completions with their pictures in TensorBoard and trackio, where `report_to` has them running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

NAME = "recorded_completions"


class Trackers:
    """Collects the completions of a step and shows them at its end. A tracker that fails is left alone from then on."""

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        """`callbacks`: those of the trainer, among which its trackers are found once they run."""
        self._callbacks = callbacks
        self._rows: list[dict[str, Any]] = []
        self._failed: set[TrainerCallback] = set()

    def add(self, completion: Mapping[str, Any], pictures: Sequence[Path]) -> None:
        """A completion as the log has it (`recording.py`), and the files of its pictures."""
        self._rows.append(
            {
                "pictures": pictures,
                "prompt": completion["prompt"],
                "student": "".join(completion["tokens"]),
                "teacher": completion["teacher"],
                "reference": completion["reference"],
            }
        )

    def show(self, step: int) -> None:
        """Hand what was added to every tracker that runs."""
        rows, self._rows = self._rows, []
        for callback in self._callbacks if rows else ():
            if callback in self._failed:
                continue
            try:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    _to_tensorboard(callback.tb_writer, rows, step)
                elif isinstance(callback, TrackioCallback) and callback._initialized:
                    _to_trackio(callback._trackio, rows, step)
            except Exception as error:  # a service that is away must not end a run
                self._failed.add(callback)
                name = type(callback).__name__
                logger.warning("%s takes no completions, training goes on: %s", name, error)


def _to_tensorboard(writer: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    for number, row in enumerate(rows, start=1):
        texts = {name: text for name, text in row.items() if name != "pictures" and text is not None}
        # Indented, Markdown leaves the words of a model as they are.
        blocks = (f"**{name}**\n\n    " + text.replace("\n", "\n    ") for name, text in texts.items())
        writer.add_text(f"{NAME}/{number}", "\n\n".join(blocks), step)
        for index, path in enumerate(row["pictures"], start=1):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (height, width, 3)
            writer.add_image(f"{NAME}/{number}/picture_{index}", pixels, step, dataformats="HWC")
    writer.flush()


def _to_trackio(trackio: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    table = [{**row, "pictures": [trackio.Image(str(path)) for path in row["pictures"]]} for row in rows]
    trackio.log({NAME: trackio.Table(dataframe=pd.DataFrame(table)), "train/global_step": step})
