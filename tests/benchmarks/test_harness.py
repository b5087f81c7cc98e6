"""The benchmarks' machinery: turns, memory, gate, records, tables."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    report,
)
from benchmarks.harness import timing
from benchmarks.harness.cases import Case, run_cases
from benchmarks.harness.gates import Check, Gate
from benchmarks.harness.machine import environment
from benchmarks.harness.memory import MIB, tensor_bytes
from benchmarks.harness.records import GateError, Row, finished_record, read_records, write_record
from benchmarks.harness.tables import describe_record, table_rows
from benchmarks.harness.timing import interleaved, time_limit
from tests.benchmarks.examples import RED, record_of


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


def test_a_turn_in_which_the_allocator_retried_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = {"count": 0}
    monkeypatch.setattr(timing, "allocator_retries", lambda device: retries["count"])

    def short_of_memory() -> None:
        retries["count"] += 1

    calls = {"fits": lambda: None, "short": short_of_memory}
    found = interleaved(calls, min_rounds=3, max_rounds=3, budget_s=0)
    assert len(found["fits"].seconds) == 3
    assert (found["short"].seconds, found["short"].discarded) == ([], 3)
    assert "allocator retried in every turn" in str(found["short"].problem)


def test_a_peer_that_runs_out_of_memory_is_a_row_and_not_the_end() -> None:
    def too_large() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 19.9 GiB.\nMore.")

    found = interleaved({"large": too_large, "fits": lambda: None}, min_rounds=2, max_rounds=2, budget_s=0)
    assert found["large"].problem == "OutOfMemoryError: CUDA out of memory. Tried to allocate 19.9 GiB."
    assert len(found["fits"].seconds) == 2


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
