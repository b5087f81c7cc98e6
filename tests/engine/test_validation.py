"""Bad input: one clear sentence each, before any training time is spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vgs_distill
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from vgs_distill import compatibility
from vgs_distill.inputs.dataset_checks import RowCheck
from vgs_distill.resilience.output_dir import check_output_dir

PROMPT = [{"role": "user", "content": "what is this ?"}]


def test_a_dataset_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no column 'prompt', 'messages' or 'conversations' \(it has 'question'\)"):
        RowCheck().check(Dataset.from_dict({"question": ["a"]}))


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        RowCheck().check(Dataset.from_dict({"prompt": []}))


@pytest.mark.parametrize("bad", [None, []])
def test_a_row_without_a_prompt_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="row 2 of the training dataset is wrong: it has no prompt"):
        RowCheck().check(Dataset.from_dict({"prompt": [PROMPT, PROMPT, bad, PROMPT]}))


def test_a_message_without_content_is_named() -> None:
    rows = [PROMPT, [{"role": "user", "content": None}]]
    with pytest.raises(ValueError, match="row 1 of the training dataset is wrong: it has a message without"):
        RowCheck().check(Dataset.from_dict({"prompt": rows}))


def image_dataset(images: list[Any]) -> Dataset:
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()})
    return Dataset.from_dict({"prompt": [PROMPT] * len(images), "image": images}, features=features)


def test_a_broken_image_is_named_by_row(prompts: Dataset) -> None:
    good = prompts[0]["image"]
    broken = image_dataset([good, None, {"bytes": b"not an image", "path": None}])
    with pytest.raises(ValueError, match="row 2 of the training dataset is wrong: an image cannot be opened"):
        RowCheck().check(broken)
    RowCheck(opened=2).check(broken)  # rows past the limit are not opened


def test_a_missing_image_file_is_named(tmp_path: Path) -> None:
    missing = image_dataset([{"bytes": None, "path": str(tmp_path / "gone.png")}])
    with pytest.raises(ValueError, match=r"row 0 .*gone\.png"):
        RowCheck().check(missing)


def test_lists_of_images_are_opened(prompts: Dataset) -> None:
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "images": [ImageFeature()]})
    rows = [[prompts[0]["image"]], [{"bytes": b"x", "path": None}]]
    dataset = Dataset.from_dict({"prompt": [PROMPT, PROMPT], "images": rows}, features=features)
    with pytest.raises(ValueError, match="row 1 "):
        RowCheck().check(dataset)


def test_a_streaming_dataset_has_its_first_row_checked() -> None:
    with pytest.raises(ValueError, match="no column 'prompt'"):
        RowCheck().check(IterableDataset.from_generator(lambda: iter([{"text": "x"}])))


def test_the_trainer_checks_before_it_trains(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make_trainer(Dataset.from_dict({"question": ["a"]}))


def test_the_trainer_checks_its_output_directory(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write to the output directory"):
        make_trainer(output_dir=str(tmp_path / "file" / "run"))


def test_an_output_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write to the output directory"):
        check_output_dir(tmp_path / "file" / "run")
    assert check_output_dir(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "1.17.0.dev0", "2.0.0"])
def test_an_unsupported_trl_names_the_supported_range(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs trl >= 1\.16, < 1\.17, but trl {found} is installed"):
        vgs_distill.VGSTrainer  # noqa: B018 - what is imported on first use
    for good in ("1.16.0", "1.16.3", "1.16.0.dev0"):
        monkeypatch.setattr(compatibility, "version", lambda name, good=good: good)
        assert vgs_distill.VGSTrainer.__name__ == "VGSTrainer"
