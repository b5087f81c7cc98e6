"""Orchestration: bad input is one sentence before any work, and failures keep what has finished."""

from __future__ import annotations

import io
import json
import os

import pytest
from rich.console import Console
from vgs_distill.demo import run
from vgs_distill.demo.distillation import _config
from vgs_distill.demo.methods import methods_for
from vgs_distill.demo.progress import PlainDisplay, make_display
from vgs_distill.demo.recipes import demo_recipe
from vgs_distill.demo.run import DemoError, check_request, run_demo
from vgs_distill.demo.workers import DistillJob, Failed, Finished, Progressed, StartJob, TeacherJob
from vgs_distill.errors import InputError
from vgs_distill.steering.methods import METHODS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"task": "letters"}, "no task called 'letters'; choose one of: digits, shapes, easyvqa"),
        ({"methods": ["matched"], "gamma": 1.5}, "gamma must lie between 0 and 1 for the method 'matched'"),
        ({"gamma": -0.1}, "gamma must be a number of at least 0"),
        ({"gamma": float("inf")}, "gamma must be a number of at least 0"),
        ({"gamma": float("nan")}, "gamma must be a number of at least 0"),
        ({"methods": ["bayes"]}, "no method called 'bayes'; choose from: vgs, opd"),
        ({"etas": ["exact"]}, "eta must be measured, amortized or a positive number, got exact"),
        ({"etas": [0.0]}, "eta must be measured, amortized or a positive number, got 0.0"),
        ({"etas": [float("nan")]}, "eta must be measured, amortized or a positive number, got nan"),
        ({"methods": ["vgs", "vgs_unit"], "etas": [0.4]}, "eta cannot be a number for the method 'vgs_unit'"),
        ({"seeds": []}, "At least one seed"),
        ({"seeds": [1, 1]}, "given once"),
        ({"seeds": [-1]}, "0 or more, got -1"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"jobs": 0}, "jobs must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setattr(run, "Worker", lambda index, run: pytest.fail("no worker may start on bad input"))
    with pytest.raises(InputError, match=sentence) as caught:
        run_demo(**{"task": "digits", "output_dir": tmp_path, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    with pytest.raises(InputError, match=r"cannot write .*Not a directory"):
        check_request("digits", output_dir=occupied)
    with pytest.raises(InputError, match=r"cannot write .*Not a directory"):
        check_request("digits", output_dir=occupied / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write .*Permission denied"):
        check_request("digits", output_dir=tmp_path / "below")


def test_each_method_takes_its_recommended_settings(tmp_path):
    request = check_request("shapes", methods=list(METHODS), output_dir=tmp_path)
    assert {method.method: method.gamma for method in request.methods} == {
        "opd": None, "vgs": 2.0, "vgs_unit": 0.7, "matched": 0.8, "teacher_prior": 0.8, "language": 1.0,
    }  # fmt: skip
    chosen = check_request("shapes", methods=["vgs_unit"], gamma=0.9, output_dir=tmp_path)
    assert [method.gamma for method in chosen.methods] == [None, 0.9, None]
    settings = {method.name: method.settings for method in request.methods}
    assert settings["teacher_prior"] == {"max_weight_ratio": 4.0}
    assert settings["vgs"] == {"language_preservation": 1.0, "ratio_floor": 0.1}


def test_the_baseline_runs_once_whatever_is_asked(tmp_path):
    for methods in ([], ["opd"], ["opd", "opd"]):
        request = check_request("digits", methods=methods, output_dir=tmp_path)
        assert [method.name for method in request.methods] == ["opd"]
    compared = check_request("digits", methods=["vgs"], etas=["measured", 0.4], output_dir=tmp_path).methods
    assert [method.name for method in compared] == ["opd", "vgs-measured", "vgs-0.4", "opd-as-long-as-vgs-measured"]
    assert [method.eta for method in compared] == [None, "measured", 0.4, None]
    assert compared[3].as_long_as == compared[1]


@pytest.mark.parametrize("method", methods_for(list(METHODS), None), ids=lambda method: method.name)
def test_every_recipe_is_one_that_the_engine_takes(tmp_path, processor, method):
    config = _config(processor, demo_recipe("digits").distillation, method, 0, tmp_path)
    assert config.method == method.method
    assert config.gamma == (method.gamma or 0.0)
    assert {name: getattr(config, name) for name in method.settings} == method.settings


def test_steps_can_be_overridden_and_prompts_suffice():
    recipe = demo_recipe("digits", steps=1000).distillation
    assert recipe.steps == 1000
    assert recipe.prompts >= 1000 * recipe.batch_size
    assert demo_recipe("digits", steps=1).distillation.warmup_steps == 1


class FakeProcess:
    exitcode = -9

    def join(self, timeout=None):
        pass


class FakeWorker:
    """Answers at once in this process, by `script`: job -> the messages it sends."""

    script = None
    stopped = 0

    def __init__(self, index, run):
        self.job = None
        self.process = FakeProcess()
        self.connection = self
        self.inbox = []

    def give(self, job):
        self.job = job
        self.inbox = list(type(self).script(job))

    def recv(self):
        if not self.inbox:
            raise EOFError
        return self.inbox.pop(0)

    def stop(self):
        type(self).stopped += 1


@pytest.fixture
def fake_workers(monkeypatch, finished):
    """Workers without processes; every job succeeds unless a test replaces the script."""

    def script(job):
        yield Progressed(job.name, 1, 2, "loss 1.000")
        if isinstance(job, TeacherJob):
            yield Finished(job.name, {**finished["teacher"], "folder": "teacher"})
        elif isinstance(job, StartJob):
            yield Finished(job.name, {**finished["starts"][job.seed], "folder": "start"})
        else:
            record = next(
                record
                for record in finished["runs"]
                if (record["seed"], record["method"]) == (job.seed, job.method.name)
            )
            yield Finished(job.name, {**record, "folder": str(job.folder / job.name)})

    monkeypatch.setattr(FakeWorker, "script", staticmethod(script))
    monkeypatch.setattr(FakeWorker, "stopped", 0)
    monkeypatch.setattr(run, "Worker", FakeWorker)
    monkeypatch.setattr(run, "with_news", lambda workers: [worker for worker in workers if worker.job is not None])
    return script


def demo(tmp_path, **arguments):
    output = io.StringIO()
    console = Console(file=output, width=100)
    try:
        results = run_demo("digits", quick=True, output_dir=tmp_path, console=console, jobs=2, **arguments)
    finally:
        demo.text = output.getvalue()
    return results


def test_every_seed_and_method_runs_once(fake_workers, tmp_path):
    results = demo(tmp_path, seeds=[0, 1])
    assert [record["name"] for record in results["runs"]] == [
        "seed0-opd",
        "seed0-vgs",
        "seed0-opd-as-long-as-vgs",
        "seed1-opd",
        "seed1-vgs",
        "seed1-opd-as-long-as-vgs",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "complete"
    assert (tmp_path / "report.html").exists()
    assert FakeWorker.stopped == 2
    assert "seed 1 VGS: 73.0 %" in demo.text


def test_a_failing_job_ends_in_a_sentence_and_keeps_what_finished(fake_workers, tmp_path, monkeypatch):
    def script(job):
        if isinstance(job, DistillJob) and job.method.steered:
            yield Failed(job.name, "RuntimeError: no memory", "Traceback ...")
        else:
            yield from fake_workers(job)

    monkeypatch.setattr(FakeWorker, "script", staticmethod(script))
    with pytest.raises(DemoError, match="seed0-vgs failed with RuntimeError: no memory") as caught:
        demo(tmp_path)
    assert "\n" not in str(caught.value)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["status"] == "incomplete"
    assert saved["error"] == str(caught.value)
    assert saved["teacher"]["with_image"] == 0.98
    assert (tmp_path / "seed0-vgs-error.txt").read_text() == "Traceback ..."
    assert FakeWorker.stopped == 2


def test_a_worker_that_dies_is_named(fake_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWorker, "script", staticmethod(lambda job: []))
    with pytest.raises(DemoError, match=r"running teacher ended without a word \(exit code -9\)"):
        demo(tmp_path)
    assert FakeWorker.stopped == 2


def test_an_interrupt_stops_the_workers_and_saves(fake_workers, tmp_path, monkeypatch):
    def script(job):
        if isinstance(job, DistillJob):
            raise KeyboardInterrupt
        yield from fake_workers(job)

    monkeypatch.setattr(FakeWorker, "script", staticmethod(script))
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path)
    assert FakeWorker.stopped == 2
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["error"] == "Interrupted."
    assert saved["student_start"]["per_seed"] == {"0": 0.3}


def test_traces_of_an_earlier_attempt_are_removed(fake_workers, tmp_path):
    (tmp_path / "seed0-opd-error.txt").write_text("old")
    demo(tmp_path)
    assert not (tmp_path / "seed0-opd-error.txt").exists()


def test_plain_progress_is_sparse():
    output = io.StringIO()
    with make_display(Console(file=output)) as display:
        assert isinstance(display, PlainDisplay)
        display.begin("job", "a job")
        for step in range(1, 401):
            display.advance("job", step, 400, "loss 0.5")
        display.end("job", "80.0 %")
    lines = output.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == [
        "a job: started",
        "a job: step 100 of 400, loss 0.5",
        "a job: step 200 of 400, loss 0.5",
        "a job: step 300 of 400, loss 0.5",
        "a job: 80.0 %",
    ]


def test_live_progress_draws_in_a_terminal():
    output = io.StringIO()
    with make_display(Console(file=output, force_terminal=True, width=100)) as display:
        display.begin("job", "a job")
        display.advance("job", 1, 2, "loss 0.5")
        display.say("[not markup]")
        display.end("job", "80.0 %")
    assert "a job: 80.0 %" in output.getvalue()
    assert "[not markup]" in output.getvalue()
