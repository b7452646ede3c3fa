"""What drives the relays: other programs, and loads of the benchmark's own."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.children import CannotMeasure
from bench.connections import IdlePairs, client_hosts, short_connections, socks4_request
from bench.loads import (
    RATE,
    bulk,
    kept_requests,
    read_h2load,
    read_iperf3,
    read_wrk,
)
from bench.origins import BODY, NAME
from bench.tls_sessions import tls_sessions
from tests.support.certificates import Authority, server_context
from tests.support.process import PATIENCE, Server, eventually, read_all

IPERF3 = {
    "start": {"version": "iperf 3.12"},
    "intervals": [],
    "end": {
        "sum_sent": {"seconds": 1.000262, "bytes": 2816737280},
        "sum_received": {"seconds": 1.003305, "bytes": 2815426560},
    },
}


IPERF3_REFUSED = """{
	"start":	{ "connected":	[], "version":	"iperf 3.12" },
	"intervals":	[],
	"end":	{ },
	"error":	"unable to connect to server: Connection refused"
}"""


WRK = """\
Running 60m test @ http://127.0.0.1:21000/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   211.74us  175.54us   5.09ms   96.09%
    Req/Sec   107.53k    17.28k  140.19k    81.82%
  235337 requests in 2.20s, 40.40MB read
Requests/sec: 106916.84
Transfer/sec:     18.35MB
"""


H2LOAD = """\
starting benchmark...
finished in 1.00s, 3999.45 req/s, 703.03KB/s
requests: {total} total, {total} started, {total} done, {good} succeeded, {bad} failed,\
 {bad} errored, 0 timeout
status codes: {good} 2xx, 0 3xx, 0 4xx, 0 5xx
"""


def test_iperf3s_bytes_are_those_received() -> None:
    moved = read_iperf3(json.dumps(IPERF3))
    assert moved.bytes == 2815426560
    assert round(moved.gigabits, 2) == 22.45


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (IPERF3_REFUSED, "iperf3 reports an error: unable to connect to server"),
        ("iperf3: not found", "iperf3's output is not JSON: 'iperf3: not found'"),
        (
            '{"end": {"sum_received": {"seconds": 1, "bytes": 0}}}',
            "iperf3 moved nothing",
        ),
    ],
)
def test_iperf3s_errors_are_errors(text: str, message: str) -> None:
    with pytest.raises(CannotMeasure, match=re.escape(message)):
        read_iperf3(text)


def test_a_busy_server_of_iperf3_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = '{"error": "error - the server is busy running a test. try again later"}'
    told = tmp_path / "told"
    program = tmp_path / "iperf3"
    program.write_text(f"""\
#!/bin/sh
if [ -e {told} ]; then echo '{json.dumps(IPERF3)}'; else echo '{busy}'; fi
touch {told}
""")
    program.chmod(0o755)
    monkeypatch.setattr("bench.loads.program", lambda _: str(program))
    assert bulk(20000, 1, 10**9).bytes == 2815426560


def test_wrks_requests_are_read() -> None:
    assert read_wrk(WRK) == 235337


@pytest.mark.parametrize(
    "line",
    [
        "Socket errors: connect 0, read 10600, write 0, timeout 0",
        "Non-2xx or 3xx responses: 7",
    ],
)
def test_wrks_errors_are_errors(line: str) -> None:
    with pytest.raises(CannotMeasure) as caught:
        read_wrk(f"{WRK}  {line}\n")
    assert str(caught.value) == f"wrk reports an error: {line}"


def test_what_wrk_had_under_way_while_it_was_stopped_is_no_error() -> None:
    line = "Socket errors: connect 0, read 0, write 0, timeout 32"
    assert read_wrk(f"{WRK}  {line}\n") == 235337


def test_wrk_makes_requests_only_while_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the windows it is stopped; in the end it has its say."""
    program = tmp_path / "wrk"
    count = tmp_path / "count"
    count.touch()
    # Not in sh: dash loses a signal that comes as it starts a command.
    program.write_text(f"""\
#!{sys.executable}
import signal, sys, time
def end(*_):
    print("  7 requests in 1s")
    sys.exit()
signal.signal(signal.SIGINT, end)
while True:
    with open({str(count)!r}, "a") as file:
        print(file=file)
    time.sleep(0.01)
""")
    program.chmod(0o755)
    monkeypatch.setattr("bench.loads.program", lambda _: str(program))

    def made() -> int:
        return count.stat().st_size

    def wait_for(number: int) -> None:
        eventually(lambda: made() >= number)

    with kept_requests(20000, 1, wait_for) as kept:
        # What it was about to write when it was stopped may come yet.
        time.sleep(0.05)
        for _ in range(2):
            before = made()
            time.sleep(0.1)
            assert made() == before
            with kept.under_way():
                wait_for(before + 2)
            time.sleep(0.05)


@pytest.mark.parametrize("text", ["", "  0 requests in 2.20s, 0.00B read\n"])
def test_no_response_to_wrk_is_an_error(text: str) -> None:
    with pytest.raises(CannotMeasure, match="wrk got no response"):
        read_wrk(text)


def h2load_log(seconds: float, rate: int) -> str:
    """Requests at that rate, each of which takes as many microseconds as its number."""
    step = 1_000_000 // rate
    return "".join(
        f"{1795220871920927 + number * step}\t200\t{number}\n"
        for number in range(int(seconds * rate))
    )


def test_h2loads_requests_count_from_half_a_second_on() -> None:
    output = H2LOAD.format(total=RATE, good=RATE, bad=0)
    took = read_h2load(output, h2load_log(1.0, RATE))
    assert took == [float(number) for number in range(RATE // 2, RATE)]


def test_h2loads_failures_are_errors() -> None:
    output = H2LOAD.format(total=RATE, good=RATE - 1, bad=1)
    with pytest.raises(CannotMeasure, match="h2load reports an error: requests: 4000"):
        read_h2load(output, h2load_log(1.0, RATE))


def test_a_rate_that_is_not_kept_is_an_error() -> None:
    output = H2LOAD.format(total=RATE, good=RATE, bad=0)
    with pytest.raises(CannotMeasure, match="the rate was 300. requests a second, not"):
        read_h2load(output, h2load_log(1.0, 3000))


def test_h2load_without_a_report_is_an_error() -> None:
    with pytest.raises(CannotMeasure, match="h2load reports an error: it crashed"):
        read_h2load("it crashed", "")


@contextmanager
def answering(
    answer: bytes, endings: list[bool], count: int, came: list[str] | None = None
) -> Iterator[int]:
    """A server that answers `count` connections, and the port it is on.

    It closes those that ask for that, and notes whether the client, of each of the
    others, ended first.

    :param came: gets the clients' addresses.
    """

    def serve(server: Server) -> None:
        for _ in range(count):
            with server.accept() as connection:
                if came is not None:
                    came.append(connection.getpeername()[0])
                asked = connection.recv(65536)
                connection.sendall(answer)
                if b"Connection: close" in asked:
                    connection.shutdown(socket.SHUT_WR)
                    endings.append(False)
                # Nothing is read twice: the client has nothing more to say.
                assert read_all(connection) == b""
                if b"Connection: close" not in asked:
                    endings.append(True)

    with Server() as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield server.socket.getsockname()[1]
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_short_connections_that_the_client_closes() -> None:
    """The server would keep them: that they end at all is the client's doing."""
    endings: list[bool] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, endings, 50) as port:
        short_connections(port, 50, "client")
    assert endings == [True] * 50


def test_clients_that_are_each_another() -> None:
    hosts = list(client_hosts())
    assert len(set(hosts)) == len(hosts) == 10_000
    came: list[str] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, [], 50, came) as port:
        short_connections(port, 50, "server", hosts=iter(hosts))
    assert sorted(came) == sorted(hosts[:50])


def test_short_connections_that_the_server_closes() -> None:
    endings: list[bool] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, endings, 50) as port:
        short_connections(port, 50, "server")
    assert endings == [False] * 50


def test_tls_sessions(tmp_path: Path) -> None:
    """Each has a handshake with the server that has the name, and one request."""
    authority = Authority(tmp_path)
    context = server_context(authority.issue(NAME))
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    answers = [BODY, BODY, b"no"]

    def serve(server: Server) -> None:
        for answer in answers:
            with context.wrap_socket(server.accept(), server_side=True) as session:
                assert b"Connection: close" not in session.recv(65536)
                session.sendall(answer)
                if answer == BODY:
                    assert session.recv(1) == b""

    with Server() as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        port = server.socket.getsockname()[1]
        tls_sessions(port, 2, authority.file)
        with pytest.raises(CannotMeasure, match="TLS session ended without"):
            tls_sessions(port, 1, authority.file)
        thread.join(PATIENCE)
    assert names == [NAME] * 3


def test_tls_sessions_that_are_refused_are_an_error(tmp_path: Path) -> None:
    trusted = Authority(tmp_path).file
    with Server() as server:
        port = server.socket.getsockname()[1]
    with pytest.raises(CannotMeasure, match="a TLS session failed"):
        tls_sessions(port, 1, trusted)


GRANT = b"\0\x5a\x4e\x21\x7f\0\0\x01"


@contextmanager
def proxying(
    replies: list[bytes], count: int, told: list[bytes], clients: list[tuple[str, int]]
) -> Iterator[int]:
    """A SOCKS4 proxy that answers `count` requests itself, and the port it is on.

    :param replies: its reply, in the pieces that it sends.
    :param told: gets what clients send up to the reply's end, and then the rest.
    :param clients: gets where they connect from.
    """

    def serve(server: Server) -> None:
        for _ in range(count):
            with server.accept() as connection:
                clients.append(connection.getpeername())
                asked = connection.recv(65536)
                for piece in replies:
                    # Who does not wait for the whole of it has spoken by now.
                    time.sleep(0.02)
                    connection.setblocking(False)
                    with suppress(BlockingIOError):
                        asked += connection.recv(65536)
                    connection.settimeout(PATIENCE)
                    connection.sendall(piece)
                told.append(asked)
                told.append(connection.recv(65536))
                if told[-1]:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
                    assert read_all(connection) == b""

    with Server() as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield server.socket.getsockname()[1]
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_socks4_request_is_that_of_the_protocol() -> None:
    """Version, CONNECT, port, address, and the end of an empty user id."""
    assert socks4_request(0x4E21) == b"\x04\x01\x4e\x21\x7f\0\0\x01\0"


def test_a_short_session_awaits_the_proxys_reply() -> None:
    told: list[bytes] = []
    with proxying([GRANT[:3], GRANT[3:]], 2, told, []) as port:
        short_connections(port, 2, "client", socks4_to=20001)
    asked, request = told[::2], told[1::2]
    assert asked == [socks4_request(20001)] * 2
    assert all(text.startswith(b"GET / HTTP/1.1\r\n") for text in request)


def test_a_proxys_clients_use_no_ephemeral_ports() -> None:
    clients: list[tuple[str, int]] = []
    with proxying([GRANT], 20, [], clients) as port:
        short_connections(port, 20, "client", socks4_to=20001)
    given_away = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert len(set(clients)) == 20
    assert all(port < int(given_away[0]) for _, port in clients)


def test_a_source_in_use_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[tuple[str, int]] = []
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.2.0.1", 0))
        sources = [taken.getsockname(), free.getsockname()]
        free.close()
        monkeypatch.setattr("bench.connections._sources", iter(sources))
        with proxying([GRANT], 1, [], clients) as port:
            short_connections(port, 1, "client", socks4_to=20001)
    assert clients == sources[1:]


def test_a_short_session_that_is_refused_is_an_error() -> None:
    with proxying([b"\0\x5b" + GRANT[2:]], 1, [], []) as port:
        with pytest.raises(
            CannotMeasure, match=r"the proxy's reply does not grant: .*\["
        ):
            short_connections(port, 1, "client", socks4_to=20001)


def test_bulk_goes_through_a_proxy_by_proxychains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    class Ran:
        def output(self, *_: float, **__: bool) -> str:
            return json.dumps(IPERF3)

    @contextmanager
    def run(_: str, argv: list[str], folder: Path, **__: bool) -> Iterator[Ran]:
        ran.extend(argv)
        ran.append((folder / "proxychains.conf").read_text())
        yield Ran()

    monkeypatch.setattr("bench.loads.program", lambda name: name)
    monkeypatch.setattr("bench.loads.child", run)
    assert bulk(20000, 1, 10**9, socks4_to=20001).bytes == 2815426560
    words = " ".join(ran)
    assert "proxychains4 -q -f proxychains.conf iperf3 -c 127.0.0.1 -p 20001 " in words
    assert "-P 1 -n 1000000000" in words
    assert "socks4 127.0.0.1 20000\n" in words


def test_a_short_connection_without_its_response_is_an_error() -> None:
    with answering(b"HTTP/1.1 500 No\r\n\r\n", [], 1) as port:
        with pytest.raises(CannotMeasure, match="ended without its response"):
            short_connections(port, 1, "server")


def test_a_refused_short_connection_is_an_error() -> None:
    with Server() as server:
        port = server.socket.getsockname()[1]
    with pytest.raises(CannotMeasure, match="a short connection failed"):
        short_connections(port, 1, "client")


def test_kept_connections_take_turns() -> None:
    """Each of three makes its opening request and two of the six that follow."""
    requests: dict[int, int] = {}

    def serve(connection: socket.socket, number: int) -> None:
        with connection, suppress(ConnectionResetError):
            while connection.recv(65536):
                requests[number] = requests.get(number, 0) + 1
                connection.sendall(BODY)

    with Server() as server:
        pairs = IdlePairs(server.socket.getsockname()[1])

        def accept() -> None:
            for number in range(3):
                threading.Thread(target=serve, args=(server.accept(), number)).start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        pairs.grow(3)
        accepting.join(PATIENCE)
        pairs.take_turns(6)
        pairs.close()
    assert requests == {0: 3, 1: 3, 2: 3}
