"""Sessions whose bandwidth is limited, on fakes: paused in time, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.errors import Refused
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import Ending
from relayd.stream import deadlines, lifecycle
from tests.support.fakes import FakeTransport
from tests.support.proxies import CONNECT, Proxy
from tests.support.relays import Relay, secret_client

STEP = 0.05


class Limited:
    """A relay on fakes that limits bandwidth, and a session of it, relayed.

    :param options: of the relay.
    """

    def __init__(self, *rates: Rates | None, **options: Any) -> None:
        self.relay = Relay(**options)
        self.clock = self.relay.clock
        self.bandwidth = Bandwidth(*rates, clock=self.clock)
        self.relay.factory.bandwidth = self.bandwidth

    def join(self) -> tuple[FakeTransport, FakeTransport]:
        client = self.relay.client()
        server = self.relay.server.dials[-1].connect()
        client.capacity = server.capacity = 1 << 30
        return client, server

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.clock.advance(STEP)
            # What the turn has scheduled.
            while any(c.getTime() <= self.clock.seconds() for c in self.calls):
                self.clock.advance(0)

    @property
    def calls(self) -> list[Any]:
        return self.clock.getDelayedCalls()


@pytest.mark.parametrize("rate", [1e3, 2e4, 1e6])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_stream_has_its_rate_and_all_of_it_arrives(rate: float, way: str) -> None:
    limited = Limited(Rates(rate, rate))
    client, server = limited.join()
    source, sink = (client, server) if way == "up" else (server, client)
    sent = bytes(range(256)) * round(rate * 5 / 256)
    source.arrive(sent)
    source.arrive_eof()
    limited.run(2)
    assert len(sink.taken) == pytest.approx(2 * rate, rel=0.15)
    limited.run(4)
    assert sink.taken == sent
    assert sink.write_shut
    sink.arrive_eof()
    limited.run(1)
    limited.relay.over(
        "opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done"
    )
    assert limited.bandwidth.waits > 3


def test_the_other_way_is_not_limited() -> None:
    limited = Limited(None, None, Rates(up=1e3))
    client, server = limited.join()
    server.arrive(bytes(1_000_000))
    client.arrive(bytes(1_000_000))
    limited.run(1)
    assert len(client.taken) == 1_000_000
    assert len(server.taken) == pytest.approx(1e3, rel=0.3)
    client.lose()
    limited.run(1)
    limited.relay.over(
        "opened",
        "dialing server:80",
        "connected 192.0.2.1:9000",
        "closed downstream_reset",
    )


def test_a_client_is_not_read_before_there_is_a_server() -> None:
    """Or what is kept would be passed on at once, 64 KiB of it."""
    limited = Limited(Rates(1e4, 1e4))
    client = limited.relay.client()
    client.arrive(bytes(100_000))
    limited.run(0.5)
    assert client.waiting == 100_000
    server = limited.relay.server.dial.connect()
    server.add_capacity(1 << 30)
    limited.run(2)
    assert len(server.taken) == pytest.approx(2.25e4, rel=0.1)
    client.lose()
    limited.run(1)


def test_a_client_whose_limit_is_wide_is_read_at_once() -> None:
    limited = Limited(Rates(1e6, 1e6))
    client = limited.relay.client()
    client.arrive(b"hello")
    limited.run(STEP)
    assert client.waiting == 0
    server = limited.relay.server.dial.connect()
    server.take()
    assert server.taken == b"hello"
    client.lose()
    limited.run(1)


def test_a_client_that_is_not_read_and_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its dial is cancelled as always, after a second."""
    limited = Limited(Rates(1e3, 1e3))
    client = limited.relay.client()
    limited.run(2)
    assert limited.relay.server.cancelled == 0
    monkeypatch.setattr(lifecycle, "ended_unread", lambda _: True)
    limited.run(4)
    assert limited.relay.server.cancelled == 1
    assert client.log[-1] == "close"
    limited.run(6)
    limited.relay.over("opened", "dialing server:80", "closed client_left")


def test_early_data_of_a_proxys_client_is_a_debt() -> None:
    """What came with its request: it was read, and counts."""
    proxy = Proxy()
    proxy.factory.bandwidth = Bandwidth(Rates(1e4, 1e4), clock=proxy.clock)
    client = proxy.client()
    client.receive(CONNECT + bytes(30_000))
    server = proxy.server.dial.connect()
    server.add_capacity(1 << 30)
    client.arrive(bytes(10_000))
    for _ in range(20):
        proxy.clock.advance(0.1)
    assert len(server.taken) == 30_000
    for _ in range(20):
        proxy.clock.advance(0.1)
    assert len(server.taken) == 40_000 - client.waiting > 30_000
    client.lose()
    proxy.clock.advance(1)
    assert not client.connected


def test_a_session_that_is_paced_is_neither_idle_nor_stalled() -> None:
    """Its share may be so small that its turn comes after the idle timeout."""
    limited = Limited(Rates(10, 10), idle_timeout=2, stall_timeout=1)
    client, server = limited.join()
    # A debt, as of a TLS record.
    pace = limited.relay.session.up.pace
    assert pace is not None
    pace.spend(100)
    pace.grant(1)
    pace.wait()
    client.arrive(bytes(50))
    limited.run(8)
    assert limited.relay.session.ending is None
    assert not server.taken
    limited.run(12)
    assert server.taken == bytes(50)
    limited.run(6)
    assert limited.relay.session.ending is Ending.IDLE


def test_before_a_reset_is_passed_on_what_is_unread_leaves_unpaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited = Limited(None, None, Rates(1e3, 1e3))
    client, server = limited.join()
    client.arrive(bytes(100_000))
    client.arrive_reset()
    limited.run(2)
    assert len(server.taken) < 3_000
    # What the kernel says.
    monkeypatch.setattr(deadlines, "was_reset", lambda t: t is client)
    monkeypatch.setattr(deadlines, "unread", lambda t: t.waiting)
    limited.run(3)
    assert len(server.taken) == 100_000
    assert limited.relay.session.ending is Ending.DOWNSTREAM_RESET
    assert not server.connected
    assert server.aborted


def test_a_full_peer_and_an_empty_bucket() -> None:
    """Each is a reason of its own to be paused."""
    limited = Limited(Rates(1e5, 1e5))
    client, server = limited.join()
    server.capacity = 0
    client.arrive(bytes(1_000_000))
    limited.run(3)
    assert len(server.dataBuffer) <= 2 * 65536
    leg = next(iter(limited.relay.factory.sessions.values()))
    assert not leg.paused & ALLOWANCE
    server.add_capacity(1 << 30)
    before = len(server.dataBuffer)
    limited.run(5)
    assert len(server.taken) == pytest.approx(5e5 + before, rel=0.1)
    client.lose()
    limited.run(1)


def test_what_tls_reads_at_once_is_paid_for() -> None:
    """What it hands on is a record, however little was granted."""
    limited = Limited(Rates(1e4, 1e4))
    client = secret_client(limited.relay)
    client.shake_hands()
    server = limited.relay.server.dial.connect()
    server.capacity = 1 << 30
    client.receive(bytes(16_384))
    limited.run(0.5)
    assert not client.reading
    limited.run(1.6)
    assert client.reading
    client.lose()
    limited.run(1)


def test_many_that_begin_at_once_share_what_there_is() -> None:
    """None is read far beyond that, and so nobody has to wait for long after it."""
    limited = Limited(Rates(1e5, 1e5))
    sessions = [limited.join() for _ in range(30)]
    for _, server in sessions:
        server.arrive(bytes(100_000))
    limited.run(1)
    taken = [len(client.taken) for client, _ in sessions]
    assert sum(taken) == pytest.approx(1.16e5, rel=0.1)
    assert min(taken) > 3000
    for client, _ in sessions:
        client.lose()
    limited.run(1)


def test_a_transport_that_can_not_be_told_how_much_to_read() -> None:
    limited = Limited(Rates(1e4, 1e4))
    client = limited.relay.client()
    server = limited.relay.server.dial.connect()
    leg: Any = next(iter(limited.relay.factory.sessions.values()))
    leg.bridge.upstream.transport.bufferSize = 65536
    server.arrive(bytes(65_536))
    limited.run(1)
    client.take()
    assert len(client.taken) == 65_536
    client.lose()
    limited.run(1)


def test_a_drain_ends_what_waits() -> None:
    limited = Limited(Rates(1e3, 1e3))
    client, _ = limited.join()
    client.arrive(bytes(100_000))
    limited.run(1)
    over = limited.relay.factory.drain(0)
    limited.run(STEP)
    assert over.called
    limited.relay.over(
        "opened", "dialing server:80", "connected 192.0.2.1:9000", "closed drained"
    )


def test_a_client_that_is_refused_has_entered_nothing() -> None:
    limited = Limited(None, Rates(1e3, 1e3))
    limited.relay.gate.problem = Refused("no", "client")
    limited.relay.client()
    assert limited.bandwidth.clients == 0
    limited.relay.gate.problem = None
    client = limited.relay.client()
    assert limited.bandwidth.clients == 1
    client.lose()
    assert limited.bandwidth.clients == 0


def test_what_is_dropped_after_the_first_end_is_paced_as_well() -> None:
    """With --half-close off: a client that leaves does not make its server faster."""
    limited = Limited(Rates(1e4, 1e4), half_close=False)
    client, server = limited.join()
    server.arrive(bytes(1_000_000))
    limited.run(1)
    client.arrive_eof()
    limited.run(1)
    assert not client.connected
    assert server.write_shut
    limited.run(2)
    assert 1_000_000 - server.waiting == pytest.approx(4e4, rel=0.15)
    limited.run(6)
    limited.relay.over(
        "opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done"
    )
