"""What clients see of a change, over real sockets and both kinds of transports."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.control.steering import FlowQuery, SessionQuery
from tests.support.certificates import Authority
from tests.support.process import TRANSPORTS
from tests.support.steered import (
    HOST,
    ME,
    Relayd,
    at,
    datagrams,
    result,
    running,
    whole,
)

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


class Ends:
    """Clients and servers of a relayd, which takes turns while they wait.

    :param backlog: of the servers.
    """

    def __init__(self, relayd: Relayd) -> None:
        self.relayd, self.reactor = relayd, relayd.reactor
        self.open: list[socket.socket] = []

    def keep(self, sock: socket.socket) -> socket.socket:
        self.open.append(sock)
        return sock

    def server(self, port: int) -> socket.socket:
        sock = self.keep(socket.create_server((HOST, port)))
        sock.setblocking(False)
        return sock

    def client(self, port: int) -> socket.socket:
        """One that is connected; the relay may not have seen it yet."""
        return self.keep(socket.create_connection((HOST, port)))

    def accept(self, server: socket.socket) -> socket.socket:
        found: list[socket.socket] = []

        def accepted() -> bool:
            try:
                found.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        self.reactor.until(accepted, "a session")
        return self.keep(found[0])

    def pass_on(self, one: socket.socket, other: socket.socket, data: bytes) -> None:
        """What one says, the other hears."""
        one.sendall(data)
        self.hears(other, data)

    def hears(self, sock: socket.socket, data: bytes) -> None:
        sock.setblocking(False)
        heard = bytearray()

        def all_of_it() -> bool:
            try:
                heard.extend(sock.recv(100))
            except BlockingIOError:
                return False
            return len(heard) >= len(data)

        self.reactor.until(all_of_it, repr(data))
        assert bytes(heard) == data

    def talk(self, client: socket.socket, upstream: socket.socket) -> None:
        """Both ways."""
        self.pass_on(client, upstream, b"ask")
        self.pass_on(upstream, client, b"answer")


@contextmanager
def relaying(folder: Path, kind: str, **tables: Any) -> Iterator[Ends]:
    with running(folder, {"transport": kind, **tables}) as relayd:
        ends = Ends(relayd)
        try:
            yield ends
        finally:
            for each in ends.open:
                each.close()
            relayd.reactor.turn()


def web(listen: int = 20001, dest: int = 20009, **settings: Any) -> dict[str, Any]:
    return {"web": {"listen": at(listen), "dest": at(dest), **settings}}


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == errno.ECONNREFUSED


def asks(client: socket.socket, port: int, data: bytes) -> None:
    client.sendto(data, (HOST, port))


# -- streams


def test_clients_in_the_queue_of_a_listener_are_served_by_what_comes(
    tmp_path: Path, kind: str
) -> None:
    """By the new settings, though they came before; and by another relay."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        old, new = ends.server(20009), ends.server(20008)
        waiting = [ends.client(20001) for _ in range(5)]
        ends.relayd.set("web", dest=at(20008))
        for each in waiting:
            each.sendall(b"!")
        for _ in waiting:
            ends.hears(ends.accept(new), b"!")
        with pytest.raises(BlockingIOError):
            old.accept()
        last = ends.client(20001)
        ends.relayd.write({"transport": kind, "tcp": {"other": web()["web"]}})
        ends.relayd.reload(discard=True)
        ends.talk(last, ends.accept(old))


def test_a_session_outlives_each_kind_of_change(tmp_path: Path, kind: str) -> None:
    tables = web()
    with relaying(tmp_path, kind, tcp=tables) as ends:
        relayd = ends.relayd
        server = ends.server(20009)
        client = ends.client(20001)
        upstream = ends.accept(server)
        for change in (
            lambda: relayd.set("web", dest=at(20008)),
            lambda: relayd.set("web", idle_timeout=60, max_sessions=1),
            lambda: relayd.set("web", listen=at(20002)),
            lambda: relayd.set("web", listen=None, clients=["deny 127.0.0.0/8"]),
            lambda: relayd.do("pause", "web"),
            lambda: relayd.do("resume", "web"),
            lambda: relayd.do("stop", "web"),
            lambda: relayd.do("start", "web"),
            lambda: relayd.reload(discard=True),
            lambda: relayd.write({"transport": kind, "tcp": {"x": tables["web"]}}),
            lambda: relayd.reload(),
        ):
            change()
            ends.talk(client, upstream)
        [told] = whole(relayd.steered.sessions(SessionQuery()))["sessions"]
        assert (told["relay"], told["older"]) == ("web", True)
        # It is of a relay that is no more, and has the drain timeout.
        relayd.reactor.advance(11)
        relayd.reactor.turn()
        assert relayd.service.sessions == 0


def test_sessions_of_a_relay_that_comes_back_go_on(tmp_path: Path, kind: str) -> None:
    """As when a reload that removed it is taken back."""
    tables = web()
    with relaying(tmp_path, kind, tcp=tables) as ends:
        relayd = ends.relayd
        client = ends.client(20001)
        upstream = ends.accept(ends.server(20009))
        relayd.write({"transport": kind, "tcp": {"x": web(20002)["web"]}})
        assert relayd.reload()["removed"] == ["web"]
        relayd.write({"transport": kind, "tcp": tables})
        assert relayd.reload()["added"] == ["web"]
        relayd.reactor.advance(11)
        relayd.reactor.turn()
        ends.talk(client, upstream)


def test_a_relay_that_is_gone_ends_its_clients(tmp_path: Path, kind: str) -> None:
    """Those that it holds at once, sessions when the drain is over."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        relayd = ends.relayd
        client = ends.client(20001)
        upstream = ends.accept(ends.server(20009))
        relayd.do("pause", "web")
        held = ends.client(20001)
        held.settimeout(5)
        relayd.write({"transport": kind, "tcp": {"x": web(20002)["web"]}})
        assert relayd.reload()["removed"] == ["web"]
        with pytest.raises(ConnectionResetError):
            held.recv(1)
        ends.talk(client, upstream)
        relayd.reactor.advance(11)
        relayd.reactor.turn()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_relays_swap_their_ports(tmp_path: Path, kind: str) -> None:
    one, other = web(20001, 20008)["web"], web(20002, 20009)["web"]
    with relaying(tmp_path, kind, tcp={"one": one, "other": other}) as ends:
        first, second = ends.server(20008), ends.server(20009)
        queued = ends.client(20001)
        relayd = ends.relayd
        swapped = {
            "one": {**one, "listen": at(20002)},
            "other": {**other, "listen": at(20001)},
        }
        relayd.write({"transport": kind, "tcp": swapped})
        assert relayd.reload()["changed"] == ["one", "other"]
        ends.talk(queued, ends.accept(second))
        ends.talk(ends.client(20002), ends.accept(first))
        assert relayd.steered.relay("one")["sessions"] == 1


@pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")
def test_a_listener_with_tls_serves_on(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next client by other settings; the one that is there goes on."""
    authority = Authority(tmp_path)
    pem = authority.issue("localhost")
    listen = f"ssl:20001:interface={HOST}:privateKey={pem}:certKey={pem}"
    with relaying(
        tmp_path, kind, tcp={"web": {"listen": listen, "dest": at(20009)}}
    ) as ends:
        # Twisted writes with the reactor that is installed, unless it is told another.
        monkeypatch.setattr(
            "twisted.protocols.tls._get_default_clock", lambda: ends.reactor
        )
        context = ssl.create_default_context(cafile=str(authority.file))

        def connect() -> ssl.SSLSocket:
            client = context.wrap_socket(
                ends.client(20001),
                server_hostname="localhost",
                do_handshake_on_connect=False,
            )
            ends.open.append(client)
            client.setblocking(False)

            def done() -> bool:
                try:
                    client.do_handshake()
                except ssl.SSLWantReadError:
                    return False
                return True

            ends.reactor.until(done, "a handshake")
            return client

        def relayed(client: ssl.SSLSocket, upstream: socket.socket) -> None:
            client.send(b"ask")
            ends.hears(upstream, b"ask")
            upstream.sendall(b"answer")
            heard: list[bytes] = []

            def answered() -> bool:
                try:
                    heard.append(client.recv(100))
                except ssl.SSLWantReadError:
                    return False
                return True

            ends.reactor.until(answered, "an answer")
            assert heard == [b"answer"]

        first, second = ends.server(20009), ends.server(20008)
        before = connect()
        upstream = ends.accept(first)
        relayed(before, upstream)
        ends.relayd.set("web", dest=at(20008))
        relayed(connect(), ends.accept(second))
        relayed(before, upstream)
        ends.relayd.do("pause", "web")
        ends.relayd.do("resume", "web")
        relayed(connect(), ends.accept(second))


def test_a_unix_listener_keeps_its_file(
    tmp_path: Path, tmp_socket: Path, kind: str
) -> None:
    tables = {"web": {"listen": f"unix:{tmp_socket}", "dest": at(20009)}}
    with relaying(tmp_path, kind, tcp=tables) as ends:
        server, before = ends.server(20009), tmp_socket.stat().st_ino
        ends.relayd.set("web", idle_timeout=60)
        assert tmp_socket.stat().st_ino == before
        client = ends.keep(socket.socket(socket.AF_UNIX))
        client.connect(str(tmp_socket))
        ends.talk(client, ends.accept(server))
        ends.relayd.do("stop", "web")
        assert not tmp_socket.exists()
        ends.relayd.do("start", "web")
        again = ends.keep(socket.socket(socket.AF_UNIX))
        again.connect(str(tmp_socket))
        ends.talk(again, ends.accept(server))


def test_who_comes_while_a_relay_is_paused_is_served_later(
    tmp_path: Path, kind: str
) -> None:
    """In the order in which they came, by the settings of then."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        old, new = ends.server(20009), ends.server(20008)
        ends.relayd.steered.pause("web", 5.0, ME)
        clients = [ends.client(20001) for _ in range(3)]
        for number, each in enumerate(clients):
            each.sendall(b"%d" % number)
        ends.reactor.turn()
        assert ends.relayd.service.sessions == 0
        ends.relayd.set("web", dest=at(20008))
        ends.reactor.turn()
        assert ends.relayd.service.sessions == 0
        assert ends.relayd.state("web") == "paused"
        ends.reactor.advance(5)
        for number, _ in enumerate(clients):
            ends.hears(ends.accept(new), b"%d" % number)
        with pytest.raises(BlockingIOError):
            old.accept()


def test_a_stopped_relay_refuses(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, kind, tcp=web()) as ends:
        ends.relayd.do("stop", "web")
        assert refuses(20001)
        ends.relayd.do("start", "web")
        assert not refuses(20001)
        ends.reactor.turn()


def test_limits_and_servers_count_sessions_of_before(tmp_path: Path, kind: str) -> None:
    """And totals never go back."""
    two = [f"{at(20009)},max=1,name=one", f"{at(20008)},name=two"]
    tables = web(dest=20009, max_sessions=2)
    tables["web"].update(dest=two, balance="least-sessions")
    with relaying(tmp_path, kind, tcp=tables) as ends:
        relayd = ends.relayd
        one, other = ends.server(20009), ends.server(20008)
        client = ends.client(20001)
        upstream = ends.accept(one)
        ends.talk(client, upstream)
        relayd.steered.set_server("web", "two", None, 1, None, ME)
        relayd.set("web", dest=[f"{two[0]},weight=9", two[1]])
        assert relayd.steered.server("web", "one")["sessions"] == 1
        assert relayd.steered.server("web", "two")["weight"] == 1
        # The first has as many as it may have; then the relay has.
        ends.talk(ends.client(20001), ends.accept(other))
        refused = ends.client(20001)
        ends.reactor.until(lambda: relayd.steered.relay("web")["refused"] == 1)
        refused.close()
        relayd.set("web", max_sessions=3, idle_timeout=60)
        ends.talk(ends.client(20001), ends.accept(other))
        told = relayd.steered.relay("web")
        assert (told["sessions"], told["older_sessions"], told["refused"]) == (3, 2, 1)
        client.close()
        upstream.close()
        ends.reactor.until(lambda: relayd.steered.relay("web")["sessions"] == 2)
        assert relayd.steered.server("web", "one")["sessions"] == 0
        ends.talk(ends.client(20001), ends.accept(one))


def test_a_client_whose_header_comes_after_a_change(tmp_path: Path, kind: str) -> None:
    """It counts for the limits that there are then, and is refused by them."""
    with relaying(tmp_path, kind, tcp=web(accept_proxy="127.0.0.1")) as ends:
        relayd, server = ends.relayd, ends.server(20009)
        relayd.set("web", max_sessions=1)
        header = b"PROXY TCP4 192.0.2.7 192.0.2.1 1000 80\r\n"
        pending = [ends.client(20001) for _ in range(5)]
        ends.reactor.until(lambda: relayd.steered.relay("web")["sessions"] == 5)
        relayd.set("web", max_sessions=2)
        limits = relayd.served("web").gate
        for client in pending[:3]:
            client.sendall(header)
        upstreams = [ends.accept(server) for _ in range(2)]
        ends.reactor.until(lambda: relayd.steered.relay("web")["refused"] == 1)
        assert limits.sessions == 2
        for each in (*pending, *upstreams):
            each.close()
        ends.reactor.until(lambda: relayd.steered.relay("web")["sessions"] == 0)
        assert limits.sessions == 0
        late = ends.client(20001)
        ends.reactor.until(lambda: relayd.steered.relay("web")["sessions"] == 1)
        relayd.set("web", max_sessions=None, clients=["deny 192.0.2.7"])
        late.sendall(header)
        ends.reactor.until(lambda: relayd.steered.relay("web")["refused"] == 2)


def test_a_limit_of_one_client_that_is_new(tmp_path: Path, kind: str) -> None:
    """It counts the sessions that there are, also beside a limit of all."""
    with relaying(tmp_path, kind, tcp=web(max_sessions=9)) as ends:
        relayd, server = ends.relayd, ends.server(20009)
        for number in range(2):
            ends.talk(ends.client(20001), ends.accept(server))
            relayd.set("web", max_sessions_per_client=1)
            ends.client(20001)
            refused = number + 1
            ends.reactor.until(
                lambda: relayd.steered.relay("web")["refused"] == refused  # noqa: B023
            )
            assert relayd.served("web").gate.most_of_one == refused
            relayd.set("web", max_sessions_per_client=None)


def test_who_waits_for_a_limit_that_is_no_more_is_served(
    tmp_path: Path, kind: str
) -> None:
    with relaying(tmp_path, kind, tcp=web()) as ends:
        relayd, server = ends.relayd, ends.server(20009)
        relayd.set("web", max_sessions=1, queue=5, queue_timeout=60)
        ends.talk(ends.client(20001), ends.accept(server))
        waits = [ends.client(20001) for _ in range(2)]
        ends.reactor.until(lambda: relayd.served("web").gate.waiting == 2)
        relayd.set("web", max_sessions=None, queue=None, queue_timeout=None)
        upstreams = [ends.accept(server) for _ in waits]
        for each in waits:
            each.sendall(b"!")
        for each in upstreams:
            ends.hears(each, b"!")


# -- datagrams


@contextmanager
def flows(folder: Path, kind: str, **more: Any) -> Iterator[tuple[Any, ...]]:
    """A UDP relay, two servers of which it has the first, and two clients."""
    with (
        relaying(folder, kind, udp={**web(), **more}) as ends,
        datagrams(20009) as server,
        datagrams(20008) as other,
        datagrams() as one,
        datagrams() as two,
    ):
        for each in (server, other, one, two):
            each.setblocking(False)
        yield ends, server, other, one, two


def arrives(ends: Ends, sock: socket.socket, data: bytes) -> Any:
    """A datagram; where it came from."""
    found: list[Any] = []

    def came() -> bool:
        try:
            found.append(sock.recvfrom(100))
        except BlockingIOError:
            return False
        return True

    ends.reactor.until(came, repr(data))
    assert found[0][0] == data
    return found[0][1]


def test_a_flow_keeps_its_server_and_its_port(tmp_path: Path, kind: str) -> None:
    with flows(tmp_path, kind) as (ends, server, other, one, two):
        asks(one, 20001, b"1")
        port = arrives(ends, server, b"1")
        ends.relayd.set("web", dest=at(20008))
        asks(one, 20001, b"2")
        assert arrives(ends, server, b"2") == port
        server.sendto(b"3", port)
        arrives(ends, one, b"3")
        asks(two, 20001, b"4")
        arrives(ends, other, b"4")
        told = ends.relayd.steered.relay("web")
        assert told["sessions"] == 2
        assert told["bytes_up"] == 3
        assert len(whole(ends.relayd.steered.nat(FlowQuery()))["entries"]) == 2


def test_a_udp_relay_is_stopped_and_taken_back(tmp_path: Path, kind: str) -> None:
    """Its flows go on; the port closes when the last has ended."""
    with flows(tmp_path, kind) as (ends, server, _, one, two):
        relayd = ends.relayd
        for ended in (False, True):
            asks(one, 20001, b"1")
            port = arrives(ends, server, b"1")
            relayd.do("stop", "web")
            assert relayd.state("web") == "stopped"
            dropped = relayd.served("web").counters.dropped["stopped"]
            asks(two, 20001, b"2")
            asks(one, 20001, b"3")
            assert arrives(ends, server, b"3") == port
            assert relayd.served("web").counters.dropped["stopped"] == dropped + 1
            server.sendto(b"4", port)
            arrives(ends, one, b"4")
            if ended:
                for _ in range(40):
                    ends.reactor.advance(20)
                assert not relayd.served("web").listeners
                with datagrams(20001):
                    """It is free."""
            relayd.do("start", "web")
            asks(two, 20001, b"5")
            arrives(ends, server, b"5")
            relayd.served("web").abort_all()
            relayd.do("start", "web")


def test_udp_relays_swap_their_ports(tmp_path: Path, kind: str) -> None:
    """Flows of before get their answers by the address to which they have sent."""
    second = web(20002, 20008)["web"]
    with flows(tmp_path, kind, second=second) as (ends, server, other, one, two):
        asks(one, 20001, b"1")
        port = arrives(ends, server, b"1")
        swapped = {"web": web(20002)["web"], "second": {**second, "listen": at(20001)}}
        ends.relayd.write({"transport": kind, "udp": swapped})
        asks(two, 20001, b"in the queue")
        ends.relayd.reload()
        arrives(ends, other, b"in the queue")
        server.sendto(b"2", port)
        assert arrives(ends, one, b"2") == (HOST, 20001)
        asks(one, 20002, b"3")
        arrives(ends, server, b"3")
        for _ in range(2):
            # And back again.
            ends.relayd.set("web", listen=at(20003))
            ends.relayd.set("web", listen=None)
        for name in ("web", "second"):
            ends.relayd.served(name).abort_all()
        ends.reactor.advance(1)
        assert len(ends.relayd.served("web").listeners) == 1


def test_new_clients_of_a_udp_relay_that_is_paused_lose_nothing(
    tmp_path: Path, kind: str
) -> None:
    """Flows go on meanwhile; others are served in order, by the settings of then."""
    with flows(tmp_path, kind) as (ends, server, other, one, two):
        asks(one, 20001, b"1")
        arrives(ends, server, b"1")
        ends.relayd.do("pause", "web")
        for number in range(3):
            asks(two, 20001, b"%d" % number)
        asks(one, 20001, b"on")
        arrives(ends, server, b"on")
        ends.relayd.set("web", dest=at(20008))
        ends.reactor.turn()
        assert ends.relayd.state("web") == "paused"
        assert len(ends.relayd.served("web").table) == 1
        ends.relayd.do("resume", "web")
        for number in range(3):
            arrives(ends, other, b"%d" % number)


def test_a_removed_udp_relay_drains(tmp_path: Path, kind: str) -> None:
    with flows(tmp_path, kind, other=web(20002)["web"]) as (ends, server, _, one, two):
        asks(one, 20001, b"1")
        port = arrives(ends, server, b"1")
        ends.relayd.write({"transport": kind, "udp": {"other": web(20002)["web"]}})
        assert ends.relayd.reload()["removed"] == ["web"]
        asks(two, 20001, b"nobody")
        server.sendto(b"2", port)
        arrives(ends, one, b"2")
        for _ in range(12):
            ends.reactor.advance(1)
            ends.reactor.turn()
        assert ends.relayd.service.sessions == 0
        with datagrams(20001):
            """It is free."""


def test_a_name_that_was_found_is_not_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UDP relay whose only server is a name goes on sending to it."""
    tables = {"d": {"listen": at(20001), "dest": "server.example:20009"}}
    monkeypatch.setattr(
        "relayd.datagrams.servers.ServerPool._look_up", lambda self: None
    )
    with (
        relaying(tmp_path, kind, udp=tables) as ends,
        datagrams(20009) as server,
        datagrams() as client,
    ):
        server.setblocking(False)
        [found] = ends.relayd.served("d").servers
        found.found([(socket.AF_INET, (HOST, 20009))])
        ends.relayd.set("d", udp_timeout=60)
        assert ends.relayd.served("d").servers != (found,)
        asks(client, 20001, b"1")
        arrives(ends, server, b"1")


def test_descriptors_are_where_they_were(tmp_path: Path, kind: str) -> None:
    """After 30 rounds of sessions, flows and all kinds of changes."""
    with flows(tmp_path, kind, more=web(20002, 20008)["web"]) as (
        ends,
        server,
        *_,
        two,
    ):
        relayd = ends.relayd

        def left() -> tuple[int, ...]:
            reactor = relayd.reactor
            return (
                len(os.listdir("/proc/self/fd")),
                len(reactor.readers),
                len(reactor.getDelayedCalls()),
                len(relayd.service._retired),
                len(relayd.relays._former),
            )

        def rounds(*numbers: int) -> tuple[int, ...]:
            for number in numbers:
                asks(two, 20001, b"1")
                arrives(ends, server, b"1")
                relayd.set("web", udp_timeout=60 + number, listen=at(20003))
                relayd.set("more", listen=at(20001))
                relayd.do("stop", "web")
                relayd.do("drain", "more")
                result(relayd.steered.stop("web", False, ME))
                relayd.reload(discard=True)
                relayd.served("web").abort_all()
                relayd.served("more").abort_all()
                relayd.do("start", "web")
                relayd.reactor.advance(2)
            return left()

        first = rounds(1, 2)
        assert rounds(*range(30)) == first
