"""How long a session may stay in each state, and what watches over two joined legs.

:class:`Timeouts` are the limits.  A :class:`Watch` compares the counters of a joined
session with those of its last check, about once a tick.  Nothing is timed while bytes
move.

- *Stall*: a transport holds bytes and the peer's kernel has taken none of them for
  `stall` seconds, and what a slow reader's kernel needs beyond that
  (:mod:`relayd.stream.delivery`).
- *Lost*: what was sent again, or a probe, is not answered for `stall` seconds.
- *Idle*, *half-closed*: nothing moves for `idle` seconds, or `half_close` seconds once
  one direction has ended.  That begins when the kernels' queues are empty, too.
- A connection that is not read does not hear of its reset: the kernel is asked.

In a drain, sessions that are idle are ended before the others.  That nothing has moved
is not enough: who has asked and waits for an answer is not idle.  A relay that knows no
protocol takes it that a client waits if the last data were its own, and that it does
not if the server had the last word.
"""

from __future__ import annotations

from typing import Any

import attrs

from relayd.core import settings
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import Ending, Session
from relayd.core.setting_types import Setting
from relayd.net.tcp_info import (
    SinceData,
    since_data,
    take_error,
    unread,
    was_reset,
)
from relayd.net.transports import PeerVanished, lost_by
from relayd.stream.delivery import WORTH_A_CHECK
from relayd.stream.legs import Leg
from relayd.stream.losses import lost_ending, reset_ending

#: Of a tick: a check that is later than this is late.  The time of one that is not is
#: the wheel's, and no number of its own for each idle session: 32 bytes.
LATE = 1 / 8

#: Seconds that a peer gets to answer a polite close.
CLOSE_GRACE = 5.0


def _not_negative(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{attribute.name} must not be negative: {value!r}")


def _timeout(setting: Setting[float]) -> Any:
    return attrs.field(default=setting.default, validator=_not_negative)


@attrs.frozen
class Timeouts:
    """How long a session may stay in each state, in seconds; 0 is for ever.

    :ivar connect: until the upstream connection stands, with its TLS.
    :ivar stall: with bytes buffered and none of them taken by the peer, or with bytes
        under way and not a sign of it.
    :ivar idle: with nothing moving.
    :ivar half_close: with nothing moving, after one direction has ended.
    :ivar handshake: until the client has done its handshake, of TLS or SOCKS4 or both.
    """

    connect: float = _timeout(settings.CONNECT_TIMEOUT)
    stall: float = _timeout(settings.STALL_TIMEOUT)
    idle: float = _timeout(settings.IDLE_TIMEOUT)
    half_close: float = _timeout(settings.HALF_CLOSE_TIMEOUT)
    handshake: float = _timeout(settings.HANDSHAKE_TIMEOUT)

    #: Seconds between two checks of a session: an eighth of the shortest, <= 1 s.
    tick: float = attrs.field(init=False, eq=False, repr=False)

    @tick.default
    def _find_tick(self) -> float:
        all_of_them = (
            self.connect,
            self.stall,
            self.idle,
            self.half_close,
            self.handshake,
        )
        return max(min([1.0, *(each / 8 for each in all_of_them if each)]), 0.01)


def _was_answered(client: SinceData | None, server: SinceData | None) -> bool | None:
    """Whether the server had the last word; None: that can't be told.

    :param client: of the client's connection; None: the kernel can't tell.
    :param server: of the server's.
    """
    if client is not None and client.sent != client.arrived:
        return client.sent < client.arrived
    if server is not None and server.sent != server.arrived:
        return server.arrived < server.sent
    # A question and an answer fell into one tick of the kernel, or an answer and the
    # next question.  A kernel acknowledges what comes with what it sends; if its
    # program has nothing to send, some 40 ms later (delayed ACK).  So whoever had the
    # last word hears of that alone.
    client_did, server_did = (
        each is not None and each.acknowledged < each.arrived
        for each in (client, server)
    )
    return None if client_did == server_did else client_did


class Watch:
    """The deadlines of one joined session; a Bridge is one.

    It is the base of the Bridge, and no object of its own, as an idle session should
    take little memory.

    :ivar closing: both directions have ended, and both connections are being closed.
    """

    __slots__ = ("_active_at", "_asked_at", "_progress", "_queued", "_timeouts")

    session: Session
    downstream: Leg
    upstream: Leg
    closing: bool
    #: Whose end of data ends the session (:mod:`relayd.stream.closing_bridge`).
    first: Leg | None = None

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        #: Of the last check; any progress is more than at the first.
        self._progress = -1
        #: When something moved.
        self._active_at = 0.0
        #: When the kernels were last asked while something moved.
        self._asked_at = 0.0
        #: What the kernels' queues held at the last check; None: ask again.
        self._queued: int | None = None

    @property
    def was_checked(self) -> bool:
        """Whether it was checked since the two were joined."""
        return self._progress >= 0

    def abort(self, ending: Ending, detail: str = "") -> None:
        """End the session now: reset both connections."""
        raise NotImplementedError

    def give_up(self, leg: Leg, ending: Ending, detail: str = "") -> None:
        """End the session as if the peer of `leg` had reset its connection."""
        raise NotImplementedError

    def check(self, now: float) -> None:
        """Compare the counters with those of the last check, about once a tick."""
        stall = self._timeouts.stall
        session, up, down = self.session, self.upstream, self.downstream
        # Nearly always: both are read, and neither's transport holds anything.
        flows = (
            up.spliced
            and up.transport.clear
            and down.transport.clear
            and not (up.paused or down.paused)
        )
        buffered_up = buffered_down = 0
        if not flows:
            buffered_up, buffered_down = up.buffered, down.buffered
        sent, got = session.up, session.down
        ended = sent.eof + got.eof
        written_up, written_down = sent.written, got.written
        # Grows with every byte read, every byte that a kernel takes, and every EOF.
        progress = sent.read + written_up - buffered_up
        progress += got.read + written_down - buffered_down + ended
        moved = progress != self._progress
        # Our buffers may be empty while a kernel still delivers: quiet begins when its
        # queues are empty, too.  So does a reset that waits for delivery, or a close.
        last = session.ending is not None or self.first is not None
        ask = last or (not moved and self._queued != 0)
        # While things move, once in a while will do.
        due = moved and now - self._asked_at >= stall / 2 > 0
        if due:
            self._asked_at = now
        # Nothing was written since then, so what waits has waited since then.
        since = now if moved else self._active_at
        queued = 0
        for leg, written, buffered, blocks in (
            (up, written_up, buffered_up, buffered_down),
            (down, written_down, buffered_down, buffered_up),
        ):
            if not leg.alive:
                continue
            delivery = leg.delivery
            if (
                ask
                or buffered
                or written - leg.written_at_check >= WORTH_A_CHECK
                or (delivery is not None and delivery.waits)
                or due
            ):
                queued += leg.check_delivery(now, since, written, buffered, last)
                if stall and self._ended_by_peer(now, leg, buffered):
                    return
            if flows:
                continue
            is_read = not (leg.direction.eof or leg.paused or blocks)
            if not is_read and self._ended_unread(leg):
                return
        if moved:
            self._progress = progress
            self._active_at = now
            self._queued = None
            return
        if self._queued is None:
            # The first check only tells where it starts from.  Until then the kernel
            # may have delivered: one that is late, as the machine was paused, knows no
            # more than one that is in time.
            tick = self._timeouts.tick
            if now - self._active_at > (1 + LATE) * tick:
                self._active_at = now - tick
            self._queued = queued
        elif self._queued != 0 and queued != self._queued:
            self._active_at = now
            self._queued = queued
        limit = self._timeouts.half_close if ended else self._timeouts.idle
        if limit and now - self._active_at >= limit and not self._is_paced():
            self.abort(
                Ending.HALF_CLOSED if ended else Ending.IDLE,
                f"nothing moved for {limit:g} s",
            )

    @property
    def moved_at(self) -> float | None:
        """When something moved last, by the last check; None: there was none yet."""
        return self._active_at if self.was_checked else None

    def idle_since(self) -> float | None:
        """Since when nothing has moved, by the last check; None: not idle for sure."""
        session = self.session
        if (
            self._queued != 0
            or session.ending is not None
            # Whoever has ended its data waits for the rest of the other's.
            or session.up.eof
            or session.down.eof
        ):
            return None
        return self._active_at

    def idle_for(self, now: float | None = None) -> float:
        """Seconds for which nothing has moved, by the kernel; 0.0: it is in use.

        It is where bytes wait, and where the client waits for an answer.

        :param now: what to go by where the kernel can't tell, in seconds on the relay's
            clock; None: what it can't tell counts as in use.
        """
        since = self.idle_since()
        if since is None:
            return 0.0
        session = self.session
        client, server = self.downstream, self.upstream
        for leg in (client, server):
            if not leg.alive or leg.buffered or unread(leg.transport):
                return 0.0
        here, there = since_data(client.transport), since_data(server.transport)
        known = [each for each in (here, there) if each is not None]
        asked = session.up.read or not known
        told = _was_answered(here, there) if asked else True
        if told is None:
            return 0.0 if now is None else now - since
        return min(min(each.sent, each.arrived) for each in known) if told else 0.0

    def _is_paced(self) -> bool:
        """Whether a leg waits for its bandwidth: it has something to say."""
        legs = (self.upstream, self.downstream)
        return any(
            leg.paused & ALLOWANCE and leg.direction.pace is not None for leg in legs
        )

    def _ended_by_peer(self, now: float, leg: Leg, buffered: int) -> bool:
        """End the session if the peer of `leg` is gone, or takes nothing."""
        delivery, stall = leg.delivery, self._timeouts.stall
        if delivery is None:
            return False
        is_client = leg is self.downstream
        silence = delivery.silence(now)
        if silence >= stall:
            self.give_up(
                leg,
                lost_ending(is_client),
                f"{leg.undelivered()} bytes unacknowledged for {silence:.1f} s",
            )
            return True
        limit = stall + delivery.allowance
        if delivery.idleness(now) >= limit:
            self.abort(
                Ending.DOWNSTREAM_STALLED if is_client else Ending.UPSTREAM_STALLED,
                f"{buffered} bytes waited {round(limit, 1):g} s",
            )
            return True
        return False

    def _ended_unread(self, leg: Leg) -> bool:
        """End the session if a connection that is not read was reset, or is lost.

        Its transport may not hear of that before it writes, or reads, again.
        """
        if (
            self.closing
            or self.session.ending is not None
            or not was_reset(leg.transport)
        ):
            return False
        if not leg.direction.eof and unread(leg.transport):
            # What it sent before is read as the other side takes it.
            if leg.direction.pace is not None:
                leg.direction.pace.lift()
            return False
        is_client = leg is self.downstream
        # Nobody reads it any more: to give it up is to abort it.
        error = lost_by(take_error(leg.transport))
        if isinstance(error, PeerVanished):
            self.give_up(leg, lost_ending(is_client), str(error))
        else:
            self.give_up(leg, reset_ending(is_client, leg.undelivered()))
        return True
