"""Each filter that comes with relayd, as the manual shows it, in a real relay.

The examples are those of :mod:`relayd.filters.built_in`, of which the manual and
docs/filters.md are made; each is run as it stands.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relayd.filters.built_in import BUILT_IN
from tests.support.live_relays import once
from tests.support.process import (
    RelayProcess,
    Server,
    UdpServer,
    connect,
    read_all,
    read_exactly,
    relay,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: Of the kinds of relays that a filter serves, one; its traffic is what is looked at.
DATAGRAMS = ("loss", "duplicate", "reorder", "corrupt")

Ends = tuple[socket.socket, socket.socket]


def passes(client: socket.socket, upstream: socket.socket, data: bytes) -> None:
    client.sendall(data)
    assert read_exactly(upstream, len(data)) == data


def replace(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    if "Server" in example:
        upstream.sendall(b"HTTP/1.1 200 OK\r\nServer: Apache\r\n\r\n")
        expected = b"HTTP/1.1 200 OK\r\nServer: none\r\n\r\n"
        assert read_exactly(client, len(expected)) == expected
    else:
        # In two pieces.
        client.sendall(b"GET / HTTP/1.1\r\nHost: www.exam")
        client.sendall(b"ple.net\r\n\r\n")
        expected = b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"
        assert read_exactly(upstream, len(expected)) == expected


def deny(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    client.sendall(b"hello ")
    assert read_exactly(upstream, 6) == b"hello "
    client.sendall(b"DROP TABLE users" if "DROP" in example else b"Select * from users")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        while data := upstream.recv(100):
            assert b"DROP" not in data
            assert b"Select" not in data
    running.ended("filtered")


def first(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    passes(client, upstream, b'GET / "x"\r\n')
    passes(upstream, client, b"200\n" + b"y" * 100)
    client.close()
    upstream.close()
    running.ended("done")
    [line] = running.sessions()
    assert line["first_up"] == r"GET\x20/\x20\x22x\x22\r\n"
    assert line["first_down"] == r"200\n" + "y" * 60


def capture(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    passes(client, upstream, b"a secret question")
    client.close()
    upstream.close()
    running.ended("done")


def latency(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    before = time.monotonic()
    passes(upstream, client, b"late")
    if "direction=up" not in example:
        assert time.monotonic() - before >= 0.08
    else:
        before = time.monotonic()
        passes(client, upstream, b"late")
        # By its seed the first session is a lucky one, or it is late.
        late = time.monotonic() - before
        assert late >= 1 or late < 0.9


def bandwidth(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    before = time.monotonic()
    passes(upstream, client, b"x" * 60_000)
    assert time.monotonic() - before >= 0.2


def slow_close(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    passes(upstream, client, b"data")
    before = time.monotonic()
    upstream.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert time.monotonic() - before >= 0.45


def timeout(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    before = time.monotonic()
    upstream.sendall(b"nobody hears this")
    assert read_all(client) == b""
    assert time.monotonic() - before >= 1.5
    running.ended("filtered")


def reset_peer(running: RelayProcess, ends: Ends, example: str) -> None:
    client, _ = ends
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    running.ended("filtered")


def slicer(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    upstream.sendall(b"x" * 200)
    pieces = []
    while sum(pieces) < 200:
        pieces.append(len(client.recv(1000)))
    assert len(pieces) > 1


def limit_data(running: RelayProcess, ends: Ends, example: str) -> None:
    client, upstream = ends
    upstream.sendall(b"x" * 20_000)
    assert len(read_all(client)) == 10_000
    running.ended("filtered")


#: What each does to a session.
CHECKS: dict[str, Callable[[RelayProcess, Ends, str], None]] = {
    each.__name__: each
    for each in (
        *(replace, deny, first, capture, latency, bandwidth, slow_close, timeout),
        *(reset_peer, slicer, limit_data),
    )
}

EXAMPLES = [
    (name, example) for name, kind in BUILT_IN.items() for example in kind.examples
]


@once
def test_each_filter_has_an_example_in_the_docs() -> None:
    assert {*CHECKS, *DATAGRAMS} == set(BUILT_IN) == {name for name, _ in EXAMPLES}
    page = (Path(__file__).parents[2] / "docs" / "filters.md").read_text()
    [frame] = re.findall(r"\n\n```\n(.*?)```", page, re.DOTALL)
    assert frame.splitlines() == [example for _, example in EXAMPLES]


@pytest.fixture
def there(tmp_path: Path) -> Callable[[str], str]:
    """An example whose file is in a folder of this test."""
    return lambda example: example.replace("/var/tmp", str(tmp_path))


@once
@pytest.mark.parametrize(
    ("name", "example"), [each for each in EXAMPLES if each[0] not in DATAGRAMS]
)
def test_an_example(
    name: str, example: str, there: Callable[[str], str], server: Server, tmp_path: Path
) -> None:
    options: tuple[Any, ...] = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*options, "--filter", there(example)) as running:
        with connect(running.port) as client, server.accept() as upstream:
            CHECKS[name](running, (client, upstream), example)
    for file in tmp_path.glob("*.pcapng"):
        data = file.read_bytes()
        assert data.startswith(b"\x0a\x0d\x0d\x0a")
        assert b"a secret question" in data


@once
@pytest.mark.parametrize(
    ("name", "example"), [each for each in EXAMPLES if each[0] in DATAGRAMS]
)
def test_an_example_for_datagrams(name: str, example: str) -> None:
    """With few datagrams nothing happens, most of the time: the same, for all."""
    sure = re.sub(r":0\.\d+", ":1", example)
    sent = [b"one", b"two", b"three"]
    with UdpServer() as server:
        options = ("-l", "udp:127.0.0.1:0", "-d", server.address)
        for words in (example, sure):
            with relay(*options, "--filter", words) as running:
                with udp_client(running.port) as client:
                    if words == example:
                        # Which of them are hit is the seed's to say.
                        client.send(b"hello")
                        assert server.receive()[0] == b"hello"
                        continue
                    client.send(b"hello")
                    _, source = server.receive()
                    for each in sent:
                        server.socket.sendto(each, source)
                    check_datagrams(name, client, sent)


def check_datagrams(name: str, client: socket.socket, sent: list[bytes]) -> None:
    """All datagrams to the client are hit."""
    if name == "loss":
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)
    elif name == "duplicate":
        assert [client.recv(100) for _ in range(6)] == [x for x in sent for _ in "12"]
    elif name == "reorder":
        got = [client.recv(100) for _ in sent]
        assert sorted(got) == sorted(sent)
    else:
        got = [client.recv(100) for _ in sent]
        for one, other in zip(got, sent, strict=True):
            different = int.from_bytes(one) ^ int.from_bytes(other)
            assert different.bit_count() == 1
