"""How a server is asked whether it is up: by TCP, by HTTP, by a datagram, in Python.

Each kind of :mod:`relayd.core.check_grammar` is a coroutine here; :func:`asks` makes
the function that :class:`relayd.upstreams.checks.Checker` calls.  A check dials the
server's own endpoint, with what that has: TLS, a source address, a name that is looked
up.  It counts as no session.

A server may say anything: see :mod:`relayd.upstreams.conversation`.  A check ends when
its connection has: it is closed politely, within what is left of the check's time, and
reset then, which changes nothing about what was found.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from operator import attrgetter
from typing import Any, cast

import attrs
from twisted.internet import error
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    maybeDeferred,
    succeed,
)
from twisted.internet.defer import TimeoutError as DeferredTimedOut
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import DatagramProtocol, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.check_grammar import (
    Check,
    HttpCheck,
    PythonCheck,
    TcpCheck,
    UdpCheck,
)
from relayd.core.errors import SHORTAGE, ConfigError, RelayError
from relayd.net.tls import ServerIdentity, error_line, is_openssl_error
from relayd.upstreams.conversation import (
    QUOTED,
    CheckFailed,
    Conversation,
    Conversations,
    did_not_come,
    quoted,
)
from relayd.upstreams.judging import CannotCheck, Verdict
from relayd.upstreams.server import MAX_WEIGHT

#: How long an error's message may be.
LONGEST = 200


@attrs.frozen(eq=False, kw_only=True)
class Target:
    """A server, as far as a check needs it.

    :ivar server: what a check in Python is given.
    :ivar endpoint: how sessions dial it; None: it is for datagrams.
    :ivar endpoint_at: how to dial another port of its host, without TLS.
    :ivar host: its host, for HTTP: a name or an address, one of IPv6 in brackets.
    :ivar port: its port; None if it has none.
    :ivar identity: the name that its certificate must have, of its own endpoint.
    :ivar preamble: what a connection to its own endpoint begins with: a PROXY header.
    :ivar address: returns its address and port, for datagrams; None: it has none now.
    :ivar open_socket: opens a datagram socket of a family, which does not block.
    """

    server: Any
    endpoint: IStreamClientEndpoint | None = None
    endpoint_at: Callable[[int], IStreamClientEndpoint] | None = None
    host: str = "localhost"
    port: int | None = None
    identity: ServerIdentity | None = None
    preamble: bytes = b""
    address: Callable[[], tuple[str, int] | None] | None = None
    open_socket: Callable[[int], Any] | None = None


def asks(check: Check, target: Target, reactor: Any) -> Callable[[], Deferred[Verdict]]:
    """What checks a server once; the Deferred may be cancelled.

    It fires with a :class:`Verdict`, whatever the server does; or fails with
    :class:`CannotCheck`, or what a check in Python has raised.

    :raises ConfigError: a check in Python can't be imported.
    """
    ask: Callable[[], Awaitable[Verdict]]
    if isinstance(check, TcpCheck):
        ask = partial(_tcp, check, target)
    elif isinstance(check, HttpCheck):
        ask = partial(_http, check, target, reactor)
    elif isinstance(check, UdpCheck):
        ask = partial(_udp, check, target, reactor)
    elif isinstance(check, PythonCheck):
        ask = partial(_python, function_of(check), target.server)
    else:
        raise TypeError(f"{check!r} is no kind of check")
    return partial(maybeDeferred, _judged, ask)


async def _judged(ask: Callable[[], Awaitable[Verdict]]) -> Verdict:
    """What was found; a failure of the network is a finding, too.

    :raises CannotCheck: this process lacks what a check needs.
    """
    try:
        return await ask()
    except CheckFailed as problem:
        return Verdict(False, str(problem))
    except (CannotCheck, CancelledError):
        raise
    except Exception as problem:
        if not _is_of_network(problem):
            raise
        number = getattr(problem, "osError", None) or getattr(problem, "errno", None)
        if number in SHORTAGE:
            raise CannotCheck(_line_of(problem)) from problem
        return Verdict(False, _line_of(problem))


def _is_of_network(problem: Exception) -> bool:
    """Whether it tells of a server that is not well, and of no defect."""
    expected = OSError, RelayError, error.ConnectionClosed, error.ConnectError
    # Of checks in Python: what Twisted's HTTP and OpenSSL raise, and are imported for.
    return (
        isinstance(problem, (*expected, DeferredTimedOut))
        or type(problem).__module__.startswith("twisted.web.")
        or is_openssl_error(problem)
    )


def _line_of(problem: Exception) -> str:
    """Its message, in one line of ASCII: it may quote what a server has said."""
    reasons: list[Failure] = getattr(problem, "reasons", None) or []
    said = "; ".join(each.getErrorMessage() for each in reasons) or error_line(problem)
    line = ascii(" ".join(said.split()).rstrip("."))[1:-1]
    return line[:LONGEST] or type(problem).__name__


# -- connections


async def _converse(
    target: Target,
    port: int | None,
    speak: Callable[[Conversation], Awaitable[Verdict]],
) -> Verdict:
    """Connect, have `speak` find out, and close.

    :param port: None: its own.
    :raises CheckFailed: the server is down.
    """
    own = port is None
    endpoint = target.endpoint
    if port is not None and target.endpoint_at is not None:
        endpoint = target.endpoint_at(port)
    if endpoint is None:
        raise CheckFailed("there is no port to connect to")
    identity = target.identity if own else None
    made = await endpoint.connect(Conversations(identity))
    conversation = cast(Conversation, made)
    try:
        await conversation.ready()
        if own:
            conversation.write(target.preamble)
        found = await speak(conversation)
    except BaseException:
        conversation.abort()
        raise
    await conversation.close()
    return found


async def _tcp(check: TcpCheck, target: Target) -> Verdict:
    async def speak(conversation: Conversation) -> Verdict:
        conversation.write(check.send)
        if not check.expect:
            return Verdict(True, "it accepts connections")
        await conversation.until(check.expect)
        return Verdict(True, f"it answers {quoted(check.expect)}")

    return await _converse(target, check.port, speak)


# -- HTTP


async def _http(check: HttpCheck, target: Target, reactor: Any) -> Verdict:
    # Imports much, and few checks are by HTTP.
    from twisted.web.client import (
        Agent,
        RequestTransmissionFailed,
        ResponseFailed,
    )
    from twisted.web.http_headers import Headers
    from twisted.web.iweb import IAgentEndpointFactory

    host, port = check.host or target.host, check.port or target.port
    where = host if port in (None, 80) else f"{host}:{port}"
    uri = f"http://{where}{check.path}".encode("ascii")

    async def speak(conversation: Conversation) -> Verdict:
        only = implementer(IAgentEndpointFactory)(_Only)(conversation)
        agent = Agent.usingEndpointFactory(reactor, only)
        headers = Headers({b"User-Agent": [b"relayd"]})
        try:
            response = await agent.request(b"GET", uri, headers)
            is_good = 200 <= response.code <= 399
            body = _Body(check.expect if is_good else b"")
            response.deliverBody(body)
            if is_good and check.expect:
                await body.found
        except (ResponseFailed, RequestTransmissionFailed) as problem:
            reasons: list[Failure] = getattr(problem, "reasons", [])
            if any(each.check(CancelledError) for each in reasons):
                raise CancelledError from problem
            said = conversation.said
            but = f", but {quoted(said)}" if said else ""
            why = CheckFailed(f"no HTTP response{but}")
            raise conversation.problem or why from problem
        except CheckFailed as problem:
            # The connection knows more than the body that it cut.
            raise conversation.problem or problem from None
        return Verdict(is_good, f"HTTP status {response.code}")

    return await _converse(target, check.port, speak)


class _Only:
    """An endpoint, and the factory of it, for a connection that stands already."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def endpointForURI(self, uri: object) -> _Only:
        return self

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        conversation = self._conversation
        protocol = factory.buildProtocol(cast(Any, conversation.transport).getPeer())
        if protocol is None or conversation.is_gone:
            raise conversation.problem or CheckFailed("it closed the connection")
        conversation.carry(protocol)
        return succeed(protocol)


class _Body(Protocol):
    """The body of a response, in which a text is to be.

    :ivar found: fires when it is; fails with CheckFailed at its end.
    """

    def __init__(self, expected: bytes) -> None:
        self._expected = expected
        self._said = bytearray()
        self.found: Deferred[None] = Deferred(self._came_not)

    def dataReceived(self, data: bytes) -> None:
        if self._expected and not self.found.called:
            begin = max(0, len(self._said) - len(self._expected) + 1)
            self._said += data
            if self._said.find(self._expected, begin) >= 0:
                self.found.callback(None)

    def connectionLost(self, reason: Any = None) -> None:
        if self._expected and not self.found.called:
            said = quoted(self._said) if self._said else "nothing"
            why = f"{quoted(self._expected)} is not in the body: {said}"
            self.found.errback(Failure(CheckFailed(why)))

    def _came_not(self, waiting: Deferred[None]) -> None:
        waiting.errback(Failure(did_not_come(self._expected, self._said)))


# -- datagrams


class _Question(DatagramProtocol):
    """Sends a datagram to a server, and waits for the answer.

    :ivar answered: fires when it has come.
    """

    def __init__(self, check: UdpCheck, where: tuple[str, int]) -> None:
        self._check, self._where = check, where
        self._said = b""
        self.answered: Deferred[None] = Deferred(self._came_not)

    def ask(self) -> None:
        """Send it."""
        transport = cast(Any, self.transport)
        transport.connect(*self._where)
        transport.write(self._check.send)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self._said = datagram[: QUOTED + 1]
        if self._check.expect in datagram and not self.answered.called:
            self.answered.callback(None)

    def connectionRefused(self) -> None:
        if not self.answered.called:
            refused = CheckFailed("Connection was refused by other side")
            self.answered.errback(Failure(refused))

    def stopProtocol(self) -> None:
        # With epoll, Twisted takes an ICMP error for the end of the socket.
        self.connectionRefused()

    def _came_not(self, waiting: Deferred[None]) -> None:
        if self._said:
            problem = did_not_come(self._check.expect, self._said)
            waiting.errback(Failure(problem))


def _datagram_socket(family: int) -> Any:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


async def _udp(check: UdpCheck, target: Target, reactor: Any) -> Verdict:
    found = target.address() if target.address is not None else None
    if found is None:
        raise CannotCheck("its name has no address")
    host, port = found[0], check.port or found[1]
    question = _Question(check, (host, port))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = (target.open_socket or _datagram_socket)(family)
    try:
        listening = reactor.adoptDatagramPort(opened.fileno(), family, question)
    finally:
        # Twisted has its own descriptor of it.
        opened.close()
    try:
        question.ask()
        await question.answered
    finally:
        listening.stopListening()
    return Verdict(True, "it answers")


# -- Python


def function_of(check: PythonCheck) -> Callable[[Any], Any]:
    """The function of a check in Python, imported.

    :raises ConfigError: there is none; one line.
    """
    try:
        function = attrgetter(check.function)(importlib.import_module(check.module))
    except Exception as problem:
        # A module of somebody else's may raise anything.
        why = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ConfigError(f"can't import the check {check}: {why}") from problem
    if not callable(function):
        raise ConfigError(f"can't use the check {check}: it is no function")
    return cast(Callable[[Any], Any], function)


async def _python(function: Callable[[Any], Any], server: Any) -> Verdict:
    answer = await maybeDeferred(function, server)
    name = getattr(function, "__name__", "the check")
    if answer is True or answer is False:
        return Verdict(answer, f"{name} returned {answer}")
    if isinstance(answer, int) and 0 <= answer <= MAX_WEIGHT:
        return Verdict(True, f"{name} returned the weight {answer}", int(answer))
    raise TypeError(
        f"{name} returned {ascii(answer)[:80]}, not True, False or a weight of 0 to"
        f" {MAX_WEIGHT}"
    )
