"""One flow in the soak: what was sent and received, and whether that is right.

A client's datagram begins with the numbers of its flow and of itself, and the rest is a
pattern that depends on both: no two are equal, except for those too small for the
numbers.  So a datagram that is changed, duplicated, or of another flow is detected at
once, by the server and by the client.

The relay's port for a client is what its server sees.  A flow is *in use* once there
was traffic both ways beyond its first two seconds, and then it must keep its port until
nothing has moved for the timeout.  Only the relay knows exactly when something last
moved; here a time is known that is not later, which is enough to check it: an answer
proves that the port was open when the client asked.  As the senders note the times, it
does not matter how long the relay was stopped.
"""

from __future__ import annotations

import random
import struct

import attrs

from soak.log import FlowLine
from soak.pattern import pattern_bytes, pattern_start
from soak.stops import Stops
from soak.timeouts import SLACK

#: The timeouts of flows that the relay is started with, in seconds.
UDP_TIMEOUT, UDP_UNREPLIED = 10.0, 2.0

#: Seconds by which a flow may be checked late: twice the relay's step.
UDP_STEP = 2.0

#: Seconds after which traffic both ways proves that a flow is in use.  The relay's are
#: half a second less.
PROVEN = 2.5

#: Seconds within which traffic both ways does not put a flow in use.
SHORT = 1.0

#: Seconds by which an age in the log may be too long.
ROUNDING = 0.01

#: The largest datagram over IPv4.
LARGEST = 65507

#: The largest that Ethernet carries without fragments.
USUAL = 1472

#: How many unexpected datagrams a flow keeps until they can be explained.
MAX_STRAYS = 8

#: What a datagram begins with: the number of its flow, and its own.
HEADER = struct.Struct(">II")

#: Added to the number of a datagram that a server sends by itself.
DOWN = 1 << 31

#: Datagrams of a flood: one that the server ignores, and one that it answers.
SILENT, LOUD = b"\xff", b"\xfe"


def datagram(number: int, sequence: int, size: int) -> bytes:
    """A flow's datagram of this number, LARGEST bytes at most."""
    start = pattern_start(number, True)
    body = pattern_bytes(start, sequence * 7919, max(0, size - HEADER.size))
    return (HEADER.pack(number, sequence) + body)[:size]


def draw_size(dice: random.Random, *, named: bool) -> int:
    """The size of a datagram: from 0 on, or large enough for its header."""
    least = HEADER.size if named else 0
    [most] = dice.choices((64, USUAL, 9000, LARGEST), (20, 60, 14, 6))
    return max(least, dice.choice((most, dice.randint(least, most), least)))


def unowed(data: bytes) -> str:
    """What is wrong with a datagram that came to the wrong client."""
    return f"{len(data)} bytes that are not owed to it: {data[:16]!r}"


@attrs.define(eq=False)
class Sent:
    """A datagram that was sent.

    :ivar before: the time just before it was sent; `after`: just after.
    :ivar kept: its flow was in use, so its port stays open for the answer.
    :ivar port: the relay's port that it went through; empty if that is not known.
    :ivar received: it, or the answer to it, has arrived at the client.
    """

    size: int
    before: float
    kept: bool
    after: float = 0.0
    port: str = ""
    received: bool = False


@attrs.define(eq=False)
class Flow:
    """The traffic of one client; times are of `time.monotonic`.

    :ivar began_at: when its first datagram was sent.
    :ivar moved_at: when something was last sent or received.
    :ivar port: the relay's port, as the server saw it last; empty before.
    :ivar ports: how many ports there have been.
    :ivar in_use: it is certainly in use.
    :ivar kept_at: the last time at which the port was certainly open.
    :ivar up: what the client has sent, by number.
    :ivar down: what the server has sent by itself, by number.
    :ivar owed: expected datagrams at the client, and their numbers.
    :ivar strays: unexpected datagrams at the client.
    :ivar answered_before: hashes of the last answers to its ports from before they were
        its own.
    """

    number: int
    began_at: float = 0.0
    moved_at: float = 0.0
    port: str = ""
    ports: int = 0
    in_use: bool = False
    kept_at: float = 0.0
    up: dict[int, Sent] = attrs.Factory(dict)
    down: dict[int, Sent] = attrs.Factory(dict)
    owed: dict[bytes, list[int]] = attrs.Factory(dict)
    strays: list[bytes] = attrs.Factory(list)
    answered_before: set[int] = attrs.Factory(set)
    _received_at: float | None = None

    # -- what the client does

    def ask(self, size: int, now: float, *, answered: bool) -> bytes:
        """The next datagram, about to be sent.

        :param answered: the server will echo it.
        """
        sequence = len(self.up)
        data = datagram(self.number, sequence, size)
        self.up[sequence] = Sent(size, now, self.in_use)
        self.began_at = self.began_at or now
        if answered:
            self.owed.setdefault(data, []).append(sequence)
        return data

    def asked(self, now: float) -> None:
        """The last datagram has been sent."""
        self.up[len(self.up) - 1].after = self.moved_at = now

    def receive(self, data: bytes, now: float) -> str:
        """A datagram has arrived at the client; the error, if it is wrong."""
        waiting = self.owed.get(data)
        if not waiting:
            # The relay counts it as an answer.
            self.moved_at = now
            self.strays.append(data)
            return "" if len(self.strays) <= MAX_STRAYS else unowed(data)
        sequence = waiting.pop(0)
        if not waiting:
            del self.owed[data]
        self.moved_at = now
        sent = self.down[sequence] if sequence & DOWN else self.up[sequence]
        sent.received = True
        if sent.port and sent.port == self.port:
            # The port was open when it was sent, or was opened by it.
            if self._received_at is None:
                self._received_at = now
            elif sent.before - self._received_at >= PROVEN:
                self.in_use = True
            self.kept_at = max(self.kept_at, sent.before)
        return ""

    def is_foreign(self, data: bytes) -> bool:
        """Whether a datagram is certainly another flow's, or a flood's."""
        if len(data) < HEADER.size:
            return data == LOUD
        return bool(HEADER.unpack_from(data)[0] != self.number)

    def judge_strays(self) -> str:
        """The error, if an unexpected datagram can't be explained; else empty.

        The kernel may give a new flow the port of one that was just evicted, while an
        answer to the latter is still on its way: the relay can't tell it from one of
        the new flow.
        """
        for data in self.strays:
            if hash(data) not in self.answered_before or not self.is_foreign(data):
                return unowed(data)
        return ""

    # -- what the server does

    def arrive(self, sequence: int, data: bytes, port: str) -> str:
        """A datagram has arrived at the server; the error, if it is wrong."""
        sent = self.up.get(sequence)
        if sent is None:
            return f"a datagram {sequence} that it has not sent"
        if data != datagram(self.number, sequence, sent.size):
            return f"datagram {sequence} has {len(data)} bytes that are not its own"
        if sent.port:
            return f"datagram {sequence} comes a second time"
        sent.port = port
        if port == self.port:
            return ""
        quiet = sent.after - self.kept_at
        kept, before = self.in_use and quiet < UDP_TIMEOUT, self.port
        self._take(port)
        self.ports += 1
        if kept:
            return f"its port was {before} and is {port}, after {quiet:.1f} s at most"
        return ""

    def _take(self, port: str) -> None:
        self.port, self.in_use, self._received_at = port, False, None

    def stream(self, size: int, now: float) -> bytes:
        """The next datagram that the server is about to send by itself."""
        sequence = DOWN + len(self.down)
        data = datagram(self.number, sequence, size)
        self.down[sequence] = Sent(size, now, self.in_use, now, self.port)
        self.owed.setdefault(data, []).append(sequence)
        return data

    # -- what the log says

    @property
    def unreached(self) -> list[Sent]:
        """Datagrams with a header that have not arrived at the server."""
        return [s for s in self.up.values() if not s.port and s.size >= HEADER.size]

    @property
    def unanswered(self) -> list[Sent]:
        """Datagrams that have arrived, or may have, whose answer has not."""
        numbers = [n for each in self.owed.values() for n in each]
        owed = [self.down[n] if n & DOWN else self.up[n] for n in numbers]
        return [s for s in owed if s.port or s.size < HEADER.size]

    @property
    def lost(self) -> int:
        """How many datagrams must have been dropped, either way.

        The port of a flow that is not in use may be closed before the answer arrives.
        """
        return len(self.unreached) + sum(sent.kept for sent in self.unanswered)

    def judge(self, line: FlowLine, now: float, stops: Stops) -> str:
        """The error, if the log line is wrong; else empty."""
        age = now - self.began_at
        if not 0 <= line.age <= age + ROUNDING:
            return f"age={line.age:.3f} in the log, {age:.3f} s ago it began"
        if line.ending not in ("expired", "unreplied", "evicted"):
            return f"ending={line.ending} in the log"
        if line.port != self.port:
            # An earlier port, or one that the server never saw.
            return ""
        if self.in_use:
            quiet = now - self.kept_at
            if line.ending != "expired" or quiet < UDP_TIMEOUT:
                return (
                    f"ending={line.ending} in the log, of a flow in use,"
                    f" {quiet:.1f} s at most after it was used"
                )
        received = [s for s in (*self.up.values(), *self.down.values()) if s.received]
        answered = received or self.strays
        short = not answered or self.moved_at - self.began_at < SHORT
        limit = UDP_UNREPLIED if short else UDP_TIMEOUT
        limit += UDP_STEP + SLACK + stops.delay_within(self.moved_at, now)
        quiet = now - self.moved_at
        if line.ending != "evicted" and quiet > limit:
            return (
                f"ending={line.ending} in the log after {quiet:.1f} s,"
                f" expected {limit:.1f} at most"
            )
        whole = self.ports == 1 and not self.unreached and not self.unanswered
        self._take("")
        return self._judge_counts(line, received) if whole else ""

    def _judge_counts(self, line: FlowLine, received: list[Sent]) -> str:
        up = len(self.up), sum(sent.size for sent in self.up.values())
        sizes = [*(sent.size for sent in received), *map(len, self.strays)]
        down = len(sizes), sum(sizes)
        if (line.up, line.down) == (up, down):
            return ""
        return (
            f"up={line.up[0]}/{line.up[1]} down={line.down[0]}/{line.down[1]} in the"
            f" log, expected {up[0]}/{up[1]} and {down[0]}/{down[1]}"
        )
