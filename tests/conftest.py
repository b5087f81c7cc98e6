"""What tests share: small models, processors and datasets on disk, as a user has them; instruction-set levels."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import places
from tests.small_run import ON_CPU, build_student
from vgs_kernels import backend

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_support import interpreter

    interpreter.install()

# What a file may need besides torch, triton, numpy and pytest; `make test` installs all of it, `make test-floor` none.
OF_EXTRAS = (
    "vgs_distill",
    "transformers",
    "trl",
    "datasets",
    "PIL",
    "yaml",
    "rich",
    "typer",
    "safetensors",
    "hypothesis",
    "expecttest",
    "mkdocs",
)


class Module(pytest.Module):
    """A file of tests; skipped, and said why, where a library of an extra is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except self.CollectError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError) and str(missing.name).partition(".")[0] in OF_EXTRAS:
                pytest.skip(f"{missing.name} is not installed", allow_module_level=True)
            raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with _skipped_without_extras():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with _skipped_without_extras():
        return (yield)


@contextmanager
def _skipped_without_extras() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OF_EXTRAS:
            pytest.skip(f"{error.name} is not installed")
        raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return Module.from_parent(parent, path=module_path)


NATIVE_PROBLEM = backend._native_problem()
LEVELS = [0] if NATIVE_PROBLEM else range(torch.ops.vgs_kernels_native.highest_cpu_level() + 1)


@pytest.fixture(params=LEVELS, ids=lambda level: ("baseline", "avx2", "avx512", "avx512bf16", "amx")[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each instruction-set level of the compiled CPU kernels that runs here, in force while the test runs."""
    if NATIVE_PROBLEM:
        pytest.skip(NATIVE_PROBLEM)
    operators = torch.ops.vgs_kernels_native
    operators.set_cpu_level(request.param)
    yield request.param
    operators.set_cpu_level(operators.highest_cpu_level())


@pytest.fixture(params=places.places("stream_kl"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of the divergences, in each of its places (`tests/places.py`)."""
    for place in places.visit(request):
        yield place.backend


@pytest.fixture(params=places.places("stream_kl"))
def module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The same, as its module."""
    for place in places.visit(request):
        yield backend.load("stream_kl", place.backend)


@pytest.fixture(params=places.places("combine_gradients"))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of Gramian and combination, in each of its places."""
    for place in places.visit(request):
        yield place.backend


@dataclass(frozen=True)
class Workspace:
    """A folder with `student` and `teacher`, and one dataset of sixteen rows in every form that `vgs` reads."""

    root: Path

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The fields of a run of two steps on the CPU."""
        return {
            "model_name_or_path": str(self.root / "student"),
            "teacher_model_name_or_path": str(self.root / "teacher"),
            "dataset_name": str(self.root / "rows.jsonl"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 4,
            "learning_rate": "1e-3",
            **ON_CPU,
            **changes,
        }

    def yaml(self, path: Path, **changes: Any) -> str:
        """Write the settings to a file, without those that are `...`; return its name."""
        import yaml

        settings = {name: value for name, value in self.settings(**changes).items() if value is not ...}
        path.write_text(yaml.safe_dump(settings))
        return str(path)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    from vgs_distill.demo.models import build_processor
    from vgs_distill.demo.worlds import make_world, to_prompt_dataset

    root = tmp_path_factory.mktemp("workspace")
    world = make_world("shapes")
    processor = build_processor(world.words)
    for seed, (name, width) in enumerate((("student", 32), ("teacher", 48))):
        build_student(processor, seed, width).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    examples = world.training_questions(16, seed=5, prior=0.5)
    rows = to_prompt_dataset(examples).add_column("answer", [example.answer for example in examples])
    rows.save_to_disk(str(root / "saved"))
    rows.to_parquet(str(root / "rows.parquet"))
    pictures = root / "pictures"
    pictures.mkdir()
    lines, metadata = [], []
    for index, example in enumerate(examples):
        example.image.save(pictures / f"{index}.png")
        row = {"prompt": [{"role": "user", "content": example.question}], "answer": example.answer}
        lines.append(json.dumps({**row, "image": f"pictures/{index}.png"}))
        metadata.append(json.dumps({**row, "file_name": f"{index}.png"}))
    (root / "rows.jsonl").write_text("\n".join(lines))
    (pictures / "metadata.jsonl").write_text("\n".join(metadata))
    return Workspace(root)
