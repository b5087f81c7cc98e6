"""Jobs do what they say with the real engine, and worker processes end when they should."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from vgs_distill.demo.methods import methods_for
from vgs_distill.demo.models import build_model
from vgs_distill.demo.recipes import DemoRecipe, demo_recipe
from vgs_distill.demo.workers import (
    DistillJob,
    Failed,
    Finished,
    Progressed,
    StartJob,
    TeacherJob,
    Worker,
    one_sentence,
    run_job,
)

from tests.small_run import small_recipe


@pytest.fixture
def tiny_recipe() -> DemoRecipe:
    return small_recipe(demo_recipe("digits"))


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("VGS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def saved_models(processor, tiny_size, tmp_path) -> tuple[Path, Path]:
    """A teacher and a student start that differ: equal ones would have nothing to learn from each other."""
    folders = tmp_path / "teacher", tmp_path / "start"
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        build_model(tiny_size, processor).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folders


def test_the_teacher_and_a_start_are_trained_once_and_evaluated(tiny_recipe, own_cache):
    sent = []
    first = run_job(TeacherJob("teacher", tiny_recipe), sent.append)
    assert not first["cached"]
    assert sent[-1] == Progressed("teacher", 3, 3, sent[-1].note)
    assert len(first["with_image"]["judgements"]) == 12
    second = run_job(TeacherJob("teacher", tiny_recipe), sent.append)
    assert second["cached"]
    assert second["with_image"] == first["with_image"]
    start = run_job(StartJob("seed3-start", tiny_recipe, 3, "seed 3"), sent.append)
    assert start["seed"] == 3
    assert start["folder"] != first["folder"]
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize("method", methods_for(["vgs", "matched"], None), ids=lambda method: method.name)
def test_distillation_saves_a_loadable_student_and_its_history(tiny_recipe, saved_models, tmp_path, method):
    sent = []
    teacher, start_folder = saved_models
    job = DistillJob(f"seed0-{method.name}", tiny_recipe, 0, method, teacher, start_folder, tmp_path, "label")
    result = run_job(job, sent.append)
    folder = Path(result["folder"])
    assert folder == tmp_path / job.name
    history = json.loads((folder / "history.json").read_text())
    assert history == result["history"]
    assert [row["step"] for row in history] == [1, 2]
    expected = {"loss", "loss/standard", "time/rollout", "time/teacher", "time/student"}
    if method.steered:
        expected |= {"loss/lang", "gradient/cosine", "steering/weight_ratio", "time/steering"}
    if method.name == "vgs":
        expected |= {"loss/vis", "dependency", "gradient/norm_standard", "gradient/norm_vis", "steering/eta"}
        assert history[0]["steering/language_preservation"] == method.settings["language_preservation"] == 1.0
    assert expected <= set(history[0])
    assert ("gradient/cosine" in history[0]) == method.steered
    assert all(row["processor_seconds"] > 0 for row in history)
    student = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    start = Qwen3VLForConditionalGeneration.from_pretrained(start_folder)
    assert not torch.equal(student.lm_head.weight, start.lm_head.weight)
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    assert isinstance(sent[-1], Progressed)
    json.dumps(result)


def test_an_error_is_told_in_one_sentence():
    assert one_sentence(ValueError("first\nsecond")) == "ValueError: first"
    assert one_sentence(KeyError()) == "KeyError"


@pytest.mark.slow
def test_a_worker_answers_ignores_interrupts_and_ends_with_its_pipe(tiny_recipe, own_cache):
    worker = Worker(0, run_job)
    try:
        worker.give(StartJob("seed0-start", tiny_recipe, 0, "label"))
        os.kill(worker.process.pid, signal.SIGINT)  # during its imports
        messages = [worker.connection.recv()]
        while not isinstance(messages[-1], Finished | Failed):
            messages.append(worker.connection.recv())
        assert isinstance(messages[-1], Finished), messages[-1]
        os.kill(worker.process.pid, signal.SIGINT)  # while idle
        time.sleep(0.2)
        assert worker.process.is_alive()
        impossible = replace(tiny_recipe, student_size=replace(tiny_recipe.student_size, heads=0))
        worker.give(StartJob("seed0-start", impossible, 0, "label"))
        failure = worker.connection.recv()
        assert isinstance(failure, Failed)
        assert "ZeroDivisionError" in failure.sentence
        assert "Traceback" in failure.trace
        worker.connection.close()
        worker.process.join(timeout=10)
        assert worker.process.exitcode == 0
    finally:
        worker.stop()
