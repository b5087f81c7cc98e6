"""The shape of the code: short files and functions, imports that flow one way, and the engine on public names only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vgs_distill": ROOT / "python", "vgs_kernels": ROOT}
FOLDERS = ("python/vgs_distill", "vgs_kernels", "benchmarks")
FILE_LINES = 450
FUNCTION_LINES = 60  # without the docstring


def files() -> Iterator[tuple[str, str]]:
    """Path and text of every file the limits hold for: not those of Triton kernels."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith("triton"):
                yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def is_operator(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Registered with torch, which wants its whole schema as one signature."""
    return any("custom_op" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_file_is_long() -> None:
    assert not {path for path, text in files() if text.count("\n") > FILE_LINES}


def test_no_function_is_long() -> None:
    found = {
        f"{path}:{node.name}"
        for path, text in files()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of(node) > FUNCTION_LINES
        and not is_operator(node)
    }
    assert not found


# ------------------------------------------------------------------ imports


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, list[str]]]:
    """Modules, and the names taken from each, that are imported when `module` is, not when a function is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]
        else:
            yield from imported(node, module, is_package)


def import_graph(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    paths: dict[str, Path] = {}
    for path in (PACKAGES[package] / package).rglob("*.py"):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        found = imported(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        wanted = {f"{base}.{name}" if f"{base}.{name}" in paths else base for base, names in found for name in names}
        graph[module] = (wanted & paths.keys()) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that import each other in a circle, and what imports those; empty if there is none."""
    remaining = dict(graph)
    while leaves := [node for node, others in remaining.items() if not others & remaining.keys()]:
        for node in leaves:
            del remaining[node]
    return sorted(remaining)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_in_no_circle(package: str) -> None:
    graph = import_graph(package)
    assert len(graph) > 10
    assert circle({module: others - {package} for module, others in graph.items()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_import_in_no_circle(package: str) -> None:
    """`inputs` and `models` as a whole, not only their files."""

    def folder(module: str) -> str:
        return ".".join(module.split(".")[:2])

    folders: dict[str, set[str]] = {}
    for module, others in import_graph(package).items():
        folders.setdefault(folder(module), set()).update(map(folder, others - {package}))
    assert circle({name: others - {name} for name, others in folders.items()}) == []


def test_the_engine_uses_public_names_of_the_kernels() -> None:
    import vgs_kernels

    found = {
        f"{path.relative_to(ROOT)}: {base}.{name}"
        for path in (ROOT / "python" / "vgs_distill").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for base, names in imported(ast.Module([node], []), "vgs_distill", is_package=False)
        for name in names or [""]
        if base.split(".")[0] == "vgs_kernels" and not (base == "vgs_kernels" and name in ("", *vgs_kernels.__all__))
    }
    assert found == set()
