"""`make gpu-check` without a GPU: its plan, its steps, its page, and what it checks, on sizes of a second."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_correctness, gpu_page, launch_constants
from benchmarks.gpu_check import run_steps
from benchmarks.gpu_page import StepLine
from benchmarks.gpu_plan import KERNEL_TESTS, Options, Step, kernel_tests, plan
from benchmarks.harness.machine import REPOSITORY
from benchmarks.harness.records import Row
from benchmarks.launch_constants import Proposal, proposals
from tests.benchmarks.examples import RED, record_of
from vgs_kernels import backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_stops_with_one_sentence_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.strip() == gpu_check.NO_GPU


def test_the_plan_goes_from_correctness_to_times(tmp_path: Path) -> None:
    names = [step.name for step in plan(Options(tmp_path))]
    assert names[:4] == ["build", "doctor", "correctness", "tests"]
    for tokens in (1024, 2048, 4096, 8192, 16384):
        assert any(name.startswith(f"reverse_kl bf16 {tokens} x") for name in names), tokens
    assert len(set(names)) == len(names)
    assert all(step.left_out or "--device=cuda" in step.arguments or step.name in ("build", "doctor", "tests",
               "training step") for step in plan(Options(tmp_path)))  # fmt: skip


def test_kernels_only_needs_no_trainer(tmp_path: Path) -> None:
    steps = {step.name: step for step in plan(Options(tmp_path, kernels_only=True))}
    assert steps.pop("training step").left_out == "--kernels-only"
    assert all((REPOSITORY / "tests").glob(pattern) for pattern in KERNEL_TESTS)
    for file in kernel_tests():
        text = (REPOSITORY / file).read_text()
        for package in ("transformers", "trl", "datasets", "vgs_distill"):
            assert f"\nimport {package}" not in text, file
            assert f"\nfrom {package}" not in text, file


def test_a_dry_run_has_the_steps_of_the_real_one(tmp_path: Path) -> None:
    def kinds(options: Options) -> list[str]:
        return list(dict.fromkeys(step.name.split()[0] for step in plan(options)))

    assert kinds(Options(tmp_path, dry_run=True)) == kinds(Options(tmp_path))
    assert all(step.environment["CUDA_VISIBLE_DEVICES"] == "" for step in plan(Options(tmp_path, dry_run=True)))


def test_a_step_that_fails_or_hangs_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    steps = [
        Step("fails", ("-c", "import sys; print('no such kernel'); sys.exit(3)")),
        Step("hangs", ("-c", "import time; time.sleep(60)"), limit_s=0.5),
        Step("absent", left_out="no nvcc"),
        Step("works", ("-c", "import os; print(os.environ['WORD'])"), environment={"WORD": "here"}),
    ]
    found = run_steps(steps, tmp_path / "logs", 600)
    assert [outcome.status for outcome in found] == ["failed", "failed", "left out", "passed"]
    assert found[0].note == "exit code 3: no such kernel"
    assert found[1].note.startswith("ran past")
    assert found[1].seconds < 30
    assert (tmp_path / "logs" / "works.log").read_text() == "here\n"
    assert run_steps(steps[3:], tmp_path, 1)[0].note == "no time was left for it (--minutes)"


def test_a_dry_run_ends_in_a_page_and_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run", "--only=build,steering", f"--folder={tmp_path}"]) == 0
    page = (tmp_path / "dry-run" / "page.md").read_text()
    assert page in capsys.readouterr().out
    assert page.startswith("# GPU check: PASS")
    assert "| steering, clipped | dry run |" in page
    assert " ms" not in page
    assert {"page.md", "logs/steering-33-x-2.log"} <= set(zipfile.ZipFile(tmp_path / "dry-run.zip").namelist())


def timed_record(**changes: Any) -> Any:
    rows = [
        Row("floor_4", "floor", [0.060]),
        Row("roofline_opd", "roofline", [0.066]),
        Row("opd", "ours", [0.072], floor="floor_4", peak_bytes=2**30),
        Row("trl", "TRL", [0.144], ours="opd"),
        Row("cross_entropy_quack", "another loss: quack", note="skipped: No module named 'quack'"),
    ]
    return record_of(**{"rows": rows, "targets": [], **changes})


def test_the_page_has_every_time_beside_its_roofline() -> None:
    steps = [StepLine("tests", "passed", 9.0, ""), StepLine("build", "left out", 0.0, "no nvcc")]
    tests = {"tests": 10, "failures": 0, "errors": 0, "skipped": 1}
    record = timed_record(facts={"not shown": {"several devices": "not run: there is one"}})
    page = gpu_page.build(steps, [record], record.environment, tests, dry_run=False)
    assert page.startswith("# GPU check: PASS")
    assert "| tests | 9 | passed | 10 tests, 0 failures, 0 errors, 1 skipped |" in page
    assert "| ours | 72 ms | 66 ms | 1.09 | 1.00 GiB |" in page
    assert "| TRL | 144 ms | 66 ms | 2.18 |  | 2.00× |" in page
    assert "| floor |" not in page
    assert "* another loss: quack: skipped: No module named 'quack'" in page
    assert "* several devices: not run: there is one" in page
    dry = gpu_page.build(steps, [record], record.environment, None, dry_run=True)
    assert " ms" not in dry.replace("another loss", "")


def test_the_page_says_what_failed_and_shows_no_time_of_a_red_gate() -> None:
    steps = [StepLine("correctness", "failed", 9.0, "exit code 1")]
    page = gpu_page.build(steps, [timed_record(gate=RED)], record_of().environment, None, dry_run=False)
    assert page.startswith("# GPU check: FAIL (correctness)")
    assert "gradients: error 1.00e+00" in page
    assert " ms" not in page


def test_a_constant_changes_where_another_is_worthwhile() -> None:
    rows = [
        Row("vgs|gradient|warps=4", "", [1.0]),
        Row("vgs|gradient|warps=2", "", [0.9]),
        Row("vgs|gradient|warps=8", "", note="out of resources"),
        Row("vgs|numbers|warps=4", "", [1.0]),
        Row("vgs|numbers|warps=2", "", [0.99]),
        Row("opd|run|tokens=1024", "", [1.0], note="shipped"),
        Row("opd|run|tokens=2048", "", [0.5]),
    ]
    found = proposals(rows, {"warps": 4})
    assert [(p.where, p.verdict) for p in found] == [
        ("vgs, gradient", "warps = 2"), ("vgs, numbers", "keep"), ("opd, run", "tokens = 2048")
    ]  # fmt: skip
    facts = {"proposals": [p._asdict() for p in found]}
    page = gpu_page.build([], [record_of(benchmark=launch_constants.NAME, facts=facts, rows=[])],
                          record_of().environment, None, dry_run=False)  # fmt: skip
    assert "| vgs, gradient | warps | 4 | 2 |" in page
    assert "1 of 3 stay as they are" in page
    assert Proposal(**facts["proposals"][0]) == found[0]


SIZES = gpu_correctness.QUICK._replace(vocabs={"fp32": 301}, tensors=20)


@pytest.mark.parametrize("name", ["steering", "far", "streams"])
def test_the_checks_of_correctness_are_green(name: str) -> None:
    parts: dict[str, Any] = {
        "steering": lambda: gpu_correctness.steering_checks(SIZES, "cpu"),
        "far": lambda: gpu_correctness.far_checks(SIZES._replace(vocabs={"bf16": 301}), "cpu", {}),
        "streams": lambda: gpu_correctness.stream_checks(SIZES, "cpu", {}),
    }
    found = list(parts[name]())
    assert found
    assert all(check.passed for check in found), [check for check in found if not check.passed]


def test_the_checks_of_steering_see_a_backend_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = backend.load("combine_gradients", "foreach")
    combine = module.combine

    def last_tensor_left_out(first: Any, second: Any, weights: Any, out: Any) -> None:
        combine(first[:-1], second[:-1], weights, out[:-1])

    monkeypatch.setattr(module, "combine", last_tensor_left_out)
    failed = [check.name for check in gpu_correctness.steering_checks(SIZES, "cpu") if not check.passed]
    assert failed
    assert all("foreach" in name for name in failed)
