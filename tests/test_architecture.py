"""The rooms of the house: who may import whom.

ARCHITECTURE.md draws the order; this keeps it, over the syntax trees.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "relayd"

#: Each row may import from the rows above it.
ROWS = [
    {"errors", "addresses", "names", "ports", "hops", "libc"},
    {"session", "socks4_wire", "nat_table", "ident", "endpoint_strings"},
    {"interfaces"},
    {
        "wheel",
        "seldom",
        "log_fields",
        "tls",
        "transports",
        "resolving",
        "udp_sockets",
        "plane.pipes",
    },
    {"plane.poller", "udp_batches"},
    {"plane.transport"},
    {
        "destinations",
        "limits",
        "upstreams",
        "observers",
        "bridge",
        "dialing",
        "listening",
        "flow_log",
    },
    {"plane.endpoints", "policy", "udp_servers"},
    {"udp_nat"},
    {"udp_listening"},
    {"endpoints", "stream"},
    {"tcp", "socks4"},
    {"config"},
    {"demo", "cycles", "log_file"},
    {"signals"},
    {"service"},
    {"tap.options"},
    {"tap.relayd", "tap.socks4"},
]

#: The rooms that other programs embed: what they need comes as an argument.
EMBEDDED = {
    "tcp",
    "socks4",
    "udp_nat",
    "stream",
    "bridge",
    "session",
    "interfaces",
    "wheel",
}

#: What knows the settings, or the whole; no embedded room may.
OUTER = {"config", "cycles", "endpoints", "service", "demo"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


MODULES = _modules()


@functools.cache
def tree_of(name: str) -> ast.Module:
    """The syntax tree of a module of ours."""
    return ast.parse(MODULES[name].read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted names that a module imports anywhere in it, but for type checks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def rooms(tree: ast.Module) -> set[str]:
    """The rooms of ours that a module imports from."""
    known = {name for row in ROWS for name in row}
    found = set()
    for name, _ in imports(tree):
        if name.startswith("relayd."):
            rest = name.removeprefix("relayd.")
            found |= {room for room in known if f"{rest}.".startswith(f"{room}.")}
    return found


def test_every_module_has_a_room() -> None:
    assert set(MODULES) == {name for row in ROWS for name in row}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    [level] = [n for n, row in enumerate(ROWS) if name in row]
    above: set[str] = set().union(*ROWS[:level])
    beside = rooms(tree_of(name)) - above
    assert not beside, f"{name} may not import {sorted(beside)}"


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_rooms_know_no_settings(name: str) -> None:
    assert not rooms(tree_of(name)) & OUTER


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_reactor_is_an_argument(name: str) -> None:
    """Importing the global reactor installs one; only two defaults may."""
    tree = tree_of(name)
    taken = [
        node
        for dotted, node in imports(tree)
        if dotted in ("twisted.internet.reactor", "twisted.internet.pollreactor")
    ]
    if name in ("tap.relayd", "tap.socks4", "tcp"):
        assert all(node not in tree.body for node in taken), "within a function only"
    else:
        assert not taken


def test_the_plugin_imports_nothing_of_ours() -> None:
    plugin = PACKAGE.parent / "twisted" / "plugins" / "relayd_plugin.py"
    names = [name for name, _ in imports(ast.parse(plugin.read_text()))]
    assert not any(name.startswith("relayd") for name in names)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(tree_of(name))
