"""The two tools stand apart: neither imports the other, and the relay imports neither.

Within each tool imports go one way.  The idiom is that of `tests/test_architecture.py`:
syntax trees are read, nothing is imported.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_architecture import imports

ROOT = Path(__file__).parent.parent.parent

#: Which of the folders at the top each of them may import from.
FOLDERS = {
    "relayd": {"relayd"},
    "bench": {"bench", "relayd"},
    "soak": {"soak", "relayd"},
}


def trees(folder: str) -> dict[str, ast.Module]:
    """The syntax trees of a folder's modules, by their dotted names."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def modules_used(tree: ast.Module, known: set[str]) -> set[str]:
    """Those of the known modules that a module imports, or imports from."""
    return {
        max((k for k in known if f"{name}.".startswith(f"{k}.")), key=len, default="")
        for name, _ in imports(tree)
    } - {""}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tools_stand_apart(folder: str) -> None:
    others = {*FOLDERS, "tests"} - FOLDERS[folder]
    found = {
        (name, imported)
        for name, tree in trees(folder).items()
        for imported, _ in imports(tree)
        if imported.partition(".")[0] in others
    }
    assert not found


@pytest.mark.parametrize("tool", ["bench", "soak"])
def test_a_tools_modules_import_one_way(tool: str) -> None:
    modules = trees(tool)
    graph = {
        name: modules_used(tree, set(modules) - {tool})
        for name, tree in modules.items()
    }
    assert sum(map(len, graph.values())) > len(modules)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as problem:
        pytest.fail(f"these import each other: {problem.args[1]}")


@pytest.mark.parametrize("tool", ["bench", "soak"])
def test_every_module_of_a_tool_says_what_it_is_for(tool: str) -> None:
    for name, tree in trees(tool).items():
        assert ast.get_docstring(tree), name


def test_the_import_rule_finds_any_import() -> None:
    text = "def f():\n    from bench.children import child\n    import soak.ends\n"
    known = {"bench", "bench.children", "soak.ends", "soak"}
    assert modules_used(ast.parse(text), known) == {"bench.children", "soak.ends"}
