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
    {"libc"},
    {"timers"},
    {"monotonic"},
    {
        *("errors", "addresses", "names", "ports", "hops", "relay_names"),
        *("hooks", "stage", "broadcast"),
    },
    {"networks", "fair_queue"},
    {"setting_types"},
    {"settings"},
    {"session", "pauses", "preludes", "flows", "ident"},
    {"interfaces", "socks4_wire"},
    {
        *(
            "wheel",
            "registry",
            "log_throttle",
            "log_fields",
            "tls",
            "transports",
            "socket_ends",
            "own_addresses",
        ),
        "resolving",
        "plane.pipes",
    },
    {"plane.poller", "endpoint_strings", "foreign_transports"},
    {"tcp_info"},
    {"rules", "policy", "descriptors", "binding"},
    {"listener", "dialing"},
    {"happy_eyeballs"},
    {"plane.connection", "delivery"},
    {"plane.splicing"},
    {"plane.transport", "legs", "upstream"},
    {"losses"},
    {"deadlines"},
    {
        "destinations",
        "limits",
        "upstreams",
        "observers",
        "bridge",
        "listening",
        "flow_lines",
        "proxy_header",
    },
    {
        *("datagrams.table", "datagrams.sockets", "datagrams.watching"),
        *("datagrams.unanswered", "datagrams.refusals", "datagrams.guarded"),
    },
    {"datagrams.mmsg", "datagrams.ledger", "datagrams.servers"},
    {"datagrams.batches", "datagrams.loops", "datagrams.dialing"},
    {"datagrams.replies"},
    {"datagrams.interfaces"},
    {"datagrams.flow"},
    {"datagrams.listener"},
    {"datagrams.opening"},
    {"datagrams.relay"},
    {"datagrams.endpoint"},
    {"udp_nat", "udp_sockets", "flow_log"},
    {"plane.endpoints", "attempt", "stream_relay", "session_log", "address_grammar"},
    {"stream_session"},
    {"stream", "socks4_named", "socks4_bind"},
    {"endpoints", "socks4_session"},
    {"tcp", "socks4"},
    {"address_settings"},
    {"config"},
    {"demo", "cycles", "log_file"},
    {"signals"},
    {"service"},
    {"tap.options"},
    {"tap.relayd", "tap.socks4"},
    # For the tests of those who embed a relay: nothing of ours imports it.
    {"testing.suite", "testing.protocols", "testing.fakes"},
    {"testing.peers"},
    {"testing.connection"},
    {"testing.reading", "testing.producing", "testing.closing", "testing.losing"},
    {"testing.contract"},
    {"testing.sockets"},
]

#: The rooms that other programs embed: what they need comes as an argument.
EMBEDDED = {
    "tcp",
    "socks4",
    "udp_nat",
    "stream",
    "stream_relay",
    "stream_session",
    "attempt",
    "session_log",
    "bridge",
    "session",
    "interfaces",
    "wheel",
}

#: What knows the settings, or the whole; no embedded room may.
OUTER = {"address_settings", "config", "cycles", "endpoints", "service", "demo"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


MODULES = _modules()

#: For the tests of those who embed a relay, whose time is a test's.
OF_TESTS = {name for name in MODULES if name.startswith("testing.")}


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


@pytest.mark.parametrize("name", sorted(EMBEDDED | OF_TESTS))
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
    if name in ("tap.relayd", "tap.socks4", "tcp", "testing.suite"):
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


#: What is asked of a clock, and where else a thing of the same name is found: the
#: timeouts of the command lines.
OF_CLOCKS = {"callLater", "getDelayedCalls", "seconds"}
OTHER_SECONDS = {"tap.options", "tap.relayd", "tap.socks4"}

#: They go by the machine's clock, or by a reactor's.
OF_THE_MACHINE = {
    "time",
    "datetime",
    "twisted.internet.task",
    "twisted.protocols.policies",
}
#: What is found there and has no time in it.
TIMELESS = {
    "twisted.protocols.policies.ProtocolWrapper",
    "twisted.protocols.policies.WrappingFactory",
}


def last_name(node: ast.AST | None) -> str:
    """What a value is called: `a.b.clock` and `self._clock()` are a clock."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_clock(node: ast.AST | None) -> bool:
    return last_name(node).endswith("clock")


def is_made_a_clock(node: ast.AST | None) -> bool:
    """`monotonic(...)`, what is a clock already, or a weak reference to either."""
    if isinstance(node, ast.Call) and last_name(node) in ("ref", "proxy"):
        return is_made_a_clock(node.args[0])
    return is_clock(node) or last_name(node) == "monotonic"


def asks_the_machine(tree: ast.Module, *, seconds: bool = True) -> list[str]:
    """Where a module's time may come from a clock that somebody can set."""
    found = [f"imports {dotted}" for dotted, _ in imports(tree) if _of_machine(dotted)]
    asked = OF_CLOCKS if seconds else OF_CLOCKS - {"seconds"}
    for node in ast.walk(tree):
        bad = False
        if isinstance(node, ast.Attribute):
            bad = node.attr in asked and not is_made_a_clock(node.value)
        elif isinstance(node, ast.Assign):
            clocks = any(is_clock(target) for target in node.targets)
            bad = clocks and not is_made_a_clock(node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            bad = is_clock(node.target) and not is_made_a_clock(node.value)
        elif isinstance(node, ast.Call) and last_name(node) == "addTimeout":
            bad = not is_clock(node.args[1])
        if bad:
            found.append(ast.unparse(node))
    return found


def _of_machine(dotted: str) -> bool:
    return dotted not in TIMELESS and any(
        f"{dotted}.".startswith(f"{each}.") for each in OF_THE_MACHINE
    )


@pytest.mark.parametrize(
    "name", sorted(set(MODULES) - OF_TESTS - {"monotonic", "timers"})
)
def test_time_comes_from_the_monotonic_clock(name: str) -> None:
    """A step of the machine's clock ends nobody's session, and keeps none.

    Time is asked of what is called a clock, and that is made by `monotonic`, or is an
    argument.
    """
    tree = tree_of(name)
    assert not asks_the_machine(tree, seconds=name not in OTHER_SECONDS)


@pytest.mark.parametrize(
    "text",
    [
        *("import time", "from time import monotonic", "import datetime"),
        "from twisted.internet.task import LoopingCall",
        "from twisted.protocols.policies import TimeoutMixin",
        *("reactor.callLater(0, f)", "self._reactor.callLater(1, f)"),
        *("self._where.reactor.callLater(1, f)", "now = self.reactor.seconds"),
        *("clock = reactor", "self.clock: Any = reactor", "self._clock = ref(reactor)"),
        "done.addTimeout(10, reactor, late)",
    ],
)
def test_that_rule_finds_what_it_is_for(text: str) -> None:
    assert len(asks_the_machine(ast.parse(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            "monotonic(reactor).callLater(0, f)",
            "clock.callLater(0, f)",
            "self._clock().seconds",
        ),
        *("clock = monotonic(reactor)", "self._clock = weakref.ref(clock)"),
        "done.addTimeout(10, self.clock, late)",
    ],
)
def test_that_rule_finds_nothing_else(text: str) -> None:
    assert not asks_the_machine(ast.parse(text))
