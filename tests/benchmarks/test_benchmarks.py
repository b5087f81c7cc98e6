"""Every benchmark end to end on shapes of a second, and the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    accuracy,
    decomposed_kl,
    gpu_check,
    linear_decomposed_kl,
    linear_reverse_kl,
    peers,
    protocols,
    report,
    sweep,
)
from benchmarks.harness.records import Row, read_records
from benchmarks.inputs import (
    Streams,
    random_streams,
)
from benchmarks.methods import METHODS
from benchmarks.truth import Result
from tests.benchmarks.examples import MACHINE, RED, record_of, tiny_heads


def test_a_peer_takes_part_in_its_fastest_configuration() -> None:
    def broken(_streams: Streams) -> Result:
        raise ValueError("no such kernel")

    def slow(streams: Streams) -> Result:
        time.sleep(0.05)
        return METHODS["opd"].ours(streams)[0]

    streams = random_streams(2, tiny_heads())
    ways: dict[str, dict[str, peers.Way]] = {
        "trl": {"eager": slow, "compiled": lambda streams: METHODS["opd"].ours(streams)[0]}, "liger": {"eager": broken}
    }  # fmt: skip
    best, trials = linear_reverse_kl.best_of(ways, streams, "cpu")
    assert {name: configuration for name, (configuration, _) in best.items()} == {"trl": "compiled"}
    assert "no such kernel" in str(trials["liger"]["eager"])
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
    start = f"| {protocol.source}: {protocol.dtype}, {protocol.shape['tokens']}"
    on_cpu = record_of(case={**protocol.shape, "dtype": protocol.dtype})
    lines = [line for line in report.build([on_cpu], None).splitlines() if line.startswith(start)]
    assert len(lines) == len(report.GPU_ROWS)
    assert all(set(line.split(" | ")[1:-1]) == {"not measured"} for line in lines)

    hardware = MACHINE | {"device": "cuda", "name": "Some GPU"}
    rows = [Row("opd", "ours", [0.125])]
    environment = on_cpu.environment | {"hardware": hardware}
    on_gpu = record_of(case=on_cpu.case, rows=rows, environment=environment)
    page = report.build([on_cpu, on_gpu], None)
    line, _ = [line for line in page.splitlines() if line.startswith(start)]
    assert "| Some GPU | 125 ms | not measured |" in line
    red = record_of(RED, case=on_cpu.case, rows=rows, environment=environment)
    assert "125 ms" not in report.build([red], None)


def test_report_without_records_claims_nothing() -> None:
    page = report.build([], None)
    assert " ms" not in page
    assert page.count("not measured") >= len(protocols.GPU_PROTOCOLS)


def test_counts_of_a_test_run() -> None:
    xml = '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert gpu_check.counts(xml) == {"tests": 10, "failures": 2, "errors": 1, "skipped": 3}
