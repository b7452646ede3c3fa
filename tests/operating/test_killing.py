"""Sessions and flows that an operator ends: in each stage, once, with a line."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from relayd.control.steering import Invalid, Unknown
from relayd.core.counts import SessionCounts
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.operating.killing import kill
from relayd.operating.listing import Shown
from relayd.preludes.socks4 import Command, write_request
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.datagrams.support import Bench
from tests.support.fakes import FakeTransport
from tests.support.proxies import Proxy
from tests.support.relays import Relay, secret_client
from tests.support.shown import shown, whole


def killed(made: Any, **whom: Any) -> int:
    return int(whole(kill([shown(made.factory)], **whom))["killed"])


def over(relay: Relay, client: FakeTransport, *, admitted: bool = True) -> None:
    """It was ended by a reset, and is counted so."""
    assert client.aborted
    relay.clock.advance(0)
    assert not relay.factory.sessions
    [session] = relay.witness.sessions
    assert session.ending is Ending.KILLED
    assert session.detail == "by its operator"
    assert relay.factory.endings == {"killed": 1}
    counts: Any = relay.factory.counts
    assert counts.closed["killed"] == admitted
    assert counts.refused["killed"] == (not admitted)
    assert relay.gate.inside == 0
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()


def counted(**options: Any) -> Relay:
    relay = Relay(**options)
    relay.factory.counts = SessionCounts(["server:80"])
    return relay


def test_one_that_is_relayed() -> None:
    relay = counted()
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive(b"hello")
    assert killed(relay, sessions=[relay.session.id]) == 1
    assert server.aborted
    over(relay, client)
    assert relay.witness.heard[-1] == "closed killed"
    assert killed(relay, relay="web") == 0


def test_one_whose_server_is_dialled() -> None:
    """Which says nothing of the server."""
    relay = counted()
    client = relay.client()
    assert killed(relay, client="192.0.2.0/24") == 1
    over(relay, client)
    counts: Any = relay.factory.counts
    assert counts.servers["server:80"].results == {"cancelled": 1}


def test_one_in_a_handshake() -> None:
    relay = counted(handshake_timeout=5)
    client = secret_client(relay)
    assert relay.session.stage is Stage.HANDSHAKE
    assert killed(relay, relay="web") == 1
    over(relay, client)


def test_one_that_waits_for_its_gate() -> None:
    """It was never admitted: the gate hears that it has left."""
    relay = counted()
    left: list[Any] = []
    relay.gate.enter = lambda session: Deferred(left.append)  # type: ignore[assignment,method-assign,return-value]
    client = relay.client()
    [protocol] = relay.factory.sessions.values()
    assert protocol.session.stage is Stage.WAITING
    assert killed(relay, sessions=[protocol.session.id]) == 1
    assert len(left) == 1
    over(relay, client, admitted=False)
    assert relay.witness.heard == ["refused by its operator"]


def test_one_that_says_whose_connection_it_is() -> None:
    relay = counted(accept_proxy=["192.0.2.1"], handshake_timeout=5)
    client = relay.client()
    [protocol] = relay.factory.sessions.values()
    assert protocol.session.stage is Stage.HEADER
    assert killed(relay, relay="web") == 1
    over(relay, client, admitted=False)


def test_one_whose_data_have_ended_and_wait() -> None:
    """Both directions have; the client takes nothing."""
    relay = counted()
    client = relay.client()
    client.capacity = 0
    server = relay.server.dial.connect()
    server.receive(b"answer")
    server.receive_eof()
    client.receive_eof()
    [protocol] = relay.factory.sessions.values()
    assert protocol.session.ending is None
    assert killed(relay, server="server:80") == 1
    over(relay, client)


def test_one_that_has_its_ending_keeps_it() -> None:
    """It was told that it is not served, which it does not take."""
    proxy = Proxy(bind=False)
    client = proxy.client()
    client.capacity = 0
    client.receive(write_request(Command.BIND, "198.51.100.1", 21))
    [protocol] = proxy.factory.sessions.values()
    assert protocol.session.stage is Stage.CLOSING
    ending = protocol.session.ending
    assert ending not in (None, Ending.KILLED)
    assert whole(kill([Shown("p", "socks4", [proxy.factory])], relay="p")) == {
        "killed": 0
    }
    assert client.aborted
    proxy.clock.advance(0)
    assert not proxy.factory.sessions
    assert proxy.factory.endings == {ending.word: 1}


def test_a_proxys_clients() -> None:
    """Whoever speaks, and whoever waits for a peer."""
    proxy = Proxy(bind=True)
    speaking = proxy.client()
    speaking.receive(b"\x04\x01")
    waiting = proxy.client()
    waiting.receive(write_request(Command.BIND, "198.51.100.1", 21))
    stages = {each.session.stage for each in proxy.factory.sessions.values()}
    assert Stage.PRELUDE in stages
    own = Shown("proxy", "socks4", [proxy.factory])
    assert whole(kill([own], relay="proxy")) == {"killed": 2}
    proxy.clock.advance(0)
    assert not proxy.factory.sessions
    assert proxy.factory.endings == {"killed": 2}
    assert not len(proxy.factory.handshakes)
    assert not len(proxy.factory.binds)


def test_all_that_is_given_must_match() -> None:
    relay = Relay()
    clients = [relay.client() for _ in range(3)]
    first, second, third = sorted(relay.factory.sessions)
    nobody = {"sessions": [first], "client": "10.0.0.1"}
    assert killed(relay, **nobody) == 0
    assert killed(relay, sessions=[first, third, 10**9], server="server:80") == 2
    assert [each.aborted for each in clients] == [True, False, True]
    relay.clock.advance(0)
    assert list(relay.factory.sessions) == [second]
    assert killed(relay, sessions=[]) == 0


def test_there_is_no_such_session() -> None:
    """One of those that are named is enough."""
    relay = Relay()
    relay.client()
    [first] = relay.factory.sessions
    with pytest.raises(Unknown, match="^there is no session 1000000000, 7000$"):
        killed(relay, sessions=iter([10**9, 7000]))
    assert killed(relay, sessions=[10**9, first]) == 1
    relay.clock.advance(0)
    with pytest.raises(Unknown, match=f"^there is no session {first}$"):
        killed(relay, sessions=[first])


def test_those_of_older_settings_as_well() -> None:
    before, now = Relay(), Relay()
    clients = [each.client() for each in (before, now)]
    own = Shown("web", "tcp", [now.factory], [before.factory])
    assert whole(kill([own], relay="web", why="so")) == {"killed": 2}
    assert all(each.aborted for each in clients)
    assert before.session.detail == "so"


def test_whom_must_be_said() -> None:
    relay = Relay()
    relay.client()
    with pytest.raises(Invalid, match="say whom"):
        killed(relay)
    with pytest.raises(Unknown, match="no relay 'db'"):
        killed(relay, relay="db")
    with pytest.raises(Invalid, match="^client 'x': "):
        killed(relay, client="x")
    assert len(relay.factory.sessions) == 1


def test_a_defect_in_one_keeps_no_other(logged_failures: LoggedFailures) -> None:
    relay = Relay()
    clients = [relay.client() for _ in range(2)]
    first = next(iter(relay.factory.sessions.values()))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    first.abort_session = fails
    assert killed(relay, relay="web") == 1
    assert not clients[0].aborted
    assert clients[1].aborted
    assert logged_failures.take("could not be killed")


def test_who_ends_meanwhile_is_not_counted() -> None:
    relay = Relay()
    clients = [relay.client() for _ in range(50)]
    work = kill([shown(relay.factory)], relay="web")
    next(work)
    rest = [each for each in clients if not each.aborted]
    assert rest
    for each in rest[:5]:
        each.lose()
    assert whole(work) == {"killed": 45}
    relay.clock.advance(0)
    assert not relay.factory.sessions


# -- flows


def test_flows_end_as_well() -> None:
    pool = Pool(
        [FlowServer.at(Server(f"198.51.100.{n}", 53), label=f"s{n}") for n in (1, 2)]
    )
    bench = Bench(pool)
    for port in range(1, 7):
        bench.arrive(source=("192.0.2.1", port))
    bench.arrive(source=("192.0.2.2", 1))
    own = Shown("dns", "udp", [bench.nat], pools=[pool])
    assert whole(kill([own], sessions=[1], client="192.0.2.2")) == {"killed": 0}
    assert whole(kill([own], client="192.0.2.2")) == {"killed": 1}
    [one, two] = pool.servers
    assert whole(kill([own], server="s1")) == {"killed": 3}
    assert (one.sessions, two.sessions) == (0, 3)
    assert whole(kill([own], server="198.51.100.2:53", client="192.0.2.0/24")) == {
        "killed": 3
    }
    assert bench.observer.endings == ["killed"] * 7
    bench.check()
    # Its client's next datagram makes a new one.
    bench.arrive(source=("192.0.2.2", 1))
    assert len(bench.nat.table) == 1
    bench.close()
