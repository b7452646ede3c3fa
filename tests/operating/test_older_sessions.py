"""Sessions of before a change of their servers: the pool in use serves them, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.operating.test_changes_live import Ends, relaying, web
from tests.support.process import TRANSPORTS
from tests.support.steered import ME, at

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)

#: Its servers, of which none may be chosen yet.
WAITS = {"dest": f"{at(20009)},disabled", "when_none": "wait=1m"}


def waiting(ends: Ends) -> Any:
    """A client for which there is no server."""
    served = ends.relayd.served("web")
    before = len(served.standby)
    client = ends.client(20001)
    client.sendall(b"first")
    ends.reactor.until(lambda: len(served.standby) > before, "it waits")
    return client


def test_a_client_that_waits_gets_a_server_of_the_next_pool(
    tmp_path: Path, kind: str
) -> None:
    """Before those that came after the change."""
    with relaying(tmp_path, kind, tcp={"web": {"listen": at(20001), **WAITS}}) as ends:
        server = ends.server(20009)
        older = waiting(ends)
        ends.relayd.set("web", retries=3, max_fails=3)
        assert ends.relayd.served("web").pool is not None
        younger = waiting(ends)
        ends.relayd.set("web", dest=[at(20009)])
        upstreams = [ends.accept(server), ends.accept(server)]
        for client, upstream in zip((older, younger), upstreams, strict=True):
            ends.hears(upstream, b"first")
            ends.talk(client, upstream)


def test_a_client_that_waits_gets_a_server_that_is_new(
    tmp_path: Path, kind: str
) -> None:
    with relaying(tmp_path, kind, tcp={"web": {"listen": at(20001), **WAITS}}) as ends:
        server = ends.server(20010)
        client = waiting(ends)
        ends.relayd.set("web", dest=[at(20010)])
        upstream = ends.accept(server)
        ends.hears(upstream, b"first")
        ends.talk(client, upstream)


def test_a_client_that_waits_goes_on_waiting_while_its_relay_is_stopped(
    tmp_path: Path, kind: str
) -> None:
    with relaying(tmp_path, kind, tcp={"web": {"listen": at(20001), **WAITS}}) as ends:
        server = ends.server(20009)
        client = waiting(ends)
        for what in ("stop", "start"):
            ends.relayd.do(what, "web")
        ends.relayd.steered.set_server("web", at(20009), "up", None, None, ME)
        upstream = ends.accept(server)
        ends.hears(upstream, b"first")
        ends.talk(client, upstream)


@pytest.mark.parametrize("changes", [0, 1, 3])
def test_a_server_that_goes_down_cuts_the_sessions_of_before_a_change(
    tmp_path: Path, kind: str, changes: int
) -> None:
    settings = {"check": "tcp", "check_every": "1h", "on_down": "cut"}
    with relaying(tmp_path, kind, tcp=web(**settings)) as ends:
        server = ends.server(20009)
        clients = []
        for number in range(changes + 1):
            if number:
                ends.relayd.set("web", max_fails=number)
            client = ends.client(20001)
            ends.talk(client, ends.accept(server))
            clients.append(client)
        relayd = ends.relayd
        [server_of] = relayd.served("web").pool.servers
        assert server_of.sessions == changes + 1
        server_of.checked(False, "it has failed")
        ends.reactor.turn()
        for each in clients:
            each.settimeout(1)
            with pytest.raises(ConnectionResetError):
                each.recv(1)
        assert server_of.sessions == 0
