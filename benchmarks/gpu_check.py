"""Everything that only a GPU can show, in one command: `make gpu-check`, or `python -m benchmarks.gpu_check`.

Runs all tests on the device, then the benchmarks on it at the peers' own shapes, and leaves records with device,
versions and commit in benchmarks/records/ and the report in docs/benchmarks.md. Resumable. Without a GPU it stops with
one sentence.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import report
from benchmarks.harness.gates import Check, Gate
from benchmarks.harness.machine import REPOSITORY, environment
from benchmarks.harness.records import RECORDS, Record, write_record
from benchmarks.harness.tables import describe_record
from benchmarks.protocols import GPU_PROTOCOLS

NAME = "gpu_check"
NO_GPU = "gpu-check needs a CUDA or ROCm GPU that torch can see, and this machine has none; `make test` is its check."


def run_tests() -> dict[str, int]:
    """Counts of the whole suite's outcomes; {"errors": 1} when pytest itself did not finish."""
    with tempfile.TemporaryDirectory() as folder:
        report_file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report_file}"]
        subprocess.run(command, cwd=REPOSITORY, check=False)
        return counts(report_file.read_text()) if report_file.exists() else {"errors": 1}


def counts(junit_xml: str) -> dict[str, int]:
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))
    return {
        key: sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }


def benchmark_commands() -> list[list[str]]:
    commands = []
    for protocol in GPU_PROTOCOLS:
        shape = [f"--{key.replace('_', '-')}={value}" for key, value in protocol.shape.items()]
        for module in ("linear_reverse_kl", "linear_decomposed_kl"):
            commands.append([f"benchmarks.{module}", f"--dtype={protocol.dtype}", *shape])
    commands.append(["benchmarks.decomposed_kl", "--tokens=2048"])
    commands.append(["benchmarks.sweep"])
    return commands


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    start = time.perf_counter()
    commands = benchmark_commands()
    print(f"gpu-check on {torch.cuda.get_device_name()}: tests, then {len(commands)} benchmarks", flush=True)
    outcomes = run_tests()
    failed = outcomes.get("failures", 0) + outcomes.get("errors", 0)
    statuses: dict[str, int] = {}
    for module, *options in commands:
        command = [sys.executable, "-m", module, "--device=cuda", f"--records={args.records.resolve()}", *options]
        print(f"\n# {' '.join(command[2:])}", flush=True)
        statuses[" ".join([module, *options])] = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    record = Record(
        NAME,
        {"tests": outcomes.get("tests", 0), "failed": failed, "skipped": outcomes.get("skipped", 0)},
        Gate((Check("tests that failed", float(failed), 0.0, 0.0),)),
        [],
        environment("cuda"),
        facts={"tests": outcomes, "benchmarks": statuses, "seconds": time.perf_counter() - start},
    )
    print(f"\nrecord: {write_record(record, args.records)}\n{describe_record(record)}")
    report.main([f"--records={args.records}"])
    return 0 if record.gate.passed and not any(statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
