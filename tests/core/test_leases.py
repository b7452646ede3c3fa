"""Leases that come later: none is lost, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from relayd.core.errors import Refused
from relayd.core.leases import FREE, give_back, lease_of
from tests.conftest import LoggedFailures


class Lease:
    """Counts how often it was given back."""

    released = 0

    def release(self) -> None:
        self.released += 1


async def coroutine(inner: Deferred[Any]) -> Any:
    return await inner


ANSWERS: list[Callable[[Deferred[Any]], Any]] = [lambda inner: inner, coroutine]


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_lease_comes(answer: Callable[[Deferred[Any]], Any]) -> None:
    inner, told = Deferred[Any](), list[Any]()
    lease_of(answer(inner)).addCallback(told.append)
    assert not told
    inner.callback(FREE)
    assert told == [FREE]
    FREE.release()


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_refusal_comes(answer: Callable[[Deferred[Any]], Any]) -> None:
    inner, told = Deferred[Any](), list[Any]()
    lease_of(answer(inner)).addErrback(told.append)
    inner.errback(Refused("no", "hours"))
    assert told[0].value.reason == "hours"


def test_a_lease_that_comes_too_late_is_given_back() -> None:
    """Of a Deferred that can't be cancelled."""
    inner, told, lease = Deferred[Any](), list[Any](), Lease()
    given = lease_of(inner).addErrback(told.append)
    given.cancel()
    assert told[0].check(CancelledError)
    inner.callback(lease)
    assert lease.released == 1


def test_what_waits_for_another_is_not_cancelled_over_its_head() -> None:
    """The other has no canceller: it would forget its lease."""
    inner, told, lease = Deferred[Any](), list[Any](), Lease()
    outer: Deferred[Any] = Deferred(lambda _: None)
    outer.addCallback(lambda _: inner)
    given = lease_of(outer).addErrback(told.append)
    outer.callback(None)
    given.cancel()
    assert told[0].check(CancelledError)
    inner.callback(lease)
    assert lease.released == 1


@pytest.mark.parametrize("wrap", ANSWERS)
def test_what_can_be_cancelled_is(wrap: Callable[[Deferred[Any]], Any]) -> None:
    cancelled: list[Any] = []
    inner: Deferred[Any] = Deferred(cancelled.append)
    told: list[Any] = []
    given = lease_of(wrap(inner)).addErrback(told.append)
    given.cancel()
    assert cancelled == [inner]
    assert told[0].check(CancelledError)


def test_a_canceller_may_answer_with_a_lease() -> None:
    lease, told = Lease(), list[Any]()
    inner: Deferred[Any] = Deferred(lambda it: it.callback(lease))
    lease_of(inner).addErrback(told.append).cancel()
    assert lease.released == 1
    assert told[0].check(CancelledError)


def test_what_fails_after_that_is_logged(logged_failures: LoggedFailures) -> None:
    told: list[Any] = []
    inner, refused = Deferred[Any](), Deferred[Any]()
    lease_of(inner).addErrback(told.append).cancel()
    lease_of(refused).addErrback(told.append).cancel()
    refused.errback(Refused("no"))
    inner.errback(ZeroDivisionError("too late"))
    logged_failures.take("too late")
    assert len(told) == 2


def test_a_lease_that_can_not_be_given_back(logged_failures: LoggedFailures) -> None:
    class Broken(Lease):
        def release(self) -> None:
            raise ZeroDivisionError("in release")

    give_back(Broken())  # type: ignore[arg-type]
    logged_failures.take("in release")
