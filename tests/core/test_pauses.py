"""Why a leg is not read: each reason, several at once, and what follows from them.

On fakes first, and then over real sockets: what somebody asks for is no stall and no
failed write, on either kind of connections.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost

from relayd.core.pauses import ALLOWANCE, ASKED, HOLDING, PEER_FULL, RESET_PENDING
from relayd.core.session import Direction, Ending
from relayd.net.transports import PeerReset
from relayd.stream import legs
from relayd.stream.legs import HOLD_LIMIT, Leg, buffered_by, unsent
from relayd.tcp import RelayFactory, RelayProtocol
from tests.conftest import pause as wait_for
from tests.stream.test_hooks_live import Relay, relaying
from tests.support.fakes import FakeTLSTransport, FakeTransport
from tests.support.pairs import Pair, joined, no_kernel, reset_unread
from tests.support.process import TRANSPORTS

__all__ = ["no_kernel", "reset_unread"]

#: What somebody else than the other leg may pause it for.
OTHERS = [ALLOWANCE, ASKED]


def legs_of(pair: Pair, side: str) -> tuple[Leg, FakeTransport, FakeTransport]:
    """A leg, its transport and the other one's."""
    if side == "down":
        return pair.downstream, pair.down, pair.up
    return pair.upstream, pair.up, pair.down


def fill(source: FakeTransport) -> int:
    """Send until the leg is paused; return how much that was."""
    sent = 0
    while source.reading:
        source.receive(bytes(65536))
        sent += 65536
    return sent


# -- several at once


def test_it_is_paused_by_the_first_reason_and_read_after_the_last() -> None:
    pair = joined()
    leg, transport = pair.downstream, pair.down
    transport.log.clear()
    leg.pause(ASKED)
    leg.pause(ASKED)
    leg.pause(ALLOWANCE)
    leg.pauseProducing()
    assert leg.paused == ASKED | ALLOWANCE | PEER_FULL
    leg.resume(ASKED)
    leg.resume(ASKED)
    leg.resumeProducing()
    assert not transport.reading
    leg.resume(ALLOWANCE)
    assert transport.reading
    assert transport.log == ["pause", "resume"]
    leg.resume(ALLOWANCE)
    assert transport.log == ["pause", "resume"]


def test_several_reasons_may_go_at_once() -> None:
    pair = joined()
    pair.downstream.pause(ASKED | ALLOWANCE)
    pair.downstream.resume(ASKED | ALLOWANCE)
    assert pair.down.reading


def test_it_may_be_paused_before_it_is_connected() -> None:
    leg, transport = Leg(Direction()), FakeTransport()
    leg.pause(ASKED)
    transport.connect(leg)
    assert not transport.reading
    leg.resume(ASKED)
    assert transport.reading


def test_one_that_is_lost_may_be_paused_and_resumed() -> None:
    pair = joined()
    pair.down.lose()
    pair.down.log.clear()
    pair.downstream.pause(ASKED)
    pair.downstream.resume(ASKED)
    assert pair.down.log == []


def test_what_is_held_stays_within_its_limit_whoever_resumes() -> None:
    pair = Pair()
    pair.downstream.pause(ASKED)
    pair.downstream.resume(ASKED)
    pair.down.receive(bytes(HOLD_LIMIT))
    pair.downstream.pause(ASKED)
    pair.downstream.resume(ASKED)
    assert pair.downstream.paused == HOLDING
    assert not pair.down.reading


def test_a_pause_that_was_asked_for_outlasts_the_join() -> None:
    """What was held flows, and nothing more is read."""
    pair = Pair()
    pair.down.receive(bytes(HOLD_LIMIT))
    pair.downstream.pause(ASKED)
    pair.start()
    assert len(pair.up.dataBuffer) == HOLD_LIMIT
    assert pair.downstream.paused == ASKED
    assert not pair.down.reading
    pair.up.take()
    assert not pair.down.reading
    pair.downstream.resume(ASKED)
    assert pair.down.reading


def test_before_the_join_no_other_leg_can_be_full() -> None:
    """Somebody called `pauseProducing`, and the join is what they waited for."""
    pair = Pair()
    pair.downstream.pauseProducing()
    pair.start()
    assert pair.down.reading


@pytest.mark.parametrize("reason", OTHERS)
def test_room_in_the_other_buffer_does_not_end_somebody_elses_pause(
    reason: int,
) -> None:
    pair = joined()
    fill(pair.down)
    pair.downstream.pause(reason)
    pair.up.take()
    assert pair.downstream.paused == reason
    assert not pair.down.reading
    pair.downstream.resume(reason)
    assert pair.down.reading


@pytest.mark.parametrize("reason", OTHERS)
def test_an_allowance_does_not_make_room_in_the_other_buffer(reason: int) -> None:
    pair = joined()
    pair.downstream.pause(reason)
    pair.downstream.resume(reason)
    fill(pair.down)
    pair.downstream.pause(reason)
    pair.downstream.resume(reason)
    assert pair.downstream.paused == PEER_FULL
    assert not pair.down.reading


def test_one_past_its_end_of_data_is_never_read_again() -> None:
    """Twisted's transports would tell of the end once more."""
    pair = joined()
    pair.down.receive_eof()
    pair.down.log.clear()
    pair.downstream.pause(ASKED)
    pair.downstream.pauseProducing()
    pair.downstream.resumeProducing()
    pair.downstream.resume(ASKED)
    assert "resume" not in pair.down.log


# -- the stall timeout


@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize("reason", [*OTHERS, PEER_FULL])
def test_a_pause_with_nothing_buffered_is_no_stall(side: str, reason: int) -> None:
    """Even if somebody calls `pauseProducing` in the name of the other transport."""
    pair = joined(stall=10, idle=100)
    leg, transport, other = legs_of(pair, side)
    leg.pause(reason)
    pair.wait(60)
    pair.alive()
    leg.resume(reason)
    transport.receive(b"and on")
    assert other.dataBuffer == b"and on"


@pytest.mark.parametrize("reason", OTHERS)
def test_a_transport_that_cannot_be_asked_is_full_only_if_it_says_so(
    reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legs, "buffered_by", lambda _: None)
    pair = joined(stall=10)
    pair.downstream.pause(reason)
    pair.wait(30)
    pair.alive()
    pair.downstream.pauseProducing()
    pair.wait(12)
    pair.ended(Ending.UPSTREAM_STALLED)


@pytest.mark.parametrize("reason", OTHERS)
def test_a_stall_is_one_whatever_else_the_leg_is_paused_for(reason: int) -> None:
    pair = joined(stall=10)
    pair.downstream.pause(reason)
    pair.downstream.resume(reason)
    fill(pair.down)
    pair.downstream.pause(reason)
    pair.wait(12)
    pair.ended(Ending.UPSTREAM_STALLED)


@pytest.mark.parametrize("reason", OTHERS)
def test_a_pause_does_not_outlast_the_idle_timeout(reason: int) -> None:
    pair = joined(stall=10, idle=60)
    pair.downstream.pause(reason)
    pair.wait(62)
    pair.ended(Ending.IDLE)


def test_what_cannot_be_asked_is_told_from_what_is_empty() -> None:
    transport: Any = FakeTransport()
    assert buffered_by(transport) == 0
    transport.write(b"12345")
    assert buffered_by(transport) == 5
    assert buffered_by(object()) is None
    assert unsent(object()) == 0


def test_what_tls_keeps_until_its_handshake_is_done_is_buffered() -> None:
    transport: Any = FakeTLSTransport()
    transport._appSendBuffer = [b"123", b"45"]  # as Twisted's, before it can encrypt
    transport.write(b"6")
    assert buffered_by(transport) == 6


# -- how a lost connection is read


@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize("reason", [*OTHERS, PEER_FULL])
def test_a_reset_while_paused_is_a_reset_and_its_data_is_delivered(
    side: str, reason: int
) -> None:
    """Not a failed write, behind which the other side is reset at once."""
    pair = joined()
    leg, transport, other = legs_of(pair, side)
    transport.receive(b"last words")
    if reason == PEER_FULL:
        # Somebody else's, as the other transport has nothing any more.
        other.take()
    leg.pause(reason)
    transport.lose(ConnectionLost())
    other.take()
    pair.wait(1, 0.1)
    assert other.taken == b"last words"
    assert other.log[-1] == "abort"
    resets = {"down": Ending.DOWNSTREAM_RESET, "up": Ending.UPSTREAM_RESET}
    pair.ended(resets[side])


@pytest.mark.parametrize("reason", OTHERS)
def test_a_failed_write_to_one_that_waits_for_its_peer_is_one(reason: int) -> None:
    pair = joined()
    pair.downstream.pause(reason)
    pair.downstream.resume(reason)
    fill(pair.down)
    pair.downstream.pause(reason)
    pair.down.lose(ConnectionLost())
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)


@pytest.mark.parametrize(
    ("undelivered", "ending"),
    [(0, Ending.DOWNSTREAM_RESET), (1, Ending.DOWNSTREAM_WRITE_FAILED)],
)
def test_a_reset_that_the_kernel_tells_of_costs_what_it_says(
    undelivered: int, ending: Ending
) -> None:
    pair = joined()
    pair.down.receive(b"last words")
    pair.downstream.pause(ASKED)
    pair.down.lose(PeerReset(undelivered))
    pair.up.take()
    pair.wait(1, 0.1)
    assert pair.up.taken == b"last words"
    pair.ended(ending)


@pytest.mark.parametrize("reason", OTHERS)
def test_the_kernel_is_asked_about_one_that_is_paused(
    reason: int, reset_unread: dict[Any, int]
) -> None:
    """Nothing is read that would tell of its reset; what it sent before comes first."""
    pair = joined()
    pair.downstream.pause(reason)
    reset_unread[pair.down] = 1
    pair.wait(5)
    pair.alive()
    pair.downstream.resume(reason)
    pair.down.receive(b"last words")
    pair.downstream.pause(reason)
    reset_unread[pair.down] = 0
    pair.wait(1)
    pair.up.take()
    pair.wait(1, 0.1)
    assert pair.up.taken == b"last words"
    pair.ended(Ending.DOWNSTREAM_RESET)


# -- ends of data, and resets that wait


def test_nobody_reads_on_from_one_that_waits_to_be_reset() -> None:
    pair = joined()
    pair.down.receive(b"last words")
    pair.upstream.pause(ASKED)
    pair.down.lose(ConnectionLost())
    assert pair.upstream.paused == ASKED | RESET_PENDING
    pair.upstream.resume(ASKED)
    pair.upstream.resumeProducing()
    assert not pair.up.reading
    pair.up.take()
    pair.wait(1, 0.1)
    pair.ended(Ending.DOWNSTREAM_RESET)


@pytest.mark.parametrize("reason", OTHERS)
def test_one_whose_peer_left_is_read_for_its_end_when_all_allow_it(
    reason: int,
) -> None:
    """The buffer that was full is gone; what else it was paused for is not."""
    pair = joined()
    pair.upstream.pause(reason)
    pair.upstream.resume(reason)
    fill(pair.up)
    pair.upstream.pause(reason)
    pair.down.lose(ConnectionDone())
    assert pair.up.write_shut
    assert pair.upstream.paused == reason
    assert not pair.up.reading
    pair.upstream.resume(reason)
    assert pair.up.reading
    pair.up.receive_eof()
    pair.ended(Ending.DONE)


class Below:
    """The connection under a TLS transport that has got the peer's goodbye."""

    disconnecting = True


@pytest.mark.parametrize("reason", [0, *OTHERS])
def test_one_whose_tls_peer_said_goodbye_is_not_read_for_it(reason: int) -> None:
    """Its transport closes when it is empty and nobody is its producer."""
    pair = joined()
    up: Any = pair.up
    fill(pair.down)
    pair.downstream.pause(reason)
    up.transport = Below()
    up.take()
    assert up.producer is None
    assert pair.downstream.paused == PEER_FULL | reason
    up.lose(ConnectionDone())
    # From now on it is read for its own end of data.
    assert pair.downstream.paused == reason
    pair.downstream.resume(reason)
    assert pair.down.reading
    pair.down.receive_eof()
    pair.ended(Ending.DONE)


def test_one_whose_tls_peer_is_gone_can_be_paused_and_resumed() -> None:
    pair = joined()
    up: Any = pair.up
    up.transport = Below()
    up.lose(ConnectionDone())
    pair.downstream.pauseProducing()
    pair.downstream.resumeProducing()
    assert pair.down.reading


def test_a_leg_hears_of_a_reset_until_it_is_joined_whyever_it_is_paused() -> None:
    pair = Pair()
    pair.downstream.pause(ASKED | HOLDING)
    assert pair.downstream.wants_reset()
    pair.start()
    assert not pair.downstream.wants_reset()


# -- whatever the order

SIDES = st.sampled_from(["down", "up"])
STEPS = st.one_of(
    st.tuples(st.sampled_from(["pause", "resume"]), SIDES, st.sampled_from(OTHERS)),
    st.tuples(st.sampled_from(["receive", "take", "eof"]), SIDES, st.just(0)),
    st.tuples(st.just("join"), SIDES, st.just(0)),
)


@given(st.lists(STEPS, max_size=60))
def test_a_leg_is_read_if_and_only_if_there_is_no_reason_against_it(
    steps: list[tuple[str, str, int]],
) -> None:
    pair = Pair(idle=0, stall=1)
    asked = {"down": 0, "up": 0}
    sent = {"down": b"", "up": b""}
    is_joined = False
    for number, (what, side, reason) in enumerate(steps):
        leg, transport, _ = legs_of(pair, side)
        match what:
            case "pause":
                leg.pause(reason)
                asked[side] |= reason
            case "resume":
                leg.resume(reason)
                asked[side] &= ~reason
            case "receive" if transport.reading:
                piece = bytes([number]) * 30000
                transport.receive(piece)
                sent[side] += piece
            case "take":
                transport.take()
            case "eof" if transport.reading:
                transport.receive_eof()
            case "join" if not is_joined:
                is_joined = True
                pair.start()
        for each in ("down", "up"):
            leg, transport, other = legs_of(pair, each)
            if not transport.connected:
                continue
            reasons = asked[each]
            if not is_joined and len(leg.held or b"") >= HOLD_LIMIT:
                reasons |= HOLDING
            if is_joined and other._producer_paused:
                reasons |= PEER_FULL
            if not leg.direction.eof:
                assert leg.paused == reasons
                assert transport.reading is (not reasons)
            elif leg.paused != reasons:
                # Nobody is its peer's producer any more once that has been told.
                assert leg.paused == reasons | PEER_FULL
    # Let them all go on, and everything that was sent arrives.
    if not is_joined:
        pair.start()
    for side in ("down", "up"):
        legs_of(pair, side)[0].resume(ASKED | ALLOWANCE)
    pair.up.take()
    pair.down.take()
    for side in ("down", "up"):
        leg, transport, _ = legs_of(pair, side)
        assert leg.direction.eof or transport.reading
    assert pair.up.taken == sent["down"]
    assert pair.down.taken == sent["up"]


# -- over real sockets

#: Which way the bytes go: spliced, or through the legs of either kind of transport.
WAYS = [
    *(["plane spliced", "plane"] if "plane" in TRANSPORTS else []),
    "twisted",
]

#: How somebody may pause a leg.
HOW = ["asked", "as a producer", "its transport"]

#: Seconds; a pause takes five times as long.
STALL = 0.1


class Through(RelayProtocol):
    """One whose bytes pass through its legs."""

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)


def made_for(way: str) -> Any:
    def made(*args: Any, **options: Any) -> RelayFactory:
        options |= {"stall_timeout": STALL, "idle_timeout": 60}
        factory = RelayFactory(*args, **options)
        if way == "plane":
            factory.protocol = Through
        return factory

    return made


def pause_leg(leg: Any, how: str) -> None:
    match how:
        case "asked":
            leg.pause(ASKED)
        case "as a producer":
            leg.pauseProducing()
        case "its transport":
            leg.transport.pauseProducing()


def resume_leg(leg: Any, how: str) -> None:
    match how:
        case "asked":
            leg.resume(ASKED)
        case "as a producer":
            leg.resumeProducing()
        case "its transport":
            leg.transport.resumeProducing()


async def joined_live(relay: Relay, whose: str, way: str) -> tuple[Any, Any, Any]:
    """A session; one of its legs, that one's peer, and the other's."""
    client = relay.client()
    server = await relay.accepted()
    for near, far in ((client, server), (server, client)):
        await near.send(b"hello")
        assert await far.read(5) == b"hello"
        far.data.clear()
    [protocol] = relay.factory.sessions.values()
    assert protocol.bridge.upstream.spliced is (way == "plane spliced")
    if whose == "client":
        return protocol, client, server
    return protocol.bridge.upstream, server, client


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("whose", ["client", "server"])
@pytest.mark.parametrize("how", HOW)
@pytest_twisted.ensureDeferred
async def test_a_pause_is_no_stall(way: str, whose: str, how: str) -> None:
    async with relaying(way.split()[0], made_for(way)) as relay:
        leg, near, far = await joined_live(relay, whose, way)
        pause_leg(leg, how)
        await near.send(b"to be read later")
        await wait_for(5 * STALL)
        [session] = relay.witness.sessions
        assert session.ending is None
        assert not far.take()
        assert not far.data
        # The other direction is not concerned.
        await far.send(b"meanwhile")
        assert await near.read(9) == b"meanwhile"
        resume_leg(leg, how)
        assert await far.read(16) == b"to be read later"
        near.socket.close()
        far.socket.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("whose", ["client", "server"])
@pytest.mark.parametrize("how", HOW)
@pytest_twisted.ensureDeferred
async def test_a_reset_while_paused_is_no_failed_write(
    way: str, whose: str, how: str
) -> None:
    """Whether the kernel is asked first, or a write meets it."""
    async with relaying(way.split()[0], made_for(way)) as relay:
        leg, near, far = await joined_live(relay, whose, way)
        await near.send(b"last words")
        await far_has(relay, whose, 15)
        pause_leg(leg, how)
        near.reset()
        await far.send(b"to one that is gone")
        [session] = relay.witness.sessions
        while session.ended_at is None:
            await wait_for(STALL / 10)
        resets = {"client": Ending.DOWNSTREAM_RESET, "server": Ending.UPSTREAM_RESET}
        assert session.ending is resets[whose]
        with pytest.raises(ConnectionResetError):
            while not far.take():
                await wait_for(0)
        assert far.data == b"last words"
        far.socket.close()


async def far_has(relay: Relay, whose: str, count: int) -> None:
    """Wait until that many bytes have been read from one side."""
    [session] = relay.witness.sessions
    direction = session.up if whose == "client" else session.down
    while direction.written < count:
        await wait_for(0)


def paused_early(way: str) -> Any:
    """A relay whose clients' legs are paused as producers before they are joined."""
    base: Any = Through if way == "plane" else RelayProtocol

    class Early(base):  # type: ignore[misc]
        def decide(self, *said: Any) -> None:
            self.pauseProducing()
            super().decide(*said)

    def made(*args: Any, **options: Any) -> RelayFactory:
        factory: RelayFactory = made_for(way)(*args, **options)
        factory.protocol = Early
        return factory

    return made


@pytest.mark.parametrize("way", WAYS)
@pytest_twisted.ensureDeferred
async def test_what_no_other_leg_can_have_asked_for_ends_as_they_are_joined(
    way: str,
) -> None:
    transport = way.split()[0]
    async with relaying(transport, made=paused_early(way)) as relay:
        _, near, far = await joined_live(relay, "client", way)
        near.socket.close()
        far.socket.close()
