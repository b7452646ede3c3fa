"""Circles through one process are found, and chains that end are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock

from relayd.core.hops import (
    EARLIER,
    LATER,
    MAX_PAST,
    NO_STAMP,
    Hops,
    between,
    file_of,
    streams,
)
from relayd.core.interfaces import IObserver
from relayd.core.observers import Observer
from relayd.core.session import Session
from relayd.tcp import RelayFactory
from tests.support.fakes import FakeEndpoint, FakeTransport

ONE, TWO = object(), object()


def test_a_client_from_elsewhere_comes_from_no_relay() -> None:
    assert not Hops().is_loop("192.0.2.1:5>192.0.2.2:80", ONE)


def test_a_way_back_to_where_it_began() -> None:
    hops = Hops()
    hops.add("a>b", ONE, "x>a")
    assert hops.is_loop("a>b", ONE)
    assert not hops.is_loop("a>b", TWO)
    hops.add("b>c", TWO, "a>b")
    assert hops.is_loop("b>c", ONE)
    hops.remove("a>b")
    assert not hops.is_loop("b>c", ONE)
    hops.remove("a>b")


def test_ports_are_counted() -> None:
    """Two listeners may have one port, on two addresses."""
    hops = Hops()
    hops.listens(80)
    hops.listens(80)
    hops.listens(0)
    hops.closes(80)
    assert set(hops.ports) == {80}
    hops.closes(80)
    assert not hops.ports


def test_files_are_counted(tmp_path: Path) -> None:
    """By what they are, however they are called."""
    hops, path, link = Hops(), tmp_path / "x", tmp_path / "link"
    path.touch()
    link.symlink_to(path)
    assert not hops.listens_at(str(path))
    hops.opens_file(file_of(str(path)))
    hops.opens_file(file_of(str(link)))
    for spelling in (path, link, tmp_path / ".." / tmp_path.name / "x"):
        assert hops.listens_at(str(spelling))
    assert not hops.listens_at(str(tmp_path / "y"))
    assert not hops.listens_at("\0x")
    hops.opens_file(file_of("\0x"))
    hops.closes_file(file_of("\0x"))
    hops.closes_file(file_of(str(path)))
    assert hops.listens_at(str(path))
    hops.closes_file(file_of(str(path)))
    assert not hops.files


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3))))
def test_every_way_is_followed_to_its_end_and_no_further(
    given: list[tuple[int, int, int]],
) -> None:
    """Whatever was noted, a loop among the notes included."""
    hops, relays = Hops(), [object() for _ in range(4)]
    for name, before, relay in given:
        hops.add(str(name), relays[relay], str(before))
    for start in range(7):
        seen, name = set(), str(start)
        passed = set()
        while name in hops.hops and name not in seen:
            seen.add(name)
            passed.add(id(hops.hops[name].relay))
            name = hops.hops[name].before
        for relay in relays:
            assert hops.is_loop(str(start), relay) == (id(relay) in passed)


STAMPS = st.integers(0, 2**32 - 1)


def within(scale: int) -> st.SearchStrategy[int]:
    return st.integers(-EARLIER * scale, LATER * scale)


def beyond(scale: int) -> st.SearchStrategy[int]:
    return st.integers(LATER * scale + 1, 2**32 - EARLIER * scale - 1)


@given(stamp=STAMPS, data=st.data())
def test_a_connection_is_recognized_by_its_syn(stamp: int, data: st.DataObject) -> None:
    """The timestamps wrap around; an odd one is in microseconds."""
    hops = Hops()
    hops.add("a>b", ONE, "x>a", stamp)
    later = data.draw(within(1000 if stamp % 2 else 1))
    assert hops.is_loop("a>b", ONE, (stamp + later) % 2**32)
    assert hops.is_loop("a>b", ONE), "by its ends, if nobody knows"


@given(stamp=STAMPS, data=st.data())
def test_another_with_the_same_ends_is_none(stamp: int, data: st.DataObject) -> None:
    hops = Hops()
    hops.add("a>b", ONE, "x>a", stamp)
    later = data.draw(beyond(1000 if stamp % 2 else 1))
    assert not hops.is_loop("a>b", ONE, (stamp + later) % 2**32)
    assert not hops.is_loop("a>b", ONE, NO_STAMP)
    hop = hops.hops["a>b"]
    hops.is_over("a>b", hop)
    assert not hops.is_loop("a>b", ONE, NO_STAMP)
    assert hops.is_loop("a>b", ONE, stamp)


def test_its_ends_alone_say_nothing_of_one_that_is_over() -> None:
    """Its client may have them by now, and no machine has timestamps, say."""
    hops = Hops()
    hop = hops.add("a>b", ONE, "x>a", 5)
    assert hops.is_loop("a>b", ONE, None)
    hops.is_over("a>b", hop)
    assert not hops.is_loop("a>b", ONE, None)
    assert hops.is_loop("a>b", ONE, 5)


def test_a_hop_without_one_is_known_by_its_ends() -> None:
    hops = Hops()
    hops.add("a>b", ONE, "x>a")
    for stamp in (None, NO_STAMP, 5):
        assert hops.is_loop("a>b", ONE, stamp)


def test_each_step_back_has_its_own() -> None:
    """The client that came by `a>b` is not the relay's own hop of that name."""
    hops = Hops()
    hops.add("a>b", ONE, "x>a", 1_000_000)
    hops.add("b>c", TWO, "a>b", 7, 1_000_000)
    assert hops.is_loop("b>c", ONE, 7)
    hops.add("b>c", TWO, "a>b", 7, NO_STAMP)
    assert not hops.is_loop("b>c", ONE, 7)
    hops.add("b>c", TWO, "a>b", 7, 900_000)
    assert not hops.is_loop("b>c", ONE, 7)


class Heard(Observer):
    """Keeps the sessions that are over."""

    def __init__(self) -> None:
        self.over: list[Session] = []

    def closed(self, session: Session) -> None:
        self.over.append(session)

    def refused(self, session: Session, why: str) -> None:
        self.over.append(session)


class Foreign:
    """A relay whose listener and whose server's endpoint are not ours."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard = Heard()
        self.clock: Any = Clock()
        self.server = FakeEndpoint(self.clock)
        self.factory = RelayFactory(
            self.server, clock=self.clock, observer=IObserver(self.heard)
        )

    def accept(self, client: IPv4Address) -> Any:
        """A client comes; the relay's end of its connection."""
        transport = FakeTransport(clock=self.clock)
        transport.peer = client
        transport.host = IPv4Address("TCP", "127.0.0.1", self.port)
        protocol: Any = self.factory.buildProtocol(client)
        transport.connect(protocol)
        return transport

    def reach(self, port: int, local: int, host: str = "127.0.0.1") -> IPv4Address:
        """The oldest dial has reached a port of this process; where it came from."""
        ours = IPv4Address("TCP", "127.0.0.1", local)
        dial = self.server.dials.pop(0)
        protocol: Any = dial.factory.buildProtocol(None)
        transport = FakeTransport(clock=self.clock)
        transport.peer = IPv4Address("TCP", host, port)
        transport.host = ours
        transport.connect(protocol)
        dial.deferred.callback(protocol)
        transport.turn()
        return ours

    @property
    def endings(self) -> list[str]:
        """Of the sessions that are over."""
        return [each.ending.word for each in self.heard.over if each.ending]


CLIENT = IPv4Address("TCP", "192.0.2.1", 50000)


def test_a_relay_to_itself_is_one_refused_session() -> None:
    """Where the dial is known before its connection is accepted."""
    relay = Foreign(80)
    relay.accept(CLIENT)
    ours = relay.reach(80, 40000)
    again = relay.accept(ours)
    assert relay.endings == ["loop"]
    assert not again.connected
    assert not relay.server.dials
    assert relay.factory.endings == {"loop": 1}


def test_a_loop_is_found_when_the_client_is_accepted_first() -> None:
    """The order of the kernel's events is nobody's promise."""
    relay = Foreign(80)
    relay.accept(CLIENT)
    ours = IPv4Address("TCP", "127.0.0.1", 40000)
    second = relay.accept(ours)
    assert len(relay.server.dials) == 2
    assert relay.reach(80, 40000) == ours
    assert not relay.endings
    third = relay.accept(relay.reach(80, 40001))
    assert relay.endings[:1] == ["loop"]
    assert not second.connected
    # Who dialled it has gone, but may have been followed before that.
    assert not third.connected
    assert relay.endings == ["loop", "loop"]
    assert not relay.server.dials


def test_a_ring_of_two() -> None:
    one, two = known(80, 81)
    one.accept(CLIENT)
    two.accept(one.reach(81, 40000))
    one.accept(two.reach(80, 40001))
    assert one.endings == ["loop"]
    assert not two.endings


def test_a_ring_whose_ports_are_not_known_yet() -> None:
    """A foreign listener is known by its first client: found in the second round."""
    one, two = Foreign(80), Foreign(81)
    one.accept(CLIENT)
    two.accept(one.reach(81, 40000))
    one.accept(two.reach(80, 40001))
    two.accept(one.reach(81, 40002))
    assert two.endings == ["loop"]


def known(*ports: int) -> list[Foreign]:
    """Relays on these ports, each of which has served a client."""
    relays = [Foreign(port) for port in ports]
    for relay in relays:
        relay.accept(CLIENT).lose()
        relay.server.dials.clear()
        relay.heard.over.clear()
    return relays


def test_a_chain_that_ends() -> None:
    """Is what somebody has built on purpose."""
    one, two = known(80, 81)
    for local in (40000, 40002):
        one.accept(CLIENT)
        two.accept(one.reach(81, local))
        two.reach(9000, local + 1)
    assert not one.endings
    assert not two.endings
    assert len(streams.hops) == 2


def test_what_is_over_is_kept_for_a_while() -> None:
    hops = Hops()
    first = hops.add("0>x", ONE, "-")
    hops.is_over("0>x", first)
    assert hops.is_loop("0>x", ONE)
    again = hops.add("0>x", TWO, "-")
    # The port has another owner, whose hop the first can't end.
    hops.is_over("0>x", first)
    assert hops.hops == {"0>x": again}
    assert not hops.past
    hops.is_over("0>x", again)
    for number in range(1, MAX_PAST + 1):
        hops.is_over(f"{number}>x", hops.add(f"{number}>x", ONE, "-"))
    assert len(hops.past) == MAX_PAST
    assert not hops.is_loop("0>x", TWO)
    assert not hops.hops


def test_a_hop_ends_with_its_session() -> None:
    one, _ = known(80, 81)
    client = one.accept(CLIENT)
    one.reach(81, 40000)
    assert list(streams.hops) == [between("127.0.0.1:40000", "127.0.0.1:81")]
    client.lose()
    assert not streams.hops


def test_the_same_port_of_another_machine() -> None:
    """Is the usual case, and nothing is noted for it."""
    [relay] = known(80)
    client = relay.accept(CLIENT)
    relay.reach(80, 40000, "192.0.2.9")
    assert client.connected
    assert not streams.hops


def test_one_port_may_lead_to_two_places() -> None:
    """The kernel gives it to a client of another relay, too."""
    one, _ = known(80, 81)
    one.accept(CLIENT)
    ours = one.reach(81, 40000)
    # What comes from there to port 80 is not what leads to port 81.
    one.accept(ours)
    assert not one.endings
