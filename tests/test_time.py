"""Time comes from the monotonic clock: what keeps every module to it."""

from __future__ import annotations

import ast

import pytest

from tests.support.trees import MODULES, imports, tree_of

#: For the tests of those who embed a relay, whose time is a test's.
OF_TESTS = {name for name in MODULES if name.startswith("testing.")}

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
#: They say what time it is, to people; and whether a relay is open at it.
OF_PEOPLE = {
    *("observing.log_times", "filters.packet_times"),
    *("admission.hours", "operating.explanation"),
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


def test_time_comes_from_the_monotonic_clock() -> None:
    """A step of the machine's clock ends nobody's session, and keeps none.

    Time is asked of what is called a clock, and that is made by `monotonic`, or is an
    argument.
    """
    names = set(MODULES) - OF_TESTS - OF_PEOPLE - {"net.monotonic", "net.timers"}
    found = {
        name: asked
        for name in names
        if (asked := asks_the_machine(tree_of(name), seconds=name not in OTHER_SECONDS))
    }
    assert not found


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
