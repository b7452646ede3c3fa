"""Changes of a running relayd, with the errors and the meetings that they may have.

On a reactor that stands still, with real sockets: see :mod:`tests.support.steered`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.control.steering import Conflict, Invalid
from relayd.core.errors import ConfigError
from tests.conftest import LoggedFailures
from tests.support.ports import free_port
from tests.support.standing import refuse
from tests.support.steered import HOST, ME, Relayd, at, datagrams, result, running

#: A server that nobody is, and others beside it.
NOBODY = "127.0.0.1:9"
TWO = [NOBODY, "127.0.0.1:10"]


def tcp(port: int = 20001, dest: Any = NOBODY, **settings: Any) -> dict[str, Any]:
    relay = {"listen": at(port), "dest": dest, **settings}
    return {"transport": "twisted", "tcp": {"a": relay}}


def two(kind: str, one: int, other: int) -> dict[str, Any]:
    """Two relays of a kind, each with its port."""
    ports = {"a": one, "b": other}
    relays = {n: {"listen": at(p), "dest": NOBODY} for n, p in ports.items()}
    return {"transport": "twisted", kind: relays}


@contextmanager
def clients(count: int, port: int = 20001) -> Iterator[list[socket.socket]]:
    with ExitStack() as held:
        yield [
            held.enter_context(socket.create_connection((HOST, port)))
            for _ in range(count)
        ]


def cut(relayd: Relayd) -> None:
    """Stop a relay, and end its sessions."""
    stopping = relayd.steered.stop("a", True, ME)
    relayd.reactor.turn()
    assert result(stopping)["sessions"] == 0


def held(relayd: Relayd) -> dict[int, bool]:
    """Of each port of streams, whether its clients are held."""
    return {each.getHost().port: each.held for each in relayd.service.ports}


#: Listeners of all addresses, with a port that no other process of the tests has.
ALL_ADDRESSES = ["{}", "0.0.0.0:{}"]


# -- what can't be opened


def test_a_listener_that_cannot_be_opened_leaves_a_udp_relay_as_it_was(
    tmp_path: Path,
) -> None:
    """One of its new addresses is somebody else's; its flows go on."""
    tables = {"udp": {"d": {"listen": at(20001), "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009) as server,
        datagrams(20003),
        datagrams() as client,
    ):
        client.sendto(b"1", (HOST, 20001))
        relayd.reactor.turn()
        assert server.recv(9) == b"1"
        with pytest.raises(Invalid, match=r"20003: Address already in use"):
            relayd.set("d", listen=[at(20001), at(20002), at(20003)])
        assert len(relayd.served("d").listeners) == 1
        assert len(relayd.served("d").table) == 1
        client.sendto(b"2", (HOST, 20001))
        relayd.reactor.turn()
        assert server.recv(9) == b"2"
        relayd.set("d", listen=[at(20001), at(20002)])
        assert len(relayd.served("d").listeners) == 2


def test_a_socket_that_cannot_be_copied_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, two("udp", 20001, 20002)) as relayd:
        before = [*relayd.served("a").listeners, *relayd.served("b").listeners]
        relayd.write(two("udp", 20002, 20001))
        with monkeypatch.context() as patched:
            patched.setattr("relayd.datagrams.endpoint.adopt_all", refuse(errno.EMFILE))
            with pytest.raises(Invalid, match="Too many open files"):
                relayd.reload()
        assert [
            *relayd.served("a").listeners,
            *relayd.served("b").listeners,
        ] == before
        assert not any(each.deaf or each.retired for each in before)
        relayd.reload()
        assert relayd.service.addresses("a") == [f"udp:{at(20002)}"]


@pytest.mark.parametrize("listen", ALL_ADDRESSES)
def test_a_listener_may_be_narrowed(tmp_path: Path, listen: str) -> None:
    """That of all addresses is in the way of that of one, and closes first."""
    port = free_port()
    tables = {"tcp": {"a": {"listen": listen.format(port), "dest": NOBODY}}}
    with running(tmp_path, tables) as relayd:
        relayd.set("a", listen=at(port))
        assert relayd.service.addresses("a") == [at(port)]
        relayd.set("a", listen=None)
        assert relayd.service.addresses("a") != [at(port)]


@pytest.mark.parametrize("listen", ALL_ADDRESSES)
def test_one_of_datagrams_may_be_narrowed_while_it_has_no_flow(
    tmp_path: Path, listen: str
) -> None:
    """Flows share its socket: with one it stays, and is said to."""
    port = free_port()
    tables = {"udp": {"a": {"listen": listen.format(port), "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009) as server,
        datagrams() as client,
    ):

        def ask(data: bytes) -> Any:
            client.sendto(data, (HOST, port))
            relayd.reactor.turn()
            assert server.recv(9) == data
            return relayd.served("a")

        relayd.set("a", listen=at(port))
        assert relayd.service.addresses("a") == [f"udp:{at(port)}"]
        assert len(ask(b"1").table) == 1
        with pytest.raises(Invalid) as caught:
            relayd.set("a", listen=None)
        assert str(caught.value).endswith(
            f":{port}: Address already in use: relay a has flows, or clients that wait"
            f" for one, on udp:{at(port)}: relayctl stop a --cut ends them; then"
            " change it, and start it"
        )
        assert len(ask(b"2").table) == 1
        # What is said to be done works.
        cut(relayd)
        relayd.set("a", listen=None)
        relayd.do("start", "a")
        ask(b"3")


def test_one_of_datagrams_for_which_clients_wait_stays(tmp_path: Path) -> None:
    """They are served when the pause is over."""
    port = free_port()
    tables = {"udp": {"a": {"listen": at(port), "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009) as server,
        datagrams() as client,
    ):
        relayd.do("pause", "a")
        client.sendto(b"1", (HOST, port))
        relayd.reactor.turn()
        with pytest.raises(Invalid, match="clients that wait for one"):
            relayd.set("a", listen=f"0.0.0.0:{port}")
        relayd.do("resume", "a")
        relayd.reactor.turn()
        assert server.recv(9) == b"1"


def test_one_of_datagrams_that_was_in_the_way_in_vain_serves_on(tmp_path: Path) -> None:
    port = free_port()
    tables = {"udp": {"a": {"listen": f"0.0.0.0:{port}", "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009) as server,
        datagrams(20003),
        datagrams() as client,
    ):
        with pytest.raises(Invalid, match="20003: Address already in use$"):
            relayd.set("a", listen=[at(port), at(20003)])
        assert relayd.service.addresses("a") == [f"udp:0.0.0.0:{port}"]
        client.sendto(b"1", (HOST, port))
        relayd.reactor.turn()
        assert server.recv(9) == b"1"


def test_one_that_was_in_the_way_in_vain_is_opened_again(tmp_path: Path) -> None:
    with running(tmp_path, tcp()) as relayd, socket.create_server((HOST, 20003)):
        with pytest.raises(Invalid, match="20003"):
            relayd.set("a", listen=at(20003))
        assert relayd.service.addresses("a") == [at(20001)]
        with clients(1):
            relayd.reactor.turn(1)
            assert len(relayd.served("a").registry) == 1
            relayd.reactor.turn()


def test_one_that_is_in_nobodys_way_stays_open(tmp_path: Path) -> None:
    """What can't be opened has nothing to do with it."""
    with running(tmp_path, tcp(port=0)) as relayd, socket.create_server((HOST, 20003)):
        before = relayd.service.ports
        with pytest.raises(Invalid, match="20003"):
            relayd.set("a", listen=at(20003))
        assert relayd.service.ports == before


def test_a_receive_buffer_is_changed_at_once(tmp_path: Path) -> None:
    """Of a relay's own listeners, and not of one that another relay has got."""

    def buffers(name: str) -> list[int]:
        own = relayd.served(name).listeners
        return [_buffer(each.sock) for each in own if not each.deaf]

    tables = two("udp", 20001, 20002)
    with (
        running(tmp_path, tables) as relayd,
        datagrams() as client,
    ):
        relayd.set("a", udp_rcvbuf="64KiB")
        relayd.set("b", udp_rcvbuf="100KiB")
        assert (buffers("a"), buffers("b")) == ([128 << 10], [200 << 10])
        relayd.set("a", udp_rcvbuf="50KiB", listen=[at(20001), at(20003)])
        assert buffers("a") == [100 << 10] * 2
        # It keeps its first listener for a flow, and another relay gets that address.
        client.sendto(b"1", (HOST, 20001))
        relayd.reactor.turn()
        relayd.write(two("udp", 20003, 20001))
        relayd.set("a", listen=at(20003))
        assert len(relayd.served("a").listeners) == 2
        relayd.reload()
        assert (buffers("a"), buffers("b")) == ([100 << 10], [200 << 10])
        relayd.set("a", udp_rcvbuf="60KiB")
        assert (buffers("a"), buffers("b")) == ([120 << 10], [200 << 10])


def _buffer(sock: Any) -> int:
    """What a socket can have unread: the kernel doubles what is set."""
    return int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))


def test_udp_relays_share_what_the_process_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a start: one that stays has less when there is another."""
    monkeypatch.setattr("relayd.operating.units.possible_flows", lambda **_: 100)
    with running(tmp_path, two("udp", 20001, 20002)) as relayd:
        assert relayd.served("a").table.max_flows == 50
        tables = two("udp", 20001, 20002)
        del tables["udp"]["b"]
        relayd.write(tables)
        assert relayd.reload()["unchanged"] == 1
        assert relayd.served("a").table.max_flows == 100
        relayd.set("a", max_flows=60)
        tables["udp"]["b"] = {"listen": at(20002), "dest": NOBODY}
        relayd.write(tables)
        with pytest.raises(Invalid, match="relay a: max-flows 60 is more than"):
            relayd.reload()
        assert relayd.relays.units.keys() == {"a"}
        relayd.set("a", max_flows=None)
        relayd.reload()
        assert relayd.served("a").table.max_flows == 50


def test_what_was_built_in_vain_is_forgotten(tmp_path: Path) -> None:
    """Neither checks nor a pool hold on to a relay that can't be made."""
    with running(tmp_path, tcp(dest=TWO, check="tcp", retries=1)) as relayd:
        pool, checker = relayd.unit("a").pools[0], relayd.relays.checks.checker
        heard = list(pool.listeners)
        with pytest.raises(Invalid, match="a port here is 1 to 65535"):
            relayd.set("a", dest=[*TWO, "tls:a:99999"])
        with pytest.raises(Invalid, match="bad endpoint"):
            relayd.set("a", listen="ssl:1:privateKey=/nowhere:certKey=/nowhere")
        with (
            socket.create_server((HOST, 20003)),
            pytest.raises(Invalid, match="in use"),
        ):
            relayd.set("a", listen=at(20003), idle_timeout=7)
        assert pool.listeners == heard
        assert len(checker) == 2
        assert all(each.has_checks for each in pool.servers)


def test_a_defect_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised, as whoever asked is to hear of it; the next change is made."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("a defect")

    with running(tmp_path, tcp(dest=TWO, check="tcp")) as relayd:
        with monkeypatch.context() as patched:
            patched.setattr("relayd.operating.relays.pool_part", fails)
            with pytest.raises(RuntimeError, match="a defect"):
                relayd.set("a", dest=[*TWO, "127.0.0.1:11"])
        assert len(relayd.relays.checks.checker) == 2
        assert not relayd.steered.overlay
        relayd.set("a", dest=[*TWO, "127.0.0.1:11"])
        assert len(relayd.relays.checks.checker) == 3


# -- what meets


def test_changes_wait_for_each_other(tmp_path: Path) -> None:
    """A start that waits for a reload starts what that has stopped."""
    with running(tmp_path, tcp()) as relayd:
        relayd.do("stop", "a")
        relayd.write(tcp(enabled=False))
        relayd.reactor.threads.busy = True
        both = relayd.steered.reload(False, None, ME), relayd.steered.start("a", ME)
        relayd.reactor.threads.go_on()
        assert result(both[0])["overlay"] == 1
        assert result(both[1])["state"] == "running"


def test_a_reload_does_not_confirm_another(tmp_path: Path) -> None:
    with running(tmp_path, tcp()) as relayd:
        relayd.reactor.threads.busy = True
        first = relayd.steered.reload(False, 10.0, ME)
        second = relayd.steered.reload(False, 20.0, ME)
        relayd.reactor.threads.go_on()
        assert result(first)["confirm_within"] == 10
        with pytest.raises(Conflict, match="waits to be confirmed"):
            result(second)
        assert relayd.steered.status()["confirm"] == {"seconds_left": 10}
        assert relayd.steered.confirm(ME) == {"confirmed": True}


def test_what_is_gone_back_to_is_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a change that was under way when the reload was asked for."""
    monkeypatch.setattr("relayd.operating.steering.MANY", 0)
    with running(tmp_path, tcp()) as relayd:
        relayd.reactor.threads.busy = True
        relayd.steered.set("a", {"idle_timeout": 7}, ME)
        relayd.write(two("tcp", 20002, 20003))
        relayd.steered.reload(True, 10.0, ME)
        relayd.reactor.threads.go_on()
        assert relayd.relays.units.keys() == {"a", "b"}
        relayd.reactor.threads.busy = True
        # Another one is under way at that time.
        late = relayd.steered.set("a", {"idle_timeout": 9}, ME)
        relayd.reactor.advance(10)
        relayd.reactor.threads.go_on()
        assert result(late)
        assert relayd.relays.units.keys() == {"a"}
        [relay] = relayd.relays.config.relays
        assert relay.stream.idle_timeout == 7


def test_a_change_that_comes_too_late(tmp_path: Path) -> None:
    """The process stops while it waits; nor is anything gone back to then."""
    with running(tmp_path, tcp()) as relayd:
        relayd.reload(confirm=5)
        relayd.reactor.threads.busy = True
        relayd.steered.confirm(ME)
        late = relayd.steered.reload(False, None, ME)
        relayd.service.stopService()
        relayd.reactor.threads.go_on()
        with pytest.raises(Conflict, match="relayd stops"):
            result(late)
    with running(tmp_path, tcp()) as relayd:
        relayd.reload(confirm=5)
        relayd.service.stopService()
        relayd.reactor.advance(6)


def test_a_file_that_is_gone(tmp_path: Path, logged_failures: LoggedFailures) -> None:
    with running(tmp_path, tcp()) as relayd:
        relayd.path.unlink()
        with pytest.raises(Invalid, match=r"relayd\.toml: can't be read: No such file"):
            relayd.reload()
        result(relayd.steered.reload_by_signal())
        logged_failures.take("can't be read: No such file")
        logged_failures.take("nothing has changed")
        assert relayd.state("a") == "running"
        assert not relayd.steered.status()["last_reload"]["ok"]


# -- one thing after the other


def test_a_udp_relay_that_is_started_while_it_drains(tmp_path: Path) -> None:
    """It accepts clients again, at an address that it had, and at another one."""
    tables = {"udp": {"d": {"listen": at(20001), "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009),
        datagrams() as one,
        datagrams() as other,
    ):
        one.sendto(b"1", (HOST, 20001))
        relayd.reactor.turn()
        for port in (20001, 20002):
            relayd.do("drain", "d")
            assert relayd.state("d") == "draining"
            relayd.set("d", listen=at(port))
            assert relayd.state("d") == "draining"
            relayd.do("start", "d")
            assert relayd.state("d") == "running"
            other.sendto(b"2", (HOST, port))
            relayd.reactor.turn()
            assert len(relayd.served("d").table) == 1 + (port - 20000)
            relayd.reactor.advance(20)
            assert relayd.state("d") == "running"


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_paused_relays_swap_their_ports(tmp_path: Path, kind: str) -> None:
    """It is the relay's clients that are held, wherever they come."""
    with running(tmp_path, two(kind, 20001, 20002)) as relayd:
        relayd.do("pause", "a")
        relayd.write(two(kind, 20002, 20001))
        relayd.reload()
        assert relayd.state("a") == "paused"
        if kind == "tcp":
            assert held(relayd) == {20001: False, 20002: True}
            relayd.do("resume", "a")
            assert held(relayd) == {20001: False, 20002: False}
        else:
            with datagrams() as client:
                for port in (20001, 20002):
                    client.sendto(b"1", (HOST, port))
                relayd.reactor.turn()
                assert len(relayd.served("a").table) == 0
                assert len(relayd.served("b").table) == 1
                relayd.do("resume", "a")
                relayd.reactor.turn()
                assert len(relayd.served("a").table) == 1


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_who_stops_a_relay_that_is_paused_has_ended_the_pause(
    tmp_path: Path, kind: str
) -> None:
    with running(tmp_path, two(kind, 20001, 20002)) as relayd:
        result(relayd.steered.pause("a", 5.0, ME))
        relayd.do("stop", "a")
        assert relayd.state("a") == "stopped"
        assert not relayd.reactor.getDelayedCalls()
        with pytest.raises(Conflict, match="is stopped"):
            relayd.do("pause", "a")
        relayd.do("start", "a")
        assert relayd.state("a") == "running"


def test_a_stopped_relay_gets_another_address(tmp_path: Path) -> None:
    with running(tmp_path, tcp()) as relayd:
        relayd.do("stop", "a")
        relayd.set("a", listen=at(20002))
        assert relayd.service.addresses("a") == []
        relayd.do("start", "a")
        assert relayd.service.addresses("a") == [at(20002)]


def test_a_relay_of_another_kind_takes_over_a_name(tmp_path: Path) -> None:
    """Nothing that was said of the one before is said of it."""
    with running(tmp_path, tcp(dest=TWO)) as relayd:
        relayd.set("a", dest=["127.0.0.1:10", "127.0.0.1:11"])
        relayd.steered.set_server("a", "127.0.0.1:10", "down", None, None, ME)
        relayd.write(
            {"udp": {"a": {"listen": at(20001), "dest": ["10.0.0.1:1", "10.0.0.2:1"]}}}
        )
        answer = relayd.reload()
        assert (answer["changed"], answer["dropped"]) == (["a"], 2)
        assert relayd.steered.diff() == {"changes": []}
        assert relayd.service.addresses("a") == [f"udp:{at(20001)}"]
        relayd.write(tcp())
        relayd.reload()
        assert relayd.service.addresses("a") == [at(20001)]


# -- values


def test_settings_whose_values_come_from_a_file(tmp_path: Path) -> None:
    """One file after the other; what it says is read again by a reload."""
    files = [tmp_path / "first", tmp_path / "second"]
    for each in files:
        each.write_text(f"{each.name}\n")
    with running(tmp_path, {"socks4": {"a": {"listen": at(20001)}}}) as relayd:
        for each in files:
            relayd.set("a", userid_file=str(each))
            assert relayd.unit("a").settings.user_ids == (each.name.encode(),)
        merged = tmp_path / "merged.toml"
        merged.write_text(relayd.steered.merged()["toml"])
        assert list(configure(read_layers(str(merged))).relays) == list(
            relayd.relays.config.relays
        )
        relayd.set("a", userid_file=None)
        assert not relayd.steered.overlay
        relayd.write(
            {"socks4": {"a": {"listen": at(20001), "userid_file": str(files[0])}}}
        )
        relayd.reload()
        files[0].write_text("third\n")
        assert relayd.reload()["changed"] == ["a"]
        assert relayd.unit("a").settings.user_ids == (b"third",)


def test_a_null_that_nobody_knows(tmp_path: Path) -> None:
    with running(tmp_path, tcp()) as relayd:
        with pytest.raises(Invalid, match="idle_timout: no such key; did you mean"):
            relayd.set("a", idle_timout=None)
        relayd.set("a", idle_timeout=None)


def test_a_time_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path, tcp(dest=TWO)) as relayd:
        with pytest.raises(Invalid, match="expected 0 to a year"):
            relayd.steered.set_server("a", NOBODY, "drain", None, -1.0, ME)
        assert not relayd.steered.overlay
        assert relayd.steered.server("a", NOBODY)["state"] == "up"
        with pytest.raises(Invalid):
            relayd.steered.pause("a", -1.0, ME)
        assert relayd.state("a") == "running"


def test_an_etag_changes_with_what_is_said(tmp_path: Path) -> None:
    """Though the value is that of the file."""
    with running(tmp_path, tcp(idle_timeout=60)) as relayd:
        before = relayd.steered.revision("a")
        relayd.set("a", idle_timeout=60)
        assert relayd.steered.revision("a") != before


def test_what_is_said_of_servers_that_the_file_has_not(tmp_path: Path) -> None:
    """A destination of run time stands where the file has none, or another."""
    with running(tmp_path, tcp(dest=f"{NOBODY},weight=3")) as relayd:
        relayd.set("a", dest=["127.0.0.1:10", "127.0.0.1:11,weight=2"])
        for server in ("127.0.0.1:10", "127.0.0.1:11"):
            relayd.steered.set_server("a", server, None, 7, None, ME)
        _, *told = relayd.steered.diff()["changes"]
        assert [(each["server"], each["file"], each["now"]) for each in told] == [
            ("127.0.0.1:10", None, 7),
            ("127.0.0.1:11", None, 7),
        ]


# -- what sessions of before count for


def test_sessions_count_for_a_limit_that_is_new(tmp_path: Path) -> None:
    """Until they end; the ones that come are refused until then."""
    with (
        running(tmp_path, tcp(dest=at(20009))) as relayd,
        socket.create_server((HOST, 20009)),
    ):
        with clients(2):
            relayd.reactor.turn()
            relayd.set("a", max_sessions=2, max_sessions_per_client=9)
            gate = relayd.served("a").gate
            assert (gate.sessions, gate.most_of_one) == (2, 2)
            with clients(1):
                relayd.reactor.turn()
                assert relayd.steered.relay("a")["refused"] == 1
            relayd.set("a", idle_timeout=7)
            assert relayd.served("a").gate.sessions == 2
            cut(relayd)
            assert relayd.served("a").gate.sessions == 0
        relayd.do("start", "a")
        with clients(2):
            relayd.reactor.turn()
            assert relayd.served("a").gate.sessions == 2
            cut(relayd)


def test_a_session_of_a_thousand_changes_ago(tmp_path: Path) -> None:
    """It still counts for its server, once; and nothing is kept of all between."""
    with running(tmp_path, tcp(dest=TWO)) as relayd:
        old = relayd.unit("a").pools[0].servers[0]
        old.began()
        old.began()
        two = [configure(read_layers_of(tcp(dest=TWO, retries=n))) for n in range(2)]
        for number in range(1100):
            relayd.relays.change(two[number % 2])
        now = relayd.unit("a").pools[0].servers[0]
        assert now is not old
        assert (now.sessions, len(now.inherited)) == (2, 1)
        now.began()
        old.closed()
        assert now.sessions == 2
        old.closed()
        assert (now.sessions, len(now.inherited)) == (1, 0)
        now.closed()


def read_layers_of(tables: dict[str, Any]) -> Any:
    import io
    import json

    return read_layers("-", io.BytesIO(json.dumps(tables).encode()))


def test_a_server_that_was_down_is_up_if_nobody_checks_it(tmp_path: Path) -> None:
    with running(tmp_path, tcp(dest=TWO, check="tcp")) as relayd:
        down = relayd.unit("a").pools[0].servers[0]
        down.noted(0.0, False, "no")
        down.checked(False, "no")
        relayd.write(tcp(dest=TWO, check="tcp", retries=2))
        relayd.reload()
        assert relayd.steered.server("a", NOBODY)["state"] == "down"
        relayd.write(tcp(dest=TWO))
        relayd.reload()
        assert relayd.steered.server("a", NOBODY)["state"] == "up"


# -- the command's own


def test_settings_of_the_process_that_take_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, tcp()) as relayd:
        relayd.write({"drain_timeout": 1, "verbose": True, **tcp()})
        assert relayd.reload()["needs_restart"] == ["verbose"]
        assert relayd.service.drain_timeout == 1
        assert relayd.steered.status()["needs_restart"] == ["verbose"]


@pytest.mark.parametrize("what", ["", "[tcp", "[tcp.a]\nlisten = 1", "nonsense = 1"])
def test_a_broken_file_changes_nothing(tmp_path: Path, what: str) -> None:
    with running(tmp_path, tcp()) as relayd:
        relayd.set("a", idle_timeout=7)
        before = relayd.relays.config, relayd.unit("a")
        relayd.path.write_text(what)
        with pytest.raises((Invalid, ConfigError)):
            relayd.reload()
        assert (relayd.relays.config, relayd.unit("a")) == before
        assert len(relayd.steered.overlay) == 1


def test_a_hundred_changes_leave_nothing_behind(tmp_path: Path) -> None:
    """Of sockets, timers, gates, pools, and those who listen to them."""
    tables = {
        "tcp": {"a": {"listen": at(20001), "dest": TWO, "max_sessions": 5}},
        "udp": {"b": {"listen": at(20001), "dest": ["127.0.0.1:9", "127.0.0.1:10"]}},
        "socks4": {"c": {"listen": at(20002)}},
    }
    with running(tmp_path, tables) as relayd:

        def round_of(number: int) -> tuple[Any, ...]:
            for name in "abc":
                relayd.set(name, clients=[f"allow 127.0.0.{number}"])
                relayd.do("stop", name)
                relayd.do("start", name)
            relayd.set("a", idle_timeout=number + 1)
            relayd.set("b", udp_timeout=number + 1)
            relays, units = relayd.relays, relayd.relays.units.values()
            pools = [pool for each in units for pool in each.pools]
            return (
                len(os.listdir("/proc/self/fd")),
                len(relayd.reactor.readers),
                len(relayd.reactor.getDelayedCalls()),
                [len(each.listeners) for each in pools],
                len(relays.tasks),
                (len(relays._former), len(relays.service._former)),
                len(relays.checks.checker) + len(relays.checks.added),
            )

        first = round_of(1)
        for number in range(2, 34):
            assert round_of(number) == first
