"""Pools of servers by `twistd relayd`: retries, balance, limits, backups."""

from __future__ import annotations

import select
from collections import Counter
from contextlib import ExitStack

from tests.live.test_metrics import METRICS, Samples
from tests.support.live_relays import refused_address
from tests.support.process import (
    PATIENCE,
    Server,
    connect,
    eventually,
    read_all,
    relay,
)


def serve(port: int, server: Server) -> None:
    """One client is served by this server, and is over."""
    with connect(port) as client, server.accept() as upstream:
        client.sendall(b"question")
        assert upstream.recv(8) == b"question"


def test_a_server_that_refuses_costs_no_client_anything() -> None:
    dead = refused_address()
    with Server() as server:
        servers = ("-d", dead, "-d", f"{server.address},name=a")
        with relay(*METRICS, "-l", "127.0.0.1:0", *servers) as running:
            for _ in range(6):
                serve(running.port, server)
            sessions = running.sessions(6)
            assert {each["upstream"] for each in sessions} == {f"a/{server.address}"}
            tried = Counter(each["attempts"] for each in sessions)
            assert tried == {"1": 3, "2": 3}
            said = Samples(running)
            assert said("relayd_upstream_retries_total", relay="relay1") == 3
            assert said("relayd_upstream_weight", relay="relay1", upstream=dead) == 1


def test_a_backup_serves_while_the_others_refuse() -> None:
    with Server() as spare:
        args = ("-l", "127.0.0.1:0", "-d", refused_address())
        with relay(*args, "-d", f"{spare.address},backup") as running:
            serve(running.port, spare)
            [session] = running.sessions()
            assert session["attempts"] == "2"


def test_a_server_that_is_full_gets_no_more() -> None:
    with Server() as small, Server() as large:
        servers = ("-d", f"{small.address},max=1", "-d", large.address)
        options = ("--balance", "first", "-l", "127.0.0.1:0")
        with relay(*options, *servers) as running, ExitStack() as open_ones:
            for server in (small, large, large):
                open_ones.enter_context(connect(running.port))
                open_ones.enter_context(server.accept())


def test_with_nobody_left_a_client_is_refused_or_waits() -> None:
    with Server() as server:
        options = ("-l", "127.0.0.1:0", "-d", f"{server.address},max=1")
        with relay(*options) as running:
            with connect(running.port), server.accept(), connect(running.port) as other:
                assert read_all(other) == b""
            running.ended("no_upstream")
        with relay(*options, "--when-none", "wait=30") as running:
            with connect(running.port) as first, server.accept() as upstream:
                with connect(running.port) as second:
                    second.sendall(b"hello")
                    first.close()
                    upstream.close()
                    with server.accept() as another:
                        assert another.recv(5) == b"hello"


def test_a_client_comes_back_to_its_server() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server()) for _ in range(3)]
        args = [word for each in servers for word in ("-d", each.address)]
        options = ("--balance", "client-hash", "-l", "127.0.0.1:0")
        with relay(*options, *args) as running:
            for _ in range(4):
                with connect(running.port):
                    ready, _, _ = select.select(
                        [each.socket for each in servers], (), (), PATIENCE
                    )
                    with ready[0].accept()[0] as upstream:
                        # A session without a byte is not logged.
                        upstream.sendall(b"hello")
            [name] = {each["upstream"] for each in running.sessions(4)}
            assert name in {each.address for each in servers}


def test_servers_are_dialled_and_checked_in_their_own_ways() -> None:
    with Server() as one, Server() as two:
        servers = ("-d", f"{one.address},source=127.0.0.7", "-d", two.address)
        with relay("-l", "127.0.0.1:0", *servers) as running:
            for server, source in ((one, "127.0.0.7"), (two, "127.0.0.1")):
                with connect(running.port), server.accept() as upstream:
                    assert upstream.getpeername()[0] == source


def test_one_server_is_checked_and_the_other_is_not() -> None:
    with Server() as server:
        checked = f"{refused_address()},check=tcp"
        args = ("--check-every", "50ms", "--fall", "1", "-l", "127.0.0.1:0")
        with relay(*args, "-d", checked, "-d", server.address) as running:
            running.wait_for("relay1: .* is down: ")
            for _ in range(4):
                serve(running.port, server)
            assert {each["attempts"] for each in running.sessions(4)} == {"1"}


def test_a_server_whose_dials_fail_is_out_for_a_while() -> None:
    dead = refused_address()
    with Server() as server:
        args = ("--max-fails", "2", "--fail-time", "0.5s", "-l", "127.0.0.1:0")
        with relay(*args, "-d", dead, "-d", server.address) as running:
            for _ in range(6):
                serve(running.port, server)
            tried = [each["attempts"] for each in running.sessions(6)]
            assert Counter(tried) == {"1": 4, "2": 2}
            running.wait_for(f"relay1: {dead} is out: 2 dials have failed, .*0.5 s")
            with Server(address=_parts(dead)) as alive:
                # The time of its trial has come when it is chosen.
                running.wait_for("is out: .*")
                eventually(lambda: _is_served(running.port, alive, server))
                running.wait_for(f"relay1: {dead} is back: it is connected again")


def _parts(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


def _is_served(port: int, wanted: Server, other: Server) -> bool:
    """Whether a client comes to this server, and not to the other one."""
    with connect(port):
        ready, _, _ = select.select([wanted.socket, other.socket], (), (), PATIENCE)
        ready[0].accept()[0].close()
        return ready[0] is wanted.socket
