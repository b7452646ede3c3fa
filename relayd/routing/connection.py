"""What a route is given: one client that has connected, and what may be said of it.

    async def route(conn):
        if (await conn.peek(3)) == b"SSH":
            return conn.pool("ssh")
        conn.facts["tenant"] = await conn.sni() or "none"
        return conn.server("10.0.0.5:80")

A :class:`Connection` looks at what has come from its client, which stays where it is;
waits for more of it; and keeps what its route says, of which
:class:`relayd.routing.router.Router` makes a decision.  Once that is made, or the
client has left, it knows its client no more: a route may keep it, and holds nothing by
that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import attrs

from relayd.admission.rates import Rates, parse_rates
from relayd.core.addresses import host_of
from relayd.core.errors import Refused
from relayd.core.route_spec import DEFAULT
from relayd.core.routing import NO_LIMITS, Arriving, RouteLimits
from relayd.routing.facts import Facts
from relayd.routing.first_bytes import FirstBytes

#: The most bytes of a reply.
LONGEST_REPLY: Final = 16 << 10

#: The most filters of one session, and characters of a key of limits.
MOST_FILTERS: Final = 16
LONGEST_KEY: Final = 256


@attrs.frozen
class Address:
    """One end of a connection; its text is as the log has it.

    :ivar text: `192.0.2.1:40000`, `[2001:db8::1]:40000` or `unix:/run/x`.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def host(self) -> str:
        """The IP address; empty if it is a UNIX socket's."""
        return host_of(self.text)

    @property
    def port(self) -> int:
        """The port; 0 if it has none."""
        if self.text.startswith("unix:"):
            return 0
        port = self.text.rpartition(":")[2]
        return int(port) if port.isdecimal() else 0


class Choice(NamedTuple):
    """What a route returns: where its client goes.

    :ivar by: the connection that has given it.
    """

    by: Connection
    pool: str | None
    server: Any

    def __repr__(self) -> str:
        if self.pool is not None:
            return f"conn.pool({self.pool!r})"
        return f"conn.server({self.server!r})"


class Rules(Protocol):
    """What a connection asks of its router: what a route may say."""

    @property
    def server_speaks_first(self) -> bool: ...

    def check_pool(self, name: str) -> None: ...

    def upstream(self, where: Any) -> Any: ...

    def filter_of(self, wanted: Any, options: Mapping[str, Any]) -> Any: ...


class Connection(FirstBytes):
    """One client, of which a route decides.

    What waits for the client can be awaited several times at once.  Its deadline is
    that of the client's handshake; `wait` is for less.

    :ivar session: the :class:`relayd.core.session.Session`, to be read.
    :ivar waits_for: what of its client it waits for without an end, in words; empty if
        there is nothing.
    """

    # What is rare has no place of its own before it is there.
    _facts: Facts | None = None
    _limits: RouteLimits = NO_LIMITS
    _filters: tuple[Any, ...] = ()
    _refused: str | None = None
    _reply = b""

    #: The route has said something beside where the client goes.
    has_more = False

    def __init__(self, arriving: Arriving, router: Rules) -> None:
        self._arriving = arriving
        self._router = router
        self.session = arriving.session
        if router.server_speaks_first:
            self._silent = True

    # -- who it is

    @property
    def client(self) -> Address:
        """Whose connection it is: as a PROXY header says, or else the peer."""
        return Address(self.session.client)

    @property
    def peer(self) -> Address:
        """Who has connected: the client, or its balancer."""
        return Address(self.session.peer)

    @property
    def listener(self) -> Address:
        """What the client has connected to, as it knows it.

        Where rules of the kernel's bring clients to the relay (`--intercept`), that is
        what it has asked for.
        """
        return Address(self.session.listener)

    @property
    def original(self) -> Address | None:
        """Where the client meant to go, before the kernel has brought it here.

        What it has connected to, if nothing has: the listener itself.  None if there is
        no such thing: it came by a UNIX socket.

        :raises ConnectionOver: the route has decided, or the client has left.
        """
        original = self._client().original
        return Address(original) if original else None

    @property
    def requested(self) -> str | None:
        """What a client of a SOCKS4 proxy asks for, `HOST:PORT`; else None."""
        requested: str = getattr(self.session, "requested", "-")
        return None if requested == "-" else requested

    @property
    def user_id(self) -> bytes:
        """What a client of a SOCKS4 proxy calls its user, which proves nothing."""
        user_id: bytes = getattr(self.session, "user_id", b"")
        return user_id

    # -- what the route says

    def pool(self, name: str = DEFAULT) -> Choice:
        """A pool of the relay, to be returned.

        :raises ValueError: it has no such pool.
        """
        self._router.check_pool(name)
        return Choice(self, name, None)

    def server(self, where: Any) -> Choice:
        """A server, to be returned.

        :param where: a destination as one writes it (`10.0.0.5:80,weight=2`), which
            must not be what a stranger has sent; or an
            :class:`relayd.destinations.Upstream`; or an `IStreamClientEndpoint`.
            `conn.requested` is judged, and dialled, as its proxy does without a route.
        :raises relayd.errors.ConfigError: it can't be one.
        """
        requested = self.requested
        if requested is None or where != requested:
            # What a stranger has asked for is not read as what an operator writes: that
            # may name files.
            self._router.upstream(where)
        return Choice(self, None, where)

    def refuse(self, why: str) -> NoReturn:
        """Do not serve the client; what the route does after that changes nothing.

        :param why: for the log, in a few words.
        """
        if self._refused is None:
            self._refused = str(why)
        raise Refused(self._refused)

    def reply(self, data: bytes) -> None:
        """What a client is told that is refused after this; a second one follows.

        :raises ValueError: it is no bytes, or too long.
        """
        if not isinstance(data, bytes):
            raise ValueError(f"a reply is bytes, not {data!r:.60}")
        if len(self._reply) + len(data) > LONGEST_REPLY:
            raise ValueError(f"a reply has {LONGEST_REPLY} bytes at most")
        self._reply += data

    def limit(
        self,
        bandwidth: str | float | Rates | None = None,
        max_age: float | None = None,
        sessions: int | None = None,
        key: str = "",
    ) -> None:
        """Limit the session; what is left out stays as it was.

        :param bandwidth: bytes per second each way: a number, or as one writes it
            (`1MB`, `up=1Mbit,down=512KiB`).
        :param max_age: seconds that it may be relayed.
        :param sessions: how many sessions there may be of `key`.
        :raises ValueError: one of them can't be.
        """
        before = self._limits
        if max_age is not None:
            _check_number("max_age", max_age)
        if sessions is not None and (type(sessions) is not int or sessions < 1):
            raise ValueError(f"sessions is a whole number from 1, not {sessions!r:.60}")
        if not isinstance(key, str) or len(key) > LONGEST_KEY:
            raise ValueError(f"a key is text, of {LONGEST_KEY} characters at most")
        self.has_more = True
        self._limits = RouteLimits(
            bandwidth=before.bandwidth if bandwidth is None else _rates(bandwidth),
            max_age=before.max_age if max_age is None else max_age,
            sessions=before.sessions if sessions is None else sessions,
            key=key or before.key,
        )

    def filter(self, wanted: Any, /, **options: Any) -> None:
        """Put a filter on the session, behind those of its relay.

        :param wanted: the name of one, with `options`; or a factory.
        :raises relayd.errors.ConfigError: there is none, or its options are wrong.
        :raises ValueError: too many, or a factory of filters for UDP.
        """
        if len(self._filters) >= MOST_FILTERS:
            raise ValueError(f"a session has {MOST_FILTERS} filters of its route")
        made = self._router.filter_of(wanted, options)
        self.has_more = True
        self._filters = (*self._filters, made)

    @property
    def facts(self) -> Facts:
        """Facts for the access log, by name: to be set."""
        if self._facts is None:
            self.has_more = True
            self._facts = Facts()
        return self._facts

    @facts.setter
    def facts(self, facts: Mapping[str, object]) -> None:
        if facts is not self._facts:
            # They are checked as any others.
            checked = Facts()
            checked.update(facts)
            self.has_more, self._facts = True, checked

    def said(self) -> dict[str, Any]:
        """What the route has said beside where the client goes: of a decision."""
        said: dict[str, Any] = {}
        if self._facts:
            said["facts"] = dict(self._facts)
        if self._limits is not NO_LIMITS:
            said["limits"] = self._limits
        if self._filters:
            said["filters"] = self._filters
        return said

    @property
    def refusal(self) -> str | None:
        """Why the route has refused the client; None: it has not."""
        return self._refused

    @property
    def last_words(self) -> bytes:
        """What a client is told that is refused."""
        return self._reply


def _check_number(name: str, number: float) -> None:
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    if not fits or not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} is a number more than 0, not {number!r:.60}")


def _rates(bandwidth: str | float | Rates) -> Rates:
    if isinstance(bandwidth, str):
        try:
            return parse_rates(bandwidth)
        except ValueError as problem:
            raise ValueError(f"bandwidth {bandwidth!r:.60}: {problem}") from None
    if isinstance(bandwidth, Rates):
        return bandwidth
    _check_number("bandwidth", bandwidth)
    return Rates(float(bandwidth), float(bandwidth))
