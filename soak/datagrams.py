"""One flow of datagrams in the soak: what was sent, what came, and what that proves.

A client's datagram says whose it is and which one, and the rest of it is a pattern that
depends on both: no two of them are alike, but for those that are too small to say it.
So a datagram that is changed, doubled, or of another flow shows at once, at the server
as at the client.

The relay's port for a client is what its server sees.  A flow is *in use* once there
was traffic both ways beyond its first two seconds, and then it must keep its port until
nothing has moved for the timeout.  When that was, only the relay knows; what is known
here is a moment that is not later than the relay's, which is enough to judge it: a
client's answer proves that its port lived when it asked.  As those who send note the
time, it makes no difference how long the relay was stopped.
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

#: Seconds that a flow may be looked at late: twice the relay's step.
UDP_STEP = 2.0

#: Seconds of a flow beyond which traffic both ways makes it one in use.  The relay's
#: are a half less.
PROVEN = 2.5

#: Seconds of a flow within which traffic both ways does not.
SHORT = 1.0

#: Seconds that an age in the log may be too long.
ROUNDING = 0.01

#: The largest datagram over IPv4.
LARGEST = 65507

#: The largest that goes over Ethernet in one piece.
USUAL = 1472

#: Datagrams that are nobody's which a flow keeps until it is known what they were.
MAX_STRAYS = 8

#: What a datagram begins with: whose it is, and which of those.
HEADER = struct.Struct(">II")

#: Added to the number of those that a server sends by itself.
DOWN = 1 << 31

#: One that the server is not to answer, and one that it is; of no flow.
SILENT, LOUD = b"\xff", b"\xfe"


def datagram(number: int, sequence: int, size: int) -> bytes:
    """A flow's datagram of this number, as long as LARGEST at most."""
    start = pattern_start(number, True)
    body = pattern_bytes(start, sequence * 7919, max(0, size - HEADER.size))
    return (HEADER.pack(number, sequence) + body)[:size]


def draw_size(dice: random.Random, *, named: bool) -> int:
    """The size of a datagram: from 0 on, or large enough to say whose it is."""
    least = HEADER.size if named else 0
    [most] = dice.choices((64, USUAL, 9000, LARGEST), (20, 60, 14, 6))
    return max(least, dice.choice((most, dice.randint(least, most), least)))


def unowed(data: bytes) -> str:
    """What is wrong with a datagram that came to the wrong client."""
    return f"{len(data)} bytes that are not owed to it: {data[:16]!r}"


@attrs.define(eq=False)
class Sent:
    """A datagram that was sent.

    :ivar before: when it was not sent yet, by a hair; `after`: when it was.
    :ivar resend_buffer: its flow was in use, so the port is there for the answer.
    :ivar port: the relay's that it went through; empty where that is not known.
    :ivar heard: it, or the answer to it, has come to the client.
    """

    size: int
    before: float
    kept: bool
    after: float = 0.0
    port: str = ""
    heard: bool = False


@attrs.define(eq=False)
class Flow:
    """What went through one client's port, on the clock of `time.monotonic`.

    :ivar began_at: when its first datagram was sent.
    :ivar moved_at: when something was last sent or received.
    :ivar port: the relay's, as the server saw it last; empty before.
    :ivar ports: how many there have been.
    :ivar in_use: so it is, for certain.
    :ivar kept_at: when the port lived for certain.
    :ivar up: what the client has sent, by its number.
    :ivar down: what the server has sent by itself.
    :ivar owed: what may come to the client, and the numbers.
    :ivar strays: what has come to the client, and was not owed to it.
    :ivar answered_before: hashes of the last answers that went to its ports before they
        were its own.
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
    _heard_at: float | None = None

    # -- what the client does

    def ask(self, size: int, now: float, *, answered: bool) -> bytes:
        """The next datagram, about to be sent.

        :param answered: there will be an answer to it: the same.
        """
        sequence = len(self.up)
        data = datagram(self.number, sequence, size)
        self.up[sequence] = Sent(size, now, self.in_use)
        self.began_at = self.began_at or now
        if answered:
            self.owed.setdefault(data, []).append(sequence)
        return data

    def asked(self, now: float) -> None:
        """It has been sent."""
        self.up[len(self.up) - 1].after = self.moved_at = now

    def hear(self, data: bytes, now: float) -> str:
        """Something has come to the client; what is wrong with it, or nothing."""
        waiting = self.owed.get(data)
        if not waiting:
            # To the relay it is an answer like any other.
            self.moved_at = now
            self.strays.append(data)
            return "" if len(self.strays) <= MAX_STRAYS else unowed(data)
        sequence = waiting.pop(0)
        if not waiting:
            del self.owed[data]
        self.moved_at = now
        sent = self.down[sequence] if sequence & DOWN else self.up[sequence]
        sent.heard = True
        if sent.port and sent.port == self.port:
            # When it was sent, the relay still had that port, or got it then.
            if self._heard_at is None:
                self._heard_at = now
            elif sent.before - self._heard_at >= PROVEN:
                self.in_use = True
            self.kept_at = max(self.kept_at, sent.before)
        return ""

    def is_foreign(self, data: bytes) -> bool:
        """Whether a datagram says that it is another one's, or a flood's."""
        if len(data) < HEADER.size:
            return data == LOUD
        return bool(HEADER.unpack_from(data)[0] != self.number)

    def judge_strays(self) -> str:
        """What is wrong with what has come and was not owed; empty where nothing is.

        The kernel may give a new flow the port of one that has just been evicted, when
        the answer to that is still under way: nobody can tell it from the new one's.
        """
        for data in self.strays:
            if hash(data) not in self.answered_before or not self.is_foreign(data):
                return unowed(data)
        return ""

    # -- what the server does

    def arrive(self, sequence: int, data: bytes, port: str) -> str:
        """The server has got a datagram; what is wrong with it, or nothing."""
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
        self.port, self.in_use, self._heard_at = port, False, None

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
        """What has a name, and has not come to the server."""
        return [s for s in self.up.values() if not s.port and s.size >= HEADER.size]

    @property
    def unanswered(self) -> list[Sent]:
        """What has, and the client is still owed for."""
        numbers = [n for each in self.owed.values() for n in each]
        owed = [self.down[n] if n & DOWN else self.up[n] for n in numbers]
        return [s for s in owed if s.port or s.size < HEADER.size]

    @property
    def lost(self) -> int:
        """How many of both must have been dropped.

        The port of a flow that is not in use may be closed before the answer comes.
        """
        return len(self.unreached) + sum(sent.kept for sent in self.unanswered)

    def judge(self, line: FlowLine, now: float, stops: Stops) -> str:
        """What is wrong with the log's word on it; empty where nothing is."""
        age = now - self.began_at
        if not 0 <= line.age <= age + ROUNDING:
            return f"age={line.age:.3f} in the log, {age:.3f} s ago it began"
        if line.ending not in ("expired", "unreplied", "evicted"):
            return f"ending={line.ending} in the log"
        if line.port != self.port:
            # Of a port that it had before, or that nobody knows the name of.
            return ""
        if self.in_use:
            quiet = now - self.kept_at
            if line.ending != "expired" or quiet < UDP_TIMEOUT:
                return (
                    f"ending={line.ending} in the log, of a flow in use,"
                    f" {quiet:.1f} s at most after it was used"
                )
        heard = [s for s in (*self.up.values(), *self.down.values()) if s.heard]
        answered = heard or self.strays
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
        return self._judge_counts(line, heard) if whole else ""

    def _judge_counts(self, line: FlowLine, heard: list[Sent]) -> str:
        up = len(self.up), sum(sent.size for sent in self.up.values())
        sizes = [*(sent.size for sent in heard), *map(len, self.strays)]
        down = len(sizes), sum(sizes)
        if (line.up, line.down) == (up, down):
            return ""
        return (
            f"up={line.up[0]}/{line.up[1]} down={line.down[0]}/{line.down[1]} in the"
            f" log, expected {up[0]}/{up[1]} and {down[0]}/{down[1]}"
        )
