"""`vgs diagnose`: what it measures against the textbook, what it leaves behind, and what it says to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vgs_distill import VGSTrainer
from vgs_distill.diagnosis.measure import GAMMAS, NEEDS_IMAGE, Diagnosis, diagnose, from_plain
from vgs_distill.diagnosis.recommend import LANGUAGE, OPD, VGS, recommend
from vgs_distill.masking import Batch

from tests.command_line import invoke, refused
from tests.conftest import Workspace
from tests.diagnosis_record import diagnosis
from tests.engine.test_dependency_angles import textbook
from tests.engine.test_methods import flat
from tests.html_page import Page


@pytest.fixture(scope="module")
def written(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one diagnosis by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("diagnosis")
    config = workspace.yaml(folder / "run.yaml", output_dir=str(folder / "run"), method="opd")
    flags = ("--config", config, "--rows", "10", "--output", str(folder / "out" / "page.html"))
    result = invoke(("diagnose", *flags))
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_the_command_leaves_a_page_and_its_numbers_and_no_run(written: tuple[Path, str]) -> None:
    folder, said = written
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "out"}
    assert {path.name for path in (folder / "out").iterdir()} == {"page.html", "page.json"}
    record = json.loads((folder / "out" / "page.json").read_text())
    found = from_plain(record["diagnosis"])
    assert found.rows == 10
    assert record["recommendation"]["take"] == recommend(found).take
    page = Page((folder / "out" / "page.html").read_text())
    sentence = recommend(found).reason
    assert sentence in page.text
    assert sentence in " ".join(said.split())
    assert "KL(p₀‖r)" in page.text
    assert "10 completions" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_numbers_are_consistent(written: tuple[Path, str]) -> None:
    found = from_plain(json.loads((written[0] / "out" / "page.json").read_text())["diagnosis"])
    assert min(found.standard, found.lang, found.vis, found.dependency) > 0
    quantiles = found.dependency_quantiles
    assert list(quantiles) == sorted(quantiles)
    assert quantiles[0] <= found.dependency <= quantiles[-1]
    assert sum(found.angles["tokens"]) <= found.tokens
    assert found.prices["vgs"].seconds > found.prices["opd"].seconds > 0
    # One view after the other is alive: the longer one alone sets what is kept, but for some numbers a token.
    assert found.prices["vgs"].kept_bytes == pytest.approx(found.prices["opd"].kept_bytes, rel=0.1)
    assert found.prices["opd"].kept_bytes > 0
    assert found.prices["opd"].peak_bytes is None
    ratio = found.norms["vis"] / found.norms["standard"]
    for gamma in GAMMAS:
        expected = (1 + 2 * gamma * ratio * found.cosine + (gamma * ratio) ** 2) ** -0.5
        assert found.eta[f"{gamma:g}"] == pytest.approx(expected, rel=1e-4)


def test_the_losses_and_gradients_are_the_textbooks_and_nothing_is_left_behind(
    make_trainer: Callable[..., VGSTrainer],
) -> None:
    trainer = make_trainer(method="vgs", per_device_train_batch_size=4)
    rollouts: list[dict[str, Any]] = []
    roll_out = trainer.roll_out
    trainer.roll_out = lambda rows: rollouts.append(roll_out(rows)) or rollouts[-1]  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.train()
    found = diagnose(trainer, 6)
    assert trainer.model.training
    assert not trainer.teacher_model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert [len(one["prompt_ids"]) for one in rollouts] == [4, 2]

    trainer.model.eval()
    told = [textbook(trainer.model, trainer.teacher_model, one) for one in rollouts]
    scores = torch.cat([dependency for dependency, _ in told])
    assert found.tokens == len(scores)
    assert found.dependency == pytest.approx(scores.mean().item(), rel=1e-4)
    assert found.needs_image == pytest.approx((scores > NEEDS_IMAGE).float().mean().item())
    for part in ("standard", "lang", "vis"):
        losses = torch.cat([losses[part] for _, losses in told])
        assert getattr(found, part) == pytest.approx(losses.mean().item(), rel=1e-3)
        if part == "lang":
            top = losses[scores.argsort(descending=True)[: round(0.3 * len(scores))]]
            assert found.lang_of_dependent == pytest.approx(top.mean().item(), rel=1e-3)
    parameters = list(trainer.model.parameters())
    gradients = [
        flat(list(torch.autograd.grad(told[0][1][part].mean(), parameters, allow_unused=True, retain_graph=True)),
             parameters)
        for part in ("standard", "vis")
    ]  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0).item()
    assert found.cosine == pytest.approx(cosine, abs=1e-3)
    assert found.norms["vis"] == pytest.approx(gradients[1].norm().item(), rel=1e-3)
    mask = Batch.of(rollouts[0]).completion_mask
    assert mask.sum() == sum(found.angles["tokens"])


def diagnosed(**changes: Any) -> Diagnosis:
    return replace(from_plain(diagnosis()), **changes)


@pytest.mark.parametrize(
    ("changes", "take", "word"),
    [
        ({}, VGS, "need the image"),
        ({"needs_image": 0.01}, OPD, "on nothing"),
        ({"lang": 2.0}, LANGUAGE, "lacks language"),
        ({"cut_off": 0.6}, LANGUAGE, "find no end"),
        ({"lang": 2.0, "needs_image": 0.01}, LANGUAGE, "lacks language"),
    ],
)
def test_what_is_recommended_and_why(changes: dict[str, Any], take: str, word: str) -> None:
    advice = recommend(diagnosed(**changes))
    assert advice.take == take
    assert word in advice.reason
    assert advice.reason.endswith(".")
    assert (advice.settings["method"] == "vgs") == (take == VGS)


def test_the_recommended_settings_are_ones_that_the_engine_takes(tmp_path: Path) -> None:
    from vgs_distill import VGSConfig

    for changes in ({}, {"lang": 2.0}):
        settings = recommend(diagnosed(**changes)).settings
        config = VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
        assert {name: getattr(config, name) for name in settings} == settings


def test_bad_input_is_one_sentence(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.yaml(tmp_path / "run.yaml")
    assert "rows must be 1 or more, got 0" in refused("diagnose", "--config", config, "--rows", "0")
    assert "model_name_or_path" in refused("diagnose", "--dataset_name", "rows.jsonl")
    assert "gama" in refused("diagnose", "--config", config, "--gama", "2")
    (tmp_path / "file").write_text("")
    page = str(tmp_path / "file" / "page.html")
    assert "file" in refused("diagnose", "--config", config, "--rows", "2", "--output", page)


def test_rows_without_an_image_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    rows = tmp_path / "text.jsonl"
    question, picture = {"prompt": "how many objects are there ?"}, str(workspace.root / "pictures" / "0.png")
    lines = [{**question, "image": None if number < 4 else picture} for number in range(8)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    config = workspace.yaml(tmp_path / "run.yaml", dataset_name=str(rows))
    sentence = refused("diagnose", "--config", config, "--rows", "4", "--output", str(tmp_path / "page.html"))
    assert "no row that was read has an image" in sentence
    assert not (tmp_path / "page.html").exists()
