"""TLS clients go where their server name says, by `--sni`; the relay ends no TLS."""

from __future__ import annotations

import os
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from relayd.preludes.client_hello import hello_of
from tests.support import hellos
from tests.support.certificates import Authority
from tests.support.live_relays import in_thread
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
)
from tests.support.tls_servers import TlsServer

pytestmark = pytest.mark.usefixtures("connections_of")

LISTEN = ("-l", "127.0.0.1:0")
WWW = hello_of("www.example.com")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("sni"))


def ask(
    port: int, root: Authority, name: str | None, line: bytes = b"who?\n"
) -> str | None:
    """What the server says that a client gets to, whose certificate must be right.

    :param name: the server name; None: none, and then any certificate will do.
    """
    context = ssl.create_default_context(cafile=str(root.file))
    context.check_hostname = name is not None
    with (
        connect(port) as raw,
        context.wrap_socket(raw, server_hostname=name) as client,
    ):
        client.sendall(line)
        return read_all(client).rpartition(b"\r\n\r\n")[2].decode()


def hello_from_ssl(name: str | None) -> bytes:
    """The ClientHello of Python's ssl."""
    outgoing = ssl.MemoryBIO()
    context = ssl._create_unverified_context()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@contextmanager
def sending(client: socket.socket, data: bytes) -> Iterator[None]:
    """All this is on its way meanwhile."""
    thread = in_thread(lambda: client.sendall(data))
    try:
        yield
    finally:
        thread.join()


@contextmanager
def by_name(*options: str) -> Iterator[tuple[RelayProcess, Server]]:
    """A relay to one server, by the name www.example.com."""
    with (
        Server() as server,
        relay(
            *LISTEN, "--sni", f"www.example.com={server.address}", *options
        ) as running,
    ):
        yield running, server


def test_each_client_gets_to_the_server_that_it_names(root: Authority) -> None:
    names = {
        "www": "www.example.com",
        "below": "*.example.com",
        "any": "*.example.org",
    }
    with ExitStack() as stack:
        servers = {
            each: stack.enter_context(TlsServer(each, root.issue(pattern)))
            for each, pattern in names.items()
        }
        options = [
            *("--sni", f"*.Example.COM={servers['below'].address}"),
            *("--sni", f"www.example.com={servers['www'].address},name=first"),
            *("--sni", "=rest", "-d", f"{servers['any'].address},pool=rest"),
        ]
        running = stack.enter_context(relay(*LISTEN, *options))
        port = running.port
        assert ask(port, root, "www.example.com") == "www 5\n"
        assert ask(port, root, "WWW.example.com") == "www 5\n"
        assert ask(port, root, "api.example.com") == "below 5\n"
        assert ask(port, root, "a.example.org") == "any 5\n"
        assert ask(port, root, None) == "any 5\n"
        assert servers["www"].asked == ["www.example.com", "WWW.example.com"]
        assert servers["any"].asked == ["a.example.org", None]
        # It goes on as any other session, with as much as there is.
        assert ask(port, root, "www.example.com", bytes(3 << 20) + b"\n") == (
            f"www {(3 << 20) + 1}\n"
        )
        sessions = sorted(running.sessions(6), key=lambda each: int(each["session"]))
        assert [each["sni"] for each in sessions[:4]] == [
            *(
                "www.example.com",
                "www.example.com",
                "api.example.com",
                "a.example.org",
            )
        ]
        assert "sni" not in sessions[4]
        assert [each["pool"] for each in sessions[:3]] == [
            *("www.example.com", "www.example.com", "*.example.com")
        ]
        assert {each["ending"] for each in sessions} == {"done"}
        assert sessions[0]["upstream"].startswith("first/")


def test_a_name_that_no_server_is_for_is_refused_by_an_alert(root: Authority) -> None:
    with by_name() as (running, server):
        for name in ("other.example.com", None):
            with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
                ask(running.port, root, name)
        running.ended("denied", 2)
        why = running.wait_for(r"ending=denied .*no server for (.*)", 2)
        assert "the name 'other.example.com'" in why[0][1]
        assert "a client that names none" in why[1][1]
        server.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("size", [1, 100])
def test_a_hello_in_pieces_is_whole_at_the_server(size: int) -> None:
    """In segments of a byte, and in records of a byte; what is behind it follows."""
    data = hellos.in_records_of(hello_from_ssl("www.example.com"), size)
    behind = bytes(range(256)) * 4096
    with by_name() as (running, server), connect(running.port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            client.sendall(data[at : at + 1])
        with server.accept() as upstream:
            assert read_exactly(upstream, len(data)) == data
            upstream.settimeout(PATIENCE)
            upstream.sendall(b"ok")
            assert read_exactly(client, 2) == b"ok"
            with sending(client, behind):
                assert read_exactly(upstream, len(behind)) == behind
            client.close()
        [session] = running.sessions()
        assert session["up"] == str(len(data) + len(behind))


def test_what_is_sent_behind_the_hello_at_once_follows_it() -> None:
    """More than is kept for a server."""
    data = WWW + b"\x17\3\3" + bytes(range(256)) * 8192
    with by_name() as (running, server), connect(running.port) as client:
        with sending(client, data), server.accept() as upstream:
            assert read_exactly(upstream, len(data)) == data
            upstream.sendall(b"ok")
            assert read_exactly(client, 2) == b"ok"


@pytest.mark.parametrize("size", [None, 1])
def test_hostile_hellos_end_their_sessions(size: int | None) -> None:
    name = hellos.server_name(b"a.test")
    some = {
        b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n": "not TLS",
        b"\x80\x2e\1\0\2\0\x15\0\0\0\x10": "an SSLv2 ClientHello",
        hellos.Hello(extensions=(name, name)).data(): "two extensions server_name",
        hellos.Hello(extensions=(hellos.server_name(b"a\0b"),)).data(): "a server name",
        hellos.record(b""): "an empty TLS record",
        hellos.records(b"\1\0\x40\0" + bytes(9000), [1] * 9000): "a ClientHello of",
    }
    with by_name() as (running, server):
        for data, why in some.items():
            running.forget_sessions()
            with connect(running.port) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    for at in range(0, len(data), size or len(data)):
                        client.sendall(data[at : at + (size or len(data))])
                    assert client.recv(100) == b""
                except ConnectionError:
                    # More came than was read.
                    pass
            # By its first byte alone nobody is named.
            running.wait_for(f"ending=bad_request .*{why if size is None else ''}")
        server.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_client_that_does_not_say_for_whom_it_comes() -> None:
    with by_name("--handshake-timeout", "0.3") as (running, _):
        with connect(running.port) as silent, connect(running.port) as slow:
            slow.sendall(WWW[:-1])
            assert silent.recv(1) == slow.recv(1) == b""
            running.ended("handshake_timeout", 2)
            running.wait_for("ending=handshake_timeout .*ClientHello", 2)
        with connect(running.port) as leaving:
            leaving.sendall(WWW[:100])
        [session] = running.ended("client_left")
        assert session["up"] == "0"


def test_thousands_that_say_nothing_beside_one_that_is_served(root: Authority) -> None:
    """They are undecided, up to a limit; each address has a quarter of it."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # select(2) takes no descriptor beyond 1023.
    most = 400 if os.environ.get("RELAYD_TEST_REACTOR") == "select" else 2000
    wanted = most + 400
    with ExitStack() as stack:
        if limit < wanted + 500:
            assert hard >= wanted + 500
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 500, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, hard))
        pem = root.issue("www.example.com")
        www = stack.enter_context(TlsServer("www", pem))
        options = (
            "--sni",
            f"www.example.com={www.address}",
            "--max-deciding",
            f"{most}",
        )
        running = stack.enter_context(relay(*LISTEN, *options))
        port = running.port
        for number in range(wanted):
            own = f"127.9.0.{number % 8 + 1}"
            client = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), PATIENCE, (own, 0))
            )
            client.sendall(WWW[: number % len(WWW)])
        running.ended("evicted", wanted - most)
        for _ in range(3):
            assert ask(port, root, "www.example.com") == "www 5\n"
        # Those that served ones made leave; none more.
        running.ended("done", 3)
        running.ended("evicted", wanted - most + 1)
        assert running.process.poll() is None
