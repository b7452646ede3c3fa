"""PROXY headers over real sockets: read from balancers, and told to servers."""

from __future__ import annotations

import random
import socket
import struct
from pathlib import Path

import pytest

from relayd.preludes.proxy_protocol import read_header, write_version_2
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from tests.support.live_relays import once, refused_address
from tests.support.process import (
    Server,
    UdpServer,
    connect,
    read_all,
    read_exactly,
    relay,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("connections_of")

V1 = b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 80\r\n"
UNKNOWN = b"PROXY UNKNOWN\r\n"
V2 = write_version_2("192.0.2.9:1234", "192.0.2.10:80")
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
LISTEN = ("-l", "127.0.0.1:0")
ACCEPT = ("--accept-proxy", "127.0.0.0/8")

#: Enough to be spliced.
DATA = random.Random(18).randbytes(1_000_000)


def told(upstream: socket.socket, version: str) -> tuple[str, str]:
    """Who the server is told that the client is, and where it connected."""
    size = 28 if version == "v2" else 0
    data = read_exactly(upstream, size) if size else b""
    while not data.endswith(b"\n") and not size:
        data += read_exactly(upstream, 1)
    found = read_header(data)
    assert found is not None
    assert found[1] == len(data)
    return found[0].source, found[0].destination


def read_from(server: Server, count: int) -> bytes:
    """What the next connection begins with."""
    with server.accept() as upstream:
        return read_exactly(upstream, count)


@pytest.mark.parametrize("header", [V1, UNKNOWN, V2, LOCAL])
def test_a_server_that_speaks_first(header: bytes) -> None:
    with Server() as server, relay(*LISTEN, *ACCEPT, "-d", server.address) as running:
        with connect(running.port) as client:
            peer = f"127.0.0.1:{client.getsockname()[1]}"
            client.sendall(header)
            upstream = server.accept()
            upstream.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
            client.sendall(b"question")
            assert read_exactly(upstream, 8) == b"question"
            upstream.close()
        [line] = running.ended("done")
        named = header in (V1, V2)
        assert line["client"] == ("192.0.2.9:1234" if named else peer)
        assert line.get("peer") == (peer if named else None)
        assert (line["up"], line["down"]) == ("8", "5")


def test_a_header_in_pieces_and_what_follows_it() -> None:
    with Server() as server, relay(*LISTEN, *ACCEPT, "-d", server.address) as running:
        with connect(running.port) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in V2:
                client.sendall(bytes([byte]))
            client.sendall(DATA)
            client.shutdown(socket.SHUT_WR)
            upstream = server.accept()
            assert read_all(upstream) == DATA
            upstream.sendall(DATA)
            upstream.close()
            assert read_all(client) == DATA
        [line] = running.ended("done")
        assert line["up"] == line["down"] == str(len(DATA))


def test_who_is_not_trusted_is_served_as_itself() -> None:
    accept = ("--accept-proxy", "192.0.2.0/24")
    with Server() as server, relay(*LISTEN, *accept, "-d", server.address) as running:
        with connect(running.port) as client:
            client.sendall(V1)
            assert read_from(server, len(V1)) == V1
            peer = f"127.0.0.1:{client.getsockname()[1]}"
        [line] = running.sessions()
        assert line["client"] == peer


@once
def test_a_client_without_a_header_gets_no_server() -> None:
    options = (*LISTEN, *ACCEPT, "--handshake-timeout", "0.3")
    with Server() as server, relay(*options, "-d", server.address) as running:
        with connect(running.port) as client:
            assert read_all(client) == b""
        [line] = running.ended("handshake_timeout")
        running.wait_for("detail='no PROXY header in 0.3 s'")
        assert line["upstream"] == "-"


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"PROXY TCP4 192.0.2.9 192.0.2.10 65536 80\r\n",
        b"PROXY UNKNOWN " + bytes(200),
        V2[:14] + b"\xff\xff",
        V2[:14] + b"\0\1x",
    ],
)
def test_what_is_no_header_ends_as_a_bad_request(start: bytes) -> None:
    with Server() as server, relay(*LISTEN, *ACCEPT, "-d", server.address) as running:
        with connect(running.port) as client:
            client.sendall(start)
            assert read_all(client) == b""
        [line] = running.ended("bad_request")
        assert line["upstream"] == "-"


def test_a_proxy_behind_a_balancer() -> None:
    """The refusal of a request that came with the header is said, too."""
    refused = write_request(Command.CONNECT, "224.0.0.1", 80, b"joe")
    # The gate is asked for the client, not for its balancer.
    gate = ("--allow-client", "192.0.2.0/24")
    with relay(*LISTEN, *ACCEPT, *gate, plugin="socks4") as running:
        with connect(running.port) as client:
            client.sendall(V1 + refused)
            assert read_all(client) == write_reply(Code.REJECTED)
        running.ended("denied")
        with connect(running.port) as client:
            client.sendall(V1.replace(b"192.0.2.9", b"192.0.3.9") + refused)
            with pytest.raises(ConnectionResetError):
                read_all(client)
        [line] = running.ended("refused")
        assert line["client"] == "192.0.3.9:1234"


def test_a_balancer_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "relay")
    options = ("-l", f"unix:{path}", "--accept-proxy", "unix")
    with Server() as server, relay(*options, "-d", server.address) as running:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(V2 + b"early")
            assert read_from(server, 5) == b"early"
        [line] = running.sessions()
        assert line["client"] == "192.0.2.9:1234"


# -- told to servers


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("says", [b"", b"early", DATA])
def test_a_server_is_told_before_all_else(version: str, says: bytes) -> None:
    options = (*LISTEN, "--send-proxy", version)
    with Server() as server, relay(*options, "-d", server.address) as running:
        with connect(running.port) as client:
            here, there = client.getsockname(), client.getpeername()
            client.setblocking(False)
            sent = client.send(says) if says else 0
            client.setblocking(True)
            upstream = server.accept()
            assert told(upstream, version) == (
                f"127.0.0.1:{here[1]}",
                f"127.0.0.1:{there[1]}",
            )
            upstream.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
            assert read_exactly(upstream, sent) == says[:sent]
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""
            upstream.close()
        [line] = running.ended("done")
        assert (line["up"], line["down"]) == (str(sent), "5"), "it is not counted"


def test_bytes_behind_it_are_spliced() -> None:
    """Both ways, and whole."""
    options = (*LISTEN, "--send-proxy", "v2")
    with Server() as server, relay(*options, "-d", server.address) as running:
        with connect(running.port) as client:
            upstream = server.accept()
            told(upstream, "v2")
            for one, other in ((client, upstream), (upstream, client)):
                for _ in range(8):
                    one.sendall(DATA[:200_000])
                    assert read_exactly(other, 200_000) == DATA[:200_000]
            upstream.close()


def test_each_server_is_told_what_it_expects() -> None:
    with Server() as one, Server() as other:
        options = ("-d", f"{one.address},send-proxy=v1", "-d", other.address)
        with relay(*LISTEN, *options) as running:
            with connect(running.port) as client:
                here = f"127.0.0.1:{client.getsockname()[1]}"
                with one.accept() as upstream:
                    assert told(upstream, "v1")[0] == here
            with connect(running.port) as client:
                client.sendall(b"plain")
                assert read_from(other, 5) == b"plain"


def test_a_server_that_can_not_be_reached_is_told_nothing() -> None:
    options = (*LISTEN, "--send-proxy", "v1", "-d", refused_address())
    with relay(*options) as running:
        with connect(running.port) as client:
            assert read_all(client) == b""
        running.ended("connect_refused")


def test_a_chain_of_relays_passes_the_client_on() -> None:
    inner_options = (*LISTEN, *ACCEPT, "--send-proxy", "v2")
    with Server() as server, relay(*inner_options, "-d", server.address) as inner:
        outer_options = (*LISTEN, "-d", f"127.0.0.1:{inner.port}", "--send-proxy", "v1")
        with relay(*outer_options) as outer, connect(outer.port) as client:
            here, there = client.getsockname(), client.getpeername()
            client.sendall(b"data")
            upstream = server.accept()
            assert told(upstream, "v2") == (
                f"127.0.0.1:{here[1]}",
                f"127.0.0.1:{there[1]}",
            )
            assert read_exactly(upstream, 4) == b"data"
            upstream.close()


def test_a_proxy_tells_where_its_clients_come_from() -> None:
    options = (*LISTEN, "--send-proxy", "v1", "--allow-dest", "127.0.0.1")
    with Server() as server, relay(*options, plugin="socks4") as running:
        port = server.socket.getsockname()[1]
        with connect(running.port) as client:
            request = write_request(Command.CONNECT, "127.0.0.1", port)
            client.sendall(request + b"early")
            upstream = server.accept()
            assert told(upstream, "v1")[0] == f"127.0.0.1:{client.getsockname()[1]}"
            assert read_exactly(upstream, 5) == b"early"
            granted = write_reply(Code.GRANTED, "127.0.0.1", port)
            assert read_exactly(client, len(granted)) == granted
            upstream.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("version", ["v2", "v2-first"])
def test_datagrams_with_headers(version: str, host: str) -> None:
    """A listener of all addresses tells which one the client has sent to."""
    options = ("-l", "udp:0", "--send-proxy", version)
    with UdpServer() as server:
        destination = f"udp:127.0.0.1:{server.port}"
        with (
            relay(*options, "-d", destination) as running,
            udp_client(running.port, host) as client,
        ):
            shown = f"[{host}]" if ":" in host else host
            header = write_version_2(
                f"{shown}:{client.getsockname()[1]}",
                f"{shown}:{running.port}",
                datagrams=True,
            )
            for number in range(3):
                client.send(b"%d" % number)
                data, source = server.socket.recvfrom(65536)
                has = version == "v2" or not number
                assert data == (header if has else b"") + b"%d" % number
                server.socket.sendto(b"answer", source)
                assert client.recv(100) == b"answer"


@once
def test_a_datagram_that_does_not_fit_with_its_header() -> None:
    options = ("-l", "udp:127.0.0.1:0", "--send-proxy", "v2", "--drain-timeout", "0")
    with UdpServer() as server:
        destination = f"udp:127.0.0.1:{server.port}"
        with (
            relay(*options, "-d", destination) as running,
            udp_client(running.port) as client,
        ):
            client.send(bytes(65507 - 27))
            client.send(bytes(65507 - 28))
            assert len(server.socket.recv(65536)) == 65507
            running.signal()
            running.wait_for(r"send_EMSGSIZE:1")


@once
def test_a_client_that_resets_behind_its_header() -> None:
    with Server() as server, relay(*LISTEN, *ACCEPT, "-d", server.address) as running:
        client = connect(running.port)
        client.sendall(V1 + b"data")
        upstream = server.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with upstream, pytest.raises(ConnectionResetError):
            read_all(upstream)
        running.ended("downstream_reset")
