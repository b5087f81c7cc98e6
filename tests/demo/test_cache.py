"""The model cache: whole entries or none, and damage is repaired, not crashed upon."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from vgs_distill.demo.cache import MANIFEST, cache_root, cached_folder, entry_key, fault
from vgs_distill.demo.recipes import ModelSize, demo_recipe


class Builder:
    """Writes two files and counts how often it had to."""

    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, folder: Path) -> None:
        self.builds += 1
        (folder / "weights.bin").write_bytes(b"weights")
        (folder / "parts").mkdir()
        (folder / "parts" / "config.json").write_text("{}")


@pytest.fixture
def build():
    return Builder()


def test_an_entry_is_built_once(tmp_path, build):
    folder, cached = cached_folder("entry", build, root=tmp_path)
    assert not cached
    again, cached = cached_folder("entry", build, root=tmp_path)
    assert cached
    assert again == folder
    assert build.builds == 1
    assert [path.name for path in tmp_path.iterdir()] == ["entry"], "no scratch folder is left"


def damage_truncated(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"wei")


def damage_missing_file(folder: Path) -> None:
    (folder / "parts" / "config.json").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_manifest_text(folder: Path) -> None:
    (folder / MANIFEST).write_text("{not json")


def damage_manifest_type(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def damage_file_in_place(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    folder.write_text("a file where a folder should be")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_missing_file,
        damage_no_manifest,
        damage_manifest_text,
        damage_manifest_type,
        damage_file_in_place,
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_message(tmp_path, build, damage):
    folder, _ = cached_folder("entry", build, root=tmp_path)
    damage(folder)
    said: list[str] = []
    repaired, cached = cached_folder("entry", build, root=tmp_path, say=said.append)
    assert not cached
    assert build.builds == 2
    assert fault(repaired) is None
    assert (repaired / "weights.bin").read_bytes() == b"weights"
    assert len(said) == 1
    assert "damaged" in said[0]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise RuntimeError("out of patience")

    with pytest.raises(RuntimeError, match="patience"):
        cached_folder("entry", build, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_returns_the_winner(tmp_path, build):
    def overtaken(folder: Path) -> None:
        cached_folder("entry", build, root=tmp_path)
        (folder / "weights.bin").write_bytes(b"late")

    folder, _ = cached_folder("entry", overtaken, root=tmp_path)
    assert (folder / "weights.bin").read_bytes() == b"weights"
    assert fault(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_the_key_follows_every_number_and_the_libraries(monkeypatch):
    recipe = demo_recipe("digits").teacher
    size = ModelSize(text_width=96)
    key = entry_key("teacher", {"size": size, "training": recipe, "seed": 0})
    assert key == entry_key("teacher", {"size": size, "training": recipe, "seed": 0})
    assert key.startswith("teacher-")
    others = [
        entry_key("teacher", {"size": size, "training": replace(recipe, learning_rate=1e-3), "seed": 0}),
        entry_key("teacher", {"size": replace(size, heads=2), "training": recipe, "seed": 0}),
        entry_key("teacher", {"size": size, "training": recipe, "seed": 1}),
    ]
    monkeypatch.setattr("vgs_distill.demo.cache.version", lambda name: "0.0")
    others.append(entry_key("teacher", {"size": size, "training": recipe, "seed": 0}))
    assert len({key, *others}) == 5


def test_a_quick_demo_shares_its_models_with_a_full_one():
    quick, full = demo_recipe("digits", quick=True), demo_recipe("digits")
    assert (quick.teacher, quick.student_start) == (full.teacher, full.student_start)
    assert quick.distillation.steps < full.distillation.steps


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VGS_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("VGS_CACHE_DIR")
    assert cache_root() == Path(os.path.expanduser("~")) / ".cache" / "vgs-kernels"


def test_the_manifest_lists_every_file(tmp_path, build):
    folder, _ = cached_folder("entry", build, root=tmp_path)
    assert set(json.loads((folder / MANIFEST).read_text())) == {"weights.bin", "parts/config.json"}
