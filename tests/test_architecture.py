"""The rules that keep the package readable, checked on its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "instar"
FILES = sorted(ROOT.rglob("*.py"))

ORDER = (
    "errors",
    "memory",
    "processor",
    "files",
    "config",
    "help",
    "hub",
    "recipes",
    "distributed",
    "machine",
    "compilation",
    "data.schema",  # the records themselves: words without tensors
    "data.formats",  # how others write them
    "data.readers",  # and how they are read; a tokenizer learns from such files
    "tokenizer",
    "data",
    "primer",
    "model",
    "checkpoint",
    "lineage",
    "adapters",
    "objectives",
    "generation",
    "rollout",
    "training",
    "corpus",
    "planning",
    "evaluation",
    "stages",
    "report.templates",  # numbers as people write them
    "exchange",
    "report",
    "serving",
    "export",
    "grow",
    "continual",
    "merging",
    "plan",
    "profile",
    "data_verbs",
    "cli",
    "__main__",
)
"""Who may import whom: only what stands further up."""

TORCH_FREE = (
    "cli",
    "errors",
    "memory",
    "processor",
    "files",
    "config",
    "hub",
    "recipes",
    "data.schema",
    "data.readers",
    "primer",
)
MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 400, 60, 8
FORBIDDEN = ("util", "common", "manager", "helper", "misc")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> str:
    """The longest entry of ``ORDER`` that the module lies in."""
    found = [layer for layer in ORDER if module == layer or module.startswith(f"{layer}.")]
    return max(found, key=len, default="")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those within functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its place"
            yield node.lineno, node.module or ""
            for alias in node.names:  # `from instar import stages` imports a module as well
                if (ROOT / f"{alias.name}.py").exists() or (ROOT / alias.name).is_dir():
                    yield from [(node.lineno, f"instar.{alias.name}")] * (node.module == "instar")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    module = name_of(path)
    if module == "":
        assert not list(imports(path)), "importing instar is free"
        return
    layer = layer_of(module)
    assert layer, f"{module} has no place in ORDER"
    for line, imported in imports(path):
        if imported.startswith("instar."):
            other = layer_of(imported.removeprefix("instar."))
            assert ORDER.index(other) <= ORDER.index(layer), f"{path.name}:{line}: {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_stays_out(path: Path) -> None:
    module = name_of(path)
    free = any(module == m or module.startswith(f"{m}.") for m in TORCH_FREE)
    if free:
        heavy = [f"{path.name}:{line}" for line, m in imports(path) if m.split(".")[0] == "torch"]
        assert not heavy


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_fit_on_a_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{path.name}: {node.name} has {lines} lines"
            spec = node.args
            named = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
            named = [name for name in named if name not in ("self", "cls")]
            assert len(named) <= MOST_ARGUMENTS, f"{path.name}: {node.name} has {len(named)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_say_what_is_inside(path: Path) -> None:
    assert not any(word in part for part in name_of(path).split(".") for word in FORBIDDEN)
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module says its idea"


def test_every_verb_has_a_module() -> None:
    from instar.cli import VERBS

    modules = {f"instar.{name_of(path)}" for path in FILES}
    assert {module for module, _ in VERBS.values()} <= modules
