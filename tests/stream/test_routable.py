"""A client that a route decides about, on fakes: what it waits for, what is done."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.protocols.policies import ProtocolWrapper

from relayd.core.prelude import BadRequest
from relayd.core.routing import LONGEST_WHY, Decision, RouteLimits
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.observing.json_lines import JsonLines
from relayd.observing.text_lines import TextLines
from relayd.preludes.proxy_protocol import ProxyHeader
from relayd.stream.deadlines import CLOSE_GRACE
from relayd.stream.legs import HOLD_LIMIT
from relayd.stream.lifecycle import LEFT_GRACE
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.own_filters import Makes, Own
from tests.support.relays import Relay, secret_client
from tests.support.routers import FakeRouter


def relay(answer: Decision | None = None, **options: Any) -> tuple[Relay, FakeRouter]:
    """A relay on fakes, and its router."""
    router = FakeRouter(answer)
    return Relay(route=router, **options), router


def more(router: FakeRouter) -> list[None]:
    """Waits for more; what is in the list then has come."""
    came: list[None] = []
    router.arriving.more().addCallback(came.append)
    return came


# -- what it sees


def test_a_route_sees_what_comes_and_it_stays_the_first_data() -> None:
    made, router = relay()
    client = made.client()
    arriving = router.arriving
    assert arriving.session is made.session
    assert arriving.session.stage is Stage.DECIDING
    assert (arriving.data, arriving.ended, arriving.server_name) == (b"", False, None)
    came = more(router)
    client.receive(b"SS")
    assert (came, arriving.data) == ([None], b"SS")
    # Nobody waits now.
    client.receive(b"H-")
    again = more(router)
    client.receive(b"2.0")
    assert (again, arriving.data) == ([None], b"SSH-2.0")
    router.decide(pool="default")
    server = made.server.dial.connect()
    server.take()
    assert server.taken == b"SSH-2.0"
    client.receive(b" and so on")
    server.take()
    assert server.taken == b"SSH-2.0 and so on"
    assert client.protocol.reader is None


def test_a_route_is_told_where_the_client_meant_to_go() -> None:
    """As its balancer says; of what is no socket of the kernel's, nobody knows."""
    made, router = relay()
    made.client()
    assert router.arriving.original == ""
    header = ProxyHeader("192.0.2.1:5", "203.0.113.9:443")
    made.session.header = header
    assert router.arriving.original == "203.0.113.9:443"
    router.decide(pool="default")


class Unread(FakeTransport):
    """A client that has sent something which nobody has read yet."""

    then: Any = None

    def has_unread(self) -> bool:
        return True

    def relay_soon(self, then: Any) -> None:
        assert self.then is None
        self.then = then

    def end_batch(self, data: bytes) -> None:
        """As the plane does it."""
        if data:
            self.receive(data)
        self.then()


class Looks(FakeRouter):
    """One that looks at what has come."""

    def ask(self, arriving: Any) -> Deferred[Decision]:
        assert arriving.data is not None
        return FakeRouter.ask(self, arriving)


def unread_client(made: Relay) -> Unread:
    transport = Unread(clock=made.clock)
    transport.connect(made.factory.buildProtocol(transport.peer))
    return transport


def test_what_has_come_is_read_first_for_a_route_that_looks() -> None:
    """It need not wait then; it is known by what it did about the client before."""
    router = Looks()
    made = Relay(route=router)
    assert unread_client(made).then is None
    client = unread_client(made)
    assert len(router.asked) == 1
    client.end_batch(b"SSH-2.0")
    assert router.arriving.data == b"SSH-2.0"
    router.decide(pool="default")
    server = made.server.dial.connect()
    server.take()
    assert server.taken == b"SSH-2.0"


def test_a_route_that_does_not_look_is_asked_at_once() -> None:
    made, router = relay()
    assert unread_client(made).then is unread_client(made).then is None
    assert len(router.asked) == 2


def test_a_client_that_leaves_before_its_route_is_asked() -> None:
    router = Looks()
    made = Relay(route=router)
    made.factory.looks_first = True
    client = unread_client(made)
    assert made.session.stage is Stage.DECIDING
    client.lose(error.ConnectionLost())
    client.end_batch(b"")
    assert not router.asked
    made.over("opened", "closed client_left")


def test_a_client_whose_route_is_asked_late_has_a_deadline() -> None:
    router = Looks()
    made = Relay(route=router, handshake_timeout=5.0)
    made.factory.looks_first = True
    unread_client(made).end_batch(b"S")
    made.clock.pump([0.5] * 8)
    assert not router.cancelled
    made.clock.pump([0.5] * 4)
    assert router.cancelled
    assert made.session.ending is Ending.HANDSHAKE_TIMEOUT


def test_several_may_wait_and_one_may_stop() -> None:
    made, router = relay()
    client = made.client()
    first, second = more(router), more(router)
    third = router.arriving.more()
    third.addErrback(lambda _: None)
    third.cancel()
    client.receive(b"x")
    assert (first, second) == ([None], [None])


def test_the_end_of_the_clients_data_is_told() -> None:
    made, router = relay()
    client = made.client()
    client.receive(b"all")
    came = more(router)
    client.receive_eof()
    assert came == [None]
    assert router.arriving.ended
    router.decide(pool="default")
    server = made.server.dial.connect()
    server.take()
    assert (server.taken, server.write_shut) == (b"all", True)


def test_no_more_is_kept_than_while_a_server_is_dialled() -> None:
    made, router = relay()
    client = made.client()
    client.receive(b"x" * HOLD_LIMIT)
    assert not client.reading
    assert len(router.arriving.data) == HOLD_LIMIT
    router.decide(pool="default")
    made.server.dial.connect()
    assert client.reading


@pytest.mark.parametrize(
    ("asked", "name"), [(b"WWW.example.com", "www.example.com"), (None, "")]
)
def test_the_name_of_a_handshake_that_the_listener_has_done(
    asked: bytes | None, name: str
) -> None:
    made, router = relay()
    client = secret_client(made)
    client.connection.name, client.connection.stage = asked, b"done"
    client.shake_hands()
    assert router.arriving.server_name == name
    router.decide(refused="done")


def test_the_name_of_a_handshake_that_nobody_tells_of() -> None:
    """It is below a wrapper: the route may be asked before it has begun."""
    made, router = relay()
    client = secret_client(made, ProtocolWrapper)
    assert router.arriving.server_name is None
    client.connection.name = b"www.example.com"
    assert router.arriving.server_name == "www.example.com"
    router.decide(refused="done")


# -- what is done


def test_a_pool_of_several() -> None:
    web, ssh = FakeEndpoint(), FakeEndpoint()
    made, router = relay(
        pools={"web": Upstream(web, "web:80"), "ssh": Upstream(ssh, "ssh:22")}
    )
    made.client()
    router.decide(pool="ssh", facts={"tenant": "acme", "pool": "mine"})
    assert (len(web.dials), len(ssh.dials), len(made.server.dials)) == (0, 1, 0)
    said = {"tenant": "acme", "fact_pool": "mine", "pool": "ssh"}
    assert made.session.facts == said
    assert list(made.factory.pools) == ["default", "web", "ssh"]
    assert [each.relay for each in made.factory.all_pools] == [made.factory.name] * 3


def test_what_strangers_say_is_one_word_of_the_line() -> None:
    made, router = relay()
    made.client()
    said = {"first": "GET / ending=done", "plain": "a=b", "line": "a\nb", "own": "it's"}
    router.decide(pool="default", facts=said)
    facts = made.session.facts
    assert TextLines().facts(facts.items()) == (
        r" first='GET\x20/\x20ending=done' plain=a=b line='a\nb'"
        ' own="it\'s"'
    )
    # JSON has quotes of its own.
    objects = json.loads(f"{{{JsonLines().facts(facts.items())[1:]}}}")
    assert objects == {f"relayd.fact.{name}": text for name, text in said.items()}


def test_a_decision_at_once_is_as_none() -> None:
    made, _ = relay(Decision(pool="default"))
    made.client()
    made.server.dial.connect()
    assert made.session.facts == {}
    assert made.witness.heard[:2] == ["opened", "dialing server:80"]


def test_a_server_of_its_own() -> None:
    made, router = relay()
    named = router.add("10.0.0.5:80", made.clock)
    made.client()
    router.decide(server="10.0.0.5:80")
    assert made.session.upstream == "10.0.0.5:80"
    named.dial.connect()
    assert made.session.stage is Stage.RELAYING


def test_a_server_of_its_own_is_tried_again_if_retries_are_asked_for() -> None:
    made, router = relay(retries=1)
    named = router.add("10.0.0.5:80", made.clock)
    made.client()
    router.decide(server="10.0.0.5:80")
    named.dial.fail(error.ConnectionRefusedError())
    made.clock.advance(0.2)
    assert len(named.dials) == 2
    named.dials[1].connect()
    assert made.session.attempts == 2
    assert made.factory.retries is not None
    assert made.factory.retries.count == 1


def test_a_server_that_can_not_be(logged_failures: LoggedFailures) -> None:
    made, router = relay()
    client = made.client()
    router.decide(server="nonsense")
    assert made.session.ending is Ending.ROUTE_FAILED
    assert client.aborted
    assert "ConfigError" in logged_failures.take("its route failed")


def test_each_pool_has_its_own_retries() -> None:
    one, two, other = FakeEndpoint(), FakeEndpoint(), FakeEndpoint()
    pool = Pool([Upstream(one, "one"), Upstream(two, "two")])
    made, router = relay(pools={"two": pool, "single": Upstream(other, "single")})
    made.client()
    router.decide(pool="two")
    one.dial.fail(error.ConnectionRefusedError())
    two.dial.connect()
    made.client()
    router.decide(pool="single")
    other.dial.fail(error.ConnectionRefusedError())
    endings = [each.ending for each in made.witness.sessions]
    assert endings == [None, Ending.CONNECT_REFUSED]


def test_each_pool_takes_turns_of_its_own() -> None:
    """Also where every second session is another pool's."""
    ends = [FakeEndpoint() for _ in range(4)]
    servers = [Upstream(each, f"server{n}") for n, each in enumerate(ends)]
    made, router = relay(pools={"a": Pool(servers[:2]), "b": Pool(servers[2:])})
    for name in "abababab":
        made.client()
        router.decide(pool=name)
    assert [len(each.dials) for each in ends] == [2, 2, 2, 2]


def test_a_retry_takes_no_turn() -> None:
    dead, well = FakeEndpoint(), FakeEndpoint()
    pool = Pool([Upstream(dead, "dead"), Upstream(well, "well")])
    made, router = relay(pools={"two": pool})
    for _ in range(4):
        tried = len(dead.dials)
        made.client()
        router.decide(pool="two")
        if len(dead.dials) > tried:
            dead.dials[-1].fail(error.ConnectionRefusedError())
        well.dials[-1].connect()
    assert (len(dead.dials), len(well.dials)) == (2, 4)


def test_clients_wait_for_a_server_of_their_pool() -> None:
    late = FakeEndpoint()
    server = Server(late, "late", disabled=True)
    made, router = relay(
        pools={"late": Pool([server])}, wait_for_server=5.0, max_deciding=4
    )
    made.client()
    router.decide(pool="late")
    session = made.session
    assert session.stage is Stage.DECIDING
    assert len(made.factory.pools["late"].standby or ()) == 1
    # It waits for no decision any more.
    assert not made.factory.handshakes
    server.disabled = False
    server.changed()
    made.clock.advance(0)
    late.dial.connect()
    assert session.stage is Stage.RELAYING


def test_they_are_refused_in_the_end() -> None:
    made, router = relay(pools={"late": Pool([])}, wait_for_server=5.0)
    made.client()
    router.decide(pool="late")
    made.clock.pump([0.5] * 12)
    assert made.session.ending is Ending.NO_UPSTREAM


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.0\r\n\r\n"])
def test_a_refusal_is_a_reset(said: bytes) -> None:
    made, router = relay()
    client = made.client()
    if said:
        client.receive(said)
    router.decide(refused="banned", facts={"list": "ours"})
    made.clock.advance(0)
    assert client.aborted
    session = made.session
    assert (session.ending, session.detail) == (Ending.DENIED, "banned")
    assert session.facts == {"list": "ours"}
    made.over("opened", "closed denied")


def test_a_reply_is_read_before_the_end() -> None:
    made, router = relay()
    client = made.client()
    client.receive(b"GET / HTTP/1.0\r\n\r\n")
    router.decide(refused="banned", reply=b"HTTP/1.0 403 no\r\n\r\n")
    client.take()
    assert client.taken == b"HTTP/1.0 403 no\r\n\r\n"
    assert client.write_shut
    assert not client.disconnected
    # What comes is read, and dropped.
    client.receive(b"more of it")
    assert made.session.up.read == len(b"GET / HTTP/1.0\r\n\r\n")
    client.receive_eof()
    made.clock.advance(0)
    assert client.disconnected
    assert not client.aborted
    made.over("opened", "closed denied")


def test_one_that_has_ended_its_side_is_closed_behind_the_reply() -> None:
    made, router = relay()
    client = made.client()
    client.receive(b"x")
    client.receive_eof()
    router.decide(refused="banned", reply=b"no")
    client.take()
    made.clock.advance(0)
    assert client.disconnected
    made.over("opened", "closed denied")


def test_a_reply_that_waits_behind_a_full_client_is_given_up() -> None:
    made, router = relay()
    client = made.client()
    client.receive(b"x" * HOLD_LIMIT)
    router.decide(refused="banned", reply=b"no")
    # It can go on sending.
    assert client.reading
    made.clock.pump([0.5] * int(2 * CLOSE_GRACE + 2))
    assert client.aborted
    made.over("opened", "closed denied")


# -- what may go wrong


def test_a_route_that_takes_too_long() -> None:
    made, router = relay(handshake_timeout=3.0)
    made.client()
    made.clock.pump([0.5] * 8)
    assert made.session.ending is Ending.HANDSHAKE_TIMEOUT
    assert made.session.detail == "the route did not decide in 3 s"
    assert router.cancelled == 1


def test_its_time_begins_with_the_handshake() -> None:
    made, router = relay(handshake_timeout=3.0)
    client = secret_client(made)
    made.clock.pump([0.5] * 4)
    client.shake_hands()
    assert router.asked
    made.clock.pump([0.5] * 4)
    assert made.session.ending is Ending.HANDSHAKE_TIMEOUT


def test_a_client_that_leaves_cancels_it() -> None:
    made, router = relay()
    client = made.client()
    came = more(router)
    client.lose(error.ConnectionLost())
    assert (router.cancelled, came) == (1, [])
    made.over("opened", "closed client_left")
    # Nothing wakes one that goes on all the same.
    assert more(router) == []


def test_a_client_that_has_most_likely_left() -> None:
    made, router = relay()
    client = made.client()
    client.receive_eof()
    made.clock.pump([0.25] * int(4 * LEFT_GRACE + 2))
    assert made.session.ending is Ending.CLIENT_LEFT
    assert router.cancelled == 1


def test_a_drain_that_is_over_cancels_it() -> None:
    made, router = relay()
    made.client()
    done: Deferred[None] = made.factory.drain(1)
    made.clock.pump([0.5] * 4)
    assert made.session.ending is Ending.DRAINED
    assert router.cancelled == 1
    assert done.called


def test_a_route_that_fails(logged_failures: LoggedFailures) -> None:
    made, router = relay()
    client = made.client()
    router.answer.errback(KeyError("tenant\n of nobody"))
    session = made.session
    assert session.ending is Ending.ROUTE_FAILED
    assert session.detail == r"KeyError: 'tenant\n of nobody'"
    assert client.aborted
    assert made.factory.failures == 1
    assert "KeyError" in logged_failures.take("its route failed")


class Unspeakable(Exception):
    """What a route raises may be broken, too."""

    def __str__(self) -> str:
        raise KeyError(2)


def test_an_error_that_has_no_words(logged_failures: LoggedFailures) -> None:
    made, router = relay()
    made.client()
    router.answer.errback(Unspeakable())
    assert made.session.ending is Ending.ROUTE_FAILED
    assert made.session.detail.startswith("Unspeakable: ")
    assert made.factory.failures == 1
    logged_failures.take("its route failed")


def test_a_pool_that_a_programs_own_router_makes_up(
    logged_failures: LoggedFailures,
) -> None:
    made, router = relay()
    client = made.client()
    router.decide(pool="blue")
    assert made.session.ending is Ending.ROUTE_FAILED
    assert made.session.detail == "RouteFailed: there is no pool 'blue'"
    assert client.aborted
    logged_failures.take("its route failed")


def test_what_is_said_of_the_end_is_short() -> None:
    made, router = relay()
    made.client()
    router.decide(refused="x" * 5000)
    assert made.session.detail == "x" * LONGEST_WHY
    made.client()
    router.answer.errback(BadRequest("y" * 5000))
    assert made.witness.sessions[-1].detail == "y" * LONGEST_WHY


def test_a_client_that_says_what_can_not_be() -> None:
    made, router = relay()
    made.client()
    router.answer.errback(BadRequest("no ClientHello"))
    assert made.session.ending is Ending.BAD_REQUEST
    assert made.session.detail == "no ClientHello"


@pytest.mark.parametrize(
    ("said", "ending"), [(b"", Ending.CLIENT_LEFT), (b"G", Ending.BAD_REQUEST)]
)
def test_a_health_check_is_no_bad_request(said: bytes, ending: Ending) -> None:
    async def route(conn: Any) -> Any:
        await conn.until(b"\n")

    made = Relay(route=route)
    client = made.client()
    if said:
        client.receive(said)
    client.receive_eof()
    assert made.session.ending is ending
    made.clock.pump([0.0] * 3)
    assert made.session.is_silent == (not said)


def test_one_that_is_ended_meanwhile_is_not_decided_about() -> None:
    made, router = relay()
    client = made.client()
    made.factory.sessions[made.session.id].abort_session(Ending.KILLED)
    assert router.cancelled == 1
    made.clock.advance(0)
    assert client.aborted
    assert not made.server.dials
    made.over("opened", "closed killed")


@pytest.mark.parametrize("waits", [False, True])
def test_one_whose_routes_first_step_ends_it(*, waits: bool) -> None:
    """Nobody has told the relay yet how to cancel it."""
    left: list[str] = []

    async def route(conn: Any) -> Any:
        leg = made.factory.sessions[conn.session.id]
        leg.abort_session(Ending.KILLED)
        try:
            await (Deferred() if waits else conn.peek(1))
        except BaseException:
            left.append(conn.session.ending.word)
            raise

    made = Relay(route=route)
    made.client()
    assert left == ["killed"]
    assert not made.factory.handshakes
    made.over("opened", "closed killed")


def test_those_who_wait_are_limited_and_the_oldest_goes() -> None:
    made, router = relay(max_deciding=8)
    clients = [FakeTransport(50000 + n, clock=made.clock) for n in range(4)]
    for each in clients:
        # All of one client, which has a quarter.
        each.connect(made.factory.buildProtocol(each.peer))
    assert len(made.factory.handshakes or ()) == 2
    endings = [each.ending for each in made.witness.sessions]
    assert endings == [Ending.EVICTED, Ending.EVICTED, None, None]
    assert router.cancelled == 2
    router.decide(pool="default")
    assert len(made.factory.handshakes or ()) == 1


def test_one_that_is_decided_at_once_is_not_counted() -> None:
    made, _ = relay(Decision(pool="default"), max_deciding=1)
    for _ in range(3):
        made.client()
    assert len(made.server.dials) == 3
    assert not made.factory.handshakes


def test_limits_and_filters_are_asked_for_before_the_dial() -> None:
    made, router = relay()
    made.client()
    made.client()
    limits = RouteLimits(sessions=1, key="acme")
    [first, second] = [answer for _, answer in router.asked]
    first.callback(Decision(pool="default", limits=limits))
    second.callback(Decision(pool="default", limits=limits))
    endings = [each.ending for each in made.witness.sessions]
    assert endings == [None, Ending.DENIED]


# -- what a relay can't have


def test_several_pools_take_something_that_chooses() -> None:
    with pytest.raises(ValueError, match="several pools"):
        Relay(pools={"more": Pool([])})
    with pytest.raises(TypeError, match="has an upstream"):
        RelayFactory(None)
    with pytest.raises(ValueError, match="leave out sni"):
        relay(sni={"": "default"})
    with pytest.raises(ValueError, match="pools that are not given"):
        Relay(sni={"": "elsewhere"})
    with pytest.raises(ValueError, match="pools has a 'default', which is"):
        relay(pools={"default": Pool([])})
    with pytest.raises(ValueError, match="max_deciding"):
        relay(max_deciding=0)
    with pytest.raises(ValueError, match="max_deciding is for a relay with"):
        Relay(max_deciding=5)
    with pytest.raises(ValueError, match="clients say nothing before"):
        Relay(sni={"": "default"}, server_speaks_first=True)
    greets = Makes(Own)
    greets.server_speaks_first = True
    with pytest.raises(ValueError, match="filter whose server speaks first"):
        Relay(sni={"": "default"}, filters=[greets])
    with pytest.raises(ValueError, match="server_speaks_first is for a route"):
        Relay(server_speaks_first=True)
