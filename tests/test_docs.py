"""The documentation builds without a warning, and what its pages show works: code, commands, settings, messages."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import json
import re
import shlex
import statistics
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Workspace

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"benchmarks.md", "compile_report.md", "families.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in GENERATED)


class Block(NamedTuple):
    language: str
    title: str
    code: str


def blocks(page: str, language: str | None = None) -> list[Block]:
    fences = re.finditer(
        r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )
    found = [Block(fence[1], fence[2] or "", fence[3]) for fence in fences]
    return [block for block in found if language in (None, block.language)]


def commands(page: str) -> list[list[str]]:
    """The command lines of a page, without what they set in the environment."""
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words if line]


@pytest.fixture
def desk(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, as the pages take it to be: models, rows, and the files that a page names."""
    for name in ("student", "teacher", "rows.jsonl", "pictures"):
        (tmp_path / name).symlink_to(workspace.root / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_pages_need_no_network_and_show_no_raw_formulas(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text), page
        assert not re.search(r'class="arithmatex"|:(?:math|class|func|meth):', text), page
    assert "<math " in (site / "how_it_works" / "index.html").read_text()


def test_the_reference_has_every_public_name(site: Path) -> None:
    import vgs_distill

    import vgs_kernels

    reference = (site / "api" / "index.html").read_text()
    for package in (vgs_kernels, vgs_distill):
        for name in package.__all__:
            if not name.startswith("__"):
                assert re.search(rf'id="{package.__name__}\.([\w.]+\.)?{name}"', reference), name


@pytest.mark.parametrize(
    "module",
    [
        "vgs_kernels.reverse_kl.api",
        "vgs_kernels.decomposed_kl.api",
        "vgs_kernels.linear.api",
        "vgs_kernels.steer",
        "vgs_kernels.gradient_gramian.api",
        "vgs_kernels.steering",
        "vgs_kernels.torchjd_adapter",
    ],
)
def test_the_examples_of_the_reference_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


# ------------------------------------------------------------------ the blocks of the pages


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "bash", "yaml", "json"}
    assert (DOCS / page).read_text().count("```") == 2 * len(blocks(page))
    for block in blocks(page, "json"):
        for line in block.code.splitlines():
            json.loads(line)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, desk: Path) -> None:
    import torch

    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if shown := re.fullmatch(r'--8<-- "(.*)"\n', block.code):
            assert (ROOT / shown[1]).parent == ROOT / "examples"  # which tests/test_examples.py runs
        else:
            exec(compile(block.code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_settings_of_a_page_are_read_by_the_parser(page: str, desk: Path) -> None:
    from vgs_distill.commands.arguments import train_parser

    for block in blocks(page, "yaml"):
        (desk / "block.yaml").write_text(block.code)
        _, values = train_parser().parse(["--config", "block.yaml", "--use_cpu"])
        assert values["method"] is not None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_of_a_page_are_understood(page: str, desk: Path) -> None:
    for block in blocks(page, "yaml"):
        (desk / (block.title or "run.yaml")).write_text(block.code)
    for command in commands(page):
        understand(command)


def understand(command: list[str]) -> None:
    """Fails unless the program that the command names takes its arguments."""
    from accelerate.commands.launch import launch_command_parser
    from vgs_distill.commands import cli
    from vgs_distill.commands.arguments import eval_parser, train_parser

    match command:
        case ["vgs", ("train" | "eval") as name, *arguments]:
            fields = cli.look_parser().parse_known_args(arguments)[1] if name == "train" else arguments
            (train_parser if name == "train" else eval_parser)().parse([*fields, "--use_cpu"])
        case ["vgs", "diagnose", *arguments]:
            train_parser().parse([*cli.diagnose_parser().parse_known_args(arguments)[1], "--use_cpu"])
        case ["vgs", ("demo" | "export" | "report" | "doctor") as name, *arguments]:
            getattr(cli, f"{name}_parser")().parse_args(arguments)
        case ["vgs", name, *_]:
            assert name in cli.COMMANDS
        case ["accelerate", "launch", *arguments]:
            launched = launch_command_parser().parse_args(arguments)
            assert launched.module
            understand(["vgs", *launched.training_script_args])
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", *arguments]:
            asked = re.findall(r"\[(.*?)\]", " ".join(arguments))
            assert set(asked) <= set(metadata("vgs-kernels").get_all("Provides-Extra") or [])
        case ["python", "-m", module]:
            assert importlib.util.find_spec(module) is not None
        case _:
            pytest.fail(f"no test for {shlex.join(command)!r}")


def test_the_quick_start_runs(desk: Path, workspace: Workspace) -> None:
    """Its commands as they stand, but for the size of the run."""
    from tests.command_line import invoke

    for block in blocks("index.md", "yaml"):
        (desk / block.title).write_text(block.code)
    changes = workspace.settings(save_strategy="steps", save_steps=1)
    sizes = {name: value for name, value in changes.items() if not re.search("_path$|^dataset", name)}
    small = {
        "train": [f"--{name}={value}" for name, value in sizes.items()],
        "diagnose": ["--rows=4", *(f"--{name}={value}" for name, value in sizes.items())],
        "eval": ["--use_cpu", "--max_completion_length", "4", "--max_rows", "4"],
        "report": [],
    }
    ran = []
    for command in commands("index.md"):
        if command[0] == "vgs" and command[1] in small:
            result = invoke([*command[1:], *small[command[1]]])
            assert result.exit_code == 0, result.output
            ran.append(command[1])
    assert set(ran) == small.keys()
    assert (desk / "run" / "report.html").exists()


# ------------------------------------------------------------------ the figures


INTERVAL = r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]"
OF_WEIGHTS = r"(?:λ (?:= )?|constant, |between )0\.\d\d(?: and 0\.\d\d)?"  # λ and η, not cosines


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "choosing.md"], ids=lambda page: page.name)
def test_the_intervals_are_those_of_the_study(page: Path) -> None:
    told = set(re.findall(INTERVAL, page.read_text()))
    assert told
    assert told <= set(re.findall(INTERVAL, (DOCS / "study.md").read_text()))


def test_the_cosines_are_those_of_the_demo() -> None:
    records = [json.loads(path.read_text()) for path in (DOCS / "results").glob("*.json")]
    measured = [part for record in records for part in (*record["summary"].values(), record["student_start"])]
    cosines = {
        f"{part['cosine']:.2f}".replace("-0.00", "0.00").replace("-", "−") for part in measured if "cosine" in part
    }
    page = (DOCS / "how_it_works.md").read_text()
    told = set(re.findall(r"−?\b0\.\d\d\b", re.sub(f"{INTERVAL}|{OF_WEIGHTS}", "", page)))
    assert told
    assert told <= cosines, told - cosines


def test_the_accuracies_of_the_readme_are_those_of_the_demo() -> None:
    records = [json.loads(path.read_text()) for path in (DOCS / "results").glob("*.json")]
    measured = [part for record in records for part in (*record["summary"].values(), record["student_start"])]
    recorded = {
        f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['deviation']:.1f} "
        f"({', '.join(f'{100 * value:.1f}' for value in accuracy['values'])})"
        for accuracy in (part["accuracy"] for part in measured)
    }
    told = set(re.findall(r"\d\d\.\d ± \d+\.\d \(.*?\)", (ROOT / "README.md").read_text()))
    assert told
    assert told <= recorded, told - recorded


def test_the_times_of_the_readme_are_those_of_the_records() -> None:
    medians = {
        f"{statistics.median(row['seconds']):.2f} s"
        for path in (ROOT / "benchmarks" / "records").glob("linear_*.json")
        for row in json.loads(path.read_text())["rows"]
        if row["seconds"]
    }
    told = set(re.findall(r"\d+\.\d\d s", (ROOT / "README.md").read_text()))
    assert len(told) >= 10
    assert told <= medians, told - medians


# ------------------------------------------------------------------ the messages


def messages() -> Iterator[str]:
    """Every text in the sources, with `…` for what it leaves open."""
    for path in (*ROOT.glob("vgs_kernels/**/*.py"), *ROOT.glob("python/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[ds]", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_message_that_the_pages_explain_is_one_of_the_code() -> None:
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "faults.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    texts = list(messages())
    unknown = [row for row in rows if not any(row in text for text in texts)]
    assert not unknown
