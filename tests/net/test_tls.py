"""Which transports tell of their handshake, and embedders' endpoints with TLS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IHandshakeListener, INegotiated
from twisted.internet.protocol import Protocol
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer

import twisted
from relayd.core.errors import HandshakeFailed
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.net.tls import (
    ServerHandshake,
    ServerIdentity,
    ascii_name,
    notifies_handshake,
    why_failed,
)
from relayd.net.upstream import Upstream
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures
from tests.support.certificates import Authority, server_context
from tests.support.contracts import until
from tests.support.fakes import FakeTLSTransport, FakeTransport
from tests.support.process import PATIENCE, Server

#: How Twisted checks the name: in a callback of the connection, or after the handshake.
IN_A_CALLBACK = twisted.version.major >= 26


@implementer(IHandshakeListener)
class Listener(Protocol):
    def handshakeCompleted(self) -> None:
        """The handshake is done."""


def test_which_protocols_are_notified_of_a_handshake() -> None:
    """Whoever listens to the TLS layer itself."""
    secret, plain = FakeTLSTransport(), FakeTransport()
    for transport in (secret, plain):
        transport.connect(Listener())
    assert notifies_handshake(secret)
    assert not notifies_handshake(plain)
    deaf = FakeTLSTransport().connect(Protocol())
    assert not notifies_handshake(deaf)
    wrapper = ProtocolWrapper(WrappingFactory(None), Listener())
    FakeTLSTransport().connect(wrapper)
    assert INegotiated.providedBy(wrapper)
    assert not notifies_handshake(wrapper)


def test_a_name_in_another_script() -> None:
    """As certificates and name servers have it."""
    assert ascii_name("example.com") == "example.com"
    assert ascii_name("bücher.example") == "xn--bcher-kva.example"


def test_what_failed_is_one_line() -> None:
    for problem, says in (
        (ValueError("first\nsecond"), "first second"),
        (ValueError(), "ValueError()"),
    ):
        assert why_failed(Failure(problem), "who") == says


def test_an_unknown_error_of_a_certificate_chain() -> None:
    """OpenSSL has a hundred of them."""
    transport = FakeTLSTransport()
    handshake = ServerHandshake(transport, ServerIdentity("a", alone=True))
    assert not transport.connection.verify(None, None, 99, 1, 0)
    assert handshake.why_failed(Failure(ValueError())) == (
        "the server's certificate is not good: error 99 of OpenSSL's verify"
    )
    # What comes after it does not make it good.
    assert not transport.connection.verify(None, None, 0, 1, 1)


def test_tls_options_of_other_connections_are_left_alone() -> None:
    """They may have their own check, which must be kept."""
    for identity in (None, ServerIdentity("a")):
        transport = FakeTLSTransport()
        ServerHandshake(transport, identity)
        assert transport.connection.verify is None


def test_a_connection_without_verification_has_no_name_to_check() -> None:
    """The embedder decides: SNI alone does not mean that the name is checked."""
    transport = FakeTLSTransport()
    transport.connection.name = b"example.com"
    with pytest.raises(HandshakeFailed, match="no certificate"):
        ServerHandshake(transport, None).verify()
    transport.connection.mode = 0
    ServerHandshake(transport, None).verify()
    with pytest.raises(HandshakeFailed, match="no certificate"):
        ServerHandshake(transport, ServerIdentity("a")).verify()


# -- endpoints of a program that embeds the relay


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@contextmanager
def answering(pem: Path) -> Iterator[tuple[int, list[bytes], threading.Thread]]:
    """A TLS server for one client: its port, what it has heard, and what it runs in."""
    heard: list[bytes] = []
    with Server() as server:

        def serve() -> None:
            with server.accept() as raw, suppress(OSError):
                with server_context(pem).wrap_socket(raw, server_side=True) as secret:
                    heard.append(secret.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.socket.getsockname()[1], heard, thread
        thread.join(PATIENCE)


class Witness(Observer):
    """Keeps the session that has ended."""

    ended: Session | None = None

    def closed(self, session: Session) -> None:
        self.ended = session


async def relayed(
    root: Authority, pem: Path, name: str, identity: ServerIdentity | None = None
) -> tuple[Session, list[bytes]]:
    """What becomes of a client, by an endpoint that is meant for `name`."""
    trusted = trustRootFromCertificates([Certificate.loadPEM(root.file.read_bytes())])
    options: Any = optionsForClientTLS(name, trusted)
    return await relayed_with(pem, options, identity)


async def relayed_with(
    pem: Path, options: Any, identity: ServerIdentity | None = None
) -> tuple[Session, list[bytes]]:
    with answering(pem) as (port, heard, serving):
        there = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
        endpoint = wrapClientTLS(options, there)
        witness = Witness()
        factory = RelayFactory(Upstream(endpoint, "server", identity), observer=witness)
        client = FakeTransport(clock=reactor)
        protocol: Any = factory.buildProtocol(None)
        client.connect(protocol)
        client.receive(b"a secret")
        await until(lambda: heard or witness.ended)
        client.lose()
        await until(lambda: witness.ended and not serving.is_alive())
        factory.stopFactory()
    assert witness.ended is not None
    return witness.ended, heard


@pytest_twisted.ensureDeferred
async def test_an_endpoint_with_a_good_server(root: Authority) -> None:
    for name in ("localhost", "127.0.0.1"):
        for identity in (None, ServerIdentity(name)):
            _, heard = await relayed(root, root.issue(name), name, identity)
            assert heard == [b"a secret"]


@pytest_twisted.ensureDeferred
async def test_an_endpoint_whose_server_is_another(root: Authority) -> None:
    """Twisted says so, or relayd."""
    pem = root.issue("example.com")
    session, heard = await relayed(root, pem, "localhost")
    assert session.ending is Ending.CONNECT_FAILED
    assert session.connected_at is None
    assert not any(heard)


@pytest_twisted.ensureDeferred
async def test_an_endpoint_whose_servers_certificate_has_no_name(
    root: Authority, logged_failures: LoggedFailures
) -> None:
    """The name that the connection asks for is checked, and one that is given.

    Twisted's own check is a part of the endpoint, and logs what it stumbles over.
    """
    logged = "while verifying certificate" if IN_A_CALLBACK else "info_callback"
    for name, identity in (
        ("localhost", None),
        ("127.0.0.1", ServerIdentity("127.0.0.1")),
    ):
        session, heard = await relayed(root, root.issue(), name, identity)
        assert session.ending is Ending.CONNECT_FAILED
        assert session.connected_at is None
        assert not any(heard)
        logged_failures.take(logged)


@pytest_twisted.ensureDeferred
async def test_an_endpoint_that_checks_no_name_may_be_given_one(
    root: Authority,
) -> None:
    """As one that trusts a certificate of its own, or nothing at all, does."""
    for names, good in ((("localhost",), True), ((), False), (("a.example",), False)):
        session, heard = await relayed_with(
            root.issue(*names), CertificateOptions(), ServerIdentity("localhost")
        )
        assert (heard == [b"a secret"]) is good
        if not good:
            assert session.ending is Ending.CONNECT_FAILED
            assert "not for 'localhost'" in session.detail or not names
