"""What TensorBoard and trackio have of a run that reports to them: the completions, read back from their files."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from vgs_distill import VGSTrainer
from vgs_distill.report.log import IMAGE_FOLDER, RunLog, read_run
from vgs_distill.report.recording import COMPLETIONS_PER_RECORD
from vgs_distill.report.trackers import NAME

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
needs_trackio = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs the extra trackers")


@pytest.fixture
def answered(prompts: Dataset) -> Dataset:
    return prompts.add_column("answer", [f"answer {index}" for index in range(len(prompts))])


def recorded(trainer: VGSTrainer) -> RunLog:
    assert trainer.args.output_dir is not None
    return read_run(Path(trainer.args.output_dir))


def pixels(source: Any) -> np.ndarray:
    with Image.open(source) as picture:
        return np.asarray(picture.convert("RGB"))


@needs_tensorboard
def test_tensorboard_shows_words_and_pictures(
    make_trainer: Callable[..., VGSTrainer], answered: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        answered,
        report_to=["tensorboard"],
        max_steps=3,
        record_completions_every=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    log = recorded(trainer)
    assert {record["step"] for record in log.completions} == {1, 2}
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "tensors": 0})
    board.Reload()
    for index in range(COMPLETIONS_PER_RECORD):
        records = [[r for r in log.completions if r["step"] == step][index] for step in (1, 2)]
        texts = board.Tensors(f"{NAME}/{index + 1}/text_summary")
        pictures = board.Images(f"{NAME}/{index + 1}/picture_1")
        assert [event.step for event in texts] == [event.step for event in pictures] == [1, 2]
        for record, text, picture in zip(records, texts, pictures, strict=True):
            shown = text.tensor_proto.string_val[0].decode()
            for words in (record["prompt"], "".join(record["tokens"]), record["teacher"], record["reference"]):
                assert "    " + words.replace("\n", "\n    ") in shown
            assert record["reference"].startswith("answer ")
            kept = pixels(log.run_dir / IMAGE_FOLDER / record["images"][0])
            assert np.array_equal(pixels(io.BytesIO(picture.encoded_image_string)), kept)


_TRACKIO_RUN = """
import json, sys
from tests.families.training import make_trainer, questions
from trackio.sqlite_storage import SQLiteStorage

rows = questions()
rows = rows.add_column("answer", [f"answer {index}" for index in range(len(rows))])
make_trainer(
    "qwen3_vl", sys.argv[1], rows, report_to=["trackio"], project="vgs", run_name="small", max_steps=2,
    record_completions_every=1, per_device_train_batch_size=4,
).train()
with open(sys.argv[2], "w") as file:
    json.dump(SQLiteStorage.get_logs("vgs", "small"), file)
"""


@needs_trackio
def test_trackio_shows_words_and_pictures(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where it keeps its files when it is imported."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _TRACKIO_RUN, str(tmp_path / "run"), str(tmp_path / "logs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = [entry for entry in json.loads((tmp_path / "logs.json").read_text()) if NAME in entry]
    log = read_run(tmp_path / "run")
    assert [entry["train/global_step"] for entry in entries] == [1, 2]
    rows = [row for entry in entries for row in entry[NAME]["_value"]]
    assert len(rows) == len(log.completions) == 2 * COMPLETIONS_PER_RECORD
    for row, record in zip(rows, log.completions, strict=True):
        assert row["prompt"] == record["prompt"]
        assert row["student"] == "".join(record["tokens"])
        assert row["teacher"] == record["teacher"]
        assert row["reference"] == record["reference"]
        kept = pixels(log.run_dir / IMAGE_FOLDER / record["images"][0])
        assert np.array_equal(pixels(tmp_path / "trackio" / "media" / row["pictures"][0]["file_path"]), kept)


@needs_tensorboard
def test_a_tracker_that_fails_does_not_end_the_run(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setattr(SummaryWriter, "add_image", lambda *args, **kwargs: 1 / 0)
    warnings: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("vgs_distill.report.trackers"), "handle", warnings.append)
    trainer = make_trainer(report_to=["tensorboard"], record_completions_every=1)
    trainer.train()
    assert trainer.state.global_step == 2
    (warning,) = warnings
    assert "TensorBoardCallback takes no completions, training goes on" in warning.getMessage()
