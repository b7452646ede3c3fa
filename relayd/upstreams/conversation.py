"""The connection of a check: TLS, what a server may say, and its end.

A server may say anything, at any pace, and for ever.  :data:`MOST` bytes of it are
read, HTTP headers and all; more is a failure, and so is the end of a check's time,
which is the checker's to keep.  What it says is quoted in one line of ASCII, shortened.
"""

from __future__ import annotations

from typing import Any, cast

from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.interfaces import IHandshakeListener, IProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import HandshakeFailed, RelayError
from relayd.net.tls import ServerHandshake, ServerIdentity, notifies_handshake

#: The most bytes that a check reads from a server.
MOST = 65536

#: How many bytes of what a server says are quoted.
QUOTED = 40


class CheckFailed(RelayError):
    """The server is down; the message says why."""


def quoted(data: bytes | bytearray) -> str:
    """What a server said, in one short line of ASCII."""
    shown = ascii(bytes(data[:QUOTED]))[1:]
    return f"{shown}..." if len(data) > QUOTED else shown


def did_not_come(expected: bytes, said: bytes | bytearray) -> CheckFailed:
    """The error of a server that said something else."""
    if not said:
        return CheckFailed(f"{quoted(expected)} did not come")
    return CheckFailed(f"{quoted(expected)} did not come, but {quoted(said)}")


@implementer(IHandshakeListener)
class Conversation(Protocol):
    """A connection of a check, from its TLS handshake to its end.

    :param identity: the name that its certificate must have, if it is TLS.

    :ivar said: what the server has said, up to :data:`MOST` bytes; with another
        protocol (:meth:`carry`), what is quoted of it.
    :ivar problem: why it is over, if it is.
    :ivar is_gone: it is over.
    """

    def __init__(self, identity: ServerIdentity | None = None) -> None:
        self._identity = identity
        self._handshake: ServerHandshake | None = None
        self._is_ready = False
        self._count = 0
        self._expected = b""
        #: Who waits for the handshake, or for what is expected.
        self._waiting: Deferred[None] | None = None
        self._gone: Deferred[None] = Deferred()
        self._inner: IProtocol | None = None
        self.said = bytearray()
        self.problem: CheckFailed | None = None
        self.is_gone = False

    @property
    def _transport(self) -> Any:
        return self.transport

    # -- of its connection

    def connectionMade(self) -> None:
        if notifies_handshake(self.transport):
            self._handshake = ServerHandshake(self.transport, self._identity)
        else:
            self._is_ready = True

    def handshakeCompleted(self) -> None:
        # A check of the endpoint's own may have failed: the loss will say why.
        if self._handshake is None or self._transport.disconnecting:
            return
        try:
            self._handshake.verify()
        except HandshakeFailed as problem:
            self._fail(CheckFailed(str(problem)))
        else:
            self._handshake, self._is_ready = None, True
            self._succeed()

    def dataReceived(self, data: bytes) -> None:
        self._count += len(data)
        if self._count > MOST:
            self._fail(CheckFailed(f"it says more than {MOST} bytes"))
            return
        if self._inner is not None:
            self.said += data[: QUOTED + 1 - min(len(self.said), QUOTED + 1)]
            cast(Any, self._inner).dataReceived(data)
            return
        begin = max(0, len(self.said) - len(self._expected) + 1)
        self.said += data
        self._look(begin)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.is_gone = True
        was_closed = reason.check(error.ConnectionDone)
        # By either end; who spoke may know better.
        if self.problem is None and not (was_closed and self._inner is not None):
            if self._handshake is not None:
                why = self._handshake.why_failed(reason)
            elif was_closed:
                why = "it closed the connection"
            else:
                why = " ".join(str(reason.value).split()).rstrip(".")
            if self.said:
                why = f"{why}; it said {quoted(self.said)}"
            self.problem = CheckFailed(why)
        self._handshake = None
        self._tell()
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.connectionLost(reason)
        self._gone.callback(None)

    def _fail(self, problem: CheckFailed) -> None:
        if self.problem is None:
            self.problem = problem
        self.abort()
        self._tell()

    def _tell(self) -> None:
        """Tell who waits that nothing more will come."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self.problem is not None:
            waiting.errback(Failure(self.problem))

    def _succeed(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def _look(self, begin: int) -> None:
        if self._expected and self.said.find(self._expected, begin) >= 0:
            self._expected = b""
            self._succeed()

    # -- for checks

    def ready(self) -> Deferred[None]:
        """Wait for its TLS handshake, if it has one.

        :return: fails with :class:`CheckFailed`.
        """
        if self.problem is not None:
            return fail(self.problem)
        if self._is_ready:
            return succeed(None)
        self._waiting = Deferred(self._came_not)
        return self._waiting

    def write(self, data: bytes) -> None:
        """Say something."""
        if data and not self.is_gone:
            self._transport.write(data)

    def until(self, expected: bytes) -> Deferred[None]:
        """Wait until the server has said this.

        :return: fails with :class:`CheckFailed` if it says something else instead, also
            when it is cancelled.
        """
        self._expected = expected
        waiting = self._waiting = Deferred(self._came_not)
        self._look(0)
        if self.problem is not None:
            self._tell()
        return waiting

    def _came_not(self, waiting: Deferred[None]) -> None:
        self._waiting = None
        if self.said:
            waiting.errback(Failure(did_not_come(self._expected, self.said)))

    def carry(self, protocol: IProtocol) -> None:
        """Have another protocol speak from now on."""
        self._inner = protocol
        protocol.makeConnection(self._transport)

    async def close(self) -> None:
        """Close, and wait for the end; reset it when this is cancelled."""
        if not self.is_gone:
            self._transport.loseConnection()
            try:
                await self._gone
            except CancelledError:
                self.abort()

    def abort(self) -> None:
        """Reset the connection."""
        if not self.is_gone:
            self._transport.abortConnection()


class Conversations(Factory):
    """Builds a conversation for each address that an endpoint tries."""

    noisy = False

    def __init__(self, identity: ServerIdentity | None) -> None:
        self._identity = identity

    def buildProtocol(self, addr: Any) -> Conversation:
        return Conversation(self._identity)
