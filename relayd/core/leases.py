"""What gates answer: leases, at once or later.

A gate that counts nobody has nothing to be given back: it answers :data:`FREE`.  One
that takes its time answers a Deferred, or a coroutine; :func:`lease_of` makes of either
a Deferred that can be cancelled at any time, and by which no lease is lost.
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import CoroutineType
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import ILease

log = Logger(namespace="relayd.gates")

#: The types of answers that take their time.
LATER = (Deferred, CoroutineType)


@implementer(ILease)
class _Free:
    def release(self) -> None:
        """Nothing to give back."""


#: The lease of a gate that counts nobody.
FREE = _Free()


def checked(lease: Any) -> Any:
    """A gate's answer, if it is a lease.

    :raises TypeError: it is none, as of a gate that has forgotten to say anything:
        nobody comes in by that.
    """
    if not hasattr(lease, "release"):
        raise TypeError(f"a gate answered {lease!r}, which is no lease")
    return lease


def give_back(lease: ILease) -> None:
    """Release a lease; if it can't be, that is logged."""
    try:
        lease.release()
    except Exception:
        log.failure("a lease could not be given back")


def lease_of(answer: Deferred[ILease] | Coroutine[Any, Any, ILease]) -> Deferred[Any]:
    """The lease that a gate gives later.

    :return: fires with what `answer` does.  When it is cancelled, so is `answer` if it
        knows how (a Deferred without a canceller would only forget its result); a lease
        that comes all the same is given back.
    """
    said: Deferred[Any]
    said = answer if isinstance(answer, Deferred) else Deferred.fromCoroutine(answer)
    gone = False

    def cancel(_: object) -> None:
        nonlocal gone
        gone = True
        # There is no public way to ask.  One that is called already waits for another,
        # which may have no canceller, either.
        if said._canceller is not None and not said.called:  # noqa: SLF001
            said.cancel()

    given: Deferred[Any] = Deferred(cancel)

    def came(result: Any) -> None:
        if not gone:
            given.callback(result)
        elif not isinstance(result, Failure):
            give_back(result)
        elif not result.check(CancelledError, Refused):
            log.failure("a gate failed after its client had left", result)

    said.addBoth(came)
    return given


@implementer(ILease)
class Leases:
    """Several as one."""

    __slots__ = ("_leases",)

    def __init__(self, leases: list[ILease]) -> None:
        self._leases = leases

    def add(self, lease: ILease) -> None:
        """One more."""
        self._leases.append(lease)

    def release(self) -> None:
        leases, self._leases = self._leases, []
        for lease in reversed(leases):
            give_back(lease)
