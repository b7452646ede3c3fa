"""One end of a session in the soak: a plain socket, and what goes through it.

The two ends of a session, the client's and the server's, are in one process, with the
relay between them.  An end is a non-blocking socket, under asyncio.  Nothing is
buffered here, so an end that does not read leaves its data in the kernel.

The bytes are a pattern that depends on the session, the direction and the
position, so bytes that are lost, duplicated, reordered or of another session are
detected at once, by one memcmp.  As both ends are here, an end of data is checked the
same way in every script: the peer must have sent it, and nothing may be missing before
it.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum

import attrs

from soak.kernel import undelivered
from soak.pattern import (
    CHUNK,
    PERIOD,
    pattern_bytes,
    pattern_matches,
    pattern_start,
)
from soak.stops import Stops
from soak.timeouts import LIMIT, SLACK, STALL, TICK, Violation, check_time

#: The longest pause in a transfer, in seconds: well below every timeout, so that no
#: timeout is due.
LONGEST_PAUSE = 1.0

#: A small receive buffer, in bytes; other ends have the kernel's default.
SMALL_BUFFER = 32768

#: What a client sends first: the number of the session.
HEADER = struct.Struct(">4sI")
MAGIC = b"soak"

#: What a server sends that speaks first.
GREETING = b"the server speaks first\n"

#: All ends read into this buffer, and check what was read before another end reads.
_buffer = bytearray(CHUNK)
_buffer_view = memoryview(_buffer)


def shrink_buffer(sock: socket.socket) -> None:
    """Give a socket, and what it accepts if it listens, a small receive buffer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)


class Where(Enum):
    """The kind of server behind the listener that a client connects to."""

    SERVER = "a server that waits for the client"
    GREETER = "a server that speaks first"
    CLOSED = "a port without a listener"
    HANGING = "a listener whose queue is full, so that a dial hangs"


Role = Callable[["End"], Awaitable[None]]


@attrs.frozen(eq=False)
class Script:
    """What both ends of a session do, and which endings may be logged.

    :ivar weight: how many of the sessions follow it, relative to other scripts.
    :ivar endings: the allowed values of `ending=`.
    :ivar up: the fewest and the most bytes that the client sends at a time.
    :ivar down: the same for the server.
    :ivar seconds: the longest time that a transfer is spread over.
    :ivar delay: the longest pause of an end, in seconds.
    :ivar introduces: the client sends the number of the session first.
    :ivar late: endings that are allowed as well, if the relay was stopped meanwhile.
    """

    name: str
    weight: int
    client: Role
    server: Role
    endings: tuple[str, ...]
    up: tuple[int, int] = (1, 2000)
    down: tuple[int, int] = (1, 5000)
    seconds: float = 0.0
    delay: float = 0.0
    where: Where = Where.SERVER
    introduces: bool = True
    late: tuple[str, ...] = ()


@attrs.define(eq=False)
class Session:
    """One connection through the relay: what was drawn for it, and its two ends.

    :ivar coin: a random choice, for the script.
    :ivar reset_at: when one of its ends reset it, on the loop's clock.
    :ivar ending: from the relay's log; empty until it is there.
    :ivar excused: why a timeout that ended it is not the relay's fault; else empty.
    """

    number: int
    script: Script
    up: int
    down: int
    seconds: float
    delay: float
    coin: bool
    small_buffer: bool
    client: End | None = None
    server: End | None = None
    reset_at: float | None = None
    ending: str = ""
    violated: bool = False
    excused: str = ""

    @property
    def label(self) -> str:
        return f"connection {self.number}"


class End:
    """One end of a session: its socket, and what went through it.

    Every coroutine here lets ConnectionError escape when the connection is reset.

    :ivar sent: bytes that the kernel took, with the header or the greeting.
    :ivar received: bytes that arrived, and were right.
    :ivar shut: it has sent its end of data.
    :ivar half_closed: it has sent its end of data, and goes on reading.
    :ivar done: it has finished its script, and closed.
    :ivar sent_at: when it last sent something, or its end of data; 0 before.
    :ivar moved_at: when a byte was last sent or received; late if this process is late.
    """

    def __init__(
        self, sock: socket.socket, session: Session, client: bool, stops: Stops
    ) -> None:
        self.socket = sock
        self.session = session
        self.client = client
        self._stops = stops
        self._descriptor = sock.fileno()
        self.sent = self.received = 0
        self.shut = self.half_closed = self.done = False
        self._lost = self._closed = False
        self._undelivered = 0
        self._out = pattern_start(session.number, client)
        self._in = pattern_start(session.number, not client)
        self._loop = asyncio.get_running_loop()
        self.opened_at = self.moved_at = self._loop.time()
        self.sent_at = 0.0

    @property
    def peer(self) -> End | None:
        """The session's other end, if it has one yet."""
        return self.session.server if self.client else self.session.client

    @property
    def undelivered(self) -> int:
        """Bytes that the relay's kernel has not acknowledged (when closed: had not)."""
        return self._undelivered if self._closed else undelivered(self.socket)

    def _close(self) -> None:
        if not self._closed:
            self._undelivered = undelivered(self.socket)
            self._closed = True
            self.socket.close()

    # -- one piece

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._descriptor, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(self._descriptor)

    async def _readable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_reader(self._descriptor, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._descriptor)

    async def _send_some(self, data: memoryview | bytes) -> int:
        while True:
            # Before the call: after it this process may have lost the CPU.
            now = self._loop.time()
            try:
                count = self.socket.send(data)
            except BlockingIOError:
                await self._writable()
            except ConnectionError:
                self._lost = True
                raise
            else:
                self.sent += count
                self.sent_at = self.moved_at = now
                return count

    async def _receive_some(self, limit: int) -> memoryview:
        while True:
            try:
                count = self.socket.recv_into(_buffer, limit)
            except BlockingIOError:
                await self._readable()
            except ConnectionError:
                self._lost = True
                raise
            else:
                break
        if not count and self._lost:
            # A failed send cleared the socket's error; the next read returns an end.
            raise ConnectionResetError
        self.moved_at = self._loop.time()
        return _buffer_view[:count]

    async def _receive_pattern(self, limit: int) -> int:
        data = await self._receive_some(limit)
        if data:
            if not pattern_matches(self._in, self.received, data):
                raise Violation(f"wrong bytes at {self.received} or soon after")
            self.received += len(data)
        else:
            self.check_end()
        return len(data)

    def check_end(self) -> None:
        """Check an end of data.

        :raises Violation: the peer has not sent it, or bytes before it are missing.
        """
        peer = self.peer
        if peer is None or not peer.shut:
            raise Violation(f"an end that was not sent, after {self.received} bytes")
        if self.received != peer.sent:
            raise Violation(f"an end after {self.received} of {peer.sent} bytes")

    def _check_time(
        self, what: str, since: float, earliest: float, latest: float
    ) -> None:
        """As :func:`check_time`, allowing for delays of the relay and this process."""
        now = self._loop.time()
        latest += self._stops.delay_within(since, now)
        check_time(what, now - since, earliest, latest)

    async def connected(self) -> None:
        """Wait until the connection is established.

        :raises OSError: it failed.
        """
        await self._writable()
        problem = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            raise OSError(problem, os.strerror(problem))

    # -- what scripts do

    async def send(self, count: int, seconds: float = 0, chunk: int = CHUNK) -> None:
        """Send the next bytes of the pattern, spread over so many seconds."""
        pause = min(seconds / max(1, count // chunk), LONGEST_PAUSE)
        target = self.sent + count
        due = self._loop.time()
        while self.sent < target:
            piece = min(chunk, target - self.sent)
            await self._send_some(pattern_bytes(self._out, self.sent, piece))
            due += pause
            # Without a pause, or if late, this lets other tasks run.
            await asyncio.sleep(max(0, due - self._loop.time()))

    async def introduce(self) -> None:
        """Send the number of the session."""
        await self._send_some(HEADER.pack(MAGIC, self.session.number))

    async def receive(self, count: int) -> None:
        """Read so many bytes of the pattern."""
        target = self.received + count
        while self.received < target:
            if not await self._receive_pattern(min(CHUNK, target - self.received)):
                raise Violation(f"an end {target - self.received} bytes too early")

    async def receive_greeting(self) -> None:
        """Read the greeting of a server that speaks first."""
        while self.received < len(GREETING):
            data = await self._receive_some(len(GREETING) - self.received)
            position = self.received
            if not data or data != GREETING[position : position + len(data)]:
                raise Violation(f"{bytes(data)!r} in place of the greeting")
            self.received += len(data)

    async def receive_to_end(self, pause: float = 0) -> None:
        """Read until the peer's end of data, with a pause between reads.

        With a pause, it has a small receive buffer: bytes in the kernel's buffer here
        count as delivered, and the relay's timeouts run.  Reading a megabyte of them
        would take longer than the timeouts.
        """
        if pause:
            shrink_buffer(self.socket)
        while await self._receive_pattern(CHUNK):
            await asyncio.sleep(pause)

    async def expect_reset(self) -> None:
        """Read on: a reset is due now, and no end of data."""
        try:
            await self.receive_to_end()
        except ConnectionError:
            gone_at = self.session.reset_at
            if gone_at is not None:
                since = max(gone_at, self.moved_at)
                self._check_time("the reset came", since, 0, SLACK)
            return
        raise Violation("an end of data, where a reset was due")

    async def expect_refusal(self, earliest: float, latest: float) -> None:
        """Read on: the relay reached no server, so there is an end and no data."""
        with suppress(ConnectionError):
            data = await self._receive_some(CHUNK)
            if data:
                raise Violation(f"{len(data)} bytes from a server that is not there")
        self._check_time("refused", self.opened_at, earliest, latest)

    async def until_aborted(self, timeout: float, *, early: bool = False) -> None:
        """Wait, without reading, until the kernel reports that the relay has aborted.

        :param timeout: the relay's, which began when a byte last moved.
        :param early: the relay may have reason to abort before that.
        """
        poll = select.poll()
        poll.register(self._descriptor, 0)
        while not poll.poll(0):
            await asyncio.sleep(TICK / 2)
        ends = [end for end in (self, self.peer) if end is not None]
        if not early:
            # The timeout can't have begun before the last byte was sent; when that
            # arrived is not known as well.
            last = max(end.sent_at for end in ends)
            self._check_time("aborted", last, timeout, LIMIT)
        last = max(end.moved_at for end in ends)
        self._check_time("aborted", last, 0, timeout + 2 * TICK + SLACK)

    async def flood(self) -> None:
        """Send until the relay aborts the session, as its peer does not read."""
        began_at = self._loop.time()
        with suppress(ConnectionError):
            while True:
                await self.send(CHUNK)
        # Zero-window probes may still bring bytes into the relay while its stall
        # timeout runs, so the last byte only shows what is too late.
        self._check_time("aborted", began_at, STALL, LIMIT)
        self._check_time("aborted", self.moved_at, 0, STALL + 2 * TICK + SLACK)

    async def fill(self) -> None:
        """Send for a second: until the buffers are full, and before a stall timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.send(PERIOD)

    def shut_write(self) -> None:
        """Send the end of data."""
        self.shut = self.half_closed = True
        self.sent_at = self._loop.time()
        # If the relay has just reset it, the next read reports that.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close politely, if it is open."""
        self.shut = True
        self._close()

    def reset(self) -> None:
        """Close with a reset."""
        self.session.reset_at = self._loop.time()
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._close()


def _wake(ready: asyncio.Future[None]) -> None:
    # The loop may call this again before the waiting task runs.
    if not ready.done():
        ready.set_result(None)
