"""What becomes of living flows as their relay gets other servers, over real sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.operating.test_changes_live import arrives, asks, relaying, web
from tests.support.process import TRANSPORTS
from tests.support.steered import HOST, ME, at, datagrams, whole

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


@pytest.mark.parametrize("cut", [True, False])
def test_a_flow_of_before_leaves_a_server_that_goes_down(
    tmp_path: Path, kind: str, cut: bool
) -> None:
    """Whatever was changed meanwhile, of the servers too: at once, or as it is silent
    when its client asks."""
    dest = [at(20009), at(20008)]
    tables = web()
    tables["web"]["dest"] = dest
    if cut:
        # It takes checks, which say nothing here.
        checks = {"check": "http://:20006/", "check_every": 600, "fall": 9}
        tables["web"] |= {"on_down": "cut", **checks}
    with (
        relaying(tmp_path, kind, udp=tables) as ends,
        datagrams(20009) as server,
        datagrams(20008) as other,
        datagrams() as client,
    ):
        relayd = ends.relayd
        for each in (server, other, client):
            each.setblocking(False)
        asks(client, 20001, b"1")
        server.sendto(b"answer", arrives(ends, server, b"1"))
        arrives(ends, client, b"answer")
        relayd.set("web", max_fails=7)
        relayd.set("web", dest=[*dest, f"{at(20007)},backup"])
        relayd.set("web", udp_timeout=60)
        [first, *_] = whole(relayd.steered.servers("web"))["servers"]
        assert (first["address"], first["sessions"]) == (at(20009), 1)
        relayd.steered.set_server("web", at(20009), "down", None, None, ME)
        if not cut:
            for data in (b"a", b"b"):
                asks(client, 20001, data)
                arrives(ends, server, data)
                ends.reactor.advance(1)
                ends.reactor.turn()
        asks(client, 20001, b"2")
        other.sendto(b"answer", arrives(ends, other, b"2"))
        arrives(ends, client, b"answer")
        rows = whole(relayd.steered.servers("web"))["servers"]
        assert [each["sessions"] for each in rows] == [0, 1, 0]


def test_a_flow_of_before_follows_the_name_of_its_server(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That moves after a change: when its old address refuses."""
    tables = {"d": {"listen": at(20001), "dest": "server.example:20009"}}
    monkeypatch.setattr(
        "relayd.datagrams.servers.ServerPool._look_up", lambda self: None
    )
    with (
        relaying(tmp_path, kind, udp=tables) as ends,
        datagrams(20008) as server,
        datagrams() as client,
    ):
        relayd = ends.relayd
        server.setblocking(False)
        with datagrams(20009) as old:
            old.setblocking(False)
            relayd.served("d").servers[0].found([(socket.AF_INET, (HOST, 20009))])
            asks(client, 20001, b"1")
            old.sendto(b"answer", arrives(ends, old, b"1"))
            client.setblocking(False)
            arrives(ends, client, b"answer")
            for number in (1, 2):
                relayd.set("d", udp_timeout=60 + number)
        relayd.served("d").servers[0].found([(socket.AF_INET, (HOST, 20008))])
        for _ in range(2):
            asks(client, 20001, b"2")
            ends.reactor.turn()
        arrives(ends, server, b"2")
        [flow] = relayd.served("d").table
        assert flow.server is relayd.served("d").servers[0]


def test_datagrams_of_a_flow_of_before_go_to_the_servers_of_now(
    tmp_path: Path, kind: str
) -> None:
    """To a single one, which has no pool, and to several again."""
    tables = web(udp_balance="datagram")
    tables["web"]["dest"] = [at(20009), at(20008)]
    with (
        relaying(tmp_path, kind, udp=tables) as ends,
        datagrams(20008) as one,
        datagrams(20007) as other,
        datagrams() as client,
    ):
        for each in (one, other):
            each.setblocking(False)

        def ask(*said: bytes) -> None:
            for data in said:
                asks(client, 20001, data)
                ends.reactor.turn()

        ask(b"1", b"2")
        port = arrives(ends, one, b"2")
        ends.relayd.set("web", dest=at(20007))
        ask(b"3", b"4")
        for data in (b"3", b"4"):
            assert arrives(ends, other, data) == port
        ends.relayd.set("web", dest=[at(20007), at(20008)])
        ask(b"5", b"6")
        assert arrives(ends, other, b"5") == port
        assert arrives(ends, one, b"6") == port
