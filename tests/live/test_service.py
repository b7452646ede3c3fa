"""A real TCP relay as a service: descriptors, shutting down, the log.

Each test runs on each kind of connections that relayd has (`process`), but for those
marked `once`: what they look at does not depend on it.
"""

from __future__ import annotations

import re
import resource
import signal
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from relayd.core.names import host_port
from tests.support.live_relays import (
    NEVER,
    chain,
    echo_once,
    full_backlog,
    in_thread,
    once,
    refused_address,
    seldom,
)
from tests.support.process import (
    PATIENCE,
    TWIST,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")


# -- descriptors


@seldom
def test_nothing_is_left_after_1000_sessions_of_every_ending(server: Server) -> None:
    """Two plain sockets part in every order; servers refuse, hang, have no address."""
    timeouts = (
        *("--stall-timeout", "0.3", "--idle-timeout", "1.5"),
        *("--half-close-timeout", "0.4", "--connect-timeout", "0.5"),
    )

    def client_first(client: socket.socket, upstream: socket.socket) -> None:
        client.close()
        read_all(upstream)
        upstream.close()

    def server_first(client: socket.socket, upstream: socket.socket) -> None:
        upstream.close()
        read_all(client)
        client.close()

    def both_at_once(client: socket.socket, upstream: socket.socket) -> None:
        client.close()
        upstream.close()

    def half_then_answer(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        read_all(upstream)
        upstream.sendall(b"answer")
        upstream.close()
        read_all(client)
        client.close()

    def client_resets(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        upstream.close()

    def server_resets(client: socket.socket, upstream: socket.socket) -> None:
        reset(upstream)
        client.close()

    def client_resets_first(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
        upstream.close()

    def server_resets_first(client: socket.socket, upstream: socket.socket) -> None:
        reset(upstream)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()

    def both_reset(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        reset(upstream)

    def reset_after_half(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        read_all(upstream)
        reset(client)
        with suppress(ConnectionError):
            upstream.sendall(b"to nobody")
        upstream.close()

    def leaves_unread(client: socket.socket, upstream: socket.socket) -> None:
        upstream.sendall(bytes(100_000))
        client.close()
        upstream.close()

    def writes_to_the_dead(client: socket.socket, upstream: socket.socket) -> None:
        upstream.close()
        with suppress(ConnectionError):
            client.sendall(bytes(100_000))
        client.close()

    def hears_the_end_and_writes(
        client: socket.socket, upstream: socket.socket
    ) -> None:
        upstream.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"is there anybody")
        client.close()

    held: list[socket.socket] = []
    flood, floods = bytes(1 << 26), []

    def until_it_is_cut(sender: socket.socket) -> None:
        with suppress(ConnectionError):
            sender.sendall(flood)

    def server_never_reads(client: socket.socket, upstream: socket.socket) -> None:
        floods.append(in_thread(lambda: until_it_is_cut(client)))
        held.extend((client, upstream))

    def goes_silent(client: socket.socket, upstream: socket.socket) -> None:
        held.extend((client, upstream))

    def goes_silent_half(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        held.extend((client, upstream))

    def never_reads(client: socket.socket, upstream: socket.socket) -> None:
        floods.append(in_thread(lambda: until_it_is_cut(upstream)))
        held.extend((client, upstream))

    # Who parts without a look at the other end may be met in any order; each ending
    # is certain, too, where they wait for each other.
    certain = [client_resets_first, server_resets_first, hears_the_end_and_writes]
    ways = [
        *(client_first, server_first, both_at_once, half_then_answer),
        *(client_resets, server_resets, both_reset, reset_after_half),
        *(leaves_unread, writes_to_the_dead, goes_silent, goes_silent_half),
        *certain,
    ]
    with ExitStack() as stack:
        silent = stack.enter_context(full_backlog())
        nowhere = [refused_address(), silent, "no-such-host.invalid:80"]
        elsewhere = [
            word for each in nowhere for word in ("-l", "127.0.0.1:0", "-d", each)
        ]
        running = stack.enter_context(chain(server, 1, "-v", *timeouts, *elsewhere))
        # `chain` puts its own listener last.
        *unreachable, to_server = (
            int(where.rpartition(":")[2]) for where in running.listening(4)
        )
        before = running.descriptors
        for number in range(1000):
            if number % 20 == 0:
                client = connect(unreachable[number // 20 % 3])
                if number % 40:
                    reset(client)
                else:
                    held.append(client)
                continue
            client = connect(to_server)
            upstream = server.accept()
            if number % 100 == 1:
                never_reads(client, upstream)
                continue
            if number % 100 == 51:
                server_never_reads(client, upstream)
                continue
            client.sendall(b"hello")
            way = ways[number % len(ways)]
            if number % 3 or way in certain:
                assert read_exactly(upstream, 5) == b"hello"
            way(client, upstream)
        running.sessions(1000)
        eventually(lambda: running.descriptors == before, "all descriptors closed")
        endings = {line["ending"] for line in running.sessions(1000)}
        assert endings >= {
            *("done", "downstream_reset", "upstream_reset", "idle", "half_closed"),
            *("downstream_stalled", "upstream_stalled", "upstream_write_failed"),
            *("connect_refused", "connect_timeout", "unresolved", "client_left"),
        }
        assert not any("Traceback" in line for line in running.lines)
        for thread in floods:
            thread.join()
        for sock in held:
            sock.close()


@seldom
def test_a_full_descriptor_table_is_survived(server: Server) -> None:
    limit = 60

    def low_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    options = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*options, preexec_fn=low_limit) as running:
        with ExitStack() as held:
            began = time.monotonic()
            clients = [held.enter_context(connect(running.port)) for _ in range(100)]
            running.wait_for("hardly any file descriptor is left")
            served = []
            server.socket.settimeout(0.5)
            with suppress(TimeoutError):
                while True:
                    served.append(held.enter_context(server.accept()))
            server.socket.settimeout(PATIENCE)
            assert 10 <= len(served) < limit // 2
            time.sleep(1.5)
            assert running.process.poll() is None
            lines = [x for x in running.lines if "file descriptor" in x]
            took = time.monotonic() - began
            assert len(lines) <= 1 + took, "once a second at most"
            # Those who waited in the kernel's queue are served as others leave.
            waiting = len(clients) - len(served)
            for client in clients[: len(served)]:
                client.close()
            for upstream in served:
                assert read_all(upstream) == b""
                upstream.close()
            late = [held.enter_context(server.accept()) for _ in range(len(served))]
            assert late
            assert waiting >= len(late)
        with connect(running.port) as client:
            client.sendall(b"x")
        assert not any("Traceback" in line for line in running.lines)


# -- shutting down


def test_sigterm_lets_sessions_finish(server: Server) -> None:
    with chain(server, 1, "--drain-timeout", NEVER) as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            port = running.port
            running.signal()
            running.wait_for("1 sessions may finish")
            with pytest.raises(ConnectionRefusedError):
                connect(port)
            client.sendall(b"goodbye")
            assert read_exactly(upstream, 7) == b"goodbye"
            upstream.close()
            assert read_all(client) == b""
        assert running.wait() == 0
        running.ended("done")


@once
@pytest.mark.parametrize("program", ["twistd", "twist"])
def test_sigterm_may_accept_clients_a_little_longer(
    server: Server, program: str
) -> None:
    """One that comes within the delay is served, and may finish after it."""
    how: dict[str, Any] = {}
    if program == "twist":
        how["twistd"] = (TWIST, "--log-format=text")
    with chain(server, 1, "--shutdown-delay", "2", **how) as running:
        running.signal()
        running.wait_for("SIGTERM: stopping")
        running.wait_for("clients are accepted for 2 s more")
        with connect(running.port) as client, server.accept() as upstream:
            client.sendall(b"question")
            assert read_exactly(upstream, 8) == b"question"
            running.wait_for("1 sessions may finish within 10 s")
            with pytest.raises(ConnectionRefusedError):
                connect(running.port)
            upstream.sendall(b"answer")
            upstream.close()
            assert read_all(client) == b"answer"
        assert running.wait() == 0
        running.ended("done")


@seldom
def test_a_drain_ends_idle_sessions_first(server: Server) -> None:
    """One after another; who waits for an answer gets it, and who speaks goes on."""
    with (
        # So that sessions are checked often.
        chain(server, 1, "--drain-timeout", "4", "--stall-timeout", "0.4") as running,
        ExitStack() as opened,
    ):

        def session() -> tuple[socket.socket, socket.socket]:
            client = opened.enter_context(connect(running.port))
            return client, opened.enter_context(echo_once(server, client, b"hello"))

        idle = [session() for _ in range(8)]
        (waits, to_waits), (speaks, to_speaks) = session(), session()
        for _ in range(8):
            # So that the kernels are used to answers.
            for client, upstream in idle:
                client.sendall(b"question")
                assert read_exactly(upstream, 8) == b"question"
                upstream.sendall(b"answer")
                assert read_exactly(client, 6) == b"answer"
        waits.sendall(b"question")
        assert read_exactly(to_waits, 8) == b"question"
        running.signal()
        running.wait_for("10 sessions may finish")
        while len([line for line in running.lines if "ending=drained" in line]) < 2:
            speaks.sendall(b"more")
            assert read_exactly(to_speaks, 4) == b"more"
        first = running.ended("drained", 2)
        assert {each["client"] for each in first} <= {
            host_port(*client.getsockname()) for client, _ in idle
        }
        assert running.wait_for(r"ending=drained .*nothing moved for \d")
        to_waits.sendall(b"answer")
        assert read_exactly(waits, 6) == b"answer"
        # The others are still there; the second signal ends them.
        assert len([line for line in running.lines if "ending=" in line]) < 8
        running.signal()
        assert running.wait() == 0
        running.ended("drained", 10)
        for client, upstream in idle:
            for sock in (client, upstream):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


@once
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_delay_too(server: Server, second: str) -> None:
    with chain(server, 1, "--shutdown-delay", NEVER) as running:
        with connect(running.port) as client, server.accept():
            running.signal(signal.SIGINT)
            running.wait_for("clients are accepted for")
            running.signal(signal.Signals[second])
            with pytest.raises(ConnectionResetError):
                read_all(client)
            assert running.wait() == 0
        running.ended("drained")
        running.wait_for(f"{second} again: ending at once")


@once
def test_sigterm_does_not_wait_for_ever(server: Server) -> None:
    with chain(server, 1, "--drain-timeout", "0.3") as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            running.signal()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            upstream.close()
        assert running.wait() == 0
        running.ended("drained")


@once
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(server: Server, second: str) -> None:
    with chain(server, 1, "--drain-timeout", NEVER) as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            running.signal()
            running.wait_for("may finish")
            running.signal(getattr(signal, second))
            assert running.wait() == 0
            upstream.close()
        running.ended("drained")
        assert not any("Traceback" in line for line in running.lines)


# -- the log


@once
def test_the_log_has_a_line_for_a_session_and_none_for_its_chunks(
    server: Server,
) -> None:
    with chain(server, 1) as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        for _ in range(50):
            upstream.sendall(b"chunk")
            assert read_exactly(client, 5) == b"chunk"
        upstream.close()
        assert read_all(client) == b""
        client.close()
        [line] = running.ended("done")
        assert line["listener"] == f"127.0.0.1:{running.port}"
        assert line["upstream"] == server.address
        assert (line["up"], line["down"]) == ("5", "255")
        assert float(line["duration"]) >= 0
        text = [x for x in running.lines if "twistd" not in x and "reactor" not in x]
        assert len(text) == 2, "one line for the listener, one for the session"


@once
def test_verbose_shows_opens_and_dials(server: Server) -> None:
    with chain(server, 1, "--verbose") as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        upstream.close()
        running.wait_for(r"opened session=1 relay=relay\d+ client=127.0.0.1:")
        to = f"upstream={re.escape(server.address)}"
        running.wait_for(rf"dialing session=1 relay=relay\d+ {to}")
        running.wait_for(rf"connected session=1 relay=relay\d+ {to}")
