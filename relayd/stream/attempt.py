"""One try at one server.

An :class:`Attempt` begins when a server is chosen and has one outcome: a connection
(`leg_connected`) or an ending (`failed`).  Whatever made it fail goes the same way:
refused, timed out, no such name, a certificate for somebody else, a connection that
leads back to this relay, a defect of an endpoint.  Its client is notified once; a
connection that comes later is reset.

:mod:`relayd.stream.server_attempt` dials the server of a pool.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from twisted.internet import error
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.errors import SHORTAGE, HandshakeFailed, LeadsBack, Refused
from relayd.core.session import Direction, Ending
from relayd.stream.legs import Leg

log = Logger(namespace="relayd.stream")

#: Checks more that a handshake gets after its time, if it has come further since the
#: last: a relay that was late has only now read what a peer has sent in time.
EXTRA_CHECKS = 2

#: A client whose server was never connected is reset after these; closed after others.
RESETS = (Ending.UPSTREAM_RESET, Ending.UPSTREAM_DOWN)

#: The detail of a session that leads back to its own relay.
LOOP_DETAIL = "it leads back to this relay, where it comes from"


class Dialing(Protocol):
    """Who makes attempts: a session before it is relayed."""

    session: Any
    factory: Any
    transport: Any
    held: bytearray | None
    paused: int
    is_foreign: bool
    own_filters: Any
    upstream_leg: Any
    endpoint_leg: Any
    checks_left: int
    place: Any

    @property
    def time_had(self) -> float:
        """The seconds that its attempt may take."""

    def attempt_connected(self, attempt: Any, leg: Leg) -> None:
        """It has succeeded: this is the server's connection."""

    def attempt_failed(self, attempt: Any) -> None:
        """It has failed; see its `ending` and `detail`."""

    def failed(self, reason: Failure) -> None:
        """A defect of ours, or of an endpoint: end the session."""

    def note_hop(self, name: str, stamp: int | None = None) -> None:
        """A connection to this process; kept until the session is over."""

    def leads_back(self) -> bool:
        """Whether this relay is on the way by which the client came."""


def ending_of_failed_dial(reason: Failure) -> tuple[Ending, str]:
    """Name the way in which a dial failed, and say why in one line."""
    problem = reason.value
    if isinstance(problem, error.DNSLookupError):
        ending = Ending.UNRESOLVED
    elif isinstance(problem, error.ConnectionRefusedError):
        ending = Ending.CONNECT_REFUSED
    elif getattr(problem, "osError", None) == errno.ECONNRESET:
        # It was connected, and reset before that was noticed.
        ending = Ending.UPSTREAM_RESET
    elif isinstance(problem, error.TimeoutError | error.TCPTimedOutError):
        ending = Ending.CONNECT_TIMEOUT
    elif isinstance(
        problem, error.ConnectError | CancelledError | OSError | HandshakeFailed
    ):
        ending = Ending.CONNECT_FAILED
    elif isinstance(problem, Refused):
        # A policy was against each of a name's addresses.
        ending = Ending.DENIED
    elif isinstance(problem, LeadsBack):
        ending = Ending.LOOP
    else:
        ending = Ending.FAILED
    said: object = problem
    if type(problem) is error.ConnectError and problem.args:
        # Without what Twisted says before it: that it is about a connection is known.
        said = problem.args[0]
    elif isinstance(problem, OSError):
        said = problem.strerror or problem
    try:
        text = " ".join(str(said).split()).rstrip(".")
    except Exception:
        # Of an endpoint that somebody else has made.
        text = ""
    return ending, text or type(problem).__name__


class Attempt:
    """One try to get a server's connection for a session.

    :param client: whose attempt it is.

    :ivar is_over: it has had its outcome, or was cancelled.
    :ivar ending: how it has failed, or None,
    :ivar detail: and why.
    :ivar name: what the log calls the server's address; empty to ask its connection.
    :ivar dial: what is under way and can be cancelled, if anything is.
    :ivar leg: what will be connected.
    :ivar leads_here: the server may be another relay of this process.
    :ivar holds_back: the ACK of its connection waits for the first bytes.
    :ivar preamble: makes these, of the session; None: they are the client's.
    :ivar place: the server, if its sessions are counted
        (:class:`relayd.core.interfaces.ICounted`): this is one.
    :ivar is_ours: it has failed for want of something on this machine.
    """

    is_over = False
    ending: Ending | None = None
    detail = ""
    name = ""
    leads_here = False
    holds_back = False
    preamble: Any = None
    place: Any = None
    is_ours = False
    dial: Any = None
    leg: Any = None

    def __init__(self, client: Dialing) -> None:
        self.client = client

    @property
    def awaits(self) -> str:
        """What it waits for, for the log."""
        return "connection"

    def leg_connected(self, leg: Leg) -> None:
        """A connection stands; it may come too late."""
        if self.is_over:
            leg.abort()
            return
        client = self.client
        self.dial = self.leg = None
        if not leg.alive:
            self.failed(Ending.CONNECT_FAILED, "lost as soon as it was connected")
            return
        try:
            name = self.name or client.factory.peer_name(leg.transport.getPeer())
            client.session.upstream = name
            if self.leads_here and self.is_loop(leg):
                leg.abort()
                self.failed(Ending.LOOP, LOOP_DETAIL)
                return
            self.is_over = True
            if self.place is not None:
                # It counts until the session is over.
                client.place = place = self.place
                if place.label:
                    client.session.upstream = place.label + "/" + name
                place.connected()
            client.attempt_connected(self, leg)
        except Exception:
            client.failed(Failure())
            leg.abort()

    def is_loop(self, leg: Leg) -> bool:
        """Whether a connection leads back to its relay; asked if it `leads_here`."""
        return False

    def dial_failed(self, reason: Failure) -> None:
        """A dial, or a look-up, has failed; it may come too late."""
        self.dial = None
        if self.is_over:
            return
        ending, detail = ending_of_failed_dial(reason)
        self.is_ours = getattr(reason.value, "osError", None) in SHORTAGE
        if ending is Ending.FAILED:
            log.failure(
                "session {id}: the endpoint of {upstream} failed",
                reason,
                id=self.client.session.id,
                upstream=self.client.session.upstream,
            )
        self.failed(ending, detail)

    def failed(self, ending: Ending, detail: str = "") -> None:
        """There is no connection.  Every failure is told here, once."""
        if not self.is_over:
            self.is_over = True
            self.ending, self.detail = ending, detail
            try:
                self.stop()
            except Exception:
                log.failure(
                    "session {id}: its dial can't be cancelled",
                    id=self.client.session.id,
                )
            self.client.attempt_failed(self)

    def overdue(self) -> None:
        """Its time is over."""
        client = self.client
        retries = client.factory.retries
        limit = client.factory.timeouts.connect if retries is None else client.time_had
        self.failed(Ending.CONNECT_TIMEOUT, f"no {self.awaits} in {limit:g} s")

    def comes_on(self) -> bool:
        """Whether it has come further since the last time it was asked."""
        return False

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.is_over = True
        self.stop()

    def stop(self) -> None:
        """Give up what is under way."""
        dial, self.dial = self.dial, None
        leg, self.leg = self.leg, None
        try:
            if dial is not None:
                dial.cancel()
        finally:
            if leg is not None:
                leg.abort()


class UpstreamLeg(Leg):
    """The server's connection.

    :ivar attempt: what it was made for, until it is connected.
    """

    attempt: Attempt | None = None
    was_dialled = True

    def __init__(self, direction: Direction) -> None:
        # As Leg's, which sees clients' legs only then: a line that sets attributes of
        # two classes in turn is not specialised.  1,900 instructions a session.
        self.direction = direction
        self.bridge = self.held = None
        self.alive = self.spliced = False
        self.paused = 0

    def makeConnection(self, transport: Any) -> None:
        attempt, self.attempt = self.attempt, None
        # As Leg's: see there.
        self.transport = transport
        self.alive = True
        if self.paused:
            transport.pauseProducing()
        self.connectionMade()
        if attempt is None or attempt.is_over:
            # Connected in spite of being cancelled.
            self.abort()
