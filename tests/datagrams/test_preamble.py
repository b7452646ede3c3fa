"""What a UDP server is told of each flow, or of each datagram."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from relayd.datagrams.preamble import Preamble
from relayd.preludes.proxy_protocol import write_version_2
from relayd.udp_nat import Server, preamble_of
from tests.datagrams.support import CLIENT, NAMED, SERVER, Bench, named, problem, refuse


def header(bench: Bench, client: Any = CLIENT) -> bytes:
    reached = f"203.0.113.1:{bench.listener.getsockname()[1]}"
    return write_version_2(f"{client[0]}:{client[1]}", reached, datagrams=True)


def test_every_datagram_of_a_flow_is_told_whose_it_is() -> None:
    bench = Bench(send_proxy="v2")
    told = header(bench)
    for data in (b"one", b"", b"three"):
        bench.arrive(data)
    bench.answer(b"answer")
    [sock] = bench.sockets
    assert sock.sent == [told + b"one", told, told + b"three"]
    assert bench.listener.sent == [(b"answer", CLIENT)], "answers have none"
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (3, 8), "it is not counted"
    bench.check()
    bench.close()


def test_or_the_first() -> None:
    bench = Bench(send_proxy="v2-first")
    other = ("192.0.2.2", 4000)
    for data, source in ((b"one", CLIENT), (b"two", CLIENT), (b"other", other)):
        bench.arrive(data, source)
    first, second = bench.sockets
    assert first.sent == [header(bench) + b"one", b"two"]
    assert second.sent == [header(bench, other) + b"other"]
    bench.close()


@pytest.mark.parametrize("version", ["v2", "v2-first"])
def test_datagrams_that_come_together(version: str) -> None:
    bench = Bench(send_proxy=version)
    for number in range(4):
        bench.listener.inbox.append((b"%d" % number, CLIENT))
    bench.watcher.ready(bench.listener.number)
    [sock] = bench.sockets
    told = header(bench)
    each = told if version == "v2" else b""
    assert sock.sent == [told + b"0", each + b"1", each + b"2", each + b"3"]
    bench.check()
    bench.close()


def test_a_datagram_that_no_longer_fits_is_dropped_and_counted() -> None:
    bench = Bench(send_proxy="v2")
    bench.arrive(b"fits")
    [sock] = bench.sockets
    sock.errors += [problem(errno.EMSGSIZE), problem(errno.EMSGSIZE)]
    bench.arrive(bytes(65507))
    bench.arrive(b"fits, too")
    assert [len(each) for each in sock.sent] == [28 + 4, 28 + 9]
    assert bench.nat.counters.dropped == {"send_EMSGSIZE": 1}
    bench.check()
    bench.close()


@pytest.mark.parametrize("version", ["v2", "v2-first"])
def test_a_datagram_that_was_not_sent_has_not_told_it(version: str) -> None:
    bench = Bench(send_proxy=version)
    bench.arrive(b"one")
    bench.arrive(b"two")
    bench.close()
    bench = Bench(send_proxy=version)
    opened = bench.open

    def refusing(family: int) -> Any:
        sock = opened(family)
        sock.errors.append(problem(errno.EAGAIN))
        return sock

    bench.open = refusing
    bench.arrive(b"lost")
    bench.arrive(b"first")
    [sock] = bench.sockets
    assert sock.sent == [header(bench) + b"first"]
    bench.check()
    bench.close()


@pytest.mark.parametrize("reported_by", ["send", "recv", "recv_into"])
def test_who_has_the_port_after_a_refusal_is_told(reported_by: str) -> None:
    """The server was not there, or is another by now."""
    bench = Bench(send_proxy="v2-first", together=reported_by == "recv_into")
    bench.arrive(b"refused")
    [sock] = bench.sockets
    if reported_by == "send":
        sock.errors.append(problem(errno.ECONNREFUSED))
    else:
        if reported_by == "recv_into":
            # Answers that come one at a time are read into the batch of replies.
            bench.answer(b"answer")
        refuse(bench)
    bench.arrive(b"first")
    bench.arrive(b"second")
    assert sock.sent == [
        header(bench) + b"refused",
        header(bench) + b"first",
        b"second",
    ]
    # A router's error says nothing of who has the port.
    refuse(bench, why=errno.EHOSTUNREACH)
    bench.arrive(b"third")
    assert sock.sent[3:] == [b"third"]
    bench.check()
    bench.close()


@pytest.mark.parametrize("version", ["v2", "v2-first"])
def test_the_next_address_of_a_name_is_told_too(version: str) -> None:
    bench = named(send_proxy=version)
    bench.arrive(b"one")
    bench.arrive(b"two")
    refuse(bench)
    told = header(bench)
    each = told if version == "v2" else b""
    assert [sock.peer[0] for sock in bench.sockets] == list(NAMED[:2])
    assert bench.sockets[1].sent == [told + b"one", each + b"two"]
    bench.close()


def test_a_server_may_have_its_own() -> None:
    bench = Bench([Server(*SERVER), Server(*SERVER, preamble_of("v2"))])
    for number in (1, 2):
        bench.arrive(b"?", ("192.0.2.1", number))
    assert [sock.sent for sock in bench.sockets] == [
        [b"?"],
        [header(bench, ("192.0.2.1", 2)) + b"?"],
    ]
    bench.close()


def test_versions_that_there_are() -> None:
    assert preamble_of(None) is None
    made = preamble_of("v2-first")
    assert isinstance(made, Preamble)
    assert made.first
    for version in ("v1", "", "v3"):
        with pytest.raises(ValueError, match="v2 or v2-first"):
            preamble_of(version)
