"""The benchmarks' own machinery, on tiny shapes: statistics, gate, records, report, and both benchmarks end to end."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    accuracy,
    decomposed_kl,
    gpu_check,
    linear_decomposed_kl,
    linear_gate,
    peers,
    protocols,
    report,
    sweep,
    truth,
)
from benchmarks.harness import timing
from benchmarks.harness.cases import DTYPES, Case, run_cases
from benchmarks.harness.gates import Check, Gate, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment
from benchmarks.harness.memory import MIB, tensor_bytes
from benchmarks.harness.records import GateError, Record, Row, Target, finished_record, read_records, write_record
from benchmarks.harness.tables import describe_record, table_rows
from benchmarks.harness.timing import Timing, interleaved, time_limit
from benchmarks.inputs import (
    DECOMPOSITIONS,
    Streams,
    converging_streams,
    logits_fp32,
    peaked_streams,
    random_heads,
    random_streams,
)
from benchmarks.oracle import Oracle
from benchmarks.products import floor_rows
from benchmarks.truth import Result, Truth

GREEN = Gate((Check("values", error=1e-7, peer_error=1e-7, floor=0.0),))
RED = Gate((*GREEN.checks, Check("gradients", error=1.0, peer_error=1e-7, floor=1e-6)))
MACHINE = {"device": "cpu", "name": "Some (R) CPU", "cores": 2, "memory_gib": 8.0, "instruction_set": "AVX2"}


def record_of(gate: Gate = GREEN, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "benchmark": "linear_decomposed_kl",
        "case": {"tokens": 4, "width": 8, "teacher_width": 8, "vocab": 16, "dtype": "bf16", "threads": 1},
        "gate": gate,
        "rows": [
            Row("naive", "plain torch", [4.0, 5.0, 6.0], ours="ours"),
            Row("ours", "ours", [2.0, 1.0, 3.0], floor="naive", bytes_moved=2**20, peak_bytes=2**21),
            Row("twice", "a peer, twice", [2.0], calls=2),
            Row("absent", "a peer that failed", note="skipped: it raised"),
        ],
        "environment": {
            "hardware": MACHINE,
            "versions": {"torch": "2.14"},
            "commit": "0123456789abcdef",
            "modified": False,
            "date": "2026-01-01T00:00:00Z",
            "load_average_1min": 0.0,
        },
        "targets": [
            Target("speed", 2.5, 4.0, "the floor allows it", at_least=True),
            Target("memory", None, 128, "no logits"),
        ],
        "facts": {"memory": "VmHWM"},
    }
    return Record(**fields | changes)


def test_calls_take_turns_and_slow_ones_fewer() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    def broken() -> None:
        raise ValueError("no such kernel\nsecond line")

    calls = {"slow": slow, "fast": lambda: order.append("fast"), "broken": broken}
    timings = interleaved(calls, min_rounds=2, max_rounds=4, budget_s=0.03, warm_up=["fast"])
    assert order == ["fast", "slow", "fast", "slow", "fast", "fast", "fast"]
    assert (len(timings["slow"].seconds), len(timings["fast"].seconds)) == (2, 4)
    assert 0.02 <= timings["slow"].median < 0.2
    assert timings["broken"].seconds == []
    assert timings["broken"].problem == "ValueError: no such kernel"


def test_slow_context_stops_after_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CONTEXT_SECONDS", 0.01)
    calls = {"slow": lambda: time.sleep(0.02), "slow context": lambda: time.sleep(0.02), "context": lambda: None}
    timings = interleaved(
        calls, min_rounds=3, max_rounds=3, budget_s=0, warm_up=[], context=("slow context", "context")
    )
    assert [len(timing.seconds) for timing in timings.values()] == [3, 2, 3]


def test_medians_and_ratios() -> None:
    record = record_of()
    assert record.rows[1].median == 2.0
    assert record.ratio("naive", "ours") == 2.5
    assert record.ratio("twice", "ours") == 2.0
    assert record.ratio("absent", "ours") is None
    assert record.ratio("never heard of", "ours") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_the_call_needs_above_its_result() -> None:
    def call() -> Tensor:
        scratch = torch.ones(48 * MIB // 4)
        return scratch[: 16 * MIB // 4] * 2

    timing = interleaved({"call": call}, min_rounds=2, max_rounds=2)["call"]
    assert timing.peak_bytes is not None
    assert timing.peak_bytes / MIB == pytest.approx(48, abs=4)


def test_tensors_that_share_a_storage_count_once() -> None:
    a = torch.zeros(1000)
    assert tensor_bytes({"x": (a, a[:10]), "y": [a.view(10, 100), None, 3]}) == 4000


def test_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"more than 0.05 s"), time_limit(0.05):
        time.sleep(1)
    time.sleep(0.06)  # the alarm is off again


@pytest.mark.parametrize(("error", "passed"), [(2.9e-6, True), (3.1e-6, False), (math.nan, False), (math.inf, False)])
def test_gate_allows_twice_plain_torch_and_the_floor(error: float, passed: bool) -> None:
    gate = Gate((Check("gradient", error=error, peer_error=1e-6, floor=1e-6),))
    assert gate.passed is passed
    assert ("green" in gate.describe()) is passed


def test_an_empty_gate_is_red() -> None:
    assert not Gate(()).passed


def test_a_red_gate_has_no_speedups_anywhere() -> None:
    record = record_of(RED)
    with pytest.raises(GateError):
        record.ratio("naive", "ours")
    shown, page = describe_record(record), report.build([record], None)
    assert "2.50×" in describe_record(record_of())
    assert "2.50×" in report.build([record_of()], None)
    for text in (shown, page):
        assert "×" not in text.replace("× floor", "")
    assert "target" not in shown
    assert "Gate: **red**, so no figures of time." in page


def test_record_round_trip(tmp_path: Path) -> None:
    record = record_of(RED, sources="abc")
    path = write_record(record, tmp_path)
    assert path.name == (
        "linear_decomposed_kl-some-cpu-tokens-4-width-8-teacher_width-8-vocab-16-dtype-bf16-threads-1.json"
    )
    assert read_records(tmp_path) == [record]
    assert list(tmp_path.iterdir()) == [path]
    data = json.loads(path.read_text())
    assert data["gate_passed"] is False
    data["schema"] = 0
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="schema 0"):
        read_records(tmp_path)


def test_a_finished_case_is_found_again_until_code_or_case_changes(tmp_path: Path) -> None:
    record = record_of(environment=environment(), sources="abc")
    write_record(record, tmp_path)
    arguments = (record.benchmark, record.case, "abc", "cpu", tmp_path)
    assert finished_record(*arguments) == record
    assert finished_record(record.benchmark, record.case, "changed", "cpu", tmp_path) is None
    assert finished_record(record.benchmark, record.case | {"threads": 2}, "abc", "cpu", tmp_path) is None


def test_the_environment_of_a_record() -> None:
    found = environment()
    assert {"hardware", "versions", "commit", "modified", "date", "load_average_1min"} == set(found)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1


def test_finished_cases_are_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [Case("done", [], 1, 60, record_of()), Case("done, and red", [], 1, 60, record_of(RED))]
    assert run_cases("no.such.module", cases[:1]) == 0
    assert run_cases("no.such.module", cases) == 1
    assert "0 of 2 cases to measure" in capsys.readouterr().out


def tiny_heads(dtype: str = "fp32") -> tuple[Tensor, Tensor]:
    # Rows of fewer entries are too parallel for `peaked_streams`: all tokens become deterministic.
    return random_heads(256, 288, 301, DTYPES[dtype], "cpu")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gate_of_linear_decomposed_kl_is_green(dtype: str) -> None:
    gate, errors = linear_gate.run_gate(tiny_heads(dtype), tokens=5)
    assert gate.passed, gate.describe()
    assert set(errors) == {"teacher_prior_both", "trl", "liger"}
    # TRL and Liger compute what they are compared as: reverse KL to one teacher.
    limit = 0.3 if dtype == "bf16" else 1e-3
    assert all(error < limit for found in errors.values() for error in found.values()), errors


def _scaled_head_gradient(decomposition: str, streams: Streams) -> tuple[Tensor, ...]:
    gradients = list(peers.ours_decomposed(decomposition, streams))
    gradients[3] = gradients[3] * 1.001
    return tuple(gradients)


def _one_wrong_entry(decomposition: str, streams: Streams) -> tuple[Tensor, ...]:
    """As a missing mask does: the last vocabulary entry's gradient is off."""
    gradients = list(peers.ours_decomposed(decomposition, streams))
    gradients[1] = gradients[1].clone()
    gradients[1][-1] += 0.01 * gradients[1].norm()
    return tuple(gradients)


def _swapped_components(decomposition: str, streams: Streams) -> tuple[Tensor, ...]:
    lang_hidden, lang_head, vis_hidden, vis_head = peers.ours_decomposed(decomposition, streams)
    return vis_hidden, vis_head, lang_hidden, lang_head


@pytest.mark.parametrize("planted", [_scaled_head_gradient, _one_wrong_entry, _swapped_components])
def test_gate_of_linear_decomposed_kl_refuses_a_planted_error(planted: Any) -> None:
    gate, _ = linear_gate.run_gate(tiny_heads(), tokens=5, decomposed=planted)
    assert not gate.passed
    assert "RED" in gate.describe()


def test_gate_of_decomposed_kl() -> None:
    def wrong(*streams: Tensor) -> tuple[Tensor, Tensor]:
        lang, vis = decomposed_kl.our_parts(*streams)
        return lang, vis * 1.0001

    assert decomposed_kl.run_gate(999, "fp32", "cpu").passed
    assert decomposed_kl.run_gate(999, "bf16", "cpu").passed
    assert not decomposed_kl.run_gate(999, "fp32", "cpu", wrong).passed


def test_peaked_inputs_are_peaked_at_the_targets_vocabulary() -> None:
    streams = peaked_streams(6, random_heads(256, 256, 151936, torch.bfloat16, "cpu"))
    with torch.no_grad():
        tokens = peers.ours("teacher_prior", streams).tokens
    assert 0.3 < tokens.entropy.mean() < 2.0
    assert tokens.full.mean() > 0.05  # and student and teacher differ


@pytest.mark.parametrize("divergence", [1e-1, 1e-3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_converging_student_is_as_far_from_its_teacher_as_asked(dtype: str, divergence: float) -> None:
    head, _ = random_heads(128, 128, 1000, DTYPES[dtype], "cpu")
    streams = converging_streams(8, head, teacher_width=160, deviation=4.0, divergence=divergence)
    student, masked = (logits_fp32(hidden, head) for hidden in (streams.student, streams.masked_student))
    teacher, other = (logits_fp32(h, streams.teacher_head) for h in (streams.teacher, streams.masked_teacher))
    assert student.std(-1).mean() == pytest.approx(4.0, rel=0.1)
    assert peers.standard(student, teacher).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert peers.standard(masked, other).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert peers.standard(teacher, other).min() > 0.01  # the image makes a difference


def test_truth_is_autograd_in_fp64_and_errors_are_over_the_largest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "BLOCK", 100)
    streams = random_streams(19, tiny_heads("fp64"))  # more tokens than it takes at a time
    exact = Truth(streams, peers.standard, students=["student"], teachers=["teacher"])
    loss, (hidden,), head = peers.reverse_kl(streams)
    assert max(exact.errors(Result(loss, [hidden], head))) < 1e-12
    wrong = head.clone()
    wrong[-1, 3] += 0.01 * head.abs().max()
    found = exact.errors(Result(loss * 1.5, [hidden], wrong))
    assert found == pytest.approx((0.5, found.hidden_gradient, 0.01), rel=1e-6)
    wrong[150, 0] = math.nan
    assert math.isnan(exact.errors(Result(loss, [hidden], wrong)).head_gradient)


def test_there_is_no_speedup_over_a_more_exact_peer() -> None:
    rows = [
        Row("ours", "ours", [1.0], errors={"loss": 3e-6, "head_gradient": 1e-3}),
        Row("like", "a peer like ours", [8.0], ours="ours", errors={"loss": 2e-6, "head_gradient": 1e-3}),
        Row("exact", "a more exact peer", [8.0], ours="ours", errors={"loss": 1e-6, "head_gradient": 1e-3}),
        Row("wrong", "a peer whose gradient is not one", [8.0], ours="ours", errors={"head_gradient": math.nan}),
    ]
    header, cells = table_rows(record_of(rows=rows))
    column = header.index("ours is faster by")
    assert [row[column] for row in cells] == ["", "8.00×", "no figure: it is more exact", "8.00×"]


def test_the_oracle_agrees_with_plain_torch_in_fp64() -> None:
    streams = random_streams(3, tiny_heads("fp64"))
    oracle = Oracle(streams)
    for decomposition in DECOMPOSITIONS:
        exact = oracle.parts(decomposition)
        plain = peers.naive_decomposed(decomposition, streams)
        for position, component in ((0, "lang"), (2, "vis")):
            assert relative_error(plain[position], exact.hidden[component]) < 1e-13
            assert relative_error(oracle.probe(plain[position + 1]), exact.head[component]) < 1e-13


def test_floors_count_the_products() -> None:
    seconds = {"project_student": 1.0, "project_teacher": 10.0, "hidden_product": 100.0, "head_product": 1000.0}
    rows = floor_rows({name: Timing([value]) for name, value in seconds.items()})
    assert {row.name: row.median for row in rows} == {
        "floor_3": 21, "floor_5": 1121, "floor_7": 2221, "floor_8": 2222
    }  # fmt: skip


def test_a_16_bit_softmax_fails_the_gate_and_is_no_baseline() -> None:
    gate = linear_gate.narrow_gate(random_heads(256, 256, 32768, torch.bfloat16, "cpu"))
    assert not gate.passed
    lineup = Lineup("cpu")
    for name in ("naive_decomposed_narrow", "naive_monolithic_narrow", "naive_decomposed"):
        lineup.add(name, name, lambda: None)
    linear_decomposed_kl.drop_narrow(lineup, gate)
    assert list(lineup.calls) == ["naive_decomposed"]
    assert "fails the gate" in lineup.rows["naive_monolithic_narrow"].note


def test_targets_use_the_faster_spelling_of_plain_torch() -> None:
    names = ("naive_decomposed", "naive_decomposed_narrow", "naive_monolithic", "teacher_prior_both", "trl")
    rows = [Row(name, name, [seconds]) for name, seconds in zip(names, (12.0, 8.0, 4.0, 2.0, 20.0), strict=True)]
    record = record_of(rows=rows, facts={"peaked_student_entropy": 1.5})
    found = {target.text: target for target in linear_decomposed_kl.targets(record, "bf16")}
    assert found["teacher_prior, both components: times faster than plain torch, both components"].value == 4.0
    assert found["teacher_prior, both components: times faster than TRL called twice"].met
    assert found["teacher_prior, objective: time over plain torch's monolithic reverse KL"].met is None


@pytest.mark.parametrize("module", [linear_decomposed_kl, decomposed_kl, sweep, accuracy], ids=lambda m: m.__name__)
def test_end_to_end(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a case's own process does, on shapes of a second."""
    monkeypatch.setattr(sweep, "QUICK_BASE", {"tokens": 4, "vocab": 257, "width": 256})
    monkeypatch.setattr(sweep, "QUICK_AXES", {"tokens": (2, 4)})
    common = ["--here", "--threads=1", "--rounds=1", "--budget=0", f"--records={tmp_path}", "--dtype=fp32"]
    options = {
        linear_decomposed_kl: ["--tokens=8", "--width=256", "--vocab=257", "--no-compile"],
        decomposed_kl: ["--tokens=8", "--vocab=257", "--no-compile"],
        sweep: ["--quick", "--axis=tokens"],
        accuracy: ["--tokens=8", "--width=64", "--vocab=301", "--no-compile"],
    }
    threads = torch.get_num_threads()
    try:
        assert module.main([*common, *options[module]]) == 0
    finally:
        torch.set_num_threads(threads)
    (record,) = read_records(tmp_path)
    assert record.gate.passed
    assert len(record.rows) >= 6
    assert all(row.errors if module is accuracy else row.median for row in record.rows)
    assert report.main([f"--records={tmp_path}", f"--docs={tmp_path / 'docs'}"]) == 0
    assert (tmp_path / "docs" / "benchmarks.md").exists()
    assert (tmp_path / "docs" / "benchmarks-growth.svg").exists() == (module is sweep)


def test_report_marks_gpu_shapes_not_measured_until_a_gpu_record_exists() -> None:
    protocol = protocols.GPU_PROTOCOLS[0]
    on_cpu = record_of(case={**protocol.shape, "dtype": protocol.dtype})
    lines = [line for line in report.build([on_cpu], None).splitlines() if line.startswith("| Liger: bf16, 1024")]
    assert len(lines) == 1
    assert set(lines[0].split(" | ")[1:-1]) == {"not measured"}

    hardware = MACHINE | {"device": "cuda", "name": "Some GPU"}
    rows = [Row("teacher_prior_both", "ours", [0.125])]
    environment = on_cpu.environment | {"hardware": hardware}
    on_gpu = record_of(case=on_cpu.case, rows=rows, environment=environment)
    page = report.build([on_cpu, on_gpu], None)
    (line,) = [line for line in page.splitlines() if line.startswith("| Liger: bf16, 1024")]
    assert "| Some GPU | 125 ms | not measured |" in line
    red = record_of(RED, case=on_cpu.case, rows=rows, environment=environment)
    assert "125 ms" not in report.build([red], None)


def test_report_without_records_claims_nothing() -> None:
    page = report.build([], None)
    assert " ms" not in page
    assert page.count("not measured") >= len(protocols.GPU_PROTOCOLS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_stops_with_one_sentence_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.strip() == gpu_check.NO_GPU


def test_counts_of_a_test_run() -> None:
    xml = '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert gpu_check.counts(xml) == {"tests": 10, "failures": 2, "errors": 1, "skipped": 3}
