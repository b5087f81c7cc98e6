"""Sounds and videos in the place of images, end to end on real classes: what is dropped, learned and refused.

That every mask hides them, and that rows with none, one and several train together: `test_families.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Features, IterableDataset, List, Value, Video
from torch import Tensor
from vgs_distill.errors import InputError
from vgs_distill.inputs.dataset_checks import RowCheck
from vgs_distill.inputs.families import EvidenceTokens, check_modality, check_teacher_reads_the_same, placeholder_ids
from vgs_distill.inputs.formats import canonical_row, canonical_rows
from vgs_distill.inputs.modalities import AUDIO, VIDEO, read_piece
from vgs_distill.masking import Batch, masked_view, with_evidence
from vgs_distill.report.log import LOG_FILE
from vgs_distill.rollouts import loss_mask

from tests.command_line import invoke
from tests.families.models import SMALL_FAMILIES, TEACHER_WIDTH
from tests.families.training import first_rows, make_trainer, picture, processor_of, questions, sound, step_logs, video
from tests.small_run import ON_CPU

PROMPT = [{"role": "user", "content": "which colour is it"}]
OTHERS = ["qwen2_audio", "qwen3_vl_video"]


def parts_of(student: Tensor, teacher: Tensor, masked_teacher: Tensor, masked_student: Tensor, method: str) -> Any:
    """Every part of the loss from logits, (tokens, vocabulary) each, by its definition."""
    lp, lq, lr, l0 = (x.log_softmax(-1) for x in (student, teacher, masked_teacher, masked_student))

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum(-1)

    found = {"standard": kl(lp, lq), "dependency": kl(lq, lr), "entropy": -(lp.exp() * lp).sum(-1)}
    if method == "teacher_prior":
        return found | {"lang": kl(lp, lr), "vis": kl(lp, lq) - kl(lp, lr)}
    return found | {"lang": kl(l0, lr), "vis": kl(lp, (lq + l0 - lr).log_softmax(-1))}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("method", ["vgs", "matched", "teacher_prior"])
def test_the_parts_are_those_of_the_logits_of_two_prompts(family: str, method: str, tmp_path: Path) -> None:
    """In float64: prompts with the evidence and without it, rendered here by the processor and run by the models."""
    small, processor = SMALL_FAMILIES[family], processor_of(family)
    student, teacher = (small.model(processor, seed, width).double() for seed, width in ((1, 32), (2, TEACHER_WIDTH)))
    trainer = make_trainer(family, str(tmp_path), (1, 0, 2), student, teacher, method=method)
    trainer.model.eval()
    rows = first_rows(trainer, 4)
    batch = Batch.of(inputs := trainer._prepare_inputs(rows))
    trainer._wrapped_student = trainer.model
    with torch.no_grad():
        micro_batch = trainer._loss.micro_batch(trainer.model, trainer.teacher_model, batch, loss_mask(inputs), 1.0)
        assert len(list(micro_batch)) == (2 if method == "matched" else 1)
    result = micro_batch.result

    def logits(model: Any, row: int, *, masked: bool) -> Tensor:
        """Of the tokens that the student wrote for one row, (tokens, vocabulary)."""
        written = batch.completion_ids[row, batch.completion_mask[row].bool()]
        parts = [] if masked else rows[row][trainer._modality.plural]
        name = small.modality
        content = [{"type": name, name: part} for part in parts]
        content += [rows[row]["prompt"][0]["content"][-1]]
        prompt = processor.apply_chat_template(
            [[{"role": "user", "content": content}]], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        more = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
        for key in more:
            if key.endswith("token_type_ids"):
                more[key] = torch.cat([more[key], torch.zeros_like(written[None])], dim=1)
        ids = torch.cat([prompt["input_ids"], written[None]], dim=1)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, -len(written) - 1 : -1]

    expected = {
        row: parts_of(
            logits(student, row, masked=False),
            logits(teacher, row, masked=False),
            logits(teacher, row, masked=True),
            logits(student, row, masked=True),
            method,
        )
        for row in range(4)
    }
    assert len(result.positions) == int(batch.completion_mask.sum())
    for index, (row, position) in enumerate(result.positions.tolist()):
        for part in trainer._loss.logged:
            if method == "teacher_prior" and row == 1 and part in ("lang", "vis"):
                continue  # its prior is the teacher itself: all is language
            found = result.per_token[part][index]
            # Rows of a batch are padded on the left, and rotary angles are float32 whatever the model is.
            torch.testing.assert_close(found, expected[row][part][position], atol=1e-6, rtol=1e-5)
    for part in {"vis", "dependency"} & set(trainer._loss.logged):
        without = result.per_token[part][result.positions[:, 0] == 1]
        assert len(without) > 0
        assert not without.any(), "a row of text alone has no such part"


@pytest.mark.parametrize("family", OTHERS)
def test_the_masked_view_differs_by_the_evidence_only(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, str(tmp_path), (1, 2))
    trainer.model.eval()
    batch = Batch.of(trainer._prepare_inputs(first_rows(trainer, 4)))
    views = {
        mask: masked_view(mask, batch, trainer._evidence_tokens, trainer._family, trainer.model)
        for mask in trainer._modality.masks
    }
    for view in views.values():
        assert view.completion_ids is batch.completion_ids
        assert view.completion_mask is batch.completion_mask
    hidden = views["attention"]
    assert torch.equal(hidden.prompt_ids, batch.prompt_ids)
    assert torch.equal(
        hidden.prompt_mask != batch.prompt_mask, trainer._evidence_tokens.is_placeholder(batch.prompt_ids)
    )
    assert not set(trainer._modality.keys) & set(views["drop"].multimodal)
    words = processor_of(family).tokenizer
    for row in range(4):
        full = words.decode(batch.prompt_ids[row, batch.prompt_mask[row].bool()], skip_special_tokens=True)
        text = words.decode(
            views["drop"].prompt_ids[row, views["drop"].prompt_mask[row].bool()], skip_special_tokens=True
        )
        assert text == full, "times of a video's frames apart, which this tokenizer has no words for"


@pytest.mark.parametrize("method", ["vgs", "vgs_unit", "teacher_prior"])
def test_amortized_steering_hears(method: str, tmp_path: Path) -> None:
    trainer = make_trainer("qwen2_audio", str(tmp_path), method=method, eta="amortized", refresh_every=2, gamma=0.7)
    trainer.train()
    logs = step_logs(trainer)
    assert [row["steering/gamma"] for row in logs] == [0.7] * 3
    assert [row.get("steering/refreshed") for row in logs] == [1.0, None, 1.0]
    for row in logs:
        assert math.isfinite(row["loss/vis"])
        assert row["steering/weight_ratio"] > 0
        assert ("gradient/cosine" in row) == ("steering/refreshed" in row)
    assert -1 <= logs[2]["steering/direction_cosine"] <= 1 + 1e-6


def tones(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions about tones: every second one is high, and called blue."""
    random = np.random.default_rng(seed)
    time = np.arange(1600) / 16_000
    pitches = [random.uniform(*((1500, 2500) if row % 2 else (300, 500))) for row in range(count)]
    return [{"prompt": PROMPT, "audio": np.sin(2 * np.pi * pitch * time).astype(np.float32)} for pitch in pitches]


def test_a_student_learns_the_pitch_from_its_teacher(tmp_path: Path) -> None:
    processor, small = processor_of("qwen2_audio"), SMALL_FAMILIES["qwen2_audio"]
    student, teacher = small.model(processor, 1), small.model(processor, 2, TEACHER_WIDTH)
    low, high = processor.tokenizer.convert_tokens_to_ids(["red", "blue"])

    def logits(model: Any, rows: list[dict[str, Any]]) -> Tensor:
        prompts = [with_evidence(row, AUDIO) for row in canonical_rows(rows, AUDIO)]
        inputs = processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return model(**inputs).logits[:, -1]

    def share_right(model: Any) -> float:
        with torch.no_grad():
            answers = logits(model, tones(16, seed=1)).argmax(dim=-1)
        return (answers == torch.tensor([low, high] * 8)).float().mean().item()

    known = tones(24, seed=0)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(15):
        torch.nn.functional.cross_entropy(logits(teacher, known), torch.tensor([low, high] * 12)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert share_right(teacher) == 1.0
    assert share_right(student) < 0.6
    trainer = make_trainer(
        "qwen2_audio", str(tmp_path), Dataset.from_list(known), student, teacher, max_steps=14, learning_rate=3e-3,
        per_device_train_batch_size=8, max_completion_length=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert share_right(student.eval()) > 0.9, "pitches it never heard"
    logs = step_logs(trainer)
    assert logs[-1]["loss/vis"] < 0.2 * logs[0]["loss/vis"]


def test_a_prompt_says_where_its_sound_goes() -> None:
    tone = sound(3)
    samples = read_piece(tone, AUDIO)
    placed = [{"type": "text", "text": "hear"}, {"type": "audio"}, {"type": "text", "text": "this"}]
    row = canonical_row({"prompt": [{"role": "user", "content": placed}], "audio": tone}, AUDIO)
    found = with_evidence(row, AUDIO)[0]["content"]
    assert [part["type"] for part in found] == ["text", "audio", "text"]
    assert np.array_equal(found[1]["audio"], samples)
    assert "audio" not in placed[1], "the row is left alone"
    first = canonical_row({"prompt": PROMPT, "audios": [tone, tone]}, AUDIO)["prompt"][0]["content"]
    assert [part["type"] for part in first] == ["audio", "audio", "text"]
    marked = canonical_row({"prompt": "hear <audio> this", "audio": tone}, AUDIO)["prompt"][0]["content"]
    assert [part["type"] for part in marked] == ["text", "audio", "text"]
    with pytest.raises(InputError, match="has places for 1 audios, but the row has 2; make them agree"):
        canonical_row({"prompt": [{"role": "user", "content": placed}], "audios": [tone, tone]}, AUDIO)


def test_evidence_is_read_in_every_form_it_may_have() -> None:
    tone = sound(3)
    for value in (tone, tone["array"], tone["array"].tolist()):
        read = read_piece(value, AUDIO, processor_of("qwen2_audio"))
        assert read.dtype == np.float32
        assert np.array_equal(read, tone["array"])
    frames = video(2)
    array = np.stack([np.asarray(frame) for frame in frames])
    for value in (frames, array, array.tolist(), questions((1,), modality="video")[2]["videos"][0]):
        read = read_piece(value, VIDEO)
        assert read.shape == (4, 32, 32, 3)
    assert np.array_equal(read_piece(array.tolist(), VIDEO), array)


def rows(column: str, *values: Any, features: Any = None) -> Dataset:
    return Dataset.from_list([{"prompt": PROMPT, column: value} for value in values], features=features)


WRONG_SOUNDS = {
    "no column": (rows("sound", 1), "neither in a column 'audio' or 'audios' (it has 'prompt', 'sound')"),
    "a picture beside": (rows("audio", None).add_column("image", ["a.png"]), "which takes no images beside"),
    "rate": (rows("audio", sound(1), sound(2) | {"sampling_rate": 8000}), "row 1 of the training dataset is wrong: "
             "audio is sampled at 8000 Hz, but the model hears 16000 Hz; resample it"),
    "length": (rows("audio", np.zeros(24_000, dtype=np.float32)), "audio lasts 1.5 s, of which the model would "
               "hear the first 1.0 s; cut it or leave the row out"),
    "integers": (rows("audio", [0, 16_384]), "an array of samples, floats from -1 to 1, got ndarray of int64"),
    "a path": (rows("audio", "a.wav"), "row 0 of the training dataset is wrong: audio must be an array of samples"),
    "no array": (rows("audio", {"path": "a.wav"}), "audio must be an array of samples or {'array', 'sampling_rate'}"),
    "stereo": (rows("audio", [[0.0, 1.0], [1.0, 0.0]]), "audio must be one channel"),
    "silence": (rows("audio", sound(1), {"array": [], "sampling_rate": 16_000}), "row 1 of the training dataset"),
}  # fmt: skip
WRONG_VIDEOS = {
    "frames of two sizes": (rows("video", [picture(0), picture(1)]), "a video must be a list of images of one size"),
    "one frame": (rows("video", np.asarray(picture(0)).tolist()), "got (32, 32, 3); decode files to frames"),
    "fractions": (
        rows("video", (np.asarray([picture(0)]) / 255).tolist()),
        "or whole numbers from 0 to 255, got list of float64",
    ),
    "paths": (rows("video", ["a.png", "b.png"]), "a list of images, its frames, got a list of str"),
}


@pytest.mark.parametrize("kind", WRONG_SOUNDS)
def test_a_wrong_sound(kind: str) -> None:
    dataset, sentence = WRONG_SOUNDS[kind]
    with pytest.raises(InputError) as error:
        RowCheck(AUDIO, processor_of("qwen2_audio"), need_evidence=True).check(dataset)
    assert sentence in str(error.value)


@pytest.mark.parametrize("kind", WRONG_VIDEOS)
def test_a_wrong_video(kind: str) -> None:
    dataset, sentence = WRONG_VIDEOS[kind]
    with pytest.raises(InputError) as error:
        RowCheck(VIDEO).check(dataset)
    assert sentence in str(error.value)


def test_files_that_nothing_here_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgs_distill.inputs.dataset_checks.find_spec", lambda name: None)
    prompt = List({"role": Value("string"), "content": Value("string")})
    for feature, column, modality, sentence in (
        (
            Audio(),
            "audio",
            AUDIO,
            "holds audio files, which datasets decodes with torchcodec; `pip install torchcodec`",
        ),
        (List(Audio()), "audios", AUDIO, "holds audio files"),
        (Video(), "video", VIDEO, "holds video files, which are not decoded here; give each as a list of images"),
    ):
        dataset = Dataset.from_dict({"prompt": [], column: []}, features=Features({"prompt": prompt, column: feature}))
        with pytest.raises(InputError, match=sentence):
            RowCheck(modality).check(dataset)


def test_a_stream_has_its_first_row_checked() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": PROMPT, "audio": "a.wav"}]))
    with pytest.raises(InputError, match="row 0 of the training dataset is wrong: audio must be an array of samples"):
        RowCheck(AUDIO).check(stream)


def test_a_model_of_another_modality_is_refused(tmp_path: Path) -> None:
    def config(family: str) -> Any:
        return SMALL_FAMILIES[family].build_config(processor_of(family), 32)

    with pytest.raises(InputError, match="'qwen2_audio' is not known to read images; set modality='audio'"):
        make_trainer("qwen2_audio", str(tmp_path), questions((1,)), modality="image")
    with pytest.raises(InputError, match="'llava_next' is not known to read videos; set modality='image', choose"):
        check_modality(config("llava_next"), VIDEO)
    with pytest.raises(InputError, match=r"names no audio placeholder token .* needs a model that reads audios"):
        placeholder_ids(config("qwen3_vl"), modality=AUDIO)
    other = config("qwen2_audio")
    other.audio_config.num_mel_bins = 128
    with pytest.raises(
        InputError, match=r"reads audios in another way than the student .* they differ in num_mel_bins"
    ):
        check_teacher_reads_the_same(config("qwen2_audio"), other, AUDIO)
    with pytest.raises(ValueError, match="image_mask='blank' has no meaning for modality='audio'; choose 'drop' or"):
        make_trainer("qwen2_audio", str(tmp_path), image_mask="blank")
    with pytest.raises(ValueError, match="TRL hands vLLM images only, but modality is 'audio'; leave use_vllm off"):
        make_trainer("qwen2_audio", str(tmp_path), use_vllm=True)


def test_what_fences_a_sound_is_never_sampled(tmp_path: Path) -> None:
    trainer = make_trainer("qwen2_audio", str(tmp_path))
    words = processor_of("qwen2_audio").tokenizer.convert_tokens_to_ids(["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"])
    assert EvidenceTokens.of(trainer.model.config, trainer.processing_class, AUDIO).banned_while_sampling == tuple(
        words
    )
    assert set(words) <= set(trainer.generation_config.suppress_tokens)
    assert not hasattr(trainer.model.config, "image_token_id"), "what TRL asked for is gone again"


def test_the_commands_train_and_evaluate_on_sounds(tmp_path: Path) -> None:
    processor, small = processor_of("qwen2_audio"), SMALL_FAMILIES["qwen2_audio"]
    for seed, (name, width) in enumerate((("student", 32), ("teacher", TEACHER_WIDTH))):
        small.model(processor, seed, width).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    questions((1, 0), modality="audio").add_column("answer", ["red"] * 8).to_parquet(str(tmp_path / "rows.parquet"))
    settings = {
        **ON_CPU, "modality": "audio", "output_dir": tmp_path / "run", "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher", "dataset_name": tmp_path / "rows.parquet", "max_steps": 1,
        "max_completion_length": 4, "per_device_train_batch_size": 2, "record_modules_every": 1,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    result = invoke(["train", *flags])
    assert result.exit_code == 0, result.output
    assert '"audio tower"' in (tmp_path / "run" / LOG_FILE).read_text()
    evaluation = {
        "modality": "audio", "model_name_or_path": tmp_path / "run", "use_cpu": True, "max_completion_length": 4,
        "teacher_model_name_or_path": tmp_path / "teacher", "dataset_name": tmp_path / "rows.parquet",
        "dataset_test_split": "train", "answer_column": "answer", "output_file": tmp_path / "eval.json",
    }  # fmt: skip
    result = invoke(["eval", *(f"--{name}={value}" for name, value in evaluation.items())])
    assert result.exit_code == 0, result.output
    heard, deaf = (json.loads((tmp_path / "eval.json").read_text())[name] for name in ("with_image", "without_image"))
    assert heard["vis"] > 0
    assert deaf["vis"] == 0
    assert heard["completions"][0] != deaf["completions"][0]
    assert heard["completions"][1] == deaf["completions"][1], "the second row has no sound"
    names = {"student": str(tmp_path / "run"), "teacher": str(tmp_path / "teacher")}
    trainer = make_trainer("qwen2_audio", str(tmp_path / "again"), **names, max_steps=1)
    trainer.train()
    assert math.isfinite(step_logs(trainer)[0]["loss/standard"])
    with pytest.raises(InputError, match="is not known to read images; set modality='audio'"):
        make_trainer("qwen2_audio", str(tmp_path / "again"), questions((1,)), **names, modality="image")
