"""TLS on either side: what a transport that can't half-close makes of the rules."""

from __future__ import annotations

import datetime
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.live.test_time import TIMEOUT, ports, stopped
from tests.support.certificates import Authority, server_context
from tests.support.live_relays import once
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
)

pytestmark = pytest.mark.usefixtures("connections_of")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def pem(root: Authority) -> Path:
    """A key and a certificate for `localhost`, in one file."""
    return root.issue("localhost")


@contextmanager
def tls_relay(pem: Path, server: Server, *options: str) -> Iterator[RelayProcess]:
    """TLS outside, plain inside."""
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    with relay("-l", listener, "-d", server.address, *options) as running:
        yield running


def tls_client(running: RelayProcess, root: Authority, *offers: str) -> ssl.SSLSocket:
    """A client, which may offer protocols."""
    context = ssl.create_default_context(cafile=str(root.file))
    if offers:
        context.set_alpn_protocols(list(offers))
    return context.wrap_socket(
        connect(running.port),
        server_hostname="localhost",
        # An end without close_notify is an error, not an end.
        suppress_ragged_eofs=False,
    )


def test_a_request_and_its_response(pem: Path, root: Authority, server: Server) -> None:
    with tls_relay(pem, server) as running, tls_client(running, root) as client:
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


@once
def test_a_client_that_offers_protocols_is_served(
    pem: Path, root: Authority, server: Server
) -> None:
    """As browsers do, and curl.  None is chosen: nobody knows what servers speak."""
    with (
        tls_relay(pem, server) as running,
        tls_client(running, root, "h2", "http/1.1") as client,
    ):
        assert client.selected_alpn_protocol() is None
        client.sendall(b"request")
        upstream = server.accept()
        assert read_exactly(upstream, 7) == b"request"
        upstream.close()
        assert read_all(client) == b""


def test_a_clients_clean_end_does_not_cut_its_upload(
    pem: Path, root: Authority, server: Server
) -> None:
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = bytes(range(256)) * 1000
    with tls_relay(pem, server) as running:
        client = tls_client(running, root)
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


def test_a_client_that_leaves_an_endless_server(
    pem: Path, root: Authority, server: Server
) -> None:
    with tls_relay(pem, server) as running:
        client = tls_client(running, root)
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


def test_a_reset_reaches_a_tls_client_without_a_goodbye(
    pem: Path, root: Authority, server: Server
) -> None:
    with tls_relay(pem, server) as running, tls_client(running, root) as client:
        upstream = server.accept()
        upstream.sendall(b"last words")
        assert read_exactly(client, 10) == b"last words"
        reset(upstream)
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            client.recv(1)
        running.ended("upstream_reset")


# -- a client's handshake


def silent(running: RelayProcess) -> None:
    """It has logged no traceback so far."""
    assert not [line for line in running.lines if "Traceback" in line]


def nobody_came(server: Server) -> None:
    """Nothing was dialled: nobody waits to be accepted."""
    server.socket.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_a_client_that_never_speaks_tls(pem: Path, server: Server) -> None:
    """Nothing is dialled for it, and it has the time of a handshake."""
    with tls_relay(pem, server, "--handshake-timeout", "0.3", "-v") as running:
        with connect(running.port) as client:
            running.wait_for("opened session=1")
            began = time.monotonic()
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
            assert time.monotonic() - began < 2
        [line] = running.ended("handshake_timeout")
        assert (line["code"], line["upstream"]) == ("cR", "-")
        running.wait_for("detail='no TLS handshake in 0.3 s'")
        nobody_came(server)
        silent(running)


def test_a_client_that_stops_in_the_middle_of_its_handshake(
    pem: Path, server: Server
) -> None:
    with tls_relay(pem, server, "--handshake-timeout", "0.3") as running:
        with connect(running.port) as client:
            client.sendall(b"\x16\x03\x01\x02\x00\x01")
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
        running.ended("handshake_timeout")
        nobody_came(server)


def test_no_deadline_for_a_handshake(pem: Path, root: Authority) -> None:
    """0 is never; and the time of a handshake is not counted against what follows."""
    with Server() as server:
        options = ("--handshake-timeout", "0", "--connect-timeout", "0.4")
        with tls_relay(pem, server, *options) as running:
            raw = connect(running.port)
            time.sleep(0.7)
            context = ssl.create_default_context(cafile=str(root.file))
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(b"late")
                with server.accept() as upstream:
                    assert read_exactly(upstream, 4) == b"late"


def test_plain_text_to_a_tls_listener(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running, connect(running.port) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with suppress(ConnectionResetError):
            read_all(client)
        [line] = running.ended("bad_request")
        assert (line["up"], line["upstream"]) == ("0", "-")
        running.wait_for("detail='TLS handshake: http request'")
        nobody_came(server)
        silent(running)


def test_a_client_without_a_common_cipher(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        # For servers with a key of another kind.
        context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connect(running.port))
        running.ended("bad_request")
        running.wait_for("detail='TLS handshake: no shared cipher'")
        nobody_came(server)
        silent(running)


def test_a_client_that_does_not_trust_us(pem: Path, server: Server) -> None:
    with tls_relay(pem, server) as running:
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(
                connect(running.port), server_hostname="localhost"
            )
        running.ended("bad_request")
        running.wait_for("detail='TLS handshake: tlsv1 alert unknown ca'")
        nobody_came(server)
        silent(running)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_client_that_leaves_in_its_handshake(
    pem: Path, server: Server, leave: Any, said: bytes
) -> None:
    with tls_relay(pem, server, "-v") as running:
        client = connect(running.port)
        client.sendall(said)
        leave(client)
        running.ended("client_left")
        running.wait_for("detail='in the middle of its TLS handshake'")
        nobody_came(server)
        silent(running)


def hello(running: RelayProcess, root: Authority) -> tuple[Any, Any, socket.socket]:
    """A client that is about to finish its handshake: TLS, what it has to send."""
    context = ssl.create_default_context(cafile=str(root.file))
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, to_send, server_hostname="localhost")
    raw = connect(running.port)
    while True:
        try:
            tls.do_handshake()
            return tls, to_send, raw
        except ssl.SSLWantReadError:
            raw.sendall(to_send.read())
            received.write(raw.recv(65536))


def test_what_comes_with_the_end_of_a_handshake_is_kept(
    pem: Path, root: Authority, server: Server
) -> None:
    """In one segment with it, for a server that is not even dialled yet."""
    with tls_relay(pem, server) as running:
        tls, to_send, raw = hello(running, root)
        tls.write(b"early bird")
        raw.sendall(to_send.read())
        with raw, server.accept() as upstream:
            assert read_exactly(upstream, 10) == b"early bird"


def test_a_relay_that_stops_waits_for_no_handshake_longer(
    pem: Path, server: Server
) -> None:
    with tls_relay(pem, server, "--drain-timeout", "0.2") as running:
        with connect(running.port):
            running.signal()
            assert running.wait() == 0
        running.ended("drained")
        silent(running)


# -- SOCKS4 in TLS


@contextmanager
def tls_proxy(pem: Path, *options: str) -> Iterator[RelayProcess]:
    where = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    to_us = ("--allow-client", "127.0.0.1", "--allow-dest", "127.0.0.0/8")
    with relay("-l", where, *to_us, *options, plugin="socks4") as running:
        yield running


def socks_request(server: Server) -> bytes:
    host, port = server.socket.getsockname()
    return b"\4\1" + port.to_bytes(2, "big") + socket.inet_aton(host) + b"\0"


def test_socks4_in_tls(pem: Path, root: Authority, server: Server) -> None:
    """The request comes with the end of the handshake, and data with the request."""
    with tls_proxy(pem) as running:
        tls, to_send, raw = hello(running, root)
        tls.write(socks_request(server) + b"early bird")
        raw.sendall(to_send.read())
        with raw, server.accept() as upstream:
            assert read_exactly(upstream, 10) == b"early bird"
        running.wait_for("reply=90")
        silent(running)


@pytest.mark.parametrize("shakes_hands", [False, True])
def test_both_handshakes_of_socks4_in_tls_have_one_deadline(
    pem: Path, root: Authority, shakes_hands: bool
) -> None:
    with tls_proxy(pem, "--handshake-timeout", "2.5") as running:
        began = time.monotonic()
        client: socket.socket = connect(running.port)
        if shakes_hands:
            time.sleep(1.5)
            context = ssl.create_default_context(cafile=str(root.file))
            client = context.wrap_socket(client, server_hostname="localhost")
        with client, suppress(ConnectionResetError):
            # A reply, to those who can read one.
            assert len(read_all(client)) == (8 if shakes_hands else 0)
        # With two it would be 4 s.
        assert time.monotonic() - began < 3.9
        [line] = running.ended("handshake_timeout")
        assert line["reply"] == ("91" if shakes_hands else "-")
        what = "request" if shakes_hands else "TLS handshake"
        running.wait_for(f"detail='no {what} in 2.5 s'")
        silent(running)


def test_handshakes_of_tls_are_bounded_as_those_of_socks4(pem: Path) -> None:
    """The one that has been in it longest makes room."""
    with tls_proxy(pem, "--max-handshakes", "1", "-v") as running:
        with connect(running.port) as first:
            with connect(running.port):
                with suppress(ConnectionResetError):
                    assert first.recv(1) == b""
                running.ended("evicted")
        running.ended("client_left")
        silent(running)


# -- TLS to the server


@contextmanager
def tls_server(pem: Path) -> Iterator[tuple[Server, ssl.SSLContext]]:
    with Server() as listening:
        yield listening, server_context(pem)


def port_of(server: Server) -> int:
    return int(server.socket.getsockname()[1])


def destination(server: Server, root: Authority, name: str = "localhost") -> str:
    """The server as a Twisted endpoint string that trusts the root."""
    return f"tls:{name}:{port_of(server)}:trustRoots={root.folder}"


@contextmanager
def relay_to(where: str, *options: str) -> Iterator[RelayProcess]:
    with relay("-l", "127.0.0.1:0", "-d", where, *options) as running:
        yield running


#: Ways to say that the server on a port of 127.0.0.1 must be `localhost`.
STRINGS = [
    "tls:localhost:{port}:trustRoots={roots}",
    "TLS:port={port}:trustRoots={roots}:host=localhost",
    "tls:local\\host:{port}:trustRoots={roots}",
    "tls:localhost:1:trustRoots={roots}:endpoint=tcp\\:127.0.0.1\\:{port}",
    "ssl:127.0.0.1:{port}:hostname=localhost:caCertsDir={roots}",
]


@pytest.mark.parametrize("string", STRINGS)
def test_tls_to_the_server(pem: Path, root: Authority, string: str) -> None:
    with tls_server(pem) as (server, context):
        where = string.format(port=port_of(server), roots=root.folder)
        with relay_to(where) as running:
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
            silent(running)


def refused(
    running: RelayProcess, server: Server, context: ssl.SSLContext, detail: str
) -> None:
    """The server has got nothing, and the client an end; the log says why."""
    with connect(running.port) as client:
        client.sendall(b"a secret")
        heard = b""
        with server.accept() as raw, suppress(ssl.SSLError, ConnectionError):
            upstream = context.wrap_socket(raw, server_side=True)
            heard = upstream.recv(8)
        assert heard == b""
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
    [line] = running.ended("connect_failed")
    assert (line["code"], line["down"]) == ("SC", "0")
    running.wait_for(re.escape(detail))
    silent(running)


@pytest.mark.parametrize("string", STRINGS)
def test_a_server_whose_certificate_names_nobody(root: Authority, string: str) -> None:
    """Its common name is no name: RFC 9525."""
    with tls_server(root.issue(common="localhost")) as (server, context):
        where = string.format(port=port_of(server), roots=root.folder)
        with relay_to(where) as running:
            refused(
                *(running, server, context),
                "the server's certificate names nobody, not 'localhost'",
            )


@pytest.mark.parametrize("string", STRINGS)
def test_a_server_with_another_name(root: Authority, string: str) -> None:
    with tls_server(root.issue("example.com", "192.0.2.1")) as (server, context):
        where = string.format(port=port_of(server), roots=root.folder)
        with relay_to(where) as running:
            refused(
                *(running, server, context),
                "the server's certificate is for 'example.com', '192.0.2.1',"
                " not for 'localhost'",
            )


def test_a_server_with_a_certificate_that_can_not_be_read(root: Authority) -> None:
    """service_identity has errors of other kinds for these."""
    odd = [x509.UniformResourceIdentifier("spiffe://a:1/b:2")]
    with tls_server(root.issue("localhost", alternatives=odd)) as (server, context):
        with relay_to(destination(server, root)) as running:
            refused(
                *(running, server, context),
                "the server's certificate can't be checked: too many values",
            )


def test_a_server_with_its_own_address(root: Authority) -> None:
    """A name is not asked for then; its certificate is checked all the same."""
    with tls_server(root.issue("127.0.0.1")) as (server, context):
        with relay_to(destination(server, root, "127.0.0.1")) as running:
            with connect(running.port) as client:
                with context.wrap_socket(server.accept(), server_side=True) as upstream:
                    client.sendall(b"request")
                    assert read_exactly(upstream, 7) == b"request"


@pytest.mark.parametrize("names", [(), ("127.0.0.2", "localhost")])
def test_a_server_with_another_address(root: Authority, names: tuple[str, ...]) -> None:
    with tls_server(root.issue(*names, common="127.0.0.1")) as (server, context):
        with relay_to(destination(server, root, "127.0.0.1")) as running:
            says = "is for '127.0.0.2', 'localhost'" if names else "names nobody"
            refused(running, server, context, f"the server's certificate {says}, not")


def test_a_server_with_an_ipv6_address(root: Authority) -> None:
    for names, ending in ((("::1",), "done"), (("::2",), "connect_failed")):
        context = server_context(root.issue(*names))
        with Server(socket.AF_INET6) as server:
            # As the refusal of it without `endpoint=` says.
            where = destination(server, root, r"\:\:1")
            where += rf":endpoint=tcp\:\\\:\\\:1\:{port_of(server)}"
            with relay_to(where, "-v") as running, connect(running.port) as client:
                raw = server.accept()
                with suppress(ssl.SSLError, ConnectionError):
                    raw = context.wrap_socket(raw, server_side=True)
                    # The client's end first: the server's, without a goodbye, would be
                    # a reset.
                    client.close()
                    assert raw.recv(1) == b""
                raw.close()
                client.close()
                running.ended(ending)


def test_a_server_whose_certificate_is_not_good(
    root: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "liar").mkdir()
    other = Authority(tmp_path / "other", "another root")
    liar = Authority(tmp_path / "liar", posing_as=root)
    long_ago = datetime.timedelta(days=9)
    for pem, says in (
        (root.issue("localhost", ago=long_ago), "it has expired"),
        (root.issue("localhost", ago=-long_ago), "it is not valid yet"),
        (other.issue("localhost"), "its issuer is unknown"),
        (liar.issue("localhost"), "its signature is wrong"),
    ):
        with tls_server(pem) as (server, context):
            with relay_to(destination(server, root)) as running:
                refused(
                    *(running, server, context),
                    f"the server's certificate is not good: {says}",
                )


def test_a_server_that_speaks_no_tls(root: Authority) -> None:
    with Server() as server, relay_to(destination(server, root)) as running:
        with connect(running.port) as client:
            with server.accept() as upstream:
                upstream.sendall(b"220 smtp.example.com ESMTP\r\n")
                assert client.recv(1) == b""
        running.ended("connect_failed")
        running.wait_for("detail=.TLS handshake: (wrong version number|packet length)")
        silent(running)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_server_that_leaves_in_its_handshake(root: Authority, leave: Any) -> None:
    with Server() as server, relay_to(destination(server, root)) as running:
        with connect(running.port) as client:
            upstream = server.accept()
            assert upstream.recv(1)
            leave(upstream)
            assert client.recv(1) == b""
        running.ended("connect_failed")
        running.wait_for("TLS handshake: the server closed its connection")
        silent(running)


def test_a_tls_server_that_stays_silent_is_not_waited_for(root: Authority) -> None:
    with Server() as server:
        where = destination(server, root)
        with relay_to(where, "--connect-timeout", "0.5") as running:
            with connect(running.port) as client, server.accept():
                client.sendall(b"a secret")
                assert client.recv(1) == b""
            running.ended("connect_timeout")
            running.wait_for("detail='no TLS handshake in 0.5 s'")
            silent(running)


def test_a_client_that_leaves_while_hands_are_shaken(root: Authority) -> None:
    with Server() as server, relay_to(destination(server, root), "-v") as running:
        client = connect(running.port)
        with server.accept() as upstream:
            reset(client)
            running.ended("client_left")
            with suppress(ConnectionResetError):
                read_all(upstream)
        silent(running)


def test_a_slow_tls_handshake_has_the_whole_connect_timeout(
    pem: Path, root: Authority
) -> None:
    """And not only until the first look at its deadlines, a tenth of a second.

    The session is connected when the handshake is done.
    """
    with tls_server(pem) as (server, context):
        where = destination(server, root)
        with relay_to(where, "--idle-timeout", "0.8", "-v") as running:
            with connect(running.port) as client:
                raw = server.accept()
                time.sleep(0.5)
                assert not [line for line in running.lines if " connected " in line]
                with context.wrap_socket(raw, server_side=True) as upstream:
                    running.wait_for("connected session=1")
                    client.sendall(b"request")
                    assert read_exactly(upstream, 7) == b"request"
                    upstream.sendall(b"response")
                    assert read_exactly(client, 8) == b"response"


def test_a_server_that_speaks_first_in_tls(pem: Path, root: Authority) -> None:
    """What comes with the end of its handshake is for the client."""
    with tls_server(pem) as (server, context):
        with relay_to(destination(server, root)) as running:
            with connect(running.port) as client:
                with context.wrap_socket(server.accept(), server_side=True) as upstream:
                    upstream.sendall(b"220 welcome")
                    assert read_exactly(client, 11) == b"220 welcome"


def test_tls_on_both_sides(pem: Path, root: Authority) -> None:
    with tls_server(pem) as (server, context):
        listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
        with relay("-l", listener, "-d", destination(server, root)) as running:
            with tls_client(running, root) as client:
                client.sendall(b"request")
                with context.wrap_socket(server.accept(), server_side=True) as upstream:
                    assert read_exactly(upstream, 7) == b"request"
                    upstream.sendall(b"response")
                    assert read_exactly(client, 8) == b"response"


def test_handshakes_that_go_on_while_the_relay_is_stopped(
    pem: Path, root: Authority, server: Server
) -> None:
    """Of a client and of a server: each has sent its part in time.  (1.4 s.)"""
    limit = f"{TIMEOUT:g}"
    options = ("--handshake-timeout", limit, "--connect-timeout", limit)
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    with ExitStack() as held:
        secret, context = held.enter_context(tls_server(pem))
        args = ("-l", listener, "-d", server.address)
        args += ("-l", "127.0.0.1:0", "-d", destination(secret, root))
        running = held.enter_context(relay(*options, *args))
        outside, inside = ports(running, 2)
        client, silent = (held.enter_context(connect(outside)) for _ in range(2))
        plain = held.enter_context(connect(inside))
        raw = secret.accept()
        trusts = ssl.create_default_context(cafile=str(root.file))
        with ThreadPoolExecutor(2) as threads, stopped(running):
            begun = [
                threads.submit(trusts.wrap_socket, client, server_hostname="localhost"),
                threads.submit(context.wrap_socket, raw, server_side=True),
            ]
        ends = [held.enter_context(each.result()) for each in begun]
        upstream = held.enter_context(server.accept())
        upstream.sendall(b"hello")
        assert read_exactly(ends[0], 5) == b"hello"
        ends[1].sendall(b"hello")
        assert read_exactly(plain, 5) == b"hello"
        with suppress(ConnectionResetError):
            read_all(silent)
        running.ended("handshake_timeout")
