"""Forms of rows that mean one thing are converted to it: each gives the tokens and pixels of the plain form."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.utils import logging
from vgs_distill import canonical_row, load_rows, with_evidence
from vgs_distill.demo.models import CHAT_TEMPLATE, TURN_END, TURN_START, VISION_TOKENS
from vgs_distill.errors import InputError
from vgs_distill.inputs.dataset_checks import RowCheck
from vgs_distill.inputs.images import open_image

from tests.command_line import invoke
from tests.conftest import Workspace

QUESTION = "What colour is the cross?\nAnswer in one word."
ANSWER = "Red."


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    """Qwen3-VL's, with a token for every byte: no space or line break goes unseen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", TURN_START, TURN_END, *VISION_TOKENS, *alphabet]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, *VISION_TOKENS],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    patches: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **patches)
    video = Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 256, "longest_edge": 4 * 1024}, **patches)
    return Qwen3VLProcessor(images, wrapped, video, chat_template=CHAT_TEMPLATE)


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said once to the user."""
    said: list[str] = []
    for module in ("formats", "images"):
        logger = logging.get_logger(f"vgs_distill.inputs.{module}")
        monkeypatch.setattr(logger, "warning_once", lambda text, *values: said.append(text % values))
    return said


def picture(shade: int = 90) -> Image.Image:
    pixels = np.full((32, 48, 3), shade, dtype=np.uint8)
    pixels[8:24, 20:28] = (200, 20, 20)
    return Image.fromarray(pixels)


def stored(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def inputs_of(processor: Qwen3VLProcessor, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(
        processor.apply_chat_template(
            [with_evidence(canonical_row(row))], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )
    )  # fmt: skip


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


TEXT = {"type": "text", "text": QUESTION}
DATA_URL = "data:image/png;base64," + base64.b64encode(stored(picture())).decode()

# Rows of JSON Lines beside pictures/0.png; all of them ask the same question about the same picture.
FORMS: dict[str, dict[str, Any]] = {
    "text and image": {"prompt": QUESTION, "image": "pictures/0.png"},
    "messages and image": {"prompt": [user(QUESTION)], "image": "pictures/0.png"},
    "a list of images": {"prompt": [user(QUESTION)], "images": ["pictures/0.png"]},
    "images as one path": {"prompt": [user(QUESTION)], "images": "pictures/0.png"},
    "image as a list": {"prompt": [user(QUESTION)], "image": ["pictures/0.png"]},
    "messages": {
        "messages": [user([{"type": "image"}, TEXT]), {"role": "assistant", "content": ANSWER}],
        "images": ["pictures/0.png"],
    },
    "messages of text": {
        "messages": [user(QUESTION), {"role": "assistant", "content": ANSWER}],
        "image": "pictures/0.png",
    },
    "conversations": {
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        "image": "pictures/0.png",
    },
    "conversations without a mark": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        "images": ["pictures/0.png"],
    },
    "a prompt with its answer": {
        "prompt": [user(QUESTION), {"role": "assistant", "content": ANSWER}],
        "image": "pictures/0.png",
    },
    "mark in a text": {"prompt": f"<image>{QUESTION}", "image": "pictures/0.png"},
    "path in the message": {"messages": [user([{"type": "image", "image": "pictures/0.png"}, TEXT])]},
    "URL in the message": {"messages": [user([{"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT])]},
    "names that hold nothing": {
        "messages": [user([{"type": "image", "image": None, "path": "pictures/0.png"}, {**TEXT, "image": None}])]
    },
    "data URL": {"prompt": QUESTION, "image": DATA_URL},
    "base64": {"prompt": QUESTION, "image": DATA_URL.partition(",")[2]},
    "a part that is text": {"prompt": [user([{"type": "image"}, QUESTION])], "image": "pictures/0.png"},
}  # fmt: skip


def written(folder: Path, *records: dict[str, Any]) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    picture().save(folder / "pictures" / "0.png")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens_and_pixels(
    form: str, streaming: bool, processor: Qwen3VLProcessor, tmp_path: Path
) -> None:
    (row,) = load_rows(written(tmp_path, FORMS[form]), split="train" if streaming else None, streaming=streaming)
    found = inputs_of(processor, row)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = processor(
        text=[f"<|im_start|> user {vision}{QUESTION}<|im_end|><|im_start|> assistant "],
        images=[picture()],
        return_tensors="pt",
    )
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert (found["input_ids"] == processor.image_token_id).sum() == 6


def test_a_canonical_row_stays_as_it_is(tmp_path: Path) -> None:
    for record in FORMS.values():
        (row,) = load_rows(written(tmp_path, {**record, "answer": "red"}))
        once = canonical_row(row)
        assert once["answer"] == "red"
        assert canonical_row(once) == once
        # Arrow fills the parts of a message up to the same names.
        (again,) = Dataset.from_list([once], on_mixed_types=None)
        assert canonical_row(again)["prompt"] == once["prompt"]


def test_marks_take_images_in_their_order() -> None:
    first, second = picture(10), picture(200)
    row = {"conversations": [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image>\nand then\n<image>\nwhich is darker?"},
        {"from": "gpt", "value": "the first"},
        {"from": "human", "value": "sure?"},
    ], "images": [first, second]}  # fmt: skip
    found = canonical_row(row)
    assert [message["role"] for message in found["prompt"]] == ["system", "user", "assistant", "user"]
    assert found["prompt"][1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "and then"},
        {"type": "image"},
        {"type": "text", "text": "which is darker?"},
    ]
    assert found["images"] == [first, second]
    inline = [{"type": "image"}, {"type": "image", "image": second}, {"type": "text", "text": "which?"}]
    assert canonical_row({"messages": [user(inline)], "images": [first]})["images"] == [first, second]


@pytest.mark.parametrize(
    ("form", "notice"),
    [
        ("text and image", "prompts that are text are read as one user turn"),
        ("messages", "answers at the end of prompts are left out: the student writes its own"),
        ("conversations", "'<image>' in a prompt is read as the place of one"),
        ("base64", "images in base64 are decoded anew every time a row is read; files are quicker"),
    ],
)
def test_what_is_converted_is_said(form: str, notice: str, notices: list[str], tmp_path: Path) -> None:
    (row,) = load_rows(written(tmp_path, FORMS[form]))
    canonical_row(row)
    assert notice in notices


def test_the_plain_form_needs_no_word(notices: list[str], tmp_path: Path) -> None:
    for form in ("messages and image", "a list of images"):
        (row,) = load_rows(written(tmp_path, FORMS[form]))
        canonical_row(row)
    assert notices == []


# ------------------------------------------------------------------ pixels


def ramp(dtype: Any, top: float) -> np.ndarray:
    return np.linspace(0, top, 256).astype(dtype).reshape(16, 16)


GREY = np.arange(256).reshape(16, 16)
DEEP = (256 * GREY + 77).astype(np.uint16)
PIXELS: dict[str, tuple[Callable[[], Image.Image], str, str | None]] = {
    "16 bits": (lambda: Image.fromarray(DEEP), "PNG", "the first one holds 77 to 65357"),
    "16 bits of a scan": (lambda: Image.fromarray(DEEP), "TIFF", "0 as black and 65535 as white"),
    "fractions": (lambda: Image.fromarray(ramp(np.float32, 1)), "TIFF", "images of fractions are read with 0 as black"),
    "8 bits": (lambda: Image.fromarray(ramp(np.uint8, 255)), "PNG", None),
    "palette": (lambda: Image.fromarray(ramp(np.uint8, 255)).convert("P"), "PNG", None),
    "opaque alpha": (lambda: Image.fromarray(ramp(np.uint8, 255)).convert("RGBA"), "PNG", None),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_of_every_depth_keep_their_greys(kind: str, notices: list[str]) -> None:
    make, file, notice = PIXELS[kind]
    for image in (open_image(stored(make(), file)), open_image(make())):
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
        assert np.abs(pixels - GREY[..., None]).max() <= 1
    assert [notice is not None and notice in said for said in notices] == [True] * len(notices)
    assert bool(notices) == (notice is not None)


STORES: dict[str, tuple[Any, Features | None]] = {
    "datasets.Image": ({"bytes": None, "path": None}, Features({"prompt": Value("string"), "image": ImageFeature()})),
    "a struct of bytes": ({"bytes": None}, None),
    "bytes": (None, None),
}


@pytest.mark.parametrize("store", STORES)
def test_parquet_keeps_images_in_several_ways(store: str, tmp_path: Path) -> None:
    """With 16 bits, which are converted in the same place whoever opened the file."""
    held, features = STORES[store]
    content = stored(Image.fromarray(DEEP))
    value = content if held is None else {**held, "bytes": content}
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list([{"prompt": "what ?", "image": value}], features=features).to_parquet(path)
    dataset = load_rows(path)
    RowCheck(need_evidence=True).check(dataset)
    (image,) = canonical_row(dataset[0])["images"]
    assert np.abs(np.asarray(image).astype(int) - GREY[..., None]).max() <= 1


def test_rows_that_a_transform_makes_are_checked_as_they_are_read() -> None:
    def ask(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "prompt": [f"{name} ?" if name else None for name in columns["name"]],
            "image": [picture()] * len(columns["name"]),
        }

    RowCheck(need_evidence=True).check(Dataset.from_dict({"name": ["a", "b"]}).with_transform(ask))
    with pytest.raises(InputError, match="row 1 of the training dataset is wrong: it has no prompt"):
        RowCheck().check(Dataset.from_dict({"name": ["a", ""]}).with_transform(ask))
    RowCheck(opened=1).check(Dataset.from_dict({"name": ["a", ""]}).with_transform(ask))
    with pytest.raises(InputError, match="row 0 of the training dataset cannot be read: 'name'"):
        RowCheck().check(Dataset.from_dict({"other": ["a"]}).with_transform(ask))


def test_what_is_transparent_is_white(notices: list[str]) -> None:
    drawn = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (10, 10, 30, 30))
    pixels = np.asarray(open_image(stored(drawn)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[20, 20].tolist() == [0, 0, 0]
    assert notices == ["transparent images are seen on white"]


def test_a_picture_is_turned_as_its_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == (32, 48)


# ------------------------------------------------------------------ the commands


def test_the_commands_read_other_columns_and_forms(workspace: Workspace, tmp_path: Path) -> None:
    pictures = workspace.root / "pictures"
    lines = [json.loads(line) for line in (workspace.root / "rows.jsonl").read_text().splitlines()]
    records = [
        {
            "chat": [
                {"from": "human", "value": f"<image>\n{line['prompt'][0]['content']}"},
                {"from": "gpt", "value": line["answer"]},
            ],
            "picture": str(pictures / Path(line["image"]).name),
            "prompt": "another column",
            "answer": line["answer"],
        }
        for line in lines
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    columns = ["--prompt_column", "chat", "--image_column", "picture"]
    losses = []
    for name, more in ((str(workspace.root / "rows.jsonl"), []), (str(tmp_path / "chat.jsonl"), columns)):
        run = tmp_path / f"run{len(losses)}"
        config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), dataset_name=name)
        result = invoke(["train", "--config", config, *more])
        assert result.exit_code == 0, result.output
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss/standard"] for row in history if "loss/standard" in row])
    assert losses[0] == losses[1]


def test_a_preview_shows_what_a_row_was_converted_to(workspace: Workspace, tmp_path: Path) -> None:
    picture = str(workspace.root / "pictures" / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what is this ?", "images": picture}))
    settings = {"output_dir": str(tmp_path / "run"), "dataset_name": str(tmp_path / "rows.jsonl")}
    config = workspace.yaml(tmp_path / "run.yaml", per_device_train_batch_size=1, **settings)
    result = invoke(["train", "--config", config, "--preview", "1"])
    assert result.exit_code == 0, result.output
    assert "<|im_start|> user <|vision_start|> <|image_pad|> × 4 <|vision_end|> what is <|unknown|> ?" in result.stdout


def test_eval_says_what_it_measured(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = workspace.root / "rows.jsonl"
    result = invoke(["train", "--config", workspace.yaml(tmp_path / "run.yaml", output_dir=str(run))])
    assert result.exit_code == 0, result.output
    settings = ["--model_name_or_path", str(run), "--use_cpu", "--max_completion_length", "2", "--max_rows", "2"]
    settings += ["--output_file", str(tmp_path / "eval.json")]
    for name, source, trained_on in (
        (["--dataset_name", str(rows)], f"all rows of {rows}", True),
        (["--dataset_name", str(rows.with_suffix(".parquet"))], "rows.parquet", False),
        (["--dataset_name", str(rows.parent / "pictures"), "--dataset_test_split", "train"], "split 'train' of", False),
    ):
        result = invoke(["eval", *settings, *name])
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "eval.json").read_text())
        assert source in found["source"]
        assert found["trained_on"] is trained_on
        assert ("was trained on these very rows" in result.stdout) is trained_on
        assert "2 rows, from" in " ".join(result.stdout.split())


def test_a_tokenizer_without_an_end_token_takes_the_model_s(workspace: Workspace, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(workspace.root / "student", student)
    path = student / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    end = settings.pop("eos_token")
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))
    run = tmp_path / "run"
    config = workspace.yaml(tmp_path / "run.yaml", output_dir=str(run), model_name_or_path=str(student))
    result = invoke(["train", "--config", config])
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(run).eos_token == end
    evaluation = ["--model_name_or_path", str(student), "--dataset_name", str(workspace.root / "rows.jsonl")]
    evaluation += ["--use_cpu", "--max_completion_length", "2", "--output_file", str(tmp_path / "eval.json")]
    result = invoke(["eval", *evaluation])
    assert result.exit_code == 0, result.output
