"""Every family and modality, by its own processor and model: it trains, can be masked, and its loss is the textbook's.

`docs/families.md` is the table of the first test, written from real runs by `python -m tests.families.table`.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vgs_distill import VGSTrainer, rollouts
from vgs_distill.inputs import families
from vgs_distill.inputs.families import check_teacher_reads_the_same
from vgs_distill.inputs.modalities import AUDIO, MODALITIES, Modality
from vgs_distill.masking import Batch, masked_view, stack_views, with_row
from vgs_distill.models.modules import parameters_by_module
from vgs_distill.report.log import read_run
from vgs_distill.steering.methods import METHODS

from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.families.training import first_rows, make_trainer, processor_of, step_logs


def cases(*names: str) -> Any:
    """Parameters of a test, the first of which is a family."""
    return pytest.param(
        *names,
        marks=pytest.mark.skipif(
            names[0] == "smolvlm" and importlib.util.find_spec("num2words") is None,
            reason="SmolVLM's processor needs num2words",
        ),
    )


def masks(family: str) -> tuple[str, ...]:
    return MODALITIES[SMALL_FAMILIES[family].modality].masks


every_family = pytest.mark.parametrize("family", [cases(name) for name in SMALL_FAMILIES])
every_family_and_mask = pytest.mark.parametrize(
    ("family", "image_mask"),
    [
        cases(name, mask)
        for name in SMALL_FAMILIES
        for mask in masks(name)[: 1 if name in ("qwen2_5_vl_video", "qwen2_vl_video") else None]  # as qwen3_vl_video
    ],
)
ATOL = 1e-5


@every_family_and_mask
@pytest.mark.parametrize("method", METHODS)
def test_three_steps(family: str, method: str, image_mask: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), method=method, image_mask=image_mask)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 3
    for row in logs:
        assert all(map(math.isfinite, row.values()))
        assert {f"loss/{part}" for part in ("standard", *METHODS[method].pair)} <= row.keys()
    if METHODS[method].second is not None:
        assert all(logs[0][f"gradient/norm_{part}"] > 0 for part in METHODS[method].pair)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any(word in name for name in moved for word in ("vision", "visual", "audio_tower")), "the tower learns too"


@every_family
def test_the_teacher_writes_answers_that_change_nothing(family: str, tmp_path: Path) -> None:
    students = []
    for asked in (False, True):
        folder = tmp_path / str(asked)
        trainer = make_trainer(
            family, str(folder), (1, 2), record_completions_every=1, record_teacher_answers=asked, max_steps=2
        )
        trainer.train()
        log = read_run(folder)
        assert (log.teacher_silent is None) == asked
        assert len(log.completions) == 4
        assert all((record["teacher"] is not None) == asked for record in log.completions)
        students.append(trainer.model.state_dict())
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name]), name


@every_family
def test_a_teacher_in_half_precision_beside_a_student_in_full(family: str, tmp_path: Path) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher = SMALL_FAMILIES[family].model(processor_of(family), 2, TEACHER_WIDTH).to(dtype)
        trainer = make_trainer(family, str(tmp_path), teacher=teacher, max_steps=1, record_completions_every=1)
        trainer.train()
        losses += [row["loss/standard"] for row in step_logs(trainer)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)


@every_family
def test_its_modules_are_told_apart(family: str) -> None:
    model = SMALL_FAMILIES[family].model(processor_of(family), 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    modality = MODALITIES[SMALL_FAMILIES[family].modality]
    parts = parameters_by_module(model, parameters, modality)
    tower, word_of_tower = ("audio tower", "audio_tower") if modality is AUDIO else ("vision tower", "vis")
    head = [] if getattr(model.config, "tie_word_embeddings", False) or "lm_head.weight" not in names else ["head"]
    layers = ["decoder layer 0", "decoder layer 1"]
    assert list(parts) == [tower, "connector", "embedding", *layers, "decoder, other", *head]
    assert sorted(index for indices in parts.values() for index in indices) == list(range(len(parameters)))
    for part, word in [(tower, word_of_tower), ("embedding", "embed_tokens"), ("decoder layer 1", ".layers.1.")]:
        assert all(word in names[index] for index in parts[part])
    for index in parts["connector"]:
        assert any(word in names[index] for word in ("merger", "connector", "projector", "image_newline"))


def rollout(trainer: VGSTrainer, rows: int = 4) -> Batch:
    trainer.model.eval()
    return Batch.of(trainer._prepare_inputs(first_rows(trainer, rows)))


def hidden(trainer: VGSTrainer, batch: Batch) -> Tensor:
    """Hidden states that predict the real completion tokens, (tokens, width)."""
    with torch.no_grad():
        return trainer._run_backbone(trainer.model, batch)[batch.completion_mask.bool()]


def with_other_evidence(batch: Batch, modality: Modality) -> Batch:
    """Other pictures, videos or sounds of the same sizes."""
    features = batch.multimodal[modality.features]
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    other = torch.where(features == 0, features, noise)
    return batch._replace(multimodal={**batch.multimodal, modality.features: other})


@every_family
def test_a_masked_image_cannot_be_seen(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path))
    batch = rollout(trainer)
    other = with_other_evidence(batch, trainer._modality)
    assert not torch.allclose(hidden(trainer, batch), hidden(trainer, other), atol=1e-2)
    for image_mask in masks(family):
        first, second = (
            hidden(trainer, masked_view(image_mask, view, trainer._evidence_tokens, trainer._family, trainer.model))
            for view in (batch, other)
        )
        assert torch.isfinite(first).all()
        torch.testing.assert_close(first, second, atol=ATOL, rtol=0, msg=lambda m, mask=image_mask: f"{mask}: {m}")


@every_family_and_mask
def test_both_views_in_one_batch_are_those_of_two_passes(family: str, image_mask: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), (1, 2), image_mask=image_mask)
    batch = rollout(trainer)
    masked = masked_view(image_mask, batch, trainer._evidence_tokens, trainer._family, trainer.model)
    with torch.no_grad():
        apart = torch.cat([trainer._run_backbone(trainer.model, view) for view in (batch, masked)])
        packed = trainer._run_backbone(trainer.model, stack_views(batch, masked))
    real = torch.cat([batch.completion_mask, batch.completion_mask]).bool()
    torch.testing.assert_close(packed[real], apart[real], atol=ATOL, rtol=0)


@every_family
def test_a_hidden_image_leaves_every_position_where_it_was(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), image_mask="attention")
    batch = rollout(trainer)
    seen: list[Tensor] = []
    for name, module in trainer.model.named_modules():
        if name.endswith(("language_model.rotary_emb", "text_model.rotary_emb")):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1]),
                with_kwargs=True,
            )
    hidden(trainer, batch)
    unmasked = list(seen)
    seen.clear()
    hidden(trainer, masked_view("attention", batch, trainer._evidence_tokens, trainer._family, trainer.model))
    assert len(unmasked) == len(seen) > 0
    real = batch.attention_mask.bool()
    for a, b in zip(unmasked, seen, strict=True):
        a, b = (p.expand(*p.shape[:-2], *real.shape)[..., real] for p in (a, b))
        assert torch.equal(a, b)


@every_family
def test_completion_tokens_do_not_see_later_ones(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path))
    batch = rollout(trainer)
    ids = batch.completion_ids.clone()
    red, green = processor_of(family).tokenizer.convert_tokens_to_ids(["red", "green"])
    ids[:, -1] = torch.where(ids[:, -1] == red, green, red)
    changed = batch._replace(completion_ids=ids, completion_mask=torch.ones_like(ids))
    batch = batch._replace(completion_mask=torch.ones_like(ids))
    for view in (
        lambda b: b,
        lambda b: masked_view("drop", b, trainer._evidence_tokens, trainer._family, trainer.model),
    ):
        with torch.no_grad():
            first, second = (trainer._run_backbone(trainer.model, view(b)) for b in (batch, changed))
        torch.testing.assert_close(first, second, atol=ATOL, rtol=0)


@every_family
def test_drop_leaves_the_prompt_of_a_row_without_image(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path))
    batch = rollout(trainer)
    dropped = masked_view("drop", batch, trainer._evidence_tokens, trainer._family, trainer.model)
    assert not torch.isin(dropped.prompt_ids, torch.tensor(trainer._evidence_tokens.placeholders)).any()
    if trainer._family.needs_image:
        return
    text_only = rollout(make_trainer(family, str(tmp_path), (0,)))
    assert torch.equal(dropped.prompt_ids, text_only.prompt_ids)
    assert torch.equal(dropped.prompt_mask, text_only.prompt_mask)
    real = dropped.prompt_ids[dropped.prompt_mask.bool()]
    assert not torch.isin(real, torch.tensor(trainer._evidence_tokens.banned_while_sampling)).any()


@every_family
def test_the_loss_is_the_textbook_one_on_the_model_s_own_logits(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), max_steps=1)
    trainer.model.eval()
    inputs = trainer._prepare_inputs(first_rows(trainer, 4))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
    batch = Batch.of(inputs)

    def log_probs(model: Any) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.multimodal).logits
        return logits[:, :-1][:, -batch.completion_ids.size(1) :].float().log_softmax(-1)

    p, q = log_probs(trainer.model), log_probs(trainer.teacher_model)
    kl = (p.exp() * (p - q)).sum(-1)[batch.completion_mask.bool()]
    torch.testing.assert_close(loss, kl.mean(), atol=ATOL, rtol=1e-4)


@every_family
def test_a_stand_in_beside_rows_without_evidence_leaves_them_as_they_are(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process runs whose rows have no image where another's have some."""
    trainer = make_trainer(family, str(tmp_path), (int(family == "paligemma"),), top_k=1)
    batch = rollout(trainer, 3)
    row = trainer._stand_in_prompt()
    assert trainer._evidence_tokens.is_placeholder(row.prompt_ids).any()
    assert not trainer._evidence_tokens.is_placeholder(row.text_prompt_ids).any()
    if trainer._family.needs_image:
        return
    below = with_row(batch, row)
    assert below.prompt_ids.size(0) == 4
    torch.testing.assert_close(hidden(trainer, below), hidden(trainer, batch), atol=ATOL, rtol=0)
    for image_mask in masks(family):
        view = masked_view(image_mask, below, trainer._evidence_tokens, trainer._family, trainer.model)
        torch.testing.assert_close(hidden(trainer, view), hidden(trainer, batch), atol=ATOL, rtol=0)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(rollouts, "on_any_process", lambda flags: [True])
    generate, given = trainer.model.generate, []
    monkeypatch.setattr(trainer.model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs))
    sampled = rollout(trainer, 3)
    assert trainer._modality.features in given[0]
    assert sampled.completion_ids.tolist() == batch.completion_ids.tolist()


@every_family_and_mask
def test_rows_with_none_one_and_several_images_train_together(family: str, image_mask: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        family, str(tmp_path), (0, 1, 3, 1), image_mask=image_mask, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, max_steps=2, temperature=1.0,
    )  # fmt: skip
    if trainer._family.needs_image:
        with pytest.raises(ValueError, match="takes no prompt without one; filter such rows out"):
            trainer.train()
        return
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 2
    assert all(math.isfinite(row["loss/standard"]) and row["loss/vis"] > 0 for row in logs)


@every_family
def test_plain_distillation_takes_several_images(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), (1, 2), method="opd", max_steps=1)
    trainer.train()
    assert math.isfinite(step_logs(trainer)[0]["loss/standard"])


def test_a_family_without_a_row_trains_with_drop_and_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", ())
    for image_mask in ("drop", "blank"):
        trainer = make_trainer("llava_next", str(tmp_path), image_mask=image_mask, max_steps=1)
        trainer.train()
        assert math.isfinite(step_logs(trainer)[0]["loss/vis"])
    sentence = (
        r"'attention' is not known to hide the image of model type 'llava_next'; choose 'drop' or 'blank', or add"
    )
    with pytest.raises(ValueError, match=sentence):
        make_trainer("llava_next", str(tmp_path), image_mask="attention")


def test_a_teacher_that_reads_images_differently_is_refused(tmp_path: Path) -> None:
    def config(name: str, **vision: Any) -> Any:
        built = SMALL_FAMILIES[name].build_config(processor_of(name), 32)
        for key, value in vision.items():
            setattr(built.vision_config, key, value)
        return built

    check_teacher_reads_the_same(config("qwen2_vl"), config("qwen2_5_vl"))  # same tokens, same patches
    with pytest.raises(ValueError, match="they differ in patch_size; both read what the student's processor makes"):
        check_teacher_reads_the_same(config("qwen2_5_vl"), config("qwen3_vl", patch_size=16))
    with pytest.raises(ValueError, match=r"the teacher \(gemma3\) reads images in another way .* differ in model_type"):
        check_teacher_reads_the_same(config("llava_next"), config("gemma3"))


def test_every_row_of_the_table_has_a_small_model_and_every_small_model_a_row() -> None:
    small = {(family.model_type, family.modality) for family in SMALL_FAMILIES.values()}
    rows = {(name, modality) for row in families.FAMILIES for name in row.model_types for modality in row.modalities}
    assert small <= rows
    assert all({(name, row.modalities[0]) for name in row.model_types} & small for row in families.FAMILIES)
