"""What a route decides about one connection, and what it is asked about.

A *route* is a coroutine function of an operator's own (:mod:`relayd.routing`).  A relay
asks its router about each client (:class:`IRouter`), while it keeps what the client
sends; the answer is a :class:`Decision`, and the relay does what it says.  Nothing of a
route is left in the way then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import Interface

from relayd.core.errors import RelayError
from relayd.core.session import FACT_NAME

#: The most facts of a session, and the most characters of one.
MOST_FACTS, LONGEST_FACT = 16, 256

#: The most characters of why a client is refused, or what its route has failed by.
LONGEST_WHY = 256

#: The most routes of a relay that go on after their clients have left; one more, and
#: the oldest is closed.
MOST_LEAVING = 1024

#: What a fact may be.
_FACTS = (str, int, float)


class RouteFailed(RelayError):
    """A route has raised, or has answered something that is no decision."""


@attrs.frozen(kw_only=True)
class RouteLimits:
    """What a route limits of a session.

    :ivar bandwidth: its :class:`relayd.admission.rates.Rates`; None: none of its own.
    :ivar max_age: seconds that it may be relayed; None: as its relay says.
    :ivar sessions: how many sessions there may be of `key`; None: any number.
    """

    bandwidth: Any = None
    max_age: float | None = None
    sessions: int | None = None
    key: str = ""


NO_LIMITS = RouteLimits()


@attrs.frozen(kw_only=True)
class Decision:
    """What a route has decided.

    One of `pool`, `server` and `refused` is set.

    :ivar pool: the name of one of its relay's pools.
    :ivar server: as text, as a destination is written; or an
        :class:`relayd.net.upstream.Upstream`; or an `IStreamClientEndpoint`.
    :ivar refused: why the client is refused.
    :ivar reply: what a client that is refused is told.
    :ivar facts: for the access log, by name.
    :ivar filters: of this session alone, behind those of its relay: factories.
    """

    pool: str | None = None
    server: Any = None
    refused: str | None = None
    reply: bytes = b""
    facts: Mapping[str, str] = attrs.field(factory=dict)
    filters: Sequence[Any] = ()
    limits: RouteLimits = NO_LIMITS


class Arriving(Protocol):
    """A client about which a route decides.

    :ivar session: its :class:`relayd.core.session.Session`, to be read.
    :ivar data: all that has come from it, which stays the session's first data.
    :ivar ended: it has ended its side: no more will come.
    :ivar server_name: what it asked for in a TLS handshake that its listener does,
        empty if for nothing; None: there is none, or it has not begun.
    :ivar original: where it meant to go, as the log has addresses; empty: nobody knows.
    :ivar clock: for timers.
    """

    @property
    def session(self) -> Any: ...

    @property
    def data(self) -> bytes: ...

    @property
    def ended(self) -> bool: ...

    @property
    def server_name(self) -> str | None: ...

    @property
    def original(self) -> str: ...

    @property
    def clock(self) -> IReactorTime: ...

    def more(self) -> Deferred[None]:
        """Fires when more has come, or the client has ended its side."""


class IRouter(Interface):
    """Decides about the clients of a relay."""

    def ask(arriving: Arriving) -> Decision | Deferred[Decision]:
        """Decide about a client: at once, or later.

        It is cancelled when nobody waits for it any more.

        :return: a Deferred fails with :class:`relayd.core.prelude.BadRequest` if what
            the client has sent can't be, and with anything else if the route has
            failed.
        """

    def upstream(where: Any) -> Any:
        """The :class:`relayd.net.upstream.Upstream` that a decision's `server` is.

        The same one each time for the same text, while it is asked for often; a route
        that names one that can't be is told at once, as it is asked there as well.

        :raises relayd.core.errors.ConfigError: it can't be one.
        """


def checked_fact(name: str, value: object) -> str:
    """A fact for the access log, as text.

    :raises ValueError: there can be no such fact.
    """
    if not isinstance(name, str) or not FACT_NAME.fullmatch(name):
        raise ValueError(
            f"no name of a fact: {name!r:.60}; it has lower-case letters, digits and"
            " underscores, 32 at most, a letter first"
        )
    if not isinstance(value, _FACTS):
        raise ValueError(f"the fact {name} is text or a number, not {value!r:.60}")
    text = str(value)
    if len(text) > LONGEST_FACT:
        raise ValueError(f"the fact {name} has more than {LONGEST_FACT} characters")
    return text
