"""What a run records: the log against the trainer's own, log q - log r against the textbook, kills, resuming, disks."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerControl, TrainerState
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.masking import Batch, drop_evidence, with_evidence
from vgs_distill.models.modules import parameters_by_module
from vgs_distill.report.log import IMAGE_FOLDER, LOG_FILE, RunLog, read_run
from vgs_distill.report.recording import COMPLETIONS_PER_RECORD, RunRecorder, token_texts
from vgs_distill.report.run import render_runs
from vgs_distill.report.teacher_answers import TeacherAnswers
from vgs_distill.report.trackers import Trackers

from tests.engine.test_trainer import BatchTap, step_logs, with_images_removed
from tests.html_page import Page


def recorded(trainer: VGSTrainer) -> RunLog:
    assert trainer.args.output_dir is not None
    return read_run(Path(trainer.args.output_dir))


@pytest.mark.parametrize("eta", ["measured", "amortized"])
def test_the_log_is_what_the_trainer_logged(make_trainer: Callable[..., VGSTrainer], eta: str) -> None:
    trainer = make_trainer(
        eta=eta,
        refresh_every=2,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        record_completions_every=3,
        record_modules_every=1,
    )
    trainer.train()
    log = recorded(trainer)
    assert log.max_steps == log.ended_at == 4
    rows = step_logs(trainer)
    assert list(log.steps) == [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None and math.isfinite(value):
                assert log.steps[row["step"]][name] == value

    assert [record["step"] for record in log.completions] == [1] * COMPLETIONS_PER_RECORD + [3] * COMPLETIONS_PER_RECORD
    for record in log.completions:
        assert len(record["tokens"]) == len(record["log_ratios"]) <= 6
        assert any(abs(ratio) > 0.01 for ratio in record["log_ratios"])
        with Image.open(log.run_dir / IMAGE_FOLDER / record["images"][0]) as picture:
            assert picture.size == (32, 32)

    refreshes = [1, 2, 3, 4] if eta == "measured" else [1, 3]
    assert [record["step"] for record in log.modules] == refreshes
    for record in log.modules:
        values = log.steps[record["step"]]
        assert record["parts"] == ["standard", "vis"]
        for part, norms in zip(record["parts"], (record["norms_first"], record["norms_second"]), strict=True):
            norm = math.sqrt(sum(norm**2 for norm in norms))
            assert norm == pytest.approx(values[f"gradient/norm_{part}"], rel=1e-4)
    compared = [step for step, _ in log.line("steering/direction_cosine")]
    assert compared == ([] if eta == "measured" else [3])
    Page(render_runs({"run": log}))


def test_the_contribution_is_the_difference_of_two_log_probabilities(make_trainer: Callable[..., VGSTrainer]) -> None:
    temperature = 1.3
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=8, temperature=temperature)
    tap = BatchTap(trainer)
    trainer.train()
    (inputs,) = tap.batches
    batch = Batch.of(inputs)
    masked = drop_evidence(batch)

    def log_probs(view: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = trainer.teacher_model(
                input_ids=view.input_ids, attention_mask=view.attention_mask, **view.multimodal
            ).logits
        logits = logits[:, :-1][:, -batch.completion_ids.size(1) :] / temperature
        return logits.log_softmax(-1).gather(2, batch.completion_ids[..., None]).squeeze(2)

    expected = log_probs(batch) - log_probs(masked)
    rows = RunRecorder.marked_rows(inputs)
    assert len(rows) == COMPLETIONS_PER_RECORD
    for row, record in zip(rows, recorded(trainer).completions, strict=True):
        length = int(batch.completion_mask[row].sum())
        assert record["log_ratios"] == pytest.approx(expected[row, :length].tolist(), abs=1e-4)
        assert "".join(record["tokens"]) == trainer._tokenizer.decode(batch.completion_ids[row, :length])
        assert record["prompt"] == inputs["examples"][row].row["prompt"][0]["content"][-1]["text"]


def test_recording_does_not_change_the_training(make_trainer: Callable[..., VGSTrainer]) -> None:
    students, states = [], []
    for every in (0, 1):
        trainer = make_trainer(
            record_completions_every=every, record_modules_every=every, gradient_accumulation_steps=2
        )
        trainer.train()
        assert bool(recorded(trainer).completions) == bool(every)
        students.append(trainer.model.state_dict())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name]), name


# ---------------------------------------------------------------------- the teacher's answer and the reference


def test_the_teacher_answers_what_it_finds_likeliest(make_trainer: Callable[..., VGSTrainer], prompts: Dataset) -> None:
    trainer = make_trainer(with_images_removed(prompts, lambda row: row % 2 == 0), max_steps=1)
    tap = BatchTap(trainer)
    trainer.train()
    (inputs,) = tap.batches
    batch = Batch.of(inputs)
    ends, banned = trainer.eos_token_ids, trainer.generation_config.suppress_tokens
    for row, record in zip(RunRecorder.marked_rows(inputs), recorded(trainer).completions, strict=True):
        # One prompt at a time, the whole of it read again for every token: no padding and no cache.
        prompt = batch.prompt_ids[row][batch.prompt_mask[row].bool()][None]
        marked = inputs["examples"][row].row
        fields = trainer._tokenize_prompts([with_evidence(marked, trainer._modality)])[2]
        seen = {name: torch.as_tensor(value) for name, value in fields.items() if name not in _PER_TOKEN}
        written: list[int] = []
        while len(written) < 6:
            ids = torch.cat([prompt, torch.tensor([written], dtype=torch.long)], dim=1)
            types = {"mm_token_type_ids": (ids == trainer.model.config.image_token_id).int()}
            with torch.no_grad():
                logits = trainer.teacher_model(input_ids=ids, **types, **seen).logits[0, -1]
            logits[banned] = -math.inf
            written.append(int(logits.argmax()))
            if written[-1] in ends:
                written.pop()
                break
        assert record["teacher"] == trainer._tokenizer.decode(written, skip_special_tokens=True)
        assert bool(record["images"]) == bool(seen)


_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"record_teacher_answers": False}, "record_teacher_answers is off"),
        ({"teacher_device": "offload"}, "it is not beside the student (teacher_device is 'offload')"),
        ({"teacher_device": "cpu"}, "it is not beside the student (teacher_device is 'cpu')"),
    ],
)
def test_a_teacher_that_is_not_asked_says_why(
    make_trainer: Callable[..., VGSTrainer], settings: dict[str, Any], reason: str
) -> None:
    trainer = make_trainer(max_steps=1, **settings)
    trainer.train()
    log = recorded(trainer)
    assert [record["teacher"] for record in log.completions] == [None] * COMPLETIONS_PER_RECORD
    assert log.teacher_silent == reason
    assert reason in Page(render_runs({"run": log})).text


def test_a_teacher_that_fails_to_write_does_not_end_the_run(
    make_trainer: Callable[..., VGSTrainer], make_model: Callable[..., Any]
) -> None:
    teacher = make_model(2, width=48).eval()
    teacher.generate = None  # as a model without the method
    trainer = make_trainer(teacher=teacher, record_completions_every=1)
    trainer.train()
    assert trainer.state.global_step == 2
    assert {record["teacher"] for record in recorded(trainer).completions} == {None}


@pytest.mark.parametrize(
    ("answer", "reference"), [("red", "red"), (["red", "crimson"], "red | crimson"), (3, "3"), (None, None)]
)
def test_the_reference_is_the_answer_of_the_row(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, answer: Any, reference: str | None
) -> None:
    trainer = make_trainer(prompts.add_column("answer", [answer] * len(prompts)), max_steps=1)
    trainer.train()
    assert [record["reference"] for record in recorded(trainer).completions] == [reference] * COMPLETIONS_PER_RECORD


def test_plain_runs_record_completions_without_contribution(make_trainer: Callable[..., VGSTrainer]) -> None:
    trainer = make_trainer(method="opd", max_steps=1)
    trainer.train()
    log = recorded(trainer)
    assert [record["log_ratios"] for record in log.completions] == [None] * COMPLETIONS_PER_RECORD
    assert "nats</p>" not in render_runs({"run": log})


def test_rows_without_an_image_have_no_contribution(make_trainer: Callable[..., VGSTrainer], prompts: Dataset) -> None:
    trainer = make_trainer(with_images_removed(prompts, lambda row: row % 2 == 0), max_steps=1)
    trainer.train()
    completions = recorded(trainer).completions
    assert {bool(record["images"]) for record in completions} == {True, False}
    for record in completions:
        assert any(record["log_ratios"]) == bool(record["images"])


def test_a_resumed_run_continues_its_log(make_trainer: Callable[..., VGSTrainer]) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "record_completions_every": 1}
    trainer = make_trainer(**settings)
    trainer.train()
    make_trainer(**settings).train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    log = recorded(trainer)
    assert len(log.sessions) == 2
    assert list(log.steps) == [1, 2, 3, 4]
    counts = [sum(record["step"] == step for record in log.completions) for step in (1, 2, 3, 4)]
    assert counts == [COMPLETIONS_PER_RECORD] * 4


@pytest.fixture
def make_recorder(tmp_path: Path, make_model: Callable[..., Any], processor: Any) -> Callable[..., RunRecorder]:
    def make(**settings: Any) -> RunRecorder:
        config = VGSConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, **settings)
        teacher = make_model(2)
        answers = TeacherAnswers(config, teacher, processor, GenerationConfig(), Accelerator(cpu=True))
        return RunRecorder(config, make_model(1), teacher, answers, Trackers([]))

    return make


def begin(recorder: RunRecorder, step: int) -> TrainerState:
    state = TrainerState(global_step=step, max_steps=10_000_000)
    recorder.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    return state


def log_step(recorder: RunRecorder, state: TrainerState, loss: float) -> None:
    state.global_step += 1
    recorder.on_log(None, state, TrainerControl(), {"loss/standard": loss})  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_run_loses_nothing_that_it_logged(make_recorder: Callable[..., RunRecorder], tmp_path: Path) -> None:
    recorder, path = make_recorder(), tmp_path / "run" / LOG_FILE
    child = os.fork()
    if child == 0:  # writes until it is killed
        try:
            state = begin(recorder, 0)
            while True:
                log_step(recorder, state, 1.0)
        finally:
            os._exit(1)
    try:
        while not path.exists() or path.stat().st_size < 20_000:
            time.sleep(0.005)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lines = path.read_bytes().count(b"\n")
    log = read_run(tmp_path / "run")
    assert log.ended_at is None
    assert list(log.steps) == list(range(1, lines))

    with path.open("ab") as torn:  # what a kill inside the write leaves
        torn.write(b'{"kind": "metrics", "step": 99999999, "ti')
    assert read_run(tmp_path / "run").steps == log.steps
    resumed = make_recorder()
    state = begin(resumed, 20)
    log_step(resumed, state, 2.0)
    again = read_run(tmp_path / "run")
    assert list(again.steps) == list(range(1, 22))
    assert [again.steps[step]["loss/standard"] for step in (20, 21)] == [1.0, 2.0]


def test_a_full_disk_ends_the_recording_and_not_the_run(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "run" / LOG_FILE).parent.mkdir(parents=True)
    (tmp_path / "run" / LOG_FILE).symlink_to("/dev/full")
    trainer = make_trainer()
    warnings: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("vgs_distill.report.recording"), "handle", warnings.append)
    trainer.train()
    assert trainer.state.global_step == 2
    (warning,) = warnings
    assert "the recording of the run stops here, training goes on" in warning.getMessage()


def test_numbers_that_json_lacks_are_left_out(make_recorder: Callable[..., RunRecorder], tmp_path: Path) -> None:
    recorder = make_recorder()
    state = begin(recorder, 0)
    recorder.on_log(None, state, TrainerControl(), {"a": math.nan, "b": math.inf, "c": 1, "d": None})  # type: ignore[arg-type]
    last = (tmp_path / "run" / LOG_FILE).read_text().splitlines()[-1]
    assert json.loads(last)["values"] == {"c": 1.0}


def test_pictures_are_small_and_kept_once(make_recorder: Callable[..., RunRecorder], tmp_path: Path) -> None:
    recorder = make_recorder()
    begin(recorder, 0)
    photo = Image.effect_noise((1200, 900), 50).convert("RGBA")
    names = [recorder._keep_image(photo), recorder._keep_image(photo)]
    assert names[0] == names[1]
    assert os.listdir(tmp_path / "run" / IMAGE_FOLDER) == names[:1]
    with Image.open(tmp_path / "run" / IMAGE_FOLDER / names[0]) as kept:
        assert kept.size == (384, 288)
    assert photo.size == (1200, 900)


def test_tokens_inside_a_character_wait_for_the_rest() -> None:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    text = "café\n 👩‍🚀 مرحبا"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert texts[3:5] == ["", "é"]
    assert token_texts(tokenizer, ids[:4])[3] == "\ufffd"  # a completion may end inside a character


def test_every_parameter_is_in_one_module(make_model: Callable[..., Any]) -> None:
    model = make_model(1)
    parameters = list(model.parameters())
    parts = parameters_by_module(model, parameters)
    assert list(parts) == [
        "vision tower", "connector", "embedding", "decoder layer 0", "decoder layer 1", "decoder, other", "head",
    ]  # fmt: skip
    assert sorted(index for indices in parts.values() for index in indices) == list(range(len(parameters)))
    names = [name for name, _ in model.named_parameters()]
    assert all("merger" in names[index] for index in parts["connector"])
    assert [names[index] for index in parts["head"]] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["record_completions_every", "record_modules_every"])
def test_a_negative_interval_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be 0 \(never\) or more, got -1"):
        VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: -1})
