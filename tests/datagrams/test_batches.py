"""Datagrams in batches: the kernel's calls say what Python's own say."""

from __future__ import annotations

import ctypes
import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from attrs import define

from relayd.datagrams import mmsg
from relayd.datagrams.batches import Batches, OneByOne, Outbox, outbox, receiver
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.sockets import IP_PKTINFO, ask_for_local_address, bind_udp

FAMILIES = {
    "IPv4": ("127.0.0.1", "127.0.0.1", False),
    "IPv6": ("::1", "::1", False),
    "all of IPv4": ("0.0.0.0", "127.0.0.3", True),
    "all of IPv6": ("::", "::1", True),
}


def loopback() -> closing[Any]:
    """A socket of a free port, for the length of a block."""
    return closing(bind_udp("127.0.0.1", 0))


@define
class Tally:
    icmp_errors: int = 0


@define
class Ends:
    """A listener's socket, and clients that are connected to it.

    :ivar host: where they speak to it.
    """

    sock: Any
    host: str
    local: bool
    clients: list[Any]

    def greeted(self) -> list[bytes]:
        """The clients' keys, after a datagram of each."""
        incoming = Batches(self.sock, Tally(), local=self.local)
        for client in self.clients:
            client.send(b"here")
        return [key for _, key in incoming.receive()]


@pytest.fixture(params=list(FAMILIES))
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    bound, host, local = FAMILIES[request.param]
    with ExitStack() as stack:
        sock = stack.enter_context(closing(bind_udp(bound, 0)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        if local:
            ask_for_local_address(sock)
        clients = []
        for _ in range(5):
            client = stack.enter_context(socket.socket(sock.family, socket.SOCK_DGRAM))
            client.settimeout(5)
            client.connect((host, sock.getsockname()[1]))
            clients.append(client)
        yield Ends(sock, host, local, clients)


def all_of(got: list[tuple[Any, Any]]) -> list[tuple[bytes, Any]]:
    return [(bytes(data), key) for data, key in got]


SIZES = [0, 1, 200, 1, 65507, 0, 9000, 3]


@pytest.mark.parametrize("kind", [Batches, OneByOne])
def test_what_arrives_is_received_in_order(ends: Ends, kind: Any) -> None:
    """With its source and where it was sent to, whatever its size."""
    incoming = kind(ends.sock, Tally(), local=ends.local)
    expected = []
    for number, size in enumerate(SIZES):
        client = ends.clients[number % len(ends.clients)]
        data = bytes([number + 1]) * size
        client.send(data)
        expected.append((data, client.getsockname()))
    got = all_of(incoming.receive())
    assert incoming.drained
    assert [data for data, _ in got] == [data for data, _ in expected]
    ours = socket.inet_pton(ends.sock.family, ends.host) if ends.local else b""
    for (_, key), (_, source) in zip(got, expected, strict=True):
        assert incoming.origin(key) == (source, ours)
    # One client is one key, and another one is another.
    assert len({key for _, key in got}) == len(ends.clients)
    assert incoming.receive() == []
    assert incoming.drained


@pytest.mark.parametrize("kind", [Batches, OneByOne])
def test_a_batch_is_limited(ends: Ends, kind: Any) -> None:
    """What is left is the next one's, and nothing of the last shows through."""
    incoming = kind(ends.sock, Tally(), local=ends.local)
    for number in range(BATCH + 3):
        ends.clients[0].send(bytes([number]) * (BATCH + 3 - number))
    first = all_of(incoming.receive())
    assert not incoming.drained
    rest = all_of(incoming.receive())
    assert incoming.drained
    assert [len(first), len(rest)] == [BATCH, 3]
    assert [data for data, _ in first + rest] == [
        bytes([number]) * (BATCH + 3 - number) for number in range(BATCH + 3)
    ]


@pytest.mark.parametrize("kind", [Batches, OneByOne])
def test_nothing_is_received_from_a_closed_socket(ends: Ends, kind: Any) -> None:
    """And that is no error of the network's."""
    tally = Tally()
    incoming = kind(ends.sock, tally, local=ends.local)
    ends.sock.close()
    assert incoming.receive() == []
    assert incoming.drained
    assert tally.icmp_errors == 0


@pytest.mark.parametrize("kind", [Batches, OneByOne])
def test_an_error_is_counted_and_more_may_be_pending(kind: Any) -> None:
    """Here of an earlier datagram, which its host refused."""
    tally = Tally()
    with loopback() as sock, loopback() as gone:
        sock.connect(gone.getsockname())
        incoming = kind(sock, tally, local=False)
        gone.close()
        sock.send(b"to nobody")
        assert incoming.receive() == []
        assert incoming.receive() == []
        assert incoming.drained
    assert tally.icmp_errors == 1


def test_an_unreported_address_is_empty() -> None:
    """Whatever it said the last time."""
    with loopback() as sock, loopback() as client:
        incoming = Batches(sock, Tally(), local=True)
        for asked in (0, 1, 0, 1):
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, asked)
            client.sendto(b"x", sock.getsockname())
            [(_, key)] = incoming.receive()
            ours = socket.inet_aton("127.0.0.1") if asked else b""
            assert incoming.origin(key) == (client.getsockname(), ours)


def put(out: Outbox, datas: list[bytes]) -> list[int]:
    for slot, data in zip(out.slots, datas, strict=False):
        slot[: len(data)] = data
    return [len(data) for data in datas]


def test_each_client_is_sent_its_own_datagram(ends: Ends) -> None:
    """From the address that it spoke to, whatever the size; and again."""
    out = Outbox(ends.sock, local=ends.local)
    envelopes = [out.envelope(key) for key in ends.greeted()]
    for sizes in ([65507, 0, 1, 9000, 200], [1, 2, 3, 0, 5], [7]):
        datas = [bytes([size % 251]) * size for size in sizes]
        assert out.send(put(out, datas), envelopes[: len(datas)]) == {}
        # They are connected: an answer from elsewhere would not reach them.
        got = [client.recv(65536) for client in ends.clients[: len(datas)]]
        assert got == datas


def test_datagrams_that_can_not_be_sent_are_returned(ends: Ends) -> None:
    """The others leave, wherever it stands in the batch."""
    out = Outbox(ends.sock, local=ends.local)
    key = ends.greeted()[0]
    good = out.envelope(key)
    # Its port is 0.
    nobody = out.envelope(key[:2] + bytes(2) + key[4:])
    for bad in ({0}, {2}, {0, 1, 2}, {1, 4}, {4}, set(range(5))):
        envelopes = [nobody if number in bad else good for number in range(5)]
        datas = [b"%d" % number for number in range(5)]
        problems = out.send(put(out, datas), envelopes)
        assert {number: why.errno for number, why in problems.items()} == dict.fromkeys(
            bad, errno.EINVAL
        )
        for number in sorted(set(range(5)) - bad):
            assert ends.clients[0].recv(100) == b"%d" % number
    too_long = out.send([65536], [good])
    assert too_long[0].errno == errno.EMSGSIZE


@pytest.mark.parametrize("missing", ["recvmmsg", "sendmmsg"])
@pytest.mark.parametrize("how", ["not there", "refused"])
def test_without_the_calls_pythons_are_used(
    monkeypatch: pytest.MonkeyPatch, missing: str, how: str
) -> None:
    """Another C library, or a sandbox that does not let them through."""
    with loopback() as sock:
        assert isinstance(receiver(sock, Tally(), local=False), Batches)
        assert isinstance(outbox(sock, local=False), Outbox)
        monkeypatch.setattr(
            mmsg, missing, None if how == "not there" else lambda *_: -1
        )
        assert isinstance(receiver(sock, Tally(), local=False), OneByOne)
        assert outbox(sock, local=False) is None


@pytest.fixture(params=[errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP])
def refused(request: pytest.FixtureRequest) -> Any:
    """A call that a sandbox refuses, and when it was made."""

    def call(*_: Any) -> int:
        made.append(1)
        ctypes.set_errno(request.param)
        return -1

    made: list[int] = []
    return call, made


def test_receiving_goes_on_where_the_call_is_refused_later(
    ends: Ends, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, with the same keys: no client becomes another one."""
    call, made = refused
    tally = Tally()
    incoming = Batches(ends.sock, tally, local=ends.local)
    for number, client in enumerate(ends.clients):
        client.send(b"%d" % number)
    before = all_of(incoming.receive())
    monkeypatch.setattr(mmsg, "recvmmsg", call)
    assert incoming.receive() == []
    assert incoming.drained
    for _ in range(2):
        for number, client in enumerate(ends.clients):
            client.send(b"%d" % number)
        assert all_of(incoming.receive()) == before
        assert incoming.drained
    assert incoming.receive() == []
    assert len(made) == 1
    assert (tally.icmp_errors, incoming.refusal) == (0, None)
    source = ends.clients[0].getsockname()
    ours = socket.inet_pton(ends.sock.family, ends.host) if ends.local else b""
    assert incoming.origin(before[0][1]) == (source, ours)


def test_sending_goes_on_where_the_call_is_refused_later(
    ends: Ends, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, from the address that was spoken to; and it is not asked again."""
    call, made = refused
    out = Outbox(ends.sock, local=ends.local)
    envelopes = [out.envelope(key) for key in ends.greeted()]
    monkeypatch.setattr(mmsg, "sendmmsg", call)
    for turn in range(2):
        datas = [b"%d" % (turn + number) for number in range(len(ends.clients))]
        assert out.send(put(out, datas), envelopes) == {}
        assert [client.recv(100) for client in ends.clients] == datas
    assert len(made) == 1


def test_one_that_can_not_be_sent_does_not_stop_the_call(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall says EPERM of one datagram, and lets the others through."""
    out = Outbox(ends.sock, local=ends.local)
    key = ends.greeted()[0]
    nobody = out.envelope(key[:2] + bytes(2) + key[4:])
    good = out.envelope(key)
    for _ in range(2):
        sizes = put(out, [b"a", b"b", b"c"])
        assert list(out.send(sizes, [good, nobody, good])) == [1]
        assert [ends.clients[0].recv(9) for _ in range(2)] == [b"a", b"c"]
    assert not out._singly
    # And so it is one by one.
    out._singly = True
    sizes = put(out, [b"a", b"b", b"c"])
    problems = out.send(sizes, [good, nobody, good])
    assert {number: why.errno for number, why in problems.items()} == {1: errno.EINVAL}
    assert [ends.clients[0].recv(9) for _ in range(2)] == [b"a", b"c"]


def test_an_unreported_address_is_empty_one_by_one_too() -> None:
    """In the keys of batches, whose receiver was refused."""
    for host in ("127.0.0.1", "::1"):
        with closing(bind_udp(host, 0)) as sock, closing(bind_udp(host, 0)) as client:
            incoming = Batches(sock, Tally(), local=True)
            incoming._plain = OneByOne(sock, Tally(), local=True)
            client.sendto(b"x", sock.getsockname())
            [(_, key)] = incoming.receive()
            assert incoming.origin(key) == (client.getsockname(), b"")


def test_a_function_that_the_c_library_lacks_is_none() -> None:
    """And not an error at import."""
    assert mmsg.function("no_such_function_of_the_c_library") is None
