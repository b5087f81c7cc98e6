"""What `make gpu-check` does, in order: every step is a process of its own with a limit of time."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.harness.machine import REPOSITORY
from benchmarks.protocols import GPU_PROTOCOLS, Protocol
from vgs_kernels import backend

# Of the kernels alone: they need torch, triton, numpy and pytest, and no trainer.
KERNEL_TESTS = (
    "test_backend.py", "test_stream_kl*.py", "test_logit_calls*.py", "test_linear*.py", "test_sampled_tokens.py",
    "test_gradient_gramian*.py", "test_combine_gradients*.py", "test_steering*.py", "test_tracing.py",
    "test_accuracy.py", "test_no_host_waits.py",
)  # fmt: skip
WITH_EVERY_METHOD = ("TRL", "longest")  # sources of the protocols that `linear_decomposed_kl` runs, too
COMPILED = ("TRL",)  # where peers are compiled as well: it takes minutes, and only the first shape is worth them
ENGINE = ("trl", "transformers")


@dataclass(frozen=True)
class Options:
    """What was asked of the command line."""

    folder: Path
    kernels_only: bool = False
    dry_run: bool = False
    all_tests: bool = False
    only: tuple[str, ...] = ()  # names of steps, or their beginnings

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


@dataclass(frozen=True)
class Step:
    """A command of Python's, or the reason why this machine has none."""

    name: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 300.0
    left_out: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def plan(options: Options) -> list[Step]:
    """The steps in the order of their worth: what time does not allow is left out from the end."""
    steps = [
        _build(options),
        Step("doctor", ("-m", "vgs_kernels"), 180),
        Step("correctness", _module("gpu_correctness", options, quick=True), 420),
        _tests(options),
        *_linear(options),
        *_steering(options),
        Step("logits", _module("decomposed_kl", options, *_case(options), "--no-compile",
                               *(("--tokens=16", "--vocab=512") if options.dry_run else ("--tokens=2048",))), 240),
        Step("launch constants", _module("launch_constants", options, quick=True), 420,
             environment={"TRITON_INTERPRET": "1"} if options.dry_run else {}),
        _training_step(options),
    ]  # fmt: skip
    if options.dry_run:  # also where there is a GPU
        steps = [replace(step, environment={**step.environment, "CUDA_VISIBLE_DEVICES": ""}) for step in steps]
    if options.only:
        steps = [step for step in steps if step.name.startswith(options.only)]
    return steps


def _module(name: str, options: Options, *arguments: str, quick: bool = False) -> tuple[str, ...]:
    small = ("--quick",) if quick and options.dry_run else ()
    records = f"--records={options.folder.resolve() / 'records'}"
    return ("-m", f"benchmarks.{name}", f"--device={options.device}", records, *arguments, *small)


def _case(options: Options, dtype: str = "bf16") -> tuple[str, ...]:
    """One case of a benchmark, measured in the step's own process."""
    turns = ("--rounds=1", "--budget=0") if options.dry_run else ("--rounds=5", "--budget=0.3")
    return (f"--dtype={dtype}", "--threads=1", "--here", *turns)


def _build(options: Options) -> Step:
    if options.dry_run:
        return Step("build", left_out="a dry run builds nothing")
    if "native" in backend.available("combine_gradients", "cuda"):
        return Step("build", left_out="the CUDA extension is here")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if shutil.which("nvcc") is None and not (home and (Path(home) / "bin" / "nvcc").exists()):
        return Step("build", left_out="no nvcc: steering runs on what needs no toolkit")
    return Step("build", ("setup.py", "build_ext", "--inplace"), 600)


def kernel_tests() -> list[str]:
    """The test files of the kernels, from the root of the repository."""
    found = {path for pattern in KERNEL_TESTS for path in (REPOSITORY / "tests").glob(pattern)}
    return sorted(str(path.relative_to(REPOSITORY)) for path in found)


def _tests(options: Options) -> Step:
    """Those of the kernels that need a GPU. A dry run only collects them: that they can be imported is its point."""
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={options.folder.resolve() / 'tests.xml'}"]
    if options.dry_run:
        return Step("tests", (*arguments, "-o", "addopts=-q", "--collect-only", *kernel_tests()), 180)
    if options.all_tests:
        return Step("tests", tuple(arguments), 1500)
    chosen = ("-m", "gpu", "-k", "not in_the_interpreter")  # which needs no GPU, and minutes
    return Step("tests", (*arguments, "-o", "addopts=-q", *chosen, *kernel_tests()), 600)


def _linear(options: Options) -> list[Step]:
    steps = []
    for protocol in GPU_PROTOCOLS:
        shape = _shape(protocol, options)
        label = f"{protocol.dtype} {shape['tokens']} x {shape['width']} x {shape['vocab']}"
        given = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
        given += [*_case(options, protocol.dtype), "--roofline"]
        compiled = protocol.source in COMPILED and not options.dry_run
        given += [] if compiled else ["--no-compile"]
        limit = 420.0 if compiled else 180.0
        steps.append(Step(f"reverse_kl {label}", _module("linear_reverse_kl", options, *given), limit))
        if protocol.source in WITH_EVERY_METHOD:
            steps.append(Step(f"methods {label}", _module("linear_decomposed_kl", options, *given), limit))
    return list({step.name: step for step in steps}.values())  # tiny shapes coincide


def _shape(protocol: Protocol, options: Options) -> dict[str, int]:
    if not options.dry_run:
        return protocol.shape
    return {"tokens": max(8, protocol.shape["tokens"] // 512), "width": 256, "teacher_width": 256, "vocab": 512}


def _steering(options: Options) -> list[Step]:
    """200 tensors of 64 M parameters, whose launches count, and 64 of 1.6 G, whose bytes do."""
    shapes = [(33, 2)] if options.dry_run else [(462, 25), (4096, 8)]
    return [
        Step(f"steering {width} x {layers}", _module("steering", options, f"--width={width}", f"--layers={layers}",
             *_case(options)), 180)
        for width, layers in shapes
    ]  # fmt: skip


def _training_step(options: Options) -> Step:
    missing = [name for name in ENGINE if importlib.util.find_spec(name) is None]
    if options.kernels_only or missing:
        return Step("training step", left_out="--kernels-only" if options.kernels_only else f"no {', '.join(missing)}")
    records = f"--records={options.folder.resolve() / 'records'}"
    model = "demo" if options.dry_run else "gpu"
    arguments = ["-m", "benchmarks.training_step", f"--model={model}", "--turns=1", records]
    return Step("training step", (*arguments, *(("--steps=1",) if options.dry_run else ())), 480)
