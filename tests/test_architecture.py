"""The folders of the house: who may import whom.

ARCHITECTURE.md draws the table; this keeps it, over the syntax trees.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re

import pytest

from tests.support.trees import MODULES, PACKAGE, imports, tree_of

ENGINE = {"core", "net"}
PARTS = {"admission", "upstreams", "preludes", "observing"}

#: Each folder, and those that it may import from beside itself.
MAY_IMPORT = {
    "core": set[str](),
    "net": {"core"},
    "plane": ENGINE,
    "admission": ENGINE,
    "upstreams": ENGINE,
    "preludes": {"core"},
    "observing": {"core"},
    "filters": {"core"},
    "control": ENGINE,
    "stream": ENGINE,
    "datagrams": ENGINE,
    "socks": ENGINE | {"preludes", "stream"},
    "routing": ENGINE | {"admission", "preludes", "filters"},
    "faces": ENGINE | PARTS | {"stream", "datagrams", "socks", "routing"},
    "configuring": ENGINE | {"admission", "preludes", "socks"},
    "netfilter": {"core", "configuring"},
    "operating": ENGINE
    | PARTS
    | {"plane", "datagrams", "socks", "faces", "configuring", "control", "filters"}
    | {"routing", "netfilter"},
    "tap": {"core", "configuring", "operating"},
    "ctl": {"core", "observing", "configuring", "operating", "netfilter"},
    # For the tests of those who embed a relay, or configure one: nothing of ours
    # imports it.
    "testing": {
        *("core", "net", "preludes", "routing", "stream", "configuring", "operating"),
    },
}

#: What programs import: three relays, and the names that README and the examples show.
RELAYS = {"tcp", "socks4", "udp_nat"}
NAMES = {
    *("config", "destinations", "endpoints", "errors", "flow_log", "gates"),
    *("interfaces", "pools"),
    *("observers", "resolving", "routes", "session", "socks4_wire", "udp_sockets"),
}

#: The longest module, in lines.
LONGEST = 420

#: The longest file of tests.
LONGEST_TESTS = 700


def folder_of(name: str) -> str:
    """The folder of a module, by its dotted name; `faces` for the top."""
    folder, dot, _ = name.partition(".")
    return folder if dot else "faces"


@functools.cache
def ours(name: str) -> frozenset[str]:
    """The modules of ours that a module imports from."""
    found = set()
    for dotted, _ in imports(tree_of(name)):
        part = dotted.removeprefix("relayd.")
        while part and part != dotted:
            if part in MODULES:
                found.add(part)
                break
            part = part.rpartition(".")[0]
    return frozenset(found)


def test_every_module_has_a_folder() -> None:
    top = {name for name in MODULES if "." not in name}
    assert top == RELAYS | NAMES
    assert {folder_of(name) for name in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_go_one_way(folder: str) -> None:
    """And no row allows more than is needed."""
    found = {
        folder_of(each)
        for name in MODULES
        if folder_of(name) == folder
        for each in ours(name)
    }
    if folder == "faces":
        # The names that programs import lead to what they stand for.
        found -= {"configuring", "operating"}
    assert found - {folder} == MAY_IMPORT[folder] - {folder}


def test_no_modules_import_each_other() -> None:
    graph = {name: ours(name) - {name} for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_what_we_write_ourselves_goes_to_the_folders() -> None:
    """Public names are for programs: ours go to what they stand for."""
    assert not {
        (name, each)
        for name in MODULES
        for each in ours(name)
        if each in NAMES and name not in NAMES
    }


@pytest.mark.parametrize("name", sorted(RELAYS))
def test_a_relay_knows_no_configuration(name: str) -> None:
    seen, todo = set[str](), [name]
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            todo += ours(each)
    assert not {
        each for each in seen if folder_of(each) in ("configuring", "operating", "tap")
    }


def test_the_reactor_is_an_argument() -> None:
    """Importing the global reactor installs one; only a few defaults may."""
    assert [name for name in MODULES if takes_the_reactor(name)] == []


def takes_the_reactor(name: str) -> bool:
    """Whether a module does that, and is none of those few."""
    tree = tree_of(name)
    taken = [
        node
        for dotted, node in imports(tree)
        if dotted in ("twisted.internet.reactor", "twisted.internet.pollreactor")
    ]
    if name in ("tap.relayd", "tap.socks4", "tcp", "testing.routes", "testing.suite"):
        # Within a function only.
        return any(node in tree.body for node in taken)
    return bool(taken)


def test_the_plugin_imports_nothing_of_ours() -> None:
    plugin = PACKAGE.parent / "twisted" / "plugins" / "relayd_plugin.py"
    names = [name for name, _ in imports(ast.parse(plugin.read_text()))]
    assert not any(name.startswith("relayd") for name in names)


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name in MODULES if not ast.get_docstring(tree_of(name))] == []


def test_no_module_is_too_long() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_files_of_tests_have_a_limit_as_well() -> None:
    files = (PACKAGE.parent / "tests").rglob("*.py")
    lines = {str(each): len(each.read_text().splitlines()) for each in files}
    assert lines
    assert not {each for each, count in lines.items() if count > LONGEST_TESTS}


@pytest.mark.parametrize("folder", sorted(set(MAY_IMPORT) - {"faces"}))
def test_every_folder_says_what_it_is_for_in_a_line(folder: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    assert said
    assert len(said.splitlines()[0]) > 10


def test_the_drawing_is_true() -> None:
    """ARCHITECTURE.md has this table; in words, where it says `operating`."""
    drawing = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    _, _, table = drawing.partition("## The folders")
    drawn = {}
    row = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
    for folder, _, may in row.findall(table):
        name = "faces" if folder.startswith("the top") else folder.strip("`/")
        drawn[name] = set(re.findall(r"`(\w+)`", may))
    for folder in set(MAY_IMPORT) - {"operating"}:
        assert drawn[folder] == MAY_IMPORT[folder], folder
    assert "operating" in drawn
