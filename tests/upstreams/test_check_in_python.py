"""Checks in Python: what a function may answer, and what it may raise."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from OpenSSL import SSL
from twisted.internet import defer
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed

from relayd.core.check_grammar import parse_check
from relayd.core.errors import ConfigError
from relayd.upstreams.check_kinds import Target, asks
from relayd.upstreams.judging import Verdict

reactor: Any = _reactor


async def found(check: str, target: Target) -> Verdict:
    return await asks(parse_check(check), target, reactor)()


async def is_up(server: Any) -> Any:
    """A check in Python, as `python:` names it: the server is what it returns."""
    if isinstance(server, BaseException):
        raise server
    return server


HERE = f"python:{__name__}:is_up"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (True, Verdict(True, "is_up returned True")),
        (False, Verdict(False, "is_up returned False")),
        (0, Verdict(True, "is_up returned the weight 0", 0)),
        (256, Verdict(True, "is_up returned the weight 256", 256)),
        (ConnectionRefusedError("no\nway."), Verdict(False, "no way")),
        (OSError("\x1b[2J" + "x" * 999), Verdict(False, r"\x1b[2J" + "x" * 193)),
        (TimeoutError(), Verdict(False, "TimeoutError()")),
        (defer.TimeoutError(2, "Deferred"), Verdict(False, "(2, 'Deferred')")),
        (SSL.Error([("a", "b", "bad")]), Verdict(False, "bad")),
        (
            ResponseFailed([Failure(ConnectionDone())]),
            Verdict(False, "Connection was closed cleanly"),
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_check_in_python(said: Any, verdict: Verdict) -> None:
    assert await found(HERE, Target(server=said)) == verdict


@pytest.mark.parametrize("said", [None, "up", 257, -1, 1.0, LookupError("x")])
@pytest_twisted.ensureDeferred
async def test_a_check_in_python_that_is_wrong(said: Any) -> None:
    """A defect: it is raised, and the checker logs it."""
    with pytest.raises((TypeError, LookupError), match=r"is_up returned|^x$"):
        await found(HERE, Target(server=said))


async def waits(server: Any) -> Any:
    return await server


@pytest_twisted.ensureDeferred
async def test_a_check_in_python_that_is_cancelled() -> None:
    """So is what it waits for."""
    waiting: Deferred[bool] = Deferred()
    check = parse_check(f"python:{__name__}:waits")
    run = asks(check, Target(server=waiting), reactor)()
    assert not run.called
    run.cancel()
    with pytest.raises(CancelledError):
        await run
    assert waiting.called


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("python:no_such_module:f", "ModuleNotFoundError: No module named"),
        ("python:json:nothing", "AttributeError: module 'json' has no attribute"),
        ("python:json:__name__", "it is no function"),
        (f"python:{__name__}.x:f", "ModuleNotFoundError: "),
    ],
)
def test_a_check_that_can_t_be_imported(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as problem:
        asks(parse_check(text), Target(server=None), reactor)
    said = str(problem.value)
    assert text in said
    assert why in said
    assert "\n" not in said
