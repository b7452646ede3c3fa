"""Ident: what an answer says, and asking identds that are not as they should be."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import (
    ConnectingCancelledError,
    ConnectionAborted,
    ConnectionRefusedError,
)
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure

from relayd.socks import ident
from relayd.socks.ident import MAX_LINE, PORT, TIMEOUT, NoIdent, ask, read_answer
from tests.support.contracts import Plain, until

live: Any = reactor

#: Client and proxy, and the beginning of each answer about their connection.
CLIENT = IPv4Address("TCP", "127.0.0.1", 6193)
OURS = IPv4Address("TCP", "127.0.0.1", 1080)
PORTS = b"6193, 1080"


def refusal(line: bytes) -> str:
    """Why this answer names no user, in one line."""
    with pytest.raises(NoIdent) as caught:
        read_answer(line, 6193, 1080)
    message = str(caught.value)
    assert message.isprintable()
    return message


# -- answers


@pytest.mark.parametrize(
    ("line", "user_id"),
    [
        (b"6193, 1080 : USERID : UNIX : joe", b"joe"),
        (b"6193,1080:USERID:UNIX:joe", b"joe"),
        (b"  6193  ,  1080  :  userid  :  unix  :  joe  ", b"joe"),
        (b"6193, 1080 : UserID : OTHER : joe", b"joe"),
        (b"6193, 1080 : USERID : UNIX,US-ASCII : joe", b"joe"),
        (b"6193, 1080 : USERID : : joe", b"joe"),
        # RFC 1413: the user id may have colons and blanks within.
        (b"6193, 1080 : USERID : OTHER : joe:x y", b"joe:x y"),
        (b"6193, 1080 : USERID : UNIX : \xff\xfe", b"\xff\xfe"),
        (b"6193, 1080 : USERID : UNIX : ERROR", b"ERROR"),
    ],
)
def test_an_answer_that_names_a_user(line: bytes, user_id: bytes) -> None:
    """Without the blanks around it."""
    assert read_answer(line, 6193, 1080) == user_id


@pytest.mark.parametrize("word", ["NO-USER", "HIDDEN-USER", "INVALID-PORT", "X"])
def test_an_answer_that_is_an_error(word: str) -> None:
    """Is quoted."""
    line = f"6193, 1080 : ERROR : {word}"
    assert refusal(line.encode()) == f"identd says '{word}'"
    assert refusal(line.lower().encode()) == f"identd says '{word.lower()}'"
    assert refusal(line.encode() + b" : more") == f"identd says '{word}'"


@pytest.mark.parametrize(
    "line",
    [
        "",
        ":",
        ":::",
        "joe",
        "6193, 1080",
        "6193, 1080 : USERID",
        "6193, 1080 : USERID : joe",
        "6193, 1080 : USERID : UNIX :",
        "6193, 1080 : USERID : UNIX :   ",
        "6193, 1080 : ERROR",
        "6193, 1080 : USER : UNIX : joe",
        # About another connection, or none.
        "6193, 1081 : USERID : UNIX : joe",
        "6194, 1080 : USERID : UNIX : joe",
        "1080, 6193 : USERID : UNIX : joe",
        "6194, 1080 : ERROR : NO-USER",
        "6193 : USERID : UNIX : joe",
        "6193, 1080, 1 : USERID : UNIX : joe",
        "6193; 1080 : USERID : UNIX : joe",
        "0x1831, 1080 : USERID : UNIX : joe",
        ", : USERID : UNIX : joe",
        ": USERID : UNIX : joe",
        "-6193, 1080 : USERID : UNIX : joe",
    ],
)
def test_an_answer_that_names_nobody(line: str) -> None:
    """Is quoted as it came."""
    assert refusal(line.encode()) == f"identd sent {line!r}"


def test_garbage_is_quoted_in_part_and_escaped() -> None:
    """The log has one line of it, and not a long one."""
    assert refusal(b"a\nsession=1\x1b[2J") == r"identd sent 'a\nsession=1\x1b[2J'"
    assert refusal(b"\xff") == r"identd sent b'\xff'"
    assert refusal(rb"\xff") == r"identd sent '\\xff'"
    escapes = r"\xff" * 80
    assert refusal("\u00ff".encode() * 100) == f"identd sent '{escapes}'"
    assert refusal(b"\xff" * 100) == f"identd sent b'{escapes}'"
    assert refusal(b"x" * 100_000) == f"identd sent '{'x' * 80}'"
    said = refusal(PORTS + b" : ERROR : " + b"\n" * 100)
    assert said == "identd says ''"
    said = refusal(PORTS + b" : ERROR : " + b"x" * 900)
    assert said == f"identd says '{'x' * 80}'"
    said = refusal(PORTS + b" : ERROR : a\nb")
    assert said == r"identd says 'a\nb'"


_pieces = st.sampled_from(
    [b":", b",", b" ", b"6193", b"1080", b"USERID", b"ERROR", b"UNIX", b"joe", b"_"]
)


@given(st.binary(max_size=60) | st.lists(_pieces | st.binary(max_size=3)).map(b"".join))
@example(b"9" * 10_000 + b",1080:USERID:UNIX:joe")
@example(b"6193,1080:USERID:UNIX:\0")
def test_any_answer_names_a_user_or_none(line: bytes) -> None:
    """NoIdent and nothing else; and who is named is in the answer."""
    try:
        user_id = read_answer(line, 6193, 1080)
    except NoIdent as problem:
        assert str(problem).isprintable()
    else:
        assert user_id
        assert user_id == user_id.strip()
        head, _, tail = line.upper().partition(b"USERID")
        assert user_id.upper() in tail
        assert head.count(b":") == 1


@given(
    st.integers(1, 65535),
    st.integers(1, 65535),
    st.binary(min_size=1).filter(lambda user_id: user_id == user_id.strip()),
    st.sampled_from([b"", b" ", b"\t  "]),
)
def test_any_user_can_be_named(
    client: int, ours: int, user_id: bytes, blank: bytes
) -> None:
    """Whatever the ports and the blanks."""
    fields = [b"%d%s,%s%d" % (client, blank, blank, ours), b"USERID", b"UNIX", user_id]
    line = (blank + b":" + blank).join(fields)
    assert read_answer(line, client, ours) == user_id
    if client != ours:
        with pytest.raises(NoIdent):
            read_answer(line, ours, client)


# -- asking


class Identd:
    """What an identd was asked, and does then.

    :param does: is given the transport as the question is whole.
    :ivar asked: the questions.
    :ivar peers: the hosts that they came from.
    :ivar lost: how many connections are gone.
    """

    def __init__(self, does: Callable[[Any], object]) -> None:
        self.does = does
        self.asked: list[bytes] = []
        self.peers: list[str] = []
        self.open: list[Plain] = []
        self.factory = Factory.forProtocol(self._build)
        self.factory.noisy = False

    def _build(self) -> Plain:
        made = Plain(data=lambda: self._heard(made))
        self.open.append(made)
        return made

    def _heard(self, connection: Plain) -> None:
        if connection.data.endswith(b"\r\n"):
            self.asked.append(bytes(connection.data))
            self.peers.append(connection.transport.getPeer().host)
            connection.data.clear()
            self.does(connection.transport)

    @property
    def lost(self) -> int:
        return sum("lost" in each.events for each in self.open)


@asynccontextmanager
async def identd(does: Callable[[Any], object], host: str = "127.0.0.1") -> Any:
    """One that listens, and its port; in the end it must have been let go of."""
    made = Identd(does)
    port = live.listenTCP(0, made.factory, interface=host)
    try:
        yield made, port.getHost().port
        await until(lambda: made.lost == len(made.open), "the connection is closed")
    finally:
        await port.stopListening()


async def no_ident(asked: Awaitable[bytes]) -> str:
    """Why there is no answer, in one line."""
    with pytest.raises(NoIdent) as caught:
        await asked
    message = str(caught.value)
    assert message.isprintable()
    return message


def says(*pieces: bytes) -> Callable[[Any], None]:
    """An identd that answers."""

    def answer(transport: Any) -> None:
        for piece in pieces:
            transport.write(piece)

    return answer


@pytest_twisted.ensureDeferred
async def test_an_identd_answers() -> None:
    """It is asked about the two ports; either end of line is understood."""
    for end in (b"\r\n", b"\n"):
        async with identd(says(PORTS + b" : USERID : UNIX : joe" + end)) as (it, port):
            assert await ask(live, CLIENT, OURS, port=port) == b"joe"
            assert it.asked == [b"6193, 1080\r\n"]


@pytest_twisted.ensureDeferred
async def test_an_answer_in_pieces() -> None:
    """Byte by byte, each in a turn of its own."""
    answer = PORTS + b" : USERID : UNIX : joe\r\n"

    def drip(transport: Any, sent: int = 0) -> None:
        if sent < len(answer):
            transport.write(answer[sent : sent + 1])
            live.callLater(0, drip, transport, sent + 1)

    async with identd(drip) as (_, port):
        assert await ask(live, CLIENT, OURS, port=port) == b"joe"


@pytest_twisted.ensureDeferred
async def test_only_the_first_line_counts() -> None:
    """What an identd adds to its answer changes nothing."""
    joe, eve = (PORTS + b" : USERID : UNIX : " + each for each in (b"joe", b"eve"))
    async with identd(says(joe + b"\r\n" + eve + b"\r\n")) as (_, port):
        assert await ask(live, CLIENT, OURS, port=port) == b"joe"
    async with identd(says(b"\r\n" + joe + b"\r\n")) as (_, port):
        said = await no_ident(ask(live, CLIENT, OURS, port=port))
        assert said == "identd sent ''"
    async with identd(says(joe + b"\r\n" + b"x" * 100_000)) as (_, port):
        assert await ask(live, CLIENT, OURS, port=port) == b"joe"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (PORTS + b" : ERROR : NO-USER\r\n", "identd says 'NO-USER'"),
        (b"1, 2 : USERID : UNIX : joe\r\n", "identd sent '1, 2 : USERID : UNIX : joe'"),
        (b"220 mail.example ESMTP\r\n", "identd sent '220 mail.example ESMTP'"),
        (b"\r\n", "identd sent ''"),
        (b"\0" * 20 + b"\n", rf"identd sent '{chr(92)}x00{chr(92)}x00"),
        (b"\xff\xfb\x01\n", r"identd sent b'\xff\xfb\x01'"),
        # Whether the line would have ended, or not.
        (b"x" * (MAX_LINE + 1) + b"\r\n", "identd sent a line without end"),
        (b"x" * 100_000, "identd sent a line without end"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_identd_that_is_none(answer: bytes, why: str) -> None:
    """It is left at once, and not listened to any longer."""
    async with identd(says(answer)) as (_, port):
        said = await no_ident(ask(live, CLIENT, OURS, port=port))
        assert said.startswith(why)


@pytest_twisted.ensureDeferred
async def test_the_longest_line() -> None:
    """RFC 1413's thousand characters are read."""
    start = PORTS + b" : USERID : UNIX : "
    user_id = b"u" * (MAX_LINE - len(start))
    async with identd(says(start + user_id + b"\n")) as (_, port):
        assert await ask(live, CLIENT, OURS, port=port) == user_id


@pytest_twisted.ensureDeferred
async def test_a_line_that_never_ends() -> None:
    """However slowly it comes; what is kept of it is bounded."""

    def drip(transport: Any) -> None:
        if transport.connected:
            transport.write(b"x" * 100)
            live.callLater(0, drip, transport)

    async with identd(drip) as (_, port):
        said = await no_ident(ask(live, CLIENT, OURS, port=port))
        assert said == "identd sent a line without end"


@pytest.mark.parametrize("before", [b"", PORTS + b" : USERID : UNIX : joe"])
@pytest.mark.parametrize("how", ["loseConnection", "abortConnection"])
@pytest_twisted.ensureDeferred
async def test_an_identd_that_leaves(before: bytes, how: str) -> None:
    """With an end or a reset; an answer without its end of line is none."""

    def leave(transport: Any) -> None:
        transport.write(before)
        getattr(transport, how)()

    async with identd(leave) as (_, port):
        said = await no_ident(ask(live, CLIENT, OURS, port=port))
        assert said == "identd left without an answer"


@pytest_twisted.ensureDeferred
async def test_an_identd_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is left when the time is over.  It has been asked by then."""
    clock = Clock()
    monkeypatch.setattr(ident, "monotonic", lambda reactor: clock)
    async with identd(lambda transport: None) as (it, port):
        asked = ask(live, CLIENT, OURS, port=port)
        await until(lambda: bool(it.asked), "it is asked")
        clock.advance(TIMEOUT)
        assert await no_ident(asked) == f"identd did not answer in {TIMEOUT:g} s"
    assert clock.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_no_identd() -> None:
    """The usual case; the client's host says so."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        said = await no_ident(ask(live, CLIENT, OURS, port=bound.getsockname()[1]))
    assert said.startswith("identd can't be asked: Connection was refused")


# Twisted leaves it to the collector to close a socket that could not be bound.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest_twisted.ensureDeferred
async def test_an_address_that_is_not_ours_any_more() -> None:
    """It can't be asked from there, and that is said."""
    gone = IPv4Address("TCP", "192.0.2.254", 1080)
    async with identd(lambda transport: None) as (it, port):
        said = await no_ident(ask(live, CLIENT, gone, port=port))
        assert said.startswith("identd can't be asked: ")
        assert not it.open


@pytest_twisted.ensureDeferred
async def test_it_is_asked_from_the_address_that_the_client_reached() -> None:
    """By which, and the ports, its identd knows the connection."""
    ours = IPv4Address("TCP", "127.0.0.2", 1080)
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
    except OSError:
        pytest.skip("127.0.0.2 is not this machine's here")
    answer = says(PORTS + b" : USERID : UNIX : joe\r\n")
    async with identd(answer) as (it, port):
        assert await ask(live, CLIENT, ours, port=port) == b"joe"
        assert it.peers == ["127.0.0.2"]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="there is no ::1 here")
@pytest.mark.parametrize(
    ("listens", "host"),
    [
        ("::1", "::1"),
        # An IPv4 client of a listener for both, as it is by default.
        ("127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_client_by_ipv6(listens: str, host: str) -> None:
    """Its identd is asked by IPv6; or by IPv4, if that is what it is."""
    client, ours = (IPv6Address("TCP", host, port) for port in (6193, 1080))
    answer = says(PORTS + b" : USERID : UNIX : joe\r\n")
    async with identd(answer, listens) as (it, port):
        assert await ask(live, client, ours, port=port) == b"joe"
        assert it.asked == [b"6193, 1080\r\n"]
        assert it.peers == [listens]


@pytest_twisted.ensureDeferred
async def test_who_asks_may_lose_interest() -> None:
    """The client has left: nothing is waited for, at whichever point it was."""
    async with identd(lambda transport: None) as (it, port):
        asked = ask(live, CLIENT, OURS, port=port)
        await until(lambda: it.asked, "the question")
        asked.cancel()
        with pytest.raises(CancelledError):
            await asked
    async with identd(lambda transport: None) as (_, port):
        asked = ask(live, CLIENT, OURS, port=port)
        asked.cancel()
        with pytest.raises(ConnectingCancelledError):
            await asked


# -- time, which stands still here


def begin(**options: Any) -> tuple[MemoryReactorClock, Any, list[Any]]:
    """A question that is on its way: the reactor, the factory, what comes of it."""
    clock: Any = MemoryReactorClock()
    came: list[Any] = []
    asked: Deferred[bytes] = ask(clock, CLIENT, OURS, **options)
    asked.addBoth(came.append)
    [(host, port, factory, _, bind)] = clock.tcpClients
    assert (host, port, bind) == (
        "127.0.0.1",
        options.get("port", PORT),
        ("127.0.0.1", 0),
    )
    return clock, factory, came


def why(came: list[Any]) -> str:
    """The reason of the only result, a NoIdent."""
    [failure] = came
    assert isinstance(failure, Failure)
    assert failure.check(NoIdent)
    return str(failure.value)


def test_the_defaults() -> None:
    """RFC 1413's port; and less time than it lets a server take."""
    assert PORT == 113
    assert TIMEOUT == 10
    clock, _, came = begin()
    clock.advance(9.75)
    assert not came
    clock.advance(0.25)
    assert why(came) == "identd did not answer in 10 s"
    assert clock.connectors[0].stoppedConnecting
    assert not clock.getDelayedCalls()


def test_the_time_is_for_the_whole_question() -> None:
    """An identd gets none more for having been reached late, or for each byte."""
    clock, factory, came = begin(timeout=2.5)
    clock.advance(2)
    protocol = factory.buildProtocol(None)
    transport = _Transport()
    protocol.makeConnection(transport)
    assert transport.written == b"6193, 1080\r\n"
    clock.advance(0.25)
    protocol.dataReceived(PORTS)
    assert not came
    clock.advance(0.25)
    assert why(came) == "identd did not answer in 2.5 s"
    assert transport.aborted == 1
    # What was under way arrives late.
    protocol.dataReceived(b" : USERID : UNIX : joe\r\n")
    protocol.connectionLost(Failure(ConnectionAborted()))
    assert len(came) == 1
    assert not clock.getDelayedCalls()


def test_an_answer_ends_the_wait() -> None:
    """And its timer."""
    clock, factory, came = begin()
    protocol = factory.buildProtocol(None)
    transport = _Transport()
    protocol.makeConnection(transport)
    protocol.dataReceived(PORTS + b" : USERID : UNIX : joe\r\n")
    assert came == [b"joe"]
    assert transport.aborted == 1
    protocol.connectionLost(Failure(ConnectionAborted()))
    assert not clock.getDelayedCalls()


def test_a_dial_that_fails() -> None:
    """Is told of in one line, and ends the timer."""
    clock, factory, came = begin()
    factory.clientConnectionFailed(None, Failure(ConnectionRefusedError("no")))
    assert (
        why(came) == "identd can't be asked: Connection was refused by other side: no"
    )
    assert not clock.getDelayedCalls()


class _Transport:
    """What a question needs of one."""

    disconnecting = False

    def __init__(self) -> None:
        self.written = b""
        self.aborted = 0

    def write(self, data: bytes) -> None:
        self.written += data

    def abortConnection(self) -> None:
        self.aborted += 1
