"""TLS on either side: what a transport that can't half-close makes of the rules."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.process import (
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
)


@pytest.fixture(autouse=True, params=TRANSPORTS)
def connections_of(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whose connections the plain side of each relay uses."""
    with transport(request.param):
        yield


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for `localhost`, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as listening:
        yield listening


@contextmanager
def tls_relay(pem: Path, server: Server, *options: str) -> Iterator[RelayProcess]:
    """TLS outside, plain inside."""
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    with relay("-l", listener, "-d", server.address, *options) as running:
        yield running


def tls_client(running: RelayProcess, pem: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(pem))
    return context.wrap_socket(
        connect(running.port),
        server_hostname="localhost",
        # An end without close_notify is an error, not an end.
        suppress_ragged_eofs=False,
    )


def test_a_request_and_its_response(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running, tls_client(running, pem) as client:
        client.sendall(b"request")
        upstream = server.accept()
        assert read_exactly(upstream, 7) == b"request"
        upstream.sendall(b"response")
        upstream.close()
        # The server's end arrives as close_notify; most clients then just close.
        assert read_all(client) == b"response"
        client.close()
        [line] = running.ended("done")
        assert (line["up"], line["down"]) == ("7", "8")


def test_a_clients_clean_end_does_not_cut_its_upload(pem: Path, server: Server) -> None:
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = bytes(range(256)) * 1000
    with tls_relay(pem, server) as running:
        client = tls_client(running, pem)
        upstream = server.accept()
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        upstream.sendall(b"are you done")
        sender.join()
        client.settimeout(0.2)
        with suppress(OSError):
            client.unwrap()
        client.close()
        assert read_all(upstream) == data
        upstream.close()


def test_a_client_that_leaves_an_endless_server(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running:
        client = tls_client(running, pem)
        upstream = server.accept()
        stopped = threading.Event()

        def pour() -> None:
            with suppress(OSError):
                while True:
                    upstream.sendall(bytes(65536))
            stopped.set()

        pouring = threading.Thread(target=pour)
        pouring.start()
        assert client.recv(65536)
        # The server is paused by now: the relay's buffer to the client is full.
        time.sleep(0.5)
        client.settimeout(0.2)
        with suppress(OSError):
            client.unwrap()  # says goodbye, and reads no more as TLS
        with socket.socket(fileno=client.detach()) as raw:
            raw.settimeout(PATIENCE)
            with suppress(ConnectionError):
                read_all(raw)
        assert stopped.wait(PATIENCE)
        pouring.join()
        upstream.close()
        running.ended("downstream_write_failed")


def test_plain_text_to_a_tls_listener(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running, connect(running.port) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        upstream = server.accept()
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
        upstream.close()
        running.ended("downstream_reset")
        running.wait_for("TLS: Error.*http request")


def test_a_reset_reaches_a_tls_client_without_a_goodbye(
    pem: Path, server: Server
) -> None:
    with tls_relay(pem, server) as running, tls_client(running, pem) as client:
        upstream = server.accept()
        upstream.sendall(b"last words")
        assert read_exactly(client, 10) == b"last words"
        reset(upstream)
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            client.recv(1)
        running.ended("upstream_reset")


# -- TLS to the server


@contextmanager
def tls_server(pem: Path) -> Iterator[tuple[Server, ssl.SSLContext]]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    with Server() as listening:
        yield listening, context


def destination(server: Server, pem: Path, name: str = "localhost") -> str:
    """The server as a Twisted endpoint string that trusts `pem`'s folder."""
    port = server.address.rpartition(":")[2]
    return f"ssl:host=127.0.0.1:port={port}:hostname={name}:caCertsDir={pem.parent}"


def test_tls_to_the_server(pem: Path) -> None:
    with tls_server(pem) as (server, context):
        where = destination(server, pem)
        with relay("-l", "127.0.0.1:0", "-d", where) as running:
            with connect(running.port) as client:
                client.sendall(b"request")
                client.shutdown(socket.SHUT_WR)
                upstream = context.wrap_socket(server.accept(), server_side=True)
                assert read_exactly(upstream, 7) == b"request"
                upstream.sendall(b"response")
                upstream.unwrap()
                upstream.close()
                assert read_all(client) == b"response"
            running.ended("done")


def test_a_server_with_another_name_is_not_relayed_to(pem: Path) -> None:
    with tls_server(pem) as (server, context):
        where = destination(server, pem, "example.com")
        with relay("-l", "127.0.0.1:0", "-d", where) as running:
            with connect(running.port) as client:
                client.sendall(b"a secret")
                with suppress(OSError):
                    context.wrap_socket(server.accept(), server_side=True).recv(1)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            running.ended("connect_failed")
            running.wait_for("VerificationError")


def test_a_tls_server_that_stays_silent_is_not_waited_for(pem: Path) -> None:
    with Server() as server:
        where = destination(server, pem)
        options = ("-l", "127.0.0.1:0", "-d", where, "--connect-timeout", "0.5")
        with relay(*options) as running, connect(running.port) as client:
            upstream = server.accept()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            running.ended("connect_timeout")
            running.wait_for("no TLS handshake in time")
            upstream.close()


def test_a_slow_tls_handshake_has_the_whole_connect_timeout(pem: Path) -> None:
    """And not only until the first look at its deadlines, a tenth of a second."""
    with tls_server(pem) as (server, context):
        where = destination(server, pem)
        options = ("-l", "127.0.0.1:0", "-d", where, "--idle-timeout", "0.8")
        with relay(*options) as running, connect(running.port) as client:
            raw = server.accept()
            time.sleep(0.5)
            with context.wrap_socket(raw, server_side=True) as upstream:
                client.sendall(b"request")
                assert read_exactly(upstream, 7) == b"request"
                upstream.sendall(b"response")
                assert read_exactly(client, 8) == b"response"
