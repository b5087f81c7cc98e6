"""What every benchmark shares: timing, memory, the correctness gate, records, the environment, tables.

Layer: benchmarks only. A benchmark runs its gate first, times its peers in turns (`interleaved`), and writes one
`Record` per case. A record with a red gate has no ratios: `Record.ratio` refuses, and so do table and report.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
REPOSITORY = Path(__file__).resolve().parent.parent
RECORDS = Path(__file__).resolve().parent / "records"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MIB = 2**20
CONTEXT_SECONDS = 5.0
BLOCK = 8192  # rows that are widened to fp64 at a time


def environment(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions, commit and load of the machine, as a record holds them."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "modified": bool(_git("status", "--porcelain", "--", "vgs_kernels", "csrc", "benchmarks/*.py")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    return _git("rev-parse", "HEAD") or "unknown"


def hardware(device: str = "cpu") -> dict[str, Any]:
    described: dict[str, Any] = {
        "device": device,
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "name": properties.name,
            "cpu": _cpu_name(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return described


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "trl", "liger-kernel", "torchjd", "vgs-kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    return found


def source_digest(*benchmark_files: Path) -> str:
    """Fingerprint of the code that a record's figures depend on; a finished case is measured again when it changes."""
    digest = hashlib.sha256()
    files = [*REPOSITORY.glob("vgs_kernels/**/*.py"), *(f for f in REPOSITORY.glob("csrc/**/*") if f.is_file())]
    for file in [*sorted(files), Path(__file__), *benchmark_files]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


@dataclass
class Timing:
    """The seconds of every timed call, in order, and the largest peak memory of any of them."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # above what was there before the call, results of the call excluded
    problem: str | None = None  # why there is no figure

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    min_rounds: int = 3,
    max_rounds: int = 9,
    budget_s: float = 2.0,
    device: str = "cpu",
    warm_up: Iterable[str] | None = None,
    context: Collection[str] = (),
    on_call: Callable[[str, float], None] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turns, A B C A B C, so that a slow spell of the machine meets all of them.

    Every call takes part in `min_rounds` rounds and then in more, up to `max_rounds`, while its own total is below
    `budget_s`: slow peers cost what they must, fast ones get a better median. Those in `context` stop after two rounds
    if they take more than `CONTEXT_SECONDS`: no verdict hangs on them. Those in `warm_up` (default: all) run
    once before. Peak memory is measured on the same calls. A call that raises is reported with its message, not timed.
    """
    timings = {name: Timing() for name in calls}
    for name in calls if warm_up is None else warm_up:
        _attempt(calls[name], timings[name], device, None)
    for round_number in range(max_rounds):
        for name, call in calls.items():
            timing = timings[name]
            rounds = min_rounds
            if name in context and timing.seconds and timing.seconds[0] > CONTEXT_SECONDS:
                rounds = min(2, min_rounds)
            enough = round_number >= rounds and sum(timing.seconds) >= budget_s
            if timing.problem is None and not enough:
                seconds = _attempt(call, timing, device, timing.seconds)
                if on_call is not None and seconds is not None:
                    on_call(name, seconds)
    return timings


def _attempt(call: Callable[[], Any], timing: Timing, device: str, seconds: list[float] | None) -> float | None:
    try:
        with PeakMemory(device) as peak:
            synchronize(device)
            start = time.perf_counter()
            result = call()
            synchronize(device)
            elapsed = time.perf_counter() - start
            peak.results = result
    except Exception as error:
        timing.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return None
    del result
    if seconds is not None:
        seconds.append(elapsed)
        if peak.above is not None:
            timing.peak_bytes = max(peak.above, timing.peak_bytes or 0)
    return elapsed


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(nbytes: int, device: str = "cpu", rounds: int = 9) -> float:
    """Bytes per second of `destination.copy_(source)`, read plus write, median; `nbytes` is the size of one of them.

    Take `nbytes` of the order of the streams measured against it, well past the caches.
    """
    call = copy_call(nbytes, device)
    timing = interleaved({"copy": call}, min_rounds=rounds, max_rounds=rounds, device=device)["copy"]
    return 2 * nbytes / timing.median


def copy_call(nbytes: int, device: str = "cpu") -> Callable[[], None]:
    """The copy that `copy_bandwidth` times, for benchmarks that interleave it with their own calls."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    destination = torch.zeros_like(source)

    def copy() -> None:
        destination.copy_(source)

    return copy


MEMORY_METHOD = {
    "cuda": "peak of torch.cuda.max_memory_allocated, minus before the call, minus its results",
    "cpu": "peak of the resident set (VmHWM, reset before the call), minus VmRSS before it, minus its results",
}


class PeakMemory:
    """Peak memory of a block above what was held before it, minus the tensors assigned to `results`.

    On a GPU: the caching allocator's peak. On Linux: the resident peak (VmHWM), reset through /proc/self/clear_refs
    after handing free heap pages back (`malloc_trim`), so that memory the heap kept from earlier calls counts again.
    Large tensors are mapped and unmapped by glibc one by one, so the resident size follows them. `above` is None where
    neither is possible.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.results: Any = None
        self.above: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif (before := _reset_resident_peak()) is not None:
            self._before = before
        else:
            self._before = -1
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before >= 0:
            peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status_bytes("VmHWM")
            self.above = max(0, peak - self._before - tensor_bytes(self.results))
        self.results = None


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; a storage that several share counts once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(values)
    return sum(storages.values())


def _reset_resident_peak() -> int | None:
    """Hand free heap pages back, set VmHWM to the resident size, and return that; None where it cannot be done."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


@dataclass(frozen=True)
class Check:
    """One line of a correctness gate: an error against fp64 and what it may be."""

    name: str
    error: float
    plain_error: float  # of plain torch in the same dtype
    floor: float

    @property
    def allowed(self) -> float:
        return 2 * self.plain_error + self.floor

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed


@dataclass(frozen=True)
class Gate:
    """The correctness checks of a case. No speedup without a green one."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def describe(self) -> str:
        lines = [f"correctness gate: {'green' if self.passed else 'RED, so no speedups'} ({len(self.checks)} checks)"]
        worst = sorted(self.checks, key=lambda check: check.error / check.allowed if check.allowed else 0, reverse=True)
        shown = [check for check in self.checks if not check.passed] or worst[:2]
        lines += [
            f"  {'ok ' if c.passed else 'BAD'} {c.name}: error {c.error:.2e}, plain torch {c.plain_error:.2e}, "
            f"allowed {c.allowed:.2e}"
            for c in shown
        ]
        return "\n".join(lines)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the 2-norm, in fp64; |result - exact| where `exact` is 0. Any size: in blocks."""
    norm = difference = 0.0
    for mine, theirs in zip(result.detach().split(BLOCK), exact.detach().split(BLOCK), strict=True):
        wide = theirs.to(torch.float64)
        norm += wide.square().sum().item()
        difference += (mine.to(torch.float64) - wide).square().sum().item()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


@dataclass
class Row:
    """One peer of a case. `seconds` is empty when it has no figure, and `note` says why."""

    name: str
    label: str
    seconds: list[float] = field(default_factory=list)
    bytes_moved: int | None = None  # by the byte model that the record names
    peak_bytes: int | None = None  # above inputs and gradients
    floor: str | None = None  # name of the row that holds this one's floor
    baseline: str | None = None  # name of the row that this one's speedup is against
    calls: int = 1  # the figure is this many times the median of `seconds` (one call per teacher: 2)
    note: str = ""

    @property
    def median(self) -> float | None:
        return self.calls * statistics.median(self.seconds) if self.seconds else None


@dataclass
class Threshold:
    """A line of the issue's 'must show', with the figure found."""

    text: str
    value: float | None
    limit: float
    at_least: bool = False  # otherwise at most

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def describe(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[self.met]
        sign = "≥" if self.at_least else "≤"
        figure = "" if self.value is None else f"{self.value:.3g} "
        return f"{verdict:4}  {self.text}: {figure}(wanted {sign} {self.limit:g})"


class GateError(RuntimeError):
    """A ratio was asked of a record whose correctness gate is not green."""


@dataclass
class Record:
    """Everything about one case of one benchmark: `benchmarks/records/<slug>.json`."""

    benchmark: str
    case: dict[str, Any]  # shapes, dtype, threads: what was asked for
    gate: Gate
    rows: list[Row]
    environment: dict[str, Any]
    thresholds: list[Threshold] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # bandwidths, entropies, methods
    sources: str = ""  # `source_digest`

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, name: str, other: str) -> float | None:
        """median(name) / median(other); None where either has no figure. Raises GateError unless the gate is green."""
        if not self.gate.passed:
            raise GateError(f"{self.benchmark} {self.case}: the correctness gate is red, so there are no ratios")
        first, second = self.row(name), self.row(other)
        if first is None or second is None or first.median is None or second.median is None:
            return None
        return first.median / second.median

    @property
    def slug(self) -> str:
        words = [self.benchmark, self.environment["hardware"]["name"]]
        words += [f"{key}-{value}" for key, value in self.case.items()]
        return re.sub(r"[^a-z0-9_.]+", "-", "--".join(words).lower().replace("(r)", "").replace("(tm)", "")).strip("-")

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self) | {"gate_passed": self.gate.passed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record of schema {data.get('schema')}, this code reads {SCHEMA}")
        return cls(
            benchmark=data["benchmark"],
            case=data["case"],
            gate=Gate(tuple(Check(**check) for check in data["gate"]["checks"])),
            rows=[Row(**row) for row in data["rows"]],
            environment=data["environment"],
            thresholds=[Threshold(**threshold) for threshold in data["thresholds"]],
            facts=data["facts"],
            sources=data["sources"],
        )


def write_record(record: Record, folder: Path = RECORDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.slug}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record.to_json(), indent=1) + "\n")
    unfinished.replace(path)
    return path


def read_records(folder: Path = RECORDS, benchmark: str | None = None) -> list[Record]:
    """Records of the folder, in the order of their file names."""
    records = [Record.from_json(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if benchmark in (None, record.benchmark)]


def finished_record(
    benchmark: str, case: Mapping[str, Any], sources: str, device: str, folder: Path = RECORDS
) -> Record | None:
    """The record of this very case, code and hardware, if a run left one: what makes a run resumable."""
    for record in read_records(folder, benchmark):
        same_place = record.environment["hardware"] == hardware(device) and record.environment["versions"] == versions()
        if record.case == dict(case) and record.sources == sources and same_place:
            return record
    return None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after that long (main thread, not on Windows)."""

    def expire(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class Case:
    """One case of a benchmark, for `run_cases`."""

    label: str
    arguments: Sequence[str]
    threads: int
    expected_seconds: float
    finished: Record | None  # of an earlier run; the case is then shown, not measured


def case_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of a kernel has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,fp32", help="comma-separated: bf16, fp16, fp32, fp64")
    parser.add_argument("--threads", default="1,2", help="comma-separated; ignored on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="turns of every call; fast calls take up to three times")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds below which a call takes further turns")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="small shapes, no compile")
    parser.add_argument("--force", action="store_true", help="measure again what is on record")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process measures the one case
    return parser


def drive(
    module: str,
    args: argparse.Namespace,
    shape: Mapping[str, int],
    sources: str,
    measure: Callable[[str, int], Record],
    expected_seconds: Callable[[str, int], float],
) -> int:
    """Run every (dtype, threads) of `args`, each in a fresh process; in such a process (`--here`) measure the one."""
    threads = [int(n) for n in args.threads.split(",")] if args.device == "cpu" else [0]
    choices = [(dtype, n) for dtype in args.dtype.split(",") for n in threads]
    if args.here:
        ((dtype, count),) = choices
        if count:
            torch.set_num_threads(count)
        record = measure(dtype, count)
        print(f"record: {write_record(record, args.records)}\n{describe_record(record)}", flush=True)
        return 0 if record.gate.passed else 1
    passed_on = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    passed_on += [f"--{key}={getattr(args, key)}" for key in ("device", "rounds", "budget")]
    passed_on += [f"--records={args.records.resolve()}", "--here", *(["--no-compile"] if args.no_compile else [])]
    benchmark = module.rsplit(".", 1)[-1]
    return run_cases(
        module,
        [
            Case(
                label=f"{dtype}{f', {n} threads' if n else ''}",
                arguments=[*passed_on, f"--dtype={dtype}", f"--threads={n}"],
                threads=n,
                expected_seconds=expected_seconds(dtype, n),
                finished=None
                if args.force
                else finished_record(benchmark, case_of(shape, dtype, n), sources, args.device, args.records),
            )
            for dtype, n in choices
        ],
    )


def case_of(shape: Mapping[str, int], dtype: str, threads: int) -> dict[str, Any]:
    """A record's case; `threads` 0 (a GPU) is left out."""
    return {**shape, "dtype": dtype} | ({"threads": threads} if threads else {})


def run_cases(module: str, cases: Sequence[Case]) -> int:
    """Run the unfinished cases, each in a fresh process, with an estimate before; 0 unless one failed."""
    remaining = [case for case in cases if case.finished is None]
    expected = sum(case.expected_seconds for case in remaining)
    print(f"{module}: {len(remaining)} of {len(cases)} cases to measure, about {expected / 60:.1f} min", flush=True)
    status = 0
    for case in cases:
        print(f"\n== {case.label}", flush=True)
        if case.finished is not None:
            print(f"on record (--force measures again)\n{describe_record(case.finished)}", flush=True)
            status = status or int(not case.finished.gate.passed)
        else:
            status = run_case(module, case.arguments, case.threads) or status
    return status


def run_case(module: str, arguments: Sequence[str], threads: int) -> int:
    """Run one case in a fresh process with that many threads (0: as they are); its exit status."""
    variables = dict(os.environ)
    if threads:
        variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, check=False).returncode


def table_rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a record's table. Ratios appear only beside a green gate."""
    header = ["", "median", "range", "× floor", "speedup", "peak memory", "bytes moved"]
    cells = []
    for row in record.rows:
        timed = bool(row.seconds) and record.gate.passed
        over_floor = record.ratio(row.name, row.floor) if timed and row.floor else None
        speedup = record.ratio(row.baseline, row.name) if timed and row.baseline else None
        cells.append(
            [
                row.label,
                row.note or "not measured" if row.median is None else seconds_text(row.median),
                f"{row.calls * min(row.seconds):.3g} to {row.calls * max(row.seconds):.3g}" if row.seconds else "",
                "" if over_floor is None else f"{over_floor:.2f}",
                "" if speedup is None else f"{speedup:.2f}×",
                bytes_text(row.peak_bytes),
                bytes_text(row.bytes_moved),
            ]
        )
    return header, cells


def describe_record(record: Record) -> str:
    """A record for the terminal: case, gate, table, thresholds."""
    case = ", ".join(f"{key} {value}" for key, value in record.case.items())
    parts = [f"{record.benchmark}: {case}", record.gate.describe()]
    if record.rows:
        parts.append(text_table(*table_rows(record)))
    if record.gate.passed:
        parts += [threshold.describe() for threshold in record.thresholds]
    return "\n".join(parts)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; every column but the first is aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in aligned)


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def bytes_text(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / MIB:.3g} MiB"


def plot_lines(
    path: Path,
    panels: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]],  # x label, y label, label -> points
    columns: int,
    scale: str = "log",
) -> None:
    """Panels as SVG with both axes to `scale`, one legend for all; the same bytes for the same data."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    count = math.ceil(len(panels) / columns)
    with plt.rc_context({"svg.hashsalt": "vgs", "font.size": 9}):
        figure, axes = plt.subplots(count, columns, figsize=(4.2 * columns, 3.3 * count), squeeze=False)
        handles: dict[str, Any] = {}
        for axis, (x_label, y_label, lines) in zip(axes.flat, panels, strict=False):
            for number, (label, points) in enumerate(sorted(lines.items())):
                xs, ys = zip(*sorted(points), strict=True)
                color = handles[label].get_color() if label in handles else f"C{max(number, len(handles))}"
                handles[label] = axis.plot(xs, ys, marker="o", markersize=3, linewidth=1.3, color=color)[0]
            axis.set(xlabel=x_label, ylabel=y_label, xscale=scale, yscale=scale)
            axis.grid(True, which="both", linewidth=0.3, alpha=0.6)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
        figure.tight_layout(rect=(0, 0.2 / count / 2, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
