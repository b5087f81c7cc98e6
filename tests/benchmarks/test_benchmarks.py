"""The benchmarks' own machinery, on tiny shapes: statistics, gate, records, report, and both benchmarks end to end."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
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
    linear_reverse_kl,
    methods,
    peers,
    protocols,
    report,
    sweep,
    truth,
)
from benchmarks.harness import timing
from benchmarks.harness.cases import DTYPES, Case, run_cases
from benchmarks.harness.gates import Check, Gate
from benchmarks.harness.machine import environment
from benchmarks.harness.memory import MIB, tensor_bytes
from benchmarks.harness.records import GateError, Record, Row, Target, finished_record, read_records, write_record
from benchmarks.harness.tables import describe_record, table_rows
from benchmarks.harness.timing import Timing, interleaved, time_limit
from benchmarks.inputs import (
    Streams,
    converging_streams,
    logits_fp32,
    peaked_streams,
    random_heads,
    random_streams,
    rotate_head,
)
from benchmarks.methods import METHODS, OBJECTIVES, reverse_kl
from benchmarks.products import floor_rows
from benchmarks.truth import Result, Truth

GREEN = Gate((Check("values", error=1e-7, peer_error=1e-7, floor=0.0),))
RED = Gate((*GREEN.checks, Check("gradients", error=1.0, peer_error=1e-7, floor=1e-6)))
MACHINE = {"device": "cpu", "name": "Some (R) CPU", "cores": 2, "memory_gib": 8.0, "instruction_set": "AVX2"}


def record_of(gate: Gate = GREEN, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "benchmark": "linear_reverse_kl",
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
        "linear_reverse_kl-some-cpu-tokens-4-width-8-teacher_width-8-vocab-16-dtype-bf16-threads-1.json"
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


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_gate_of_the_methods_is_green_and_peers_compute_what_they_are_compared_as(dtype: str) -> None:
    eager = {"trl": peers.trl_reverse_kl, "liger": lambda streams: peers.liger_reverse_kl(streams, compiled=False)}
    ways = {name: ("standard", way) for name, way in eager.items()}
    gate, worst = linear_gate.run_gate(tiny_heads(dtype), list(METHODS), ways, tokens=5)
    assert gate.passed, gate.describe()
    assert set(worst) == {*METHODS, "trl", "liger"}
    if dtype == "fp32":
        assert all(error < 1e-2 for found in worst.values() for error in found.values()), worst


def _changed(method: str, streams: Streams, change: Callable[[Result], Result]) -> list[Result]:
    *before, last = METHODS[method].ours(streams)
    return [*before, change(last)]


def _scaled_head_gradient(method: str, streams: Streams) -> list[Result]:
    return _changed(method, streams, lambda result: result._replace(head=result.head * 1.001))


def _one_wrong_entry(method: str, streams: Streams) -> list[Result]:
    """As a missing mask does: the last vocabulary entry's gradient is off."""

    def change(result: Result) -> Result:
        head = result.head.clone()
        head[-1, 0] += 0.01 * head.abs().max()
        return result._replace(head=head)

    return _changed(method, streams, change)


def _wrong_loss_of_one_token(method: str, streams: Streams) -> list[Result]:
    def change(result: Result) -> Result:
        assert result.losses is not None
        losses = result.losses.clone()
        losses[0] *= 1.01
        return result._replace(losses=losses)

    return _changed(method, streams, change)


def _swapped_parts(method: str, streams: Streams) -> list[Result]:
    return METHODS[method].ours(streams)[::-1]


@pytest.mark.parametrize("planted", [_scaled_head_gradient, _one_wrong_entry, _wrong_loss_of_one_token, _swapped_parts])
def test_gate_of_the_methods_refuses_a_planted_error(planted: Any) -> None:
    gate, _ = linear_gate.run_gate(tiny_heads(), ["vgs_parts"], {}, tokens=5, ours=planted)
    assert not gate.passed
    assert "RED" in gate.describe()


def test_gate_refuses_16_bit_logits() -> None:
    def rounded(method: str, streams: Streams) -> list[Result]:
        return [peers.plain(OBJECTIVES[METHODS[method].objectives[0]], streams)]

    gate, _ = linear_gate.run_gate(tiny_heads("bf16"), ["opd"], {}, tokens=5, ours=rounded)
    assert not gate.passed


def test_gate_of_decomposed_kl() -> None:
    def wrong(*streams: Tensor) -> Tensor:
        return decomposed_kl.KINDS["vgs"].ours(*streams) * 1.0001

    assert decomposed_kl.run_gate(999, "fp32", "cpu").passed
    assert decomposed_kl.run_gate(999, "bf16", "cpu").passed
    assert not decomposed_kl.run_gate(999, "fp32", "cpu", {"vgs": wrong}).passed


def test_peaked_inputs_are_peaked_at_the_targets_vocabulary() -> None:
    streams = peaked_streams(6, random_heads(256, 256, 151936, torch.bfloat16, "cpu"))
    assert 0.3 < methods.student_entropy(streams) < 2.0
    (result,) = METHODS["opd"].ours(streams)
    assert result.loss / 6 > 0.05  # and student and teacher differ


@pytest.mark.parametrize("divergence", [1e-1, 1e-3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_converging_student_is_as_far_from_its_teacher_as_asked(dtype: str, divergence: float) -> None:
    head, _ = random_heads(128, 128, 1000, DTYPES[dtype], "cpu")
    streams = converging_streams(8, rotate_head(head, teacher_width=160), deviation=4.0, divergence=divergence)
    student, masked = (logits_fp32(hidden, head) for hidden in (streams.student, streams.masked_student))
    teacher, other = (logits_fp32(h, streams.teacher_head) for h in (streams.teacher, streams.masked_teacher))
    assert student.std(-1).mean() == pytest.approx(4.0, rel=0.1)
    assert reverse_kl(student, teacher).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert reverse_kl(masked, other).tolist() == pytest.approx([divergence] * 8, rel=0.5)
    assert reverse_kl(teacher, other).min() > 0.01  # the image makes a difference


def test_truth_is_autograd_in_fp64_and_errors_are_over_the_largest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "BLOCK", 100)
    streams = random_streams(19, tiny_heads("fp64"))  # more tokens than it takes at a time
    exact = Truth(streams, {"standard": OBJECTIVES["standard"]})
    loss, losses, (hidden,), head = peers.plain(OBJECTIVES["standard"], streams)
    assert max(exact.errors("standard", Result(loss, losses, [hidden], head))) < 1e-12
    wrong = head.clone()
    wrong[-1, 3] += 0.01 * head.abs().max()
    found = exact.errors("standard", Result(loss * 1.5, None, [hidden], wrong))
    assert (found.loss, found.head_gradient) == pytest.approx((0.5, 0.01), rel=1e-6)
    assert found.losses is None
    wrong[150, 0] = math.nan
    assert math.isnan(exact.errors("standard", Result(loss, losses, [hidden], wrong)).head_gradient)


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


def test_our_methods_are_the_textbook_in_fp64() -> None:
    """With the plain formulas in fp64, every method's call agrees to rounding: the formulas say what it computes."""
    streams = random_streams(10, tiny_heads("fp64"))
    for name, method in METHODS.items():
        exact = Truth(streams, {objective: OBJECTIVES[objective] for objective in method.objectives})
        for objective, result in zip(method.objectives, method.ours(streams), strict=True):
            assert max(exact.errors(objective, result)) < 1e-10, name


def test_floors_count_the_products() -> None:
    seconds = {"project_student": 1.0, "project_teacher": 10.0, "hidden_product": 100.0, "head_product": 1000.0}
    rows = floor_rows({name: Timing([value]) for name, value in seconds.items()})
    assert {row.name: row.median for row in rows} == pytest.approx({
        "floor_projections": 22, "floor_4": 1111, "floor_6": 1122, "floor_7.2": 1455.3, "floor_8": 2222,
        "floor_5": 1121, "floor_7": 2221,
    })  # fmt: skip


def test_a_peer_takes_part_in_its_fastest_configuration() -> None:
    def broken(_streams: Streams) -> Result:
        raise ValueError("no such kernel")

    def slow(streams: Streams) -> Result:
        time.sleep(0.05)
        return METHODS["opd"].ours(streams)[0]

    streams = random_streams(2, tiny_heads())
    ways: dict[str, dict[str, peers.Way]] = {
        "trl": {"": slow, "compiled": lambda streams: METHODS["opd"].ours(streams)[0]}, "liger": {"": broken}
    }  # fmt: skip
    best, trials = linear_reverse_kl.best_of(ways, streams, "cpu")
    assert {name: configuration for name, (configuration, _) in best.items()} == {"trl": "compiled"}
    assert "no such kernel" in str(trials["liger"][""])
    lineup = linear_reverse_kl.line_up(streams, best, trials, "cpu")
    assert lineup.rows["trl"].label == "TRL chunked divergence, compiled"
    assert "liger" not in lineup.calls
    assert "no such kernel" in lineup.rows["liger"].note


def test_targets_hold_no_speedup_over_a_more_exact_peer() -> None:
    rows = [
        Row("opd", "ours", [2.0], peak_bytes=2**27, errors={"loss": 1e-2}),
        Row("trl", "TRL", [20.0], ours="opd", errors={"loss": 1e-6}),
        Row("liger", "Liger", [4.0], ours="opd", errors={"loss": 1e-1}),
        Row("floor_4", "floor", [1.9]),
    ]
    found = {target.text: target for target in linear_reverse_kl.targets(record_of(rows=rows), "bf16")}
    assert found["times faster than TRL chunked divergence"].value is None
    assert found["times faster than Liger chunked JSD"].value == 2.0
    assert found["time over the 4 products alone"].value == pytest.approx(2.0 / 1.9)
    assert found["peak memory above inputs and gradients, MiB"].met


@pytest.mark.parametrize(
    "module", [linear_reverse_kl, linear_decomposed_kl, decomposed_kl, sweep, accuracy], ids=lambda m: m.__name__
)
def test_end_to_end(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a case's own process does, on shapes of a second."""
    monkeypatch.setattr(sweep, "QUICK_BASE", {"tokens": 4, "vocab": 257, "width": 256})
    monkeypatch.setattr(sweep, "QUICK_AXES", {"tokens": (2, 4)})
    common = ["--here", "--threads=1", "--rounds=1", "--budget=0", f"--records={tmp_path}", "--dtype=fp32"]
    options = {
        linear_reverse_kl: ["--tokens=8", "--width=256", "--vocab=257", "--no-compile"],
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
    assert all(row.errors if module is accuracy else row.median or "needs a GPU" in row.note for row in record.rows)
    assert report.main([f"--records={tmp_path}", f"--docs={tmp_path / 'docs'}"]) == 0
    assert (tmp_path / "docs" / "benchmarks.md").exists()
    assert (tmp_path / "docs" / "benchmarks-growth.svg").exists() == (module is sweep)


def test_report_marks_gpu_shapes_not_measured_until_a_gpu_record_exists() -> None:
    protocol = protocols.GPU_PROTOCOLS[0]
    on_cpu = record_of(case={**protocol.shape, "dtype": protocol.dtype})
    lines = [line for line in report.build([on_cpu], None).splitlines() if line.startswith("| Liger: bf16, 1024")]
    assert len(lines) == len(report.GPU_ROWS)
    assert all(set(line.split(" | ")[1:-1]) == {"not measured"} for line in lines)

    hardware = MACHINE | {"device": "cuda", "name": "Some GPU"}
    rows = [Row("opd", "ours", [0.125])]
    environment = on_cpu.environment | {"hardware": hardware}
    on_gpu = record_of(case=on_cpu.case, rows=rows, environment=environment)
    page = report.build([on_cpu, on_gpu], None)
    line, _ = [line for line in page.splitlines() if line.startswith("| Liger: bf16, 1024")]
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
