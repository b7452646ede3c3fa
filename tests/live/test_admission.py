"""Who may come in, and how much: each option, for each kind of relay, by clients."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from relayd.preludes.socks4 import Command, write_request
from tests.support.live_udp import nothing_came
from tests.support.process import (
    PATIENCE,
    Server,
    UdpServer,
    connect,
    read_all,
    read_exactly,
    relay,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

LISTEN = ("--listen", "127.0.0.1:0", "--dest")


def is_reset(client: socket.socket) -> bool:
    """Whether a client was refused: by a reset, and without a byte."""
    try:
        return client.recv(1) == b"?"
    except ConnectionResetError:
        return True


def is_refused(port: int, source: str = "127.0.0.1") -> bool:
    """The same of a new client, which may hear of it as it connects."""
    try:
        where = ("127.0.0.1", port)
        with socket.create_connection(where, PATIENCE, (source, 0)) as client:
            return is_reset(client)
    except ConnectionResetError:
        return True


def served(client: socket.socket, server: Server) -> socket.socket:
    """The server's end of a session; a byte went each way."""
    client.sendall(b"?")
    upstream = server.accept()
    assert read_exactly(upstream, 1) == b"?"
    upstream.sendall(b"!")
    assert read_exactly(client, 1) == b"!"
    return upstream


def never() -> str:
    """Hours that it is not now, nor in the next twelve hours, in UTC."""
    now = time.gmtime()
    return f"{(now.tm_hour + 13) % 24:02}:00-{(now.tm_hour + 14) % 24:02}:00"


def rule_file(tmp_path: Path) -> str:
    path = tmp_path / "rules"
    path.write_text("# us\n127.0.0.0/8\n::1\n")
    return f"@{path}"


def refusals(tmp_path: Path) -> list[tuple[tuple[str, ...], str]]:
    """Options by which a client is refused, and the reason."""
    return [
        (("--allow-client", "192.0.2.0/24"), "client"),
        (("--deny-client", rule_file(tmp_path)), "client"),
        (("--hours", never()), "hours"),
    ]


def test_clients_that_are_refused_are_reset(tmp_path: Path) -> None:
    """Before anything is dialled; and the log says why, with the client's address."""
    with Server() as server:
        server.socket.setblocking(False)
        for options, reason in refusals(tmp_path):
            with relay(*LISTEN, server.address, *options) as running:
                with socket.socket() as client:
                    client.bind(("127.0.0.1", 0))
                    name = f"127.0.0.1:{client.getsockname()[1]}"
                    client.connect_ex(("127.0.0.1", running.port))
                    assert is_reset(client)
                [session] = running.ended("refused")
                assert session["client"] == name
                assert session["upstream"] == "-"
                running.wait_for(f"detail='{reason}: ")
        with pytest.raises(BlockingIOError):
            server.socket.accept()


def test_a_proxys_clients_that_are_refused_are_reset(tmp_path: Path) -> None:
    listen = ("--listen", "127.0.0.1:0", "--allow-dest", "127.0.0.0/8")
    for options, reason in refusals(tmp_path):
        with relay(*listen, *options, plugin="socks4") as running:
            assert is_refused(running.port)
            running.ended("refused")
            running.wait_for(f"detail='{reason}: ")


def test_datagrams_that_are_refused_are_dropped(tmp_path: Path) -> None:
    listen = ("--listen", "udp:127.0.0.1:0", "--dest")
    with UdpServer() as server:
        for options, reason in (
            *refusals(tmp_path),
            (("--max-connects-per-client", "1/3600"), "max_connects_per_client"),
        ):
            with relay(*listen, server.address, *options) as running:
                with udp_client(running.port) as first, udp_client(running.port) as one:
                    if reason.startswith("max"):
                        first.send(b"?")
                        data, peer = server.receive()
                        server.send(b"!", peer)
                        assert (data, first.recv(9)) == (b"?", b"!")
                    one.send(b"?")
                    running.wait_for(f"no flow for 127.0.0.1:\\d+: {reason}: ")
                    nothing_came(one)
                running.signal()
                running.wait_for(f"dropped=.*{reason}:1")


def test_who_is_allowed_is_served(tmp_path: Path) -> None:
    """By a rule of a file, within hours, below every limit; over IPv4 and UNIX."""
    path = tmp_path / "s"
    options = (
        *("--deny-client", "192.0.2.0/24", "--allow-client", rule_file(tmp_path)),
        *("--allow-client", "unix", "--hours", "00:00-24:00", "--max-sessions", "9"),
        *("--max-sessions-per-client", "9", "--max-connects-per-client", "9/1"),
        *("--client-prefix", "24,56", "--queue", "9", "--queue-timeout", "9"),
        *("--max-age", "1h", "--hours-end"),
    )
    with Server() as server:
        two = (*LISTEN, server.address, "-l", f"unix:{path}", "-d", server.address)
        with relay(*two, *options) as running:
            running.listening(2)
            with connect(running.port) as client, served(client, server):
                pass
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                with served(client, server):
                    pass
            running.sessions(2)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--max-sessions", "1"), "max_sessions"),
        (("--max-sessions-per-client", "1"), "max_sessions_per_client"),
        (("--max-connects-per-client", "1/3600"), "max_connects_per_client"),
    ],
)
def test_limits_of_sessions(option: tuple[str, ...], reason: str) -> None:
    """A place is free again when a session has ended; a rate goes by time."""
    with (
        Server() as server,
        relay(*LISTEN, server.address, *option, "--drain-timeout", "1") as running,
    ):
        with connect(running.port) as first, served(first, server):
            assert is_refused(running.port)
            running.ended("refused")
            running.wait_for(f"detail='{reason}: {option[0]} {option[1]}'")
        running.sessions(2)
        if reason.startswith("max_sessions"):
            with connect(running.port) as third:
                served(third, server).close()
        else:
            assert is_refused(running.port)


def test_a_queue() -> None:
    """In order; who leaves is forgotten, and nobody is read."""
    with (
        Server() as server,
        relay(
            *(*LISTEN, server.address, "--max-sessions", "1", "--queue", "2"),
            *("--queue-timeout", "50", "--connect-timeout", "1", "--verbose"),
        ) as running,
    ):
        first = connect(running.port)
        upstream = served(first, server)
        leaves, second = connect(running.port), connect(running.port)
        second.sendall(b"waits")
        assert is_refused(running.port)
        running.wait_for("detail='queue: --queue 2, with --max-sessions 1'")
        leaves.close()
        running.ended("client_left")
        first.close()
        upstream.close()
        with second, server.accept() as upstream:
            assert read_exactly(upstream, 5) == b"waits"
            upstream.sendall(b"done")
            upstream.shutdown(socket.SHUT_WR)
            second.shutdown(socket.SHUT_WR)
            assert read_all(second) == b"done"


def test_who_leaves_a_queue_with_something_unread() -> None:
    """It waits for no answer: a proxy's, or of a relay that does not half-close."""
    queue = ("--max-sessions", "1", "--queue", "2", "--connect-timeout=1", "--verbose")
    with Server() as server:
        port = int(server.address.rpartition(":")[2])
        request = write_request(Command.CONNECT, "127.0.0.1", port)
        proxy = (*LISTEN[:2], "--allow-dest", "127.0.0.0/8", *queue)
        with relay(*proxy, plugin="socks4") as running, connect(running.port) as first:
            first.sendall(request)
            with server.accept():
                assert read_exactly(first, 8)[1] == 90
                with connect(running.port) as leaves:
                    leaves.sendall(request)
                running.ended("client_left")
        off = (*LISTEN, server.address, *queue, "--half-close", "off")
        with relay(*off) as running, connect(running.port) as first:
            with served(first, server):
                with connect(running.port) as leaves:
                    leaves.sendall(b"question")
                running.ended("client_left")


@pytest.mark.parametrize("header", [b"", b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n"])
def test_who_waits_in_a_queue_for_an_answer(header: bytes) -> None:
    """A question that came with a PROXY header was read with it, and counts, too."""
    options = ("--max-sessions", "1", "--queue", "2", "--connect-timeout=1")
    accept = ("--accept-proxy", "127.0.0.0/8") if header else ()
    with (
        Server() as server,
        relay(*LISTEN, server.address, *options, "--verbose", *accept) as running,
        connect(running.port) as first,
        connect(running.port) as waits,
    ):
        first.sendall(header)
        upstream = served(first, server)
        waits.sendall(header + b"question")
        waits.shutdown(socket.SHUT_WR)
        # It is asked after that one, which is the last that has ended.
        with connect(running.port) as leaves:
            leaves.sendall(header)
        running.ended("client_left")
        first.close()
        upstream.close()
        with server.accept() as upstream:
            assert read_all(upstream) == b"question"
            upstream.sendall(b"answer")
        assert read_all(waits) == b"answer"


def test_who_waits_for_too_long_is_refused() -> None:
    options = ("--max-sessions", "1", "--queue", "2", "--queue-timeout", "250ms")
    with Server() as server, relay(*LISTEN, server.address, *options) as running:
        with connect(running.port) as first, served(first, server):
            assert is_refused(running.port)
            running.wait_for("detail='queue_timeout: --queue-timeout 0.25'")


def test_a_drain_does_not_wait_for_those_who_wait() -> None:
    options = ("--max-sessions", "1", "--queue", "2", "--drain-timeout", "60")
    with Server() as server, relay(*LISTEN, server.address, *options) as running:
        first = connect(running.port)
        upstream = served(first, server)
        with connect(running.port) as second:
            with connect(running.port):
                assert is_refused(running.port), "the two before it wait"
                running.signal()
                assert is_reset(second)
            first.close()
            upstream.close()
        assert running.wait() == 0


def test_sessions_have_an_age() -> None:
    options = ("--max-age", "1s", "--connect-timeout", "1")
    with Server() as server, relay(*LISTEN, server.address, *options) as running:
        with connect(running.port) as client, served(client, server):
            assert is_reset(client)
        [session] = running.ended("max_age")
        assert float(session["duration"]) >= 0.97


def test_a_proxy_has_the_same_limits() -> None:
    """In the file, where each relay has its own."""
    with Server() as server:
        port = int(server.address.rpartition(":")[2])
        listen = ("--listen", "127.0.0.1:0", "--allow-dest", "127.0.0.0/8")
        with relay(*listen, "--max-sessions", "1", plugin="socks4") as running:
            with connect(running.port) as first:
                first.sendall(write_request(Command.CONNECT, "127.0.0.1", port))
                with server.accept():
                    assert read_exactly(first, 8)[1] == 90
                    assert is_refused(running.port)
            running.wait_for("detail='max_sessions: --max-sessions 1'")


def test_relays_of_a_file_have_their_own(tmp_path: Path) -> None:
    """All three kinds; one list of clients, in its order."""
    path = tmp_path / "relayd.toml"
    with Server() as server, UdpServer() as udp:
        path.write_text(f"""
[tcp.open]
listen = "127.0.0.1:0"
dest = "{server.address}"
clients = ["deny 127.0.0.2", "allow {rule_file(tmp_path)}"]
[tcp.shut]
listen = "127.0.0.1:0"
dest = "{server.address}"
hours = ["{never()}"]
hours_end = true
[udp.dns]
listen = "127.0.0.1:0"
dest = "{udp.address}"
clients = "deny 127.0.0.0/8"
max_connects_per_client = "10/1"
[socks4.proxy]
listen = "127.0.0.1:0"
max_sessions = 5
max_sessions_per_client = 5
queue = 3
queue_timeout = "5s"
clients = "deny 127.0.0.1"
""")
        with relay("--config", str(path)) as running:
            ports = [int(each.rpartition(":")[2]) for each in running.listening(4)]
            names = ("open", "shut", "dns", "proxy")
            by_name = dict(zip(names, ports, strict=True))
            with connect(by_name["open"]) as client, served(client, server):
                pass
            assert is_refused(by_name["open"], "127.0.0.2")
            assert is_refused(by_name["shut"])
            assert is_refused(by_name["proxy"])
            with udp_client(by_name["dns"]) as client:
                client.send(b"?")
                running.wait_for("dns: no flow for .*: client: --deny-client 127")
            running.wait_for("detail='client: --deny-client 127.0.0.2'")
            running.wait_for("detail='hours: outside --hours")
