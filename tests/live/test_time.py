"""The relay when the machine's clock is set, and when it was stopped itself.

Over real sockets, as in the other live tests.  The clock is that of `stepped`;
what a stopped relay has missed is there to be read when it goes on.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.core.names import host_port
from relayd.preludes.socks4 import Code, Command, Reply, write_request
from tests.live.test_socks4 import reply
from tests.support.live_relays import full_backlog, seldom
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    UdpServer,
    command,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    udp_client,
)
from tests.support.stepped import MachinesClock

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind", "connections_of"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's /proc"),
]

#: Seconds, of the steps.
HOUR = 3600.0

#: Longer than a relay takes to look at every session and every flow once, in seconds.
A_LOOK = 1.3

#: The timeout of a relay that is to be stopped, in seconds, and for how long it is:
#: a dial whose first segment was dropped sends the next one after a second (RFC 6298).
TIMEOUT, STOPPED = 1.0, 1.4


@pytest.fixture
def machines_clock(tmp_path: Path) -> MachinesClock:
    return MachinesClock(tmp_path / "clock")


@pytest.fixture
def udp_server() -> Iterator[UdpServer]:
    with UdpServer() as bound:
        yield bound


def on(clock: MachinesClock) -> tuple[str, ...]:
    """A `twistd` whose machine has this clock."""
    return (
        sys.executable,
        "-m",
        "tests.support.stepped",
        str(clock.path),
        *command()[1:],
    )


def ports(running: RelayProcess, count: int) -> list[int]:
    """Of its listeners."""
    return [int(each.rpartition(":")[2]) for each in running.listening(count)]


def session(
    held: ExitStack, port: int, server: Server
) -> tuple[socket.socket, socket.socket]:
    """The two ends of a session that has relayed something each way."""
    client = held.enter_context(connect(port))
    client.sendall(b"hello")
    upstream = held.enter_context(server.accept())
    upstream.sendall(read_exactly(upstream, 5))
    assert read_exactly(client, 5) == b"hello"
    return client, upstream


def flow(held: ExitStack, port: int, server: UdpServer) -> tuple[socket.socket, Any]:
    """A client that was answered, and the relay's address that the server saw."""
    client = held.enter_context(udp_client(port))
    client.send(b"hello")
    data, peer = server.receive()
    server.send(data, peer)
    assert client.recv(100) == b"hello"
    return client, peer


def mark(client: socket.socket) -> str:
    """What the log line of this client has, and no other."""
    return f"client=127.0.0.1:{client.getsockname()[1]} "


# -- the machine's clock is set


@seldom
def test_a_step_forward_ends_nobody(
    machines_clock: MachinesClock, server: Server, udp_server: UdpServer
) -> None:
    """Not by more than all of the timeouts; and nobody's duration is wrong."""
    args = ("-l", "127.0.0.1:0", "-d", server.address)
    args += ("-l", "udp:127.0.0.1:0", "-d", udp_server.address)
    with ExitStack() as held:
        running = held.enter_context(relay(*args, twistd=on(machines_clock)))
        tcp, udp = ports(running, 2)
        idle, upstream = session(held, tcp, server)
        half, answering = session(held, tcp, server)
        half.shutdown(socket.SHUT_WR)
        assert read_all(answering) == b""
        client, peer = flow(held, udp, udp_server)
        machines_clock.step(2 * HOUR)
        time.sleep(A_LOOK)
        upstream.sendall(b"still there")
        assert read_exactly(idle, 11) == b"still there"
        answering.sendall(b"answer")
        answering.close()
        assert read_all(half) == b"answer"
        client.send(b"again")
        assert udp_server.receive() == (b"again", peer)
        # Nothing is to be waited for at the end.
        udp_server.send(b"answer", peer)
        assert client.recv(100) == b"answer"
        machines_clock.step(-4 * HOUR)
        idle.close()
        upstream.close()
        running.signal()
        assert running.wait() == 0
        lines = running.sessions(2)
        assert {line["ending"] for line in lines} == {"done"}
        [line] = running.flows()
        for told in (*(line["duration"] for line in lines), line["age"]):
            assert 0 <= float(told) < 60


@seldom
def test_a_step_back_stops_no_deadline(
    machines_clock: MachinesClock, server: Server, udp_server: UdpServer
) -> None:
    """Of a session, a dial, a flow, or a drain."""
    options = ("--idle-timeout", "0.5", "--half-close-timeout", "0.4")
    options += ("--connect-timeout", "0.3", "--drain-timeout", "0.3")
    options += ("--udp-timeout", "1", "--udp-unreplied-timeout", "1")
    with ExitStack() as held:
        full = held.enter_context(full_backlog())
        args = ("-l", "127.0.0.1:0", "-d", server.address)
        args += ("-l", "127.0.0.1:0", "-d", full)
        args += ("-l", "udp:127.0.0.1:0", "-d", udp_server.address)
        running = held.enter_context(relay(*options, *args, twistd=on(machines_clock)))
        tcp, dead, udp = ports(running, 3)
        idle, _ = session(held, tcp, server)
        half, _ = session(held, tcp, server)
        half.shutdown(socket.SHUT_WR)
        dialling = held.enter_context(connect(dead))
        flow(held, udp, udp_server)
        machines_clock.step(-HOUR)
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
        assert dialling.recv(1) == b""
        [line] = running.ended("idle")
        assert 0.5 <= float(line["duration"]) < 60
        running.ended("half_closed")
        running.ended("connect_timeout")
        [line] = running.flows()
        assert 0 < float(line["age"]) < 60
        # And as it stops.
        late, _ = session(held, tcp, server)
        machines_clock.step(-HOUR)
        running.signal()
        running.wait_for("SIGTERM: stopping")
        machines_clock.step(-HOUR)
        with pytest.raises(ConnectionResetError):
            late.recv(1)
        assert running.wait() == 0
        running.ended("drained")


@seldom
def test_a_step_back_stops_no_handshake(
    machines_clock: MachinesClock, server: Server
) -> None:
    """Nor a BIND that nobody comes to."""
    options = ("--handshake-timeout", "0.5", "--bind-timeout", "0.5")
    args = (*options, "-l", "127.0.0.1:0")
    with ExitStack() as held:
        running = held.enter_context(
            relay(*args, plugin="socks4", twistd=on(machines_clock))
        )
        silent = held.enter_context(connect(running.port))
        binding = held.enter_context(connect(running.port))
        binding.sendall(write_request(Command.BIND, "127.0.0.1", 9))
        assert reply(binding).code == Code.GRANTED
        machines_clock.step(-HOUR)
        for each in (silent, binding):
            assert reply(each).code == Code.REJECTED
        running.ended("handshake_timeout")
        running.ended("bind_timeout")


# -- the relay was stopped


@contextmanager
def stopped(running: RelayProcess) -> Iterator[None]:
    """It does nothing for longer than its timeouts, beginning with this block."""
    # It has looked at those who are there, and seen how far they were.
    time.sleep(TIMEOUT / 4)
    running.signal(signal.SIGSTOP)
    status = Path(f"/proc/{running.process.pid}/status")
    eventually(lambda: "State:\tT" in status.read_text(), "it is stopped")
    begin = time.monotonic()
    try:
        yield
        time.sleep(max(0.0, STOPPED - (time.monotonic() - begin)))
    finally:
        running.signal(signal.SIGCONT)


@contextmanager
def busy_server() -> Iterator[tuple[str, socket.socket]]:
    """One that takes no client until it has accepted those it has."""
    with socket.socket() as listening, socket.socket() as first:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        listening.settimeout(PATIENCE)
        first.connect(listening.getsockname())
        yield host_port(*listening.getsockname()), listening


@seldom
def test_who_has_spoken_while_the_relay_was_stopped_is_not_cut(
    server: Server, udp_server: UdpServer
) -> None:
    """A session, one that is half-closed, a server that answers a dial, and a flow."""
    limit = f"{TIMEOUT:g}"
    options = ("--idle-timeout", limit, "--half-close-timeout", limit)
    options += ("--connect-timeout", limit)
    options += ("--udp-timeout", limit, "--udp-unreplied-timeout", limit)
    with ExitStack() as held:
        busy, listening = held.enter_context(busy_server())
        args = ("-l", "127.0.0.1:0", "-d", server.address)
        args += ("-l", "127.0.0.1:0", "-d", busy)
        args += ("-l", "udp:127.0.0.1:0", "-d", udp_server.address)
        running = held.enter_context(relay(*options, *args))
        tcp, dialled, udp = ports(running, 3)
        # On a busy machine this takes a while: those who are to be cut come first.
        silent, _ = session(held, tcp, server)
        mute, deaf = session(held, tcp, server)
        quiet, _ = flow(held, udp, udp_server)
        speaks, hears = session(held, tcp, server)
        asks, answers = session(held, tcp, server)
        for each, end in ((mute, deaf), (asks, answers)):
            each.shutdown(socket.SHUT_WR)
            assert read_all(end) == b""
        client, peer = flow(held, udp, udp_server)
        dialling = held.enter_context(connect(dialled))
        dialling.sendall(b"early")
        with stopped(running):
            listening.accept()[0].close()
            speaks.sendall(b"here")
            answers.sendall(b"answer")
            client.send(b"again")
            udp_server.socket.settimeout(0.05)
            with pytest.raises(TimeoutError):
                udp_server.receive()
            udp_server.socket.settimeout(PATIENCE)
        assert read_exactly(hears, 4) == b"here"
        assert read_exactly(asks, 6) == b"answer"
        assert udp_server.receive() == (b"again", peer)
        upstream = held.enter_context(listening.accept()[0])
        assert read_exactly(upstream, 5) == b"early"
        # And those who have not are.
        for each, ending in ((silent, "idle"), (mute, "half_closed")):
            [line] = running.wait_for(f"{mark(each)}.*ending=")
            assert f"ending={ending} " in line.string
        [line] = running.wait_for(f"flow relay=.* {mark(quiet)}")


@seldom
def test_a_handshake_that_was_finished_while_the_proxy_was_stopped_is_served(
    server: Server,
) -> None:
    """And a BIND whose peer has come; those who have said nothing are cut."""
    limit = f"{TIMEOUT:g}"
    options = ("--handshake-timeout", limit, "--bind-timeout", limit)
    port = server.socket.getsockname()[1]
    request = write_request(Command.CONNECT, "127.0.0.1", port)
    with ExitStack() as held:
        args = (*options, "-l", "127.0.0.1:0")
        running = held.enter_context(relay(*args, plugin="socks4"))
        client, half, silent, binding, waiting = (
            held.enter_context(connect(running.port)) for _ in range(5)
        )
        half.sendall(request[:4])
        where = []
        for each in (binding, waiting):
            each.sendall(write_request(Command.BIND, "127.0.0.1", 9))
            where.append(reply(each))
            assert where[-1].code == Code.GRANTED
        with stopped(running):
            client.sendall(request)
            half.sendall(request[4:])
            peer = held.enter_context(connect(where[0].port))
        for each in (client, half):
            assert reply(each) == Reply(Code.GRANTED, "127.0.0.1", port)
            held.enter_context(server.accept())
        assert reply(binding).code == Code.GRANTED
        peer.sendall(b"here")
        assert read_exactly(binding, 4) == b"here"
        for each, ending in ((silent, "handshake_timeout"), (waiting, "bind_timeout")):
            assert reply(each).code == Code.REJECTED
            running.wait_for(f"{mark(each)}.*ending={ending} ")
