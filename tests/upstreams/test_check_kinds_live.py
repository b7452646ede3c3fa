"""Checks of real servers, good and bad, in the test's process."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from OpenSSL import SSL
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import (
    SSL4ClientEndpoint,
    TCP4ClientEndpoint,
    clientFromString,
)
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
from twisted.internet.ssl import CertificateOptions, DefaultOpenSSLContextFactory
from twisted.web.resource import Resource
from twisted.web.server import Site

from relayd.core.check_grammar import parse_check
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.tls import ServerIdentity
from relayd.plane.endpoints import PlaneSocketEndpoint
from relayd.upstreams.check_kinds import Target, asks
from relayd.upstreams.conversation import MOST
from relayd.upstreams.judging import CannotCheck, Verdict
from tests.conftest import pause
from tests.support.certificates import Authority
from tests.support.ports import free_port

reactor: Any = _reactor

#: How a server is dialled, by address.
KINDS: dict[str, Callable[[int], Any]] = {
    "own": lambda port: SocketEndpoint(reactor, socket.AF_INET, ("127.0.0.1", port)),
    "plane": lambda port: PlaneSocketEndpoint(
        reactor, socket.AF_INET, ("127.0.0.1", port)
    ),
    "name": lambda port: NameEndpoint(reactor, "localhost", port),
    "twisted": lambda port: TCP4ClientEndpoint(reactor, "127.0.0.1", port),
}

#: What a check that is cancelled raises, if it has nothing to say.
CANCELLED = CancelledError, ConnectingCancelledError

#: More than the most bytes that are read.
FLOOD = b"x" * (MOST + 1)


class Scripted(Protocol):
    """A server that does what its factory says."""

    factory: Any

    def connectionMade(self) -> None:
        self.factory.connections.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.said += data
        self.factory.on_data(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.factory.lost.append(reason)

    def write(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.write(data)


class Script(Factory):
    """What a server does, and what became of it."""

    noisy = False
    protocol = Scripted

    def __init__(
        self,
        on_data: Callable[[Scripted], object] = bool,
        on_connect: Callable[[Scripted], object] = bool,
    ) -> None:
        self.on_data, self.on_connect = on_data, on_connect
        self.connections: list[Scripted] = []
        self.said = b""
        self.lost: list[Any] = []


@contextmanager
def serving(factory: Any, tls: Any = None) -> Iterator[int]:
    """A server on a port."""
    if tls is None:
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    else:
        port = reactor.listenSSL(0, factory, tls, interface="127.0.0.1")
    try:
        yield port.getHost().port
    finally:
        pytest_twisted_stop.append(port.stopListening())


#: What the listeners of a test wait for as they stop.
pytest_twisted_stop: list[Any] = []


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    """Wait until the listeners of a test have stopped."""
    yield
    for each in pytest_twisted_stop:
        pytest_twisted.blockon(each or Deferred.fromCoroutine(_done()))
    pytest_twisted_stop.clear()


async def _done() -> None: ...


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await pause(0.001)
    pytest.fail("it did not come")


def target_at(port: int, kind: str = "own", **others: Any) -> Target:
    dial = KINDS[kind]
    return Target(
        **{
            "server": None,
            "endpoint": dial(port),
            "endpoint_at": dial,
            "host": "127.0.0.1",
            "port": port,
            **others,
        }
    )


async def found(check: str, target: Target) -> Verdict:
    # A check has no limit of its own; a test that is right does not come to this.
    return await asks(parse_check(check), target, reactor)().addTimeout(5, reactor)


def quits(server: Scripted) -> None:
    transport: Any = server.transport
    transport.loseConnection()


def resets(server: Scripted) -> None:
    transport: Any = server.transport
    transport.abortConnection()


def says(data: bytes, then: Callable[[Scripted], object] = bool) -> Any:
    def say(server: Scripted) -> None:
        server.write(data)
        then(server)

    return say


# -- TCP

PING = r'tcp send="PING\r\n" expect="+PONG"'


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_a_server_that_accepts(kind: str) -> None:
    script = Script()
    with serving(script) as port:
        assert await found("tcp", target_at(port, kind)) == Verdict(
            True, "it accepts connections"
        )
        await until(lambda: script.lost)
    assert "ConnectionDone" in str(script.lost[0]), "it is closed politely"


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_a_server_that_answers(kind: str) -> None:
    script = Script(says(b"-x\r\n+PONG\r\n"))
    with serving(script) as port:
        verdict = await found(PING, target_at(port, kind, preamble=b"<hello>"))
        assert verdict == Verdict(True, "it answers '+PONG'")
        await until(lambda: script.lost)
    assert script.said == b"<hello>PING\r\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_nobody_there(kind: str) -> None:
    verdict = await found("tcp", target_at(free_port(), kind))
    assert not verdict.up
    assert "refused" in verdict.why


@pytest_twisted.ensureDeferred
async def test_another_port() -> None:
    """Without what is said at its own."""
    script = Script(says(b"+PONG"))
    with serving(script) as port:
        target = target_at(free_port(), preamble=b"<hello>")
        verdict = await found(f"{PING} port={port}", target)
        assert verdict.up
        await until(lambda: script.lost)
    assert script.said == b"PING\r\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (Script(quits), "it closed the connection"),
        (Script(says(b"-ERR\r\n", quits)), "closed the connection; it said '-ERR"),
        (Script(resets), "lost"),
        (Script(says(FLOOD)), "it says more than 65536 bytes"),
        (Script(on_connect=says(FLOOD)), "more than 65536 bytes"),
        (Script(on_connect=quits), "it closed the connection"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_server_that_answers_something_else(script: Script, why: str) -> None:
    for each in (script.connections, script.lost):
        each.clear()
    with serving(script) as port:
        verdict = await found(PING, target_at(port))
        assert not verdict.up
        assert why in verdict.why
        await until(lambda: script.lost)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", None),
        (b"+PON", "'+PONG' did not come, but '+PON'"),
        (b"\x1b[2J\n" * 40, r"'+PONG' did not come, but '\x1b[2J\n"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_server_that_says_too_little(said: bytes, why: str | None) -> None:
    """When its time is over, the check is cancelled."""
    script = Script(says(said))
    with serving(script) as port:
        run = asks(parse_check(PING), target_at(port), reactor)()
        await until(lambda: script.said)
        await pause(0.01)
        assert not run.called
        run.cancel()
        assert run.called
        if why is None:
            with pytest.raises(CANCELLED):
                await run
        else:
            verdict = await run
            assert not verdict.up
            assert verdict.why.startswith(why)
            assert len(verdict.why) < 250
            assert verdict.why.isprintable()
        await until(lambda: script.lost)
    assert "ConnectionLost" in str(script.lost[0]), "it was reset"


@pytest_twisted.ensureDeferred
async def test_an_answer_in_pieces() -> None:
    script = Script(on_connect=says(b"2"))
    with serving(script) as port:
        run = asks(parse_check("tcp expect=220"), target_at(port), reactor)()
        for piece in (b"2", b"0"):
            await until(lambda: script.connections)
            await pause(0.005)
            assert not run.called
            script.connections[0].write(piece)
        assert (await run).up


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_a_dial_that_is_cancelled(kind: str) -> None:
    """Of a server whose queue of connections is full."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            run = asks(parse_check("tcp"), target_at(port, kind), reactor)()
            await pause(0.01)
            assert not run.called
            run.cancel()
            with pytest.raises(CANCELLED):
                await run


@pytest_twisted.ensureDeferred
async def test_without_descriptors_nobody_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_socket(*_: object) -> None:
        raise OSError(24, "Too many open files")

    target = target_at(1)
    monkeypatch.setattr(SocketEndpoint, "open_socket", no_socket)
    with pytest.raises(CannotCheck, match="Too many open files"):
        await found("tcp", target)


# -- TLS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("root"))


def tls_target(port: int, root: Authority, name: str = "localhost") -> Target:
    text = f"tls:localhost:{port}:trustRoots={root.folder}"
    endpoint = clientFromString(reactor, text)
    identity = ServerIdentity(name, alone=True)
    return target_at(port, endpoint=endpoint, identity=identity)


def options_of(pem: Path) -> Any:
    return DefaultOpenSSLContextFactory(
        str(pem), str(pem), sslmethod=SSL.TLS_SERVER_METHOD
    )


@pytest.mark.parametrize("check", ["tcp", PING, "http:///"])
@pytest_twisted.ensureDeferred
async def test_a_server_with_tls(root: Authority, check: str) -> None:
    answer = b"+PONG" if "PING" in check else b"HTTP/1.1 204 No\r\n\r\n"
    script = Script(says(answer))
    with serving(script, options_of(root.issue("localhost"))) as port:
        assert (await found(check, tls_target(port, root))).up
        await until(lambda: script.lost)


@pytest.mark.parametrize("check", ["tcp", PING, "http:///"])
@pytest_twisted.ensureDeferred
async def test_a_server_with_the_wrong_certificate(root: Authority, check: str) -> None:
    script = Script()
    with serving(script, options_of(root.issue("other.example"))) as port:
        verdict = await found(check, tls_target(port, root))
        await until(lambda: len(script.lost) == len(script.connections))
    assert not verdict.up
    assert "certificate is for 'other.example', not for 'localhost'" in verdict.why
    assert script.said == b""


@pytest_twisted.ensureDeferred
async def test_an_endpoint_that_checks_no_name_is_given_one(root: Authority) -> None:
    script = Script()
    with serving(script, options_of(root.issue("other.example"))) as port:
        endpoint = SSL4ClientEndpoint(reactor, "127.0.0.1", port, CertificateOptions())
        identity = ServerIdentity("localhost")
        target = target_at(port, endpoint=endpoint, identity=identity)
        verdict = await found("tcp", target)
        await until(lambda: script.lost)
    assert not verdict.up
    assert "certificate is for 'other.example', not for 'localhost'" in verdict.why


@pytest_twisted.ensureDeferred
async def test_a_server_without_tls(root: Authority) -> None:
    script = Script(says(b"220 hello\r\n" * 10))
    with serving(script) as port:
        verdict = await found("tcp", tls_target(port, root))
        await until(lambda: script.lost)
    assert not verdict.up
    assert "TLS handshake: " in verdict.why


@pytest_twisted.ensureDeferred
async def test_a_server_that_is_silent_in_its_handshake(root: Authority) -> None:
    script = Script()
    with serving(script) as port:
        run = asks(parse_check("tcp"), tls_target(port, root), reactor)()
        await until(lambda: script.said)
        run.cancel()
        with pytest.raises(CANCELLED):
            await run
        await until(lambda: script.lost)


@pytest_twisted.ensureDeferred
async def test_a_server_that_does_not_close(root: Authority) -> None:
    """It was found to be up, and is reset when the check's time is over."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(root.issue("localhost"))
    done, over = threading.Event(), threading.Event()

    def serve() -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            done.set()
            over.wait()
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        target = tls_target(listener.getsockname()[1], root)
        run = asks(parse_check("tcp"), target, reactor)()
        await until(done.is_set)
        await pause(0.02)
        assert not run.called
        run.cancel()
        assert (await run).up
        over.set()
        thread.join()


# -- HTTP


class Page(Resource):
    isLeaf = True

    def __init__(self, status: int, body: bytes = b"role: primary") -> None:
        super().__init__()
        self.status, self.body = status, body
        self.asked: list[Any] = []

    def render_GET(self, request: Any) -> bytes:
        self.asked.append((request.uri, request.getHeader("host")))
        request.setResponseCode(self.status)
        return self.body


def site(page: Page) -> Site:
    made = Site(page)
    made.noisy = False  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "up"), [(200, True), (399, True), (400, False), (503, False)]
)
@pytest_twisted.ensureDeferred
async def test_the_status(kind: str, status: int, up: bool) -> None:
    page = Page(status)
    with serving(site(page)) as port:
        verdict = await found(
            f"http://:{port}/primary?a=1", target_at(free_port(), kind)
        )
    assert verdict == Verdict(up, f"HTTP status {status}")
    assert page.asked == [(b"/primary?a=1", f"127.0.0.1:{port}")]


@pytest_twisted.ensureDeferred
async def test_its_own_port_and_another_host() -> None:
    page = Page(200)
    with serving(site(page)) as port:
        assert (await found("http://db.example/", target_at(port))).up
        assert (await found("http:///", target_at(port, host="[::1]"))).up
    assert page.asked == [(b"/", f"db.example:{port}"), (b"/", f"[::1]:{port}")]


@pytest.mark.parametrize(
    ("expect", "up", "why"),
    [
        ("primary", True, "HTTP status 200"),
        ('"role: primary"', True, "HTTP status 200"),
        ("replica", False, "'replica' is not in the body: 'role: primary'"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_the_body(expect: str, up: bool, why: str) -> None:
    with serving(site(Page(200))) as port:
        verdict = await found(f"http:/// expect={expect}", target_at(port))
    assert verdict == Verdict(up, why)


@pytest_twisted.ensureDeferred
async def test_a_body_in_chunks() -> None:
    """What is expected is in two of them."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    script = Script(says(answer + b"3\r\npri\r\n4\r\nmary\r\n0\r\n\r\n"))
    with serving(script) as port:
        assert (await found("http:/// expect=primary", target_at(port))).up
        await until(lambda: script.lost)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("answer", "then", "up", "why"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", quits, False, "no HTTP response, but 'SSH-2.0"),
        (b"", quits, False, "no HTTP response"),
        (b"", resets, False, "lost"),
        (HEAD + b"Content-Length: 9\r\n\r\n12", resets, False, "body: '12'|lost|clos"),
        (HEAD + b"Content-Length: zwei\r\n\r\n", quits, False, "no HTTP response"),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            quits,
            False,
            "is not in the body: nothing|closed|no HTTP",
        ),
        (HEAD, says(b"A: b\r\n" * 20000), False, "more than 65536 bytes"),
        (HEAD + b"A: ", says(FLOOD), False, "more than 65536|no HTTP"),
        (HEAD + b"\r\n", says(FLOOD), False, "more than 65536 bytes"),
        (b"HTTP/1.1 100 C\r\n\r\n" * 4000, quits, False, "more than 65536 bytes"),
        (b"HTTP/1.1 99999999999999999999 OK\r\n\r\n", quits, False, "HTTP"),
        (b"HTTP/1.0 200 OK\r\n\r\nprimary", bool, True, "HTTP status 200"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_a_hostile_server_answers(
    answer: bytes, then: Any, up: bool, why: str
) -> None:
    script = Script(says(answer, then))
    with serving(script) as port:
        verdict = await found("http:/// expect=primary", target_at(port))
        await until(lambda: script.lost)
    assert verdict.up is up
    assert any(each in verdict.why for each in why.split("|")), verdict.why
    assert verdict.why.isprintable()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", None),
        (HEAD, None),
        (HEAD + b"Content-Length: 9\r\n\r\n12", "'primary' did not come, but '12'"),
        (HEAD + b"Content-Length: 9\r\n\r\n", "'primary' did not come"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_http_server_that_says_too_little(
    answer: bytes, why: str | None
) -> None:
    script = Script(says(answer))
    with serving(script) as port:
        target = target_at(port)
        run = asks(parse_check("http:/// expect=primary"), target, reactor)()
        await until(lambda: script.said)
        await pause(0.01)
        run.cancel()
        assert run.called
        if why is None:
            with pytest.raises(CANCELLED):
                await run
        else:
            assert await run == Verdict(False, why)
        await until(lambda: script.lost)


@pytest_twisted.ensureDeferred
async def test_a_status_is_enough() -> None:
    """The body is not waited for, where nothing is expected of it."""
    script = Script(says(HEAD + b"Content-Length: 1000000\r\n\r\nx"))
    with serving(script) as port:
        assert (await found("http:///", target_at(port))).up
        await until(lambda: script.lost)


# -- datagrams


class Answering(DatagramProtocol):
    noisy = False

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.asked = answers, b""

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.asked = datagram
        transport: Any = self.transport
        for each in self.answers:
            transport.write(each, addr)


@contextmanager
def answering(*answers: bytes, interface: str = "127.0.0.1") -> Iterator[Any]:
    protocol = Answering(*answers)
    port = reactor.listenUDP(0, protocol, interface=interface)
    try:
        yield protocol, (interface, port.getHost().port)
    finally:
        pytest_twisted_stop.append(port.stopListening())


@pytest.mark.parametrize("interface", ["127.0.0.1", "::1"])
@pytest_twisted.ensureDeferred
async def test_a_server_that_answers_a_datagram(interface: str) -> None:
    with answering(b"no", b"it is ok", interface=interface) as (server, where):
        target = Target(server=None, address=lambda: where)
        assert await found(r"udp send=\x01 expect=ok", target) == Verdict(
            True, "it answers"
        )
    assert server.asked == b"\x01"


@pytest_twisted.ensureDeferred
async def test_a_datagram_that_is_refused() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as held:
        # The port is nobody else's, and this one takes nothing but from its peer.
        held.bind(("127.0.0.1", 0))
        held.connect(("127.0.0.1", 9))
        where = held.getsockname()
        verdict = await found("udp send=x", Target(server=None, address=lambda: where))
    assert verdict == Verdict(False, "Connection was refused by other side")


@pytest.mark.parametrize(
    ("answers", "why"), [((), None), ((b"no",), "'ok' did not come, but 'no'")]
)
@pytest_twisted.ensureDeferred
async def test_a_server_that_answers_no_datagram(
    answers: tuple[bytes, ...], why: str | None
) -> None:
    with answering(*answers) as (server, where):
        target = Target(server=None, address=lambda: where)
        run = asks(parse_check("udp send=x expect=ok"), target, reactor)()
        await until(lambda: server.asked)
        await pause(0.01)
        run.cancel()
        if why is None:
            with pytest.raises(CANCELLED):
                await run
        else:
            assert await run == Verdict(False, why)


@pytest_twisted.ensureDeferred
async def test_a_server_without_an_address() -> None:
    target = Target(server=None, address=lambda: None)
    with pytest.raises(CannotCheck, match="its name has no address"):
        await found("udp send=x", target)
    assert not (await found("tcp", target)).up


def test_no_kind_of_check() -> None:
    with pytest.raises(TypeError, match="no kind of check"):
        asks(object(), Target(server=None), reactor)  # type: ignore[arg-type]


def test_the_most_that_is_read() -> None:
    assert MOST == 65536
