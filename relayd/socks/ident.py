"""Asks a client's host for its user: the Identification Protocol, RFC 1413.

The server connects to port 113 of the client's host, from the address that the client
has connected to, sends the two ports of the connection, and gets one line::

    6193, 1080 : USERID : UNIX : joe
    6193, 1080 : ERROR : NO-USER

The answer is as trustworthy as the host that gives it.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IReactorTCP
from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from relayd.core.errors import RelayError
from relayd.net.monotonic import monotonic

PORT = 113

#: Seconds for the whole question; RFC 1413 lets a server take 30.
TIMEOUT = 10.0

#: RFC 1413, section 5: the most characters of a line.
MAX_LINE = 1000

#: Characters of an answer that names nobody, for the log.
MOST_QUOTED = 80


class NoIdent(RelayError):
    """No answer named a user.

    The message is the reason, in a few words for the log.
    """


def read_answer(line: bytes, client_port: int, our_port: int) -> bytes:
    """The user id in an answer, without surrounding blanks.

    :raises NoIdent: it has none, or is about another connection.
    """
    fields = line.split(b":", 3)
    ports = fields[0].split(b",")
    try:
        asked = [int(port) for port in ports] == [client_port, our_port]
    except ValueError:
        asked = False
    kind = fields[1].strip().upper() if len(fields) > 1 else b""
    if asked and kind == b"USERID" and len(fields) == 4 and fields[3].strip():
        return fields[3].strip()
    if asked and kind == b"ERROR" and len(fields) > 2:
        raise NoIdent(f"identd says {quoted(fields[2].strip(), MOST_QUOTED)}")
    raise NoIdent(f"identd sent {quoted(line, MOST_QUOTED)}")


def quoted(said: bytes, most: int | None = None) -> str:
    """What a client or an identd has said, for the log: in ASCII, as Python writes it.

    What is no text is written as bytes, so that it can be told from text that looks
    like its escapes.

    :param most: characters, or bytes; None: all.
    """
    try:
        return ascii(said.decode("utf-8")[:most])
    except UnicodeDecodeError:
        return repr(said[:most])


class _Question(LineOnlyReceiver):
    """One query, on a connection of its own."""

    delimiter = b"\n"
    MAX_LENGTH = MAX_LINE

    def __init__(self, client_port: int, our_port: int) -> None:
        self._ports = client_port, our_port
        self.answer: Deferred[bytes] = Deferred(lambda _: self._leave())

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.write(b"%d, %d\r\n" % self._ports)

    def lineReceived(self, line: bytes) -> None:
        if self.answer.called:
            return
        try:
            user_id = read_answer(line.rstrip(b"\r"), *self._ports)
        except NoIdent as problem:
            self._leave()
            self.answer.errback(problem)
        else:
            self._leave()
            self.answer.callback(user_id)

    def lineLengthExceeded(self, line: bytes) -> None:
        self._leave()
        if not self.answer.called:
            self.answer.errback(NoIdent("identd sent a line without end"))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self.answer.called:
            self.answer.errback(NoIdent("identd left without an answer"))

    def _leave(self) -> None:
        transport: Any = self.transport
        transport.abortConnection()


def ask(
    reactor: IReactorTCP,
    client: Any,
    ours: Any,
    *,
    port: int = PORT,
    timeout: float = TIMEOUT,
) -> Deferred[bytes]:
    """Ask the client's host which user has this connection.

    :param client: the client's IPv4Address or IPv6Address.
    :param ours: the address that it has connected to.
    :param port: where its identd listens.
    :return: fires with the user id, or fails with :class:`NoIdent`.  May be
        cancelled.
    """
    kind: Any = TCP6ClientEndpoint if ":" in client.host else TCP4ClientEndpoint
    # Twisted's own timeout uses the machine's clock.
    endpoint = kind(
        reactor, client.host, port, timeout=None, bindAddress=(ours.host, 0)
    )
    factory = Factory.forProtocol(lambda: _Question(client.port, ours.port))
    factory.noisy = False
    asked: Any = endpoint.connect(factory)
    asked.addCallback(lambda question: question.answer)
    clock = monotonic(reactor)
    asked.addTimeout(timeout, clock, lambda _, seconds: _late(seconds))
    return asked.addErrback(_not_reached)  # type: ignore[no-any-return]


def _late(seconds: float) -> Any:
    raise NoIdent(f"identd did not answer in {seconds:g} s")


def _not_reached(reason: Failure) -> Failure:
    if reason.check(ConnectError):
        why = " ".join(str(reason.value).split()).rstrip(".")
        return Failure(NoIdent(f"identd can't be asked: {why}"))
    return reason
