"""The syntax trees of our modules."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "relayd"


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


#: The file of each module, by its dotted name within the package.
MODULES = _modules()


@functools.cache
def tree_of(name: str) -> ast.Module:
    """The syntax tree of a module of ours."""
    return ast.parse(MODULES[name].read_text())


@functools.cache
def imports(tree: ast.Module) -> tuple[tuple[str, ast.stmt], ...]:
    """Dotted names that a module imports, anywhere in it."""
    return tuple(_imports(tree))


def _imports(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node
