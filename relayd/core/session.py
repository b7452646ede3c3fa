"""The record of one relayed connection: facts and counters, no behaviour.

A Session says who connected, through which listener, to which upstream, in which stage
it is, how many bytes went each way and how it ended.  Only the relay writes it; logs,
limits, metrics and observers read it, at any time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Generic, TypeVar, overload

import attrs

from relayd.core.escapes import Words, one_word
from relayd.core.pacing import Pace
from relayd.core.stage import Stage


class Ending(Enum):
    """Each way in which a session can end.

    `word` is what the log line and the metric label say; `code` is HAProxy's
    two-letter termination state (configuration manual, section 8.5), which
    operators know.
    """

    #: Both directions reached their end, or, with --half-close off, one of them, and
    #: all that was read was delivered.
    DONE = ("done", "--")
    #: The client, or the server, reset its connection.
    DOWNSTREAM_RESET = ("downstream_reset", "CD")
    UPSTREAM_RESET = ("upstream_reset", "SD")
    #: A write to it failed.
    DOWNSTREAM_WRITE_FAILED = ("downstream_write_failed", "CD")
    UPSTREAM_WRITE_FAILED = ("upstream_write_failed", "SD")
    #: It did not answer any more: neither data nor the kernel's probes.
    DOWNSTREAM_LOST = ("downstream_lost", "cD")
    UPSTREAM_LOST = ("upstream_lost", "sD")
    #: It took none of the data that waited for it, for the stall timeout.
    DOWNSTREAM_STALLED = ("downstream_stalled", "cD")
    UPSTREAM_STALLED = ("upstream_stalled", "sD")
    #: Its server went down, and its pool cuts sessions then.
    UPSTREAM_DOWN = ("upstream_down", "DD")
    #: Nothing moved for the idle timeout, or the half-close timeout.
    IDLE = ("idle", "cD")
    HALF_CLOSED = ("half_closed", "cD")
    #: The client left while the server was dialled.
    CLIENT_LEFT = ("client_left", "CC")
    #: No server could be reached, for these reasons.
    CONNECT_REFUSED = ("connect_refused", "SC")
    CONNECT_TIMEOUT = ("connect_timeout", "sC")
    UNRESOLVED = ("unresolved", "SC")
    CONNECT_FAILED = ("connect_failed", "SC")
    NO_UPSTREAM = ("no_upstream", "SC")
    #: A gate refused the client, or a limit was reached.
    REFUSED = ("refused", "PR")
    #: The connection led back to the same relay.
    LOOP = ("loop", "PR")
    #: The client sent no valid handshake or request; none in time; it was evicted from
    #: the table of handshakes, for a new client.
    BAD_REQUEST = ("bad_request", "PR")
    HANDSHAKE_TIMEOUT = ("handshake_timeout", "cR")
    EVICTED = ("evicted", "PR")
    #: Refused by a route, or for the server name that it asks for; of proxies, by a
    #: rule, or by the ident of the client's host.
    DENIED = ("denied", "PR")
    IDENT_FAILED = ("ident_failed", "PR")
    #: Proxies, BIND: no peer connected, or the wrong one.
    BIND_TIMEOUT = ("bind_timeout", "sC")
    WRONG_PEER = ("wrong_peer", "PC")
    #: It was as old as it may get; the hours of its relay were over.
    MAX_AGE = ("max_age", "KD")
    HOURS = ("hours", "KD")
    #: The relay shut down first.
    DRAINED = ("drained", "KD")
    #: An operator has ended it while its relay runs.
    KILLED = ("killed", "KD")
    #: One of its filters has ended it, as it is to.
    FILTERED = ("filtered", "PD")
    #: One of its filters has failed, which is logged with its traceback.
    FILTER_FAILED = ("filter_failed", "ID")
    #: Its route has failed, which is logged with its traceback.
    ROUTE_FAILED = ("route_failed", "IR")
    #: An error inside the relay, logged with its traceback.
    FAILED = ("failed", "ID")

    def __init__(self, word: str, code: str) -> None:
        self.word = word
        self.code = code


class Direction:
    """The bytes that go one way through a session.

    :ivar read: bytes read from the source, for the relay to pass on.
    :ivar kept: how many of them were not given to the sink's transport: what waits
        until the two are joined; what changes the bytes on their way may make it more,
        or less than 0.
    :ivar spliced: how many of them did not pass through this process: the kernel moved
        them.
    :ivar eof: the source has sent its last byte (or will never send more).
    :ivar pace: how fast the source may be read (:class:`relayd.core.pacing.Pace`);
        None: as fast as it can be.
    """

    # With each chunk that is copied one number changes.  A second one, `written`, would
    # be read from memory, and not from a cache, where thousands of sessions take turns.
    __slots__ = ("eof", "kept", "read", "spliced")

    # No slot: a direction without a limit takes no memory for it.
    pace: Pace | None = None

    def __init__(self) -> None:
        self.read = 0
        self.kept = 0
        self.spliced = 0
        self.eof = False

    def keep(self, count: int) -> None:
        """So many bytes were read and are not given to the sink's transport now."""
        self.read += count
        self.kept += count

    @property
    def written(self) -> int:
        """Bytes given to the sink's transport, with those that it still buffers."""
        return self.read - self.kept

    @written.setter
    def written(self, count: int) -> None:
        self.kept = self.read - count

    def __repr__(self) -> str:
        counts = f"read={self.read}, written={self.written}"
        return f"Direction({counts}, eof={self.eof})"


class PacedDirection(Direction):
    """One whose bandwidth is limited.

    :param before: what it goes on with.
    """

    __slots__ = ("pace",)

    def __init__(self, before: Direction | None = None) -> None:
        Direction.__init__(self)
        self.pace = None
        if before is not None:
            self.read, self.kept, self.eof = before.read, before.kept, before.eof


#: Seconds after which a client that leaves before its server is connected has given
#: up: a health check leaves at once, or after its own timeout, of a second or two.
GIVES_UP = 5.0

#: What a fact of the access log may be called by whoever adds one.
FACT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

#: What stands before the name of one that is called as what the line says already.
TAKEN = "fact_"

T = TypeVar("T")


class _Rare(Generic[T]):
    """An attribute that few sessions set.

    Those that do have a table of them, so that thousands of idle ones have no field for
    each.

    :param default: what the others have.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, session: None, owner: type) -> _Rare[T]: ...
    @overload
    def __get__(self, session: Session, owner: type) -> T: ...
    def __get__(self, session: Session | None, owner: type) -> T | _Rare[T]:
        if session is None:
            return self
        rare = session.rare
        return self._default if rare is None else rare.get(self._name, self._default)

    def __set__(self, session: Session, value: T) -> None:
        if session.rare is None:
            if value == self._default:
                return
            session.rare = {}
        session.rare[self._name] = value


_ACCEPTED = Stage.ACCEPTED
_DONE, _CLIENT_LEFT = Ending.DONE, Ending.CLIENT_LEFT
_DOWNSTREAM_RESET = Ending.DOWNSTREAM_RESET


@attrs.define(eq=False, slots=True, weakref_slot=False)
class Session:
    """One client's connection and what became of it.

    Times are seconds on the relay's clock (monotonic on a real reactor); use
    their differences.

    :ivar id: unique within the process, from 1 up.
    :ivar client: whose session it is, as text: the address that a PROXY header names,
        or else the peer.
    :ivar listener: the local address that the client reached, as text; if rules of the
        kernel's have brought it to its relay, what it has asked for.
    :ivar opened_at: when the client was accepted.
    :ivar relay: the name of the relay that serves it (:mod:`relayd.core.relay_names`).
    :ivar peer: the address that connected, as text: the client, or its balancer.
    :ivar ordinal: its sequence number among the clients that this relay has admitted,
        from 0 up; -1 until it is admitted.
    :ivar stage: where it is on its way.
    :ivar server: the :class:`relayd.net.upstream.Upstream` that was chosen, or None.
    :ivar upstream: the server's name or address; empty until one is chosen.
    :ivar first_dialed_at: when a server was first dialled, or, for SOCKS BIND, a
        listener first opened for its peer; None before that.
    :ivar dialed_at: when the last attempt began; the same if there was one only.
    :ivar attempts: how many servers were dialled, or listeners opened.  The addresses
        of a server's name are one attempt; of a name that a client has asked for, each
        is one.
    :ivar connected_at: when the upstream connection stood, or None.
    :ivar ended_at: when the last of its connections was closed, or None.
    :ivar up: client to server.
    :ivar down: server to client.
    :ivar spoke: its client has sent something that is not relayed: a request, a TLS
        handshake or a PROXY header, or a part of it.  A part of a TLS handshake counts
        once OpenSSL has a message of it; a whole handshake and a whole header do not.
    :ivar server_first: the server has ended its side, and the client had not.
    :ivar ending: how it ended, or None while it lives.
    :ivar detail: more about the cause, or empty.
    :ivar reason: why a gate has refused it, as one of
        :data:`relayd.core.errors.REASONS`; empty if none has.
    :ivar header: the PROXY header that came before it, or None: an object with
        `source`, `destination` (addresses as text, or empty) and `facts`.
    :ivar notes: what its filters and its route have to say, for the log line, by name;
        each one word (:meth:`note`).
    """

    id: int
    client: str
    listener: str
    opened_at: float
    relay: str = ""
    peer: str = ""
    ordinal: int = -1
    stage: Stage = _ACCEPTED
    server: Any = None
    upstream: str = ""
    dialed_at: float | None = None
    attempts: int = 0
    connected_at: float | None = None
    ended_at: float | None = None
    up: Direction = attrs.Factory(Direction)
    down: Direction = attrs.Factory(Direction)
    spoke: bool = False
    server_first: bool = False
    ending: Ending | None = None
    #: The attributes below, of those that have set one.
    rare: dict[str, Any] | None = attrs.field(default=None, repr=False)

    detail = _Rare("")
    reason = _Rare("")
    header = _Rare[Any](None)
    notes = _Rare[Mapping[str, str]]({})
    _first_dialed_at = _Rare[float | None](None)

    @property
    def first_dialed_at(self) -> float | None:
        """When a server was first dialled; see above."""
        first = None if self.rare is None else self._first_dialed_at
        return self.dialed_at if first is None else first

    def begin_attempt(self, now: float) -> None:
        """A server is dialled, or a listener opened."""
        if self.attempts == 1:
            self._first_dialed_at = self.dialed_at
        self.attempts += 1
        self.dialed_at = now

    def note(self, name: str, text: str) -> None:
        """Add a fact to its line, as one word; another of this name is forgotten."""
        # Most are one word as they are.
        noted = text if one_word(text) == text else Words(text)
        self.notes = {**self.notes, name: noted}

    @property
    def facts(self) -> Mapping[str, object]:
        """What else the log line says, in its order; subclasses may have more."""
        if self.rare is None:
            return {}
        header = self.header
        facts: Mapping[str, object] = {} if header is None else header.facts
        return {**facts, **self.notes}

    @property
    def duration(self) -> float:
        """Seconds from accept to end; 0.0 while the session lives."""
        return 0.0 if self.ended_at is None else self.ended_at - self.opened_at

    @property
    def is_silent(self) -> bool:
        """Whether it has ended without a byte either way, and by its client alone.

        That is what the health check of a balancer leaves: it connects, and closes or
        resets.  The client has ended its side first, has left before its server was
        connected, within GIVES_UP seconds, or has reset its connection.  What a relay,
        a gate or a server has ended is never silent, nor is a client that has sent a
        proxy a part of a request.
        """
        if self.up.read or self.down.read or self.spoke or self.server_first:
            return False
        if self.connected_at is None and self.attempts and self.duration > GIVES_UP:
            return False
        ending = self.ending
        return ending is _DONE or ending is _CLIENT_LEFT or ending is _DOWNSTREAM_RESET

    @property
    def queue_seconds(self) -> float | None:
        """Seconds from accept until a server was first dialled; None if none was.

        What the client took for its TLS handshake, its PROXY header and its request,
        and what was decided about it.
        """
        first = self.first_dialed_at
        return None if first is None else first - self.opened_at

    @property
    def connect_seconds(self) -> float | None:
        """Seconds that the attempt took that succeeded; None if none has.

        With the look-up of the server's name, and its TLS handshake; for SOCKS BIND,
        until the peer came.
        """
        connected, dialed = self.connected_at, self.dialed_at
        return None if connected is None or dialed is None else connected - dialed
