"""A real UDP relay as a service: flows that expire, shutting down, the log."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack

import pytest

from tests.support.live_udp import (
    LISTEN,
    balanced,
    exchange,
    name,
    seldom,
    server,
    stage,
)
from tests.support.process import (
    DATAGRAM,
    PATIENCE,
    RelayProcess,
    UdpServer,
    udp_client,
)

__all__ = ["server", "stage"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


#: Longer than a relay of these tests takes to notice that a flow is over, in seconds.
WELL_EXPIRED = 3.0


# -- time


@seldom
def test_flows_expire_unless_something_moves(server: UdpServer) -> None:
    """Both ways of taking what a server sends, at once: they take their time."""
    options = (*LISTEN, "-d", server.address)
    options = (*options, "--udp-timeout", "1", "--udp-unreplied-timeout", "0.5")
    with ExitStack() as held:
        both = held.enter_context(balanced(*options))
        outbound = held.enter_context(balanced(*options, "--no-refresh-inbound"))
        sending, hearing, replied, unreplied, deaf = (
            held.enter_context(udp_client(running.port))
            for running in (both, both, both, both, outbound)
        )
        began = time.monotonic()
        peers = {
            client: exchange(client, server, b"go", b"on")
            for client in (sending, hearing, replied, deaf)
        }
        silent = exchange(unreplied, server, b"no answer, please")
        until = time.monotonic() + WELL_EXPIRED
        while time.monotonic() < until:
            # Refreshed ten times in the time that they have, or more seldom by a busy
            # machine.
            time.sleep(0.1)
            assert exchange(sending, server, b"alive") == peers[sending]
            server.send(b"alive", peers[hearing])
            assert hearing.recv(DATAGRAM) == b"alive"
            server.send(b"not enough", peers[deaf])
        # Either may be found to be over first.
        over = {flow["client"]: flow for flow in both.flows(2)}
        over |= {flow["client"]: flow for flow in outbound.flows()}
        expected = {
            name(unreplied): ("unreplied", 0.5),
            name(replied): ("expired", 0.5),
            name(deaf): ("expired", 0.5),
        }
        assert over.keys() == expected.keys()
        for who, (ending, least) in expected.items():
            assert over[who]["ending"] == ending
            assert least <= float(over[who]["age"]) < WELL_EXPIRED + 1
        # What is over is over: the same client gets another port.
        for client, old in ((replied, peers[replied]), (unreplied, silent)):
            assert exchange(client, server, b"anew", b"yes") != old
        # Those that went on are in use by now, and have the longer time.
        lasted = time.monotonic() - began
        in_use = {name(sending), name(hearing)}
        lines = [flow for flow in both.flows(6) if flow["client"] in in_use]
        assert {flow["client"] for flow in lines} == in_use
        for flow in lines:
            assert flow["ending"] == "expired"
            assert WELL_EXPIRED + 1 <= float(flow["age"]) < lasted + 1 + WELL_EXPIRED


# -- the end


@seldom
def test_sigterm_lets_replies_arrive(server: UdpServer) -> None:
    options = ("--drain-timeout", "60")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client, udp_client(running.port) as late:
            known = name(client)
            client.send(b"before")
            _, peer = server.receive()
            running.signal()
            running.wait_for("1 sessions may finish within 60 s")
            # It serves nobody new, and those whom it knows as before.
            late.send(b"too late")
            server.send(b"in time", peer)
            assert client.recv(DATAGRAM) == b"in time"
            assert exchange(client, server, b"one more", b"and back") == peer
            # When nothing moves any longer, it does not wait for the whole minute.
            assert running.wait() == 0
        # The late one got none.
        [flow] = running.flows()
        assert (flow["client"], flow["ending"]) == (known, "drained")
        assert (flow["up"], flow["down"]) == ("2/14", "2/15")


def test_sigterm_does_not_wait_for_ever(server: UdpServer) -> None:
    """A client that never stops has --drain-timeout, and no more."""
    options = ("--drain-timeout", "0.5")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client:
            exchange(client, server, b"hello", b"hello")
            running.signal()
            running.wait_for("may finish")
            limit = time.monotonic() + PATIENCE
            while running.process.poll() is None and time.monotonic() < limit:
                try:
                    client.send(b"and another thing")
                except ConnectionRefusedError:
                    # The listener is closed.
                    break
                time.sleep(0.05)
            assert running.wait() == 0
        [flow] = running.flows()
        assert flow["ending"] == "drained"
        assert 0.5 <= float(flow["age"]) < PATIENCE


def test_a_second_signal_ends_at_once(server: UdpServer) -> None:
    options = ("--drain-timeout", "60")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client:
            exchange(client, server, b"hello", b"hello")
            running.signal()
            running.wait_for("may finish")
            running.signal(signal.SIGINT)
            assert running.wait() == 0
        [flow] = running.flows()
        # Sooner than a flow that is quiet would have been found to be.
        assert float(flow["age"]) < 1
        assert not any("Traceback" in line for line in running.lines)


def test_a_port_that_is_taken() -> None:
    with UdpServer() as taken:
        process = RelayProcess("--listen", taken.address, "--dest", "udp:127.0.0.1:9")
        try:
            assert process.wait() == 1
        finally:
            process.stop()
        said = [line for line in process.lines if "UnixAppLogger" not in line]
        assert len(said) == 1
        assert said[0].endswith(
            f"relayd: can't listen on {taken.address}: Address already in use"
        )


def test_the_log_has_a_line_for_a_flow_and_none_for_its_datagrams(
    server: UdpServer,
) -> None:
    options = ("--drain-timeout", "0")
    listeners = ("-l", "udp:0", "-d", server.address)
    with balanced(*listeners, *options) as running:
        running.listening(2)
        hosts = ("127.0.0.3", "::1")
        seen = {}
        with ExitStack() as held:
            for host in hosts:
                client = held.enter_context(udp_client(running.port, host))
                peer = exchange(client, server, b"12345", b"123", b"", b"4")
                exchange(client, server, b"")
                address = client.getsockname()[1]
                seen[host] = (address, f"{peer[0]}:{peer[1]}")
            lines = len(running.lines)
            running.signal()
            assert running.wait() == 0
        flows = {each["listener"]: each for each in running.flows(2)}
        for host in hosts:
            shown = f"[{host}]" if ":" in host else host
            flow = flows[f"{shown}:{running.port}"]
            assert float(flow.pop("age")) < PATIENCE
            own, port = seen[host]
            mine = "[::1]" if ":" in host else "127.0.0.1"
            assert flow == {
                "relay": "relay1",
                "client": f"{mine}:{own}",
                "listener": f"{shown}:{running.port}",
                "port": port,
                "server": server.address.removeprefix("udp:"),
                "up": "2/5",
                "down": "3/4",
                "ending": "drained",
            }
        assert len([line for line in running.lines[:lines] if "flow " in line]) == 0
