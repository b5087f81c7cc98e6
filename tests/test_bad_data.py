"""Bad rows and images: one clear sentence that names the row, exit code 2, and nothing left in the output folder."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - its log keeps the stderr of its first import, which must outlive one command
import numpy as np
import pytest
from PIL import Image

from tests.command_line import refused
from tests.conftest import Workspace

PROMPT = [{"role": "user", "content": "what is this ?"}]
ROW = "row 0 of the training dataset is wrong: "


def rows(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new(mode, size)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def with_image(name: str, content: bytes) -> Callable[[Path], str]:
    """A row whose image is a file of this content."""

    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return rows(folder, {"prompt": PROMPT, "image": name})

    return write


def with_row(**columns: Any) -> Callable[[Path], str]:
    return lambda folder: rows(folder, columns)


def asked(prompt: Any, **more: Any) -> Callable[[Path], str]:
    return with_row(**{"prompt": prompt, "image": None, **more})


def bomb() -> bytes:
    """A PNG that says it is 20000 pixels wide and high."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def malformed(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"prompt": \n oh')
    return str(folder / "rows.jsonl")


def two_images(folder: Path) -> str:
    (folder / "a.png").write_bytes(encoded(picture()))
    return rows(folder, {"prompt": "<image> what is this ?", "images": ["a.png", "a.png"]})


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
PHOTOGRAPH = encoded(Image.fromarray(NOISE), "JPEG")
FRACTIONS = Image.fromarray(np.linspace(0, 3, 1600, dtype=np.float32).reshape(40, 40))
WHOLE = Image.fromarray(np.linspace(0, 70_000, 1600, dtype=np.int32).reshape(40, 40))

# A function writes the rows and returns the name of the dataset.
DATASETS: dict[str, tuple[Callable[[Path], str], str]] = {
    "empty": (rows, "rows.jsonl' is empty; give it at least one row"),
    "malformed JSON": (malformed, "cannot read the dataset"),
    "no prompt column": (
        with_row(question="a", image=None),
        "there is no column 'prompt', 'messages' or 'conversations' (it has 'question', 'image')",
    ),
    "no image column": (with_row(prompt=PROMPT), "the training dataset holds no images, neither in a column 'image'"),
    # prompts
    "no prompt": (asked([]), ROW + "it has no prompt; remove the row or fill it in"),
    "blank prompt": (asked(" "), ROW + "it has no prompt"),
    "numeric prompt": (asked(7), ROW + "its prompt is of type int; write text, or messages with role and content"),
    "list of texts": (asked(["what ?"]), ROW + "it has a message without 'role' and 'content'"),
    "no content": (asked([{"role": "user", "content": None}]), ROW + "it has a message without 'role' and 'content'"),
    "numeric content": (asked([{"role": "user", "content": 7}]), ROW + "the content of a message is of type int"),
    "unknown role": (
        asked([{"role": "robot", "content": "a"}]),
        ROW + "a message has the unknown role 'robot'; use system, user, assistant, tool, or human and gpt",
    ),
    "answers alone": (asked([{"role": "assistant", "content": "a"}]), ROW + "its prompt has no user turn"),
    "system turn last": (
        asked([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]),
        ROW + "its prompt ends in a 'system' turn, which asks nothing",
    ),
    "unknown part": (
        asked([{"role": "user", "content": [{"type": "video"}]}]),
        ROW + "a part of a message is of type 'video'; parts are 'text' with a 'text', or 'image'",
    ),
    "image tokens in the text": (
        asked("<|vision_start|><|image_pad|><|vision_end|> what ?"),
        ROW + "its text holds the token '<|vision_start|>', which the processor writes where image belongs",
    ),
    # how many images
    "mark without an image": (
        asked("<image> what is this ?"),
        ROW + "its prompt has places for 1 images, but the row has 0; make them agree",
    ),
    "more images than places": (two_images, ROW + "its prompt has places for 1 images, but the row has 2"),
    "place without an image": (
        asked([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]),
        ROW + "its prompt has places for 1 images, but the row has 0",
    ),
    "null among images": (
        with_row(prompt=PROMPT, images=["a.png", None]),
        ROW + "there is nothing in place 2 of its 2 images; remove the empty one",
    ),
    "image and images": (
        with_row(prompt=PROMPT, image="a.png", images=["a.png"]),
        ROW + "there is something in both 'image' and 'images'",
    ),
    # images
    "numbers for images": (with_row(prompt=PROMPT, image=7), ROW + "a value of type int is no image; give a path"),
    "missing image": (with_row(prompt=PROMPT, image="gone.png"), "gone.png): [Errno 2] No such file or directory"),
    "corrupt image": (with_image("a.png", b"\x89PNG\r\n\x1a\nno more"), ROW + "an image cannot be opened ("),
    "truncated image": (with_image("a.jpg", PHOTOGRAPH[: len(PHOTOGRAPH) // 2]), "a.jpg): image file is truncated"),
    "decompression bomb": (with_image("a.png", bomb()), "could be decompression bomb DOS attack; remove the row"),
    "URL": (
        with_row(prompt=PROMPT, image="https://example.com/a.png"),
        ROW + "an image is a URL (https://example.com/a.png), which is not downloaded; download it and give its path",
    ),
    "damaged base64": (
        with_row(prompt=PROMPT, image="data:image/png;base64,oh"),
        ROW + "an image is a data: URL whose base64 is damaged",
    ),
    "base64 of no image": (
        with_row(prompt=PROMPT, image=base64.b64encode(b"not an image" * 40).decode()),
        ROW + "an image cannot be opened: cannot identify image file",
    ),
    "aspect ratio": (
        with_image("a.png", encoded(picture(size=(8001, 40)))),
        ROW + "the processor refuses an image of 8001 x 40 pixels: absolute aspect ratio must be smaller than 200",
    ),
    "fractions beyond 1": (
        with_image("a.tiff", encoded(FRACTIONS, "TIFF")),
        ROW + "an image holds fractions from 0 to 3, and which of them are black and white is not known",
    ),
    "32-bit whole numbers": (
        with_image("a.tiff", encoded(WHOLE, "TIFF")),
        ROW + "an image holds 32-bit whole numbers from 0 to 70000, and which of them are black and white",
    ),
    # how many rows
    "fewer rows than a batch": (
        with_image("a.png", encoded(picture())),
        "the training dataset has 1 rows, but one step takes 4 (per_device_train_batch_size times gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATASETS)
def test_a_wrong_dataset(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    write, sentence = DATASETS[kind]
    run = tmp_path / "run"
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), dataset_name=write(tmp_path))
    assert sentence in refused("train", "--config", config)
    assert not run.exists()


@pytest.mark.parametrize("kind", ["unknown role", "truncated image", "mark without an image", "empty"])
def test_evaluation_and_streams_refuse_the_same_rows(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    write, sentence = DATASETS[kind]
    sentence = sentence.removeprefix(ROW)
    name = write(tmp_path)
    lines = [json.dumps({**json.loads(line), "answer": "a"}) for line in Path(name).read_text().splitlines()]
    Path(name).write_text("\n".join(lines))
    student = str(workspace.root / "student")
    models = ["--model_name_or_path", student, "--use_cpu", "--output_file", str(tmp_path / "eval.json")]
    assert sentence in refused("eval", *models, "--dataset_name", name)
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), dataset_name=name)
    assert sentence in refused("train", "--config", config, "--dataset_streaming", "true")
    good = str(workspace.root / "saved")
    beside = ["--dataset_name", good, "--eval_dataset_name", name, "--eval_strategy", "epoch"]
    assert sentence in refused("train", "--config", config, *beside)
    assert not (tmp_path / "run").exists()


def test_evaluation_on_the_rows_that_are_trained_on(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), eval_strategy="epoch")
    sentence = "eval_strategy would evaluate on the rows that are trained on, all rows of"
    assert sentence in refused("train", "--config", config)
    assert sentence in refused("train", "--config", config, "--eval_dataset_name", str(workspace.root / "rows.jsonl"))
    assert "no splits, so there is no 'test'" in refused("train", "--config", config, "--dataset_test_split", "test")


def test_columns_and_splits_that_are_not_there(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"))
    assert "has no column 'imag' (it has 'prompt', 'answer', 'image'); did you mean 'image'?" in refused(
        "train", "--config", config, "--image_column", "imag"
    )
    assert "has no splits, so there is no 'held_out'; leave it out" in refused(
        "train", "--config", config, "--dataset_train_split", "held_out"
    )
    saved = ["--dataset_name", str(workspace.root / "saved"), "--dataset_train_split", "held_out"]
    assert "has no splits" in refused("train", "--config", config, *saved)
