"""Clients that the kernel has brought here, and where they meant to go."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.datagrams import mmsg, original_listener
from relayd.datagrams.batches import _packed
from relayd.datagrams.hop_limits import ask_for_hops
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.original import OriginalServer
from relayd.datagrams.original_listener import (
    OriginalBatches,
    OriginalOneByOne,
    OriginalOutbox,
)
from relayd.datagrams.sockets import default_max_flows
from relayd.datagrams.transparent import is_host, places
from relayd.net.dial_options import DialOptions
from relayd.udp_nat import FlowServer, Server, UdpNat
from relayd.upstreams.balance import First
from relayd.upstreams.pool import Pool
from tests.datagrams.filters import appends
from tests.datagrams.places import PlacingBench, PlacingSocket
from tests.datagrams.support import (
    CLIENT,
    SERVER,
    problem,
    refuse,
)

TRANSPARENT = DialOptions(transparent=True)

ASKED, OTHER = ("198.51.100.9", 53), ("198.51.100.8", 53)

#: IP_RECVORIGDSTADDR's message.
TOLD = socket.IPPROTO_IP, 20


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    yield
    left, places.taken = places.taken, {}
    assert not left


class TellingSocket(PlacingSocket):
    """A listener's; the kernel tells where each datagram was to go."""

    def recvmsg(self, size: int, extra: int) -> tuple[bytes, Any, int, Any]:
        data, source = self._next()
        data, to, *hops = data if isinstance(data, tuple) else (data, None)
        told = []
        if to is not None:
            host = socket.inet_aton(to[0])
            packed = struct.pack("=H", 2) + struct.pack(">H", to[1]) + host + bytes(8)
            # Another one may come before it.
            told = [(socket.SOL_SOCKET, 29, bytes(16)), (*TOLD, packed)]
        if hops:
            left = struct.pack("=i", hops[0])
            told.insert(1, (socket.IPPROTO_IP, socket.IP_TTL, left))
        return data[:size], told, 0, source

    def sendmsg(
        self, run: Any, extra: Any = (), flags: int = 0, to: Any = None
    ) -> None:
        assert [each[:2] for each in extra] == [(socket.IPPROTO_IP, 8)]
        ours = socket.inet_ntoa(extra[0][2][4:8])
        for data in run:
            self._leave((bytes(data), to, ours))


class OriginalBench(PlacingBench):
    """A relay of redirected clients; its listener has every address of the machine.

    :ivar replying: the sockets from which replies were sent.
    """

    listener: TellingSocket

    def __init__(self, servers: Any = None, **settings: Any) -> None:
        if servers is None:
            servers = [OriginalServer()]
        self.replying: list[PlacingSocket] = []
        settings.setdefault("host", "0.0.0.0")
        super().__init__(servers, redirected=True, **settings)
        self.port = self.listener.number % 60000

    def _open_listener(self, host: str) -> TellingSocket:
        return TellingSocket(self.kernel, host)

    def open_reply_socket(self, family: int) -> PlacingSocket:
        self.replying.append(PlacingSocket(self.kernel))
        return self.replying[-1]

    def ask(self, to: Any = ASKED, source: Any = CLIENT, data: bytes = b"?") -> None:
        self.listener.inbox.append(((data, to), source))
        self.watcher.ready(self.listener.number)

    @property
    def answering(self) -> list[Any]:
        """What the sockets that replies leave by are bound to."""
        return [each.name for each in self.replying if not each.closed]

    def check(self) -> None:
        counters = self.nat.counters
        assert counters.received == counters.sent + counters.dropped.total()
        assert counters.replies_received == (
            counters.replies_sent + counters.replies_dropped.total()
        )
        assert {each.sock.fileno() for each in self.nat.table} == {
            each.number for each in self.live
        }

    def close(self) -> None:
        super().close()
        assert not self.answering


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OriginalBench]:
    def make(servers: Any = None, **settings: Any) -> OriginalBench:
        bench = OriginalBench(servers, **settings)
        monkeypatch.setattr(original_listener, "udp_socket", bench.open_reply_socket)
        return bench

    return make


Make = Callable[..., OriginalBench]


def test_a_flow_is_that_of_a_client_and_where_it_meant_to_go(made: Make) -> None:
    bench = made()
    for to in (ASKED, OTHER, ASKED):
        bench.ask(to)
    assert [each.peer for each in bench.sockets] == [ASKED, OTHER]
    bench.answer(b"one", 0)
    bench.answer(b"two", 1)
    # From where each was sent to, by a socket that has next to no buffer.
    assert bench.answering == [ASKED, OTHER]
    assert [each.sent for each in bench.replying] == [
        [(b"one", CLIENT)],
        [(b"two", CLIENT)],
    ]
    for each in bench.replying:
        assert (socket.SOL_SOCKET, socket.SO_RCVBUF, 0) in each.options
        assert (socket.IPPROTO_IP, 19, 1) in each.options
    assert not bench.listener.sent
    bench.check()
    bench.close()
    assert [(each.listener, each.server) for each in bench.observer.facts] == [
        ("198.51.100.9:53", "198.51.100.9:53"),
        ("198.51.100.8:53", "198.51.100.8:53"),
    ]


def test_replies_of_all_flows_from_one_destination_leave_by_one_socket(
    made: Make,
) -> None:
    bench = made([Server(*SERVER)])
    for port in (1, 2, 3):
        bench.ask(source=("192.0.2.1", port))
        bench.answer()
    assert bench.answering == [ASKED]
    # It stays as long as one of them does.
    first, *rest = list(bench.nat.table)
    bench.nat.end(first, "killed")
    assert bench.answering == [ASKED]
    for each in rest:
        bench.nat.end(each, "killed")
    assert not bench.answering
    bench.ask()
    bench.answer()
    assert [len(each.sent) for each in bench.replying] == [3, 1]
    bench.check()
    bench.close()


def test_nothing_is_sent_for_a_flow_that_is_over(made: Make) -> None:
    for to in (ASKED, None):
        bench = made([Server(*SERVER)])
        bench.ask(to or (ASKED[0], bench.port))
        [flow] = bench.nat.table
        bench.nat.end(flow, "killed")
        with pytest.raises(OSError, match="Bad file descriptor"):
            flow.reply(b"!", flow.to)
        bench.close()


def test_a_run_of_replies_leaves_in_one_call(made: Make) -> None:
    bench = made([Server(*SERVER)])
    bench.ask()
    bench.ask()
    sock = bench.sockets[-1]
    sock.inbox += [b"!"] * 5
    bench.watcher.ready(sock.number)
    assert bench.replying[0].sent == [(b"!", CLIENT)] * 5
    bench.check()
    bench.close()


def test_a_destination_with_the_listeners_port_needs_no_socket(made: Make) -> None:
    bench = made([Server(*SERVER)])
    to = ("198.51.100.9", bench.port)
    bench.ask(to)
    bench.answer()
    assert bench.listener.sent == [(b"!", CLIENT, "198.51.100.9")]
    assert not bench.replying
    bench.check()
    bench.close()


def test_who_asks_for_the_listener_itself_is_dropped(made: Make) -> None:
    """Nobody has redirected that: the relay would send it to itself, for ever."""
    bench = made()
    with capturedLogs() as logs:
        for host in ("203.0.113.1", "203.0.113.2"):
            bench.ask((host, bench.port))
    assert bench.nat.counters.dropped == {"loop": 2}
    [line] = logs
    assert line["listener"] == f"203.0.113.1:{bench.port}"
    assert "are for the listener itself, or come by NAT" in formatEvent(line)
    # Of others, and of other ports, it is not known.
    for to in (("203.0.113.1", 53), ("198.51.100.1", bench.port)):
        bench.ask(to)
    assert [each.peer for each in bench.sockets] == [
        ("203.0.113.1", 53),
        ("198.51.100.1", bench.port),
    ]
    bench.check()
    bench.close()


def test_a_listener_that_has_one_address_is_that_one_only(made: Make) -> None:
    bench = made([Server(*SERVER)], host="203.0.113.1")
    bench.ask(("203.0.113.1", bench.port))
    bench.ask(("203.0.113.2", bench.port))
    assert bench.nat.counters.dropped == {"loop": 1}
    bench.close()


def test_a_flow_that_is_redirected_to_its_relay_again_is_dropped(made: Make) -> None:
    """By rules that take what this machine itself sends, too."""
    bench = made()
    bench.ask(("203.0.113.1", 53))
    own = bench.sockets[-1].getsockname()
    bench.ask(("203.0.113.1", 53), source=own)
    assert bench.nat.counters.dropped == {"loop": 1}
    bench.check()
    bench.close()


def test_one_with_its_clients_address_is_not_sent_where_it_came_from(
    made: Make,
) -> None:
    """If that is this machine, the same rules may bring it here again."""
    bench = made(dialing=TRANSPARENT)
    bench.ask(("203.0.113.1", 53))
    assert bench.nat.counters.dropped == {"loop": 1}
    bench.ask(ASKED)
    assert bench.bound == [(CLIENT, ASKED)]
    bench.check()
    bench.close()


def test_for_want_of_descriptors_nothing_is_taken_for_a_loop(made: Make) -> None:
    """Whether an address is own can't be asked without one: it counts as own then."""
    bench = made(dialing=TRANSPARENT, own=lambda _: bench.open_error is not None)
    bench.ask(ASKED)
    bench.open_error = problem(errno.EMFILE)
    bench.ask(OTHER)
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert bench.observer.endings == ["evicted"]
    bench.check()
    bench.close()


def test_what_nobody_knows_the_destination_of_is_dropped(made: Make) -> None:
    bench = made()
    bench.ask(None)
    assert bench.nat.counters.dropped == {"no_local_address": 1}
    bench.close()


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (("198.51.100.9", 0), "198.51.100.9:0 is no destination"),
        (("224.0.0.251", 5353), "224.0.0.251:5353 is no destination"),
        (("255.255.255.255", 67), "255.255.255.255:67 is no destination"),
    ],
)
def test_what_is_no_destination_is_dropped(made: Make, to: Any, said: str) -> None:
    bench = made()
    with capturedLogs() as logs:
        bench.ask(to)
    assert bench.nat.counters.dropped == {"no_flow": 1}
    [line] = logs
    assert line["why"] == f"no socket for a flow of 192.0.2.1: {said}"
    bench.check()
    bench.close()


@pytest.mark.parametrize("asked", [("224.0.0.251", 5353), ("198.51.100.9", 0)])
def test_nobody_answers_from_a_group_or_from_port_0(made: Make, asked: Any) -> None:
    """The kernel would take one of the relay's own addresses, or any port."""
    bench = made([Server(*SERVER)])
    with capturedLogs() as logs:
        bench.ask(asked)
    assert bench.nat.counters.dropped == {"no_source": 1}
    [line] = logs
    assert f"{asked[0]}:{asked[1]} can't be answered from" in line["why"]
    assert not bench.live
    bench.check()
    bench.close()


@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", "::ffff:192.0.2.1"])
def test_an_ipv4_address_in_a_packet_of_ipv6_is_no_host_s(host: str) -> None:
    """It would be this machine's own loopback, say."""
    assert not is_host(host)


def test_a_destination_that_another_program_has_can_not_answer(made: Make) -> None:
    bench = made([Server(*SERVER)])
    other = PlacingSocket(bench.kernel)
    other.bind(ASKED)
    with capturedLogs() as logs:
        bench.ask()
    assert bench.nat.counters.dropped == {"no_source": 1}
    [line] = logs
    assert line["why"].endswith("another program of this machine has 198.51.100.9:53")
    assert not bench.live
    other.close()
    bench.ask()
    bench.answer()
    bench.check()
    bench.close()


def test_nothing_is_left_of_a_flow_that_can_not_be_watched(made: Make) -> None:
    bench = made([Server(*SERVER)], dialing=TRANSPARENT)
    bench.watcher.full = True
    bench.ask()
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert not bench.live
    assert not bench.answering
    assert not places.taken
    bench.watcher.full = False
    bench.ask()
    assert bench.answering == [ASKED]
    bench.check()
    bench.close()


def test_a_known_host_at_the_port_that_was_asked_for(made: Make) -> None:
    bench = made([OriginalServer("192.168.0.10")])
    bench.ask(("198.51.100.9", 53))
    bench.ask(("198.51.100.9", 5353))
    assert [each.peer for each in bench.sockets] == [
        ("192.168.0.10", 53),
        ("192.168.0.10", 5353),
    ]
    bench.close()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (None, "original"),
        ("192.168.0.10", "192.168.0.10:original"),
        ("2001:db8::1", "[2001:db8::1]:original"),
    ],
)
def test_what_it_is_called(host: str | None, name: str) -> None:
    server = OriginalServer(host)
    assert server.name == name
    assert not server.named
    assert server.address is not None
    assert server.end is None


def test_a_name_is_no_host_of_it() -> None:
    with pytest.raises(ValueError, match="not the name 'db.example'"):
        OriginalServer("db.example")


def test_it_takes_a_relay_that_is_redirected() -> None:
    with pytest.raises(ValueError, match="takes a relay that is redirected"):
        UdpNat(None, [OriginalServer()], clock=Clock(), max_flows=1)
    bench = PlacingBench()
    bench.nat.servers = [OriginalServer()]
    bench.arrive()
    assert bench.nat.counters.dropped == {"no_flow": 1}
    bench.close()


def test_it_stands_in_a_pool(made: Make) -> None:
    """Its flows go on elsewhere when they are refused; it is not to blame."""
    servers = Pool(
        [FlowServer.at(OriginalServer()), FlowServer.at(Server(*SERVER))], First()
    )
    bench = made(servers, dialing=TRANSPARENT)
    bench.ask()
    bench.ask(OTHER)
    assert bench.bound == [(CLIENT, ASKED), (CLIENT, OTHER)]
    refuse(bench, 0)
    assert sorted(bench.bound) == [(CLIENT, SERVER), (CLIENT, OTHER)]
    assert [each.fails for each in servers.upstreams] == [0, 0]
    bench.answer()
    assert bench.replying[0].sent == [(b"!", CLIENT)]
    bench.check()
    bench.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"send_proxy": "v2"},
        {"reply_cap": 2.0},
        {"bandwidth": Bandwidth(Rates(1000, 1000), clock=Clock())},
        {"filters": [appends(b"", "down")]},
        {"filters": [appends(b"", "down")], "send_proxy": "v2-first"},
        {"dialing": TRANSPARENT},
    ],
)
def test_it_goes_with_the_other_settings(made: Make, settings: Any) -> None:
    bench = made(**settings)
    bench.ask()
    bench.answer()
    assert bench.replying[0].sent == [(b"!", CLIENT)]
    [data] = bench.sockets[0].sent
    assert data.endswith(b"?")
    if "send_proxy" in settings:
        # Whose it is, and where it was to go.
        ends = socket.inet_aton(CLIENT[0]) + socket.inet_aton(ASKED[0])
        assert ends in data
    bench.check()
    bench.close()


def test_the_relay_goes_on_as_another(made: Make) -> None:
    """With other settings; its flows, and what they answer from, stay."""
    bench = made()
    bench.ask()
    other = OriginalBench([Server(*SERVER)])
    bench.nat.become(other.nat)
    bench.ask(OTHER)
    assert [each.peer for each in (*bench.sockets, *other.sockets)] == [ASKED, SERVER]
    bench.answer()
    assert bench.answering == [ASKED, OTHER]
    bench.nat.close()
    assert not bench.answering


def test_a_kernel_that_does_not_tell_is_no_listener(made: Make) -> None:
    class Refusing(TellingSocket):
        def setsockopt(self, *option: Any) -> None:
            if option[:2] == TOLD:
                raise problem(errno.ENOPROTOOPT)

    bench = made()
    with pytest.raises(OSError, match="does not tell where") as raised:
        bench.nat.listen([Refusing(bench.kernel)])
    assert "(IP_RECVORIGDSTADDR): Protocol not available" in str(raised.value)
    bench.close()


def test_such_flows_take_two_descriptors() -> None:
    assert default_max_flows(1, 1) <= default_max_flows()


# -- keys

HOSTS4 = st.ip_addresses(v=4).map(str)
HOSTS6 = st.binary(min_size=16, max_size=16).map(
    lambda packed: socket.inet_ntop(socket.AF_INET6, packed)
)
PORTS = st.integers(0, 0xFFFF)
ENDS4 = st.tuples(HOSTS4, PORTS)
ENDS6 = st.tuples(HOSTS6, PORTS, st.just(0), st.integers(0, 0xFFFFFFFF))


@attrs.define
class Tally:
    icmp_errors: int = 0


@given(st.one_of(st.tuples(ENDS4, ENDS4), st.tuples(ENDS6, ENDS6)))
def test_a_key_has_both_ends(ends: tuple[Any, Any]) -> None:
    """Of either way to receive; two clients never have the same."""
    source, to = ends
    # That is what stands for an unknown one.
    assume(to != ("255.255.255.255", 0xFFFF))
    v6 = len(source) == 4
    with socket.socket(
        socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM
    ) as sock:
        batches = OriginalBatches(sock, Tally(), local=True)
    told = _packed(to)[2:28] if v6 else _packed(to)[2:8]
    key = batches._key(source, told)
    assert batches.origin(key) == (source, told)
    assert original_listener._unpacked(told) == to
    unknown = batches._key(source, b"")
    assert batches.origin(unknown) == (source, b"")
    assert OriginalOneByOne.origin((source, told)) == (source, told)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_ways_to_receive_find_the_same(host: str) -> None:
    """On loopback, where what is told is the listener itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as ours,
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        ours.setblocking(False)
        original_listener.ask_for_local_address(ours)
        ask_for_hops(ours)
        option = (41, 74) if ":" in host else (0, 20)
        ours.setsockopt(*option, 1)
        client.setsockopt(*((41, 16) if ":" in host else (0, socket.IP_TTL)), 7)
        ours.bind((host, 0))
        client.bind((host, 0))
        batches = OriginalBatches(ours, Tally(), local=True)
        singly = OriginalOneByOne(ours, Tally(), local=True)
        for count in (1, BATCH):
            found = []
            for receiver in (batches, singly):
                for _ in range(count):
                    client.sendto(b"?", ours.getsockname())
                got = receiver.receive()
                assert len(got) == count
                assert all(bytes(data) == b"?" for data, _ in got)
                keys = {key for _, key in got}
                [key] = keys
                source, told = receiver.origin(key)
                assert original_listener._unpacked(told) == ours.getsockname()
                assert receiver.hops == [7] * count
                found.append((source, told))
            assert found[0] == found[1]
            assert found[0][0] == client.getsockname()


def test_a_sandbox_may_refuse_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys stay the same."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        ours.setblocking(False)
        original_listener.ask_for_local_address(ours)
        ask_for_hops(ours)
        ours.setsockopt(0, 20, 1)
        ours.bind(("127.0.0.1", 0))
        batches = OriginalBatches(ours, Tally(), local=True)
        client.sendto(b"?", ours.getsockname())
        [(_, key)] = batches.receive()

        def refuses(*_: Any) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

        monkeypatch.setattr("relayd.datagrams.mmsg.recvmmsg", refuses)
        client.sendto(b"?", ours.getsockname())
        hops = batches.hops
        assert [again for _, again in batches.receive()] == [key]
        assert batches.hops == hops == [64]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("refused", [False, True], ids=["batched", "singly"])
def test_replies_of_several_sockets_in_one_batch(
    host: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leaves by its own, those of one socket together; one that fails is told."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        opened = [
            stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            for _ in range(4)
        ]
        for each in opened:
            each.setblocking(False)
            each.bind((host, 0))
        one, two, closed, client = opened
        batches = OriginalBatches(one, Tally(), local=True)
        out = OriginalOutbox(one, local=True)
        to = client.getsockname()
        v6 = family == socket.AF_INET6
        calls: list[int] = []
        sendmmsg = mmsg.sendmmsg

        def counted(descriptor: int, *args: Any) -> int:
            calls.append(descriptor)
            if refused:
                ctypes.set_errno(errno.EPERM)
                return -1
            return sendmmsg(descriptor, *args)  # type: ignore[misc]

        monkeypatch.setattr(mmsg, "sendmmsg", counted)

        def envelope(sock: Any) -> tuple[Any, bytes]:
            told = _packed(sock.getsockname())[2:28] if v6 else None
            told = told or _packed(sock.getsockname())[2:8]
            return sock, out.envelope(batches._key(to, told))

        socks = [one, one, two, closed, one]
        envelopes = [envelope(each) for each in socks]
        own = [each.getsockname() for each in socks]
        closed.close()
        for number, slot in zip(range(5), out.slots, strict=False):
            slot[:1] = b"%d" % number
        problems = out.send([1] * 5, envelopes)
        assert list(problems) == [3]
        assert problems[3].errno == errno.EBADF
        if not refused:
            assert len(calls) == 4
        got = [client.recvfrom(9) for _ in range(4)]
        assert sorted(got) == sorted(
            (b"%d" % number, own[number]) for number in (0, 1, 2, 4)
        )
