"""Thousands of TCP sessions at a time through one relay: opened, driven, checked.

:class:`Traffic` has the servers that the relay dials, opens clients so that about as
many are open as asked for, and runs both ends of each session through their script.  It
also checks the relay's log lines: a line is matched to its session by the client's
address, its ending is compared with the script, and its byte counts with what was sent.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter, deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from soak.ends import (
    GREETING,
    HEADER,
    LONGEST_PAUSE,
    MAGIC,
    End,
    Role,
    Session,
    Where,
    shrink_buffer,
)
from soak.kernel import Drops
from soak.log import SessionLine
from soak.scripts import draw_session
from soak.servers import HOSTS, Servers, address_name
from soak.stops import Stops
from soak.timeouts import HALF_CLOSE, IDLE, LIMIT, SLACK, Violation, WrongTime
from soak.violations import Violations

#: No session is opened while this process is late by so much, in seconds.
BUSY = 0.25

#: Seconds by which a duration in the log may be too long.
ROUNDING = 0.01

#: Seconds for which a finished session is kept: its server may see the header only when
#: the client has left.
MEMORY = 2 * LIMIT


#: How the relay ends a session on which nothing moves.
QUIET = ("idle", "half_closed", "downstream_stalled", "upstream_stalled")


def judge_line(
    line: SessionLine,
    session: Session,
    now: float,
    stops: Stops,
    *,
    excused: bool = False,
) -> str:
    """The error, if the log line of a session is wrong; else empty.

    :param excused: that nothing moved was not the relay's fault.
    """
    script, client, server = session.script, session.client, session.server
    endings = script.endings
    if client is not None:
        age = now - client.opened_at
        if not 0 <= line.duration <= age + ROUNDING:
            return f"duration={line.duration:.3f} in the log, {age:.3f} s ago it began"
        if stops.within(client.opened_at, now):
            endings += script.late
    if excused:
        endings += QUIET
    if line.ending not in endings:
        expected = " or ".join(sorted(endings))
        return f"the log's ending is wrong, expected {expected}"
    if line.ending != "done" or client is None or server is None:
        return ""
    if (line.up, line.down) != (client.sent, server.sent):
        return (
            f"up={line.up} down={line.down} in the log,"
            f" sent were {client.sent} and {server.sent}"
        )
    return ""


def is_held_back(session: Session, drops: Drops) -> bool:
    """Whether bytes of a session are missing that the kernel may have dropped.

    Between an end and the relay's kernel that is known.  Beyond the relay only its own
    kernel knows, so there all bytes that have not arrived count.
    """
    client, server = session.client, session.server
    ends = [end for end in (client, server) if end is not None]
    missing = any(end.undelivered for end in ends) or (
        client is not None
        and server is not None
        and (client.received < server.sent or server.received < client.sent)
    )
    return missing and any(drops.since(end.opened_at) for end in ends)


def acted_late(session: Session, now: float, stops: Stops) -> bool:
    """Whether this process was so late that a session may have looked idle.

    An end reads what its peer has sent, waits for as long as its script says, and
    sends: each of the three may be as late as anything was in that time.
    """
    ends = [end for end in (session.client, session.server) if end is not None]
    done = any(end.done for end in ends)
    limit = HALF_CLOSE if done or any(end.half_closed for end in ends) else IDLE
    # The longest pause of its script; once an end is done, the other one has to read
    # and close.
    planned = LONGEST_PAUSE if done else max(session.delay, LONGEST_PAUSE)
    return 3 * stops.latest_within(now - limit - SLACK, now) >= limit - planned


def client_host(number: int) -> str:
    """The address of a session's client.

    The kernel reuses a port as soon as a reset has freed it, when the relay may still
    have the session that had it.  So no two sessions of one listener have the same
    address, until half a million sessions later.
    """
    block = number // len(HOSTS) % 65536
    return f"127.1.{block // 256}.{block % 256}"


class Traffic:
    """The sessions of one soak.

    :param listeners: the relay's, by kind of server.
    :ivar alive: clients that are following their script.
    :ivar moved: bytes that arrived, of finished sessions.
    :ivar excused: sessions ended by a wrong timeout that was not the relay's fault, by
        reason; not counted as violations.
    """

    def __init__(
        self,
        seed: int,
        servers: Servers,
        listeners: dict[Where, list[tuple[str, int]]],
        violations: Violations,
        stops: Stops,
        drops: Drops,
    ) -> None:
        self.seed = seed
        self._drops = drops
        self.excused: Counter[str] = Counter()
        self._violations = violations
        self._stops = stops
        self.endings: Counter[str] = Counter()
        self.opened = self.alive = self.moved = 0
        self._servers = servers
        self._listeners = listeners
        #: The remaining sessions are being aborted, so they are not checked.
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Sessions that may still be needed, with the time when they are forgotten.
        self._sessions: dict[int, Session] = {}
        self._forgotten_at: deque[tuple[float, int]] = deque()
        #: Sessions that were not logged yet, by client and listener.
        self._unreported: dict[tuple[str, str], Session] = {}
        for sock in servers.listening:
            self._loop.add_reader(sock, self._accept, sock)

    # -- opening

    async def keep(self, connections: int, rate: float, seconds: float) -> None:
        """Keep so many open for so long, opening no more than `rate` a second."""
        before = self._loop.time()
        until = before + seconds
        credit = 0.0
        while before < until:
            await asyncio.sleep(0.02)
            now = self._loop.time()
            credit += rate * (now - before)
            if now - before > BUSY:
                # Open sessions come first.
                credit = 0
            before = now
            while credit >= 1 and self.alive < connections:
                credit -= 1
                self._open()

    def _open(self) -> None:
        self.opened += 1
        session = draw_session(self.seed, self.opened)
        self._sessions[session.number] = session
        now = self._loop.time()
        self._forgotten_at.append((now + MEMORY, session.number))
        while self._forgotten_at[0][0] < now:
            del self._sessions[self._forgotten_at.popleft()[1]]
        self.alive += 1
        self._start(self._run_client(session))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            # Most likely not the relay's fault, but it must not be overlooked.
            self._violations.add(None, "the soak itself", repr(problem))

    # -- the two ends

    async def _run_client(self, session: Session) -> None:
        try:
            with socket.socket() as sock:
                end = session.client = End(sock, session, True, self._stops)
                try:
                    await self._connect(end)
                except OSError as problem:
                    self._violations.add(session, "client", f"can't connect: {problem}")
                else:
                    await self._follow(end, session.script.client)
        finally:
            self.alive -= 1

    async def _connect(self, end: End) -> None:
        session, sock = end.session, end.socket
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if session.small_buffer:
            shrink_buffer(sock)
        sock.bind((client_host(session.number), 0))
        listeners = self._listeners[session.script.where]
        listener = listeners[session.number % len(listeners)]
        # Not sock_connect: the log may have a line about this client before it returns.
        problem = sock.connect_ex(listener)
        key = address_name(sock.getsockname()), address_name(listener)
        self._unreported[key] = session
        if problem == errno.EINPROGRESS:
            await end.connected()
        elif problem:
            raise OSError(problem, os.strerror(problem))

    def _accept(self, listening: socket.socket) -> None:
        with suppress(BlockingIOError):
            while True:
                sock, _ = listening.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(self._run_server(sock, self._servers.listening[listening]))

    async def _run_server(self, sock: socket.socket, where: Where) -> None:
        with sock:
            greeting = GREETING if where is Where.GREETER else b""
            session = await self._introduced(sock, greeting)
            if session is not None:
                end = session.server = End(sock, session, False, self._stops)
                end.sent, end.received = len(greeting), HEADER.size
                await self._follow(end, session.script.server)

    async def _introduced(self, sock: socket.socket, greeting: bytes) -> Session | None:
        """The session of a new connection, from its header; None if it has none."""
        header = b""
        try:
            async with asyncio.timeout(IDLE + SLACK):
                await self._loop.sock_sendall(sock, greeting)
                while len(header) < HEADER.size:
                    part = await self._loop.sock_recv(sock, HEADER.size - len(header))
                    if not part:
                        break
                    header += part
        except ConnectionError:
            return None
        except TimeoutError:
            self._violations.add(None, "server", "a connection stays, and says nothing")
            return None
        if not header:
            return None
        magic, number = HEADER.unpack(header.ljust(HEADER.size))
        session = self._sessions.get(number)
        if magic != MAGIC or session is None:
            self._violations.add(None, "server", f"a header of no session: {header!r}")
            return None
        if session.server is not None:
            self._violations.add(session, "server", "connected to a second time")
            return None
        return session

    async def _follow(self, end: End, role: Role) -> None:
        """Let an end follow its part of the script; count a violation."""
        wrong, excused = "", False
        try:
            async with asyncio.timeout(LIMIT):
                if end.client and end.session.script.introduces:
                    await end.introduce()
                await role(end)
            end.done = True
        except Violation as violation:
            wrong = str(violation)
            # The check already allowed for how late this process was.
            excused = isinstance(violation, WrongTime) and self._excuse(
                end.session, late=False
            )
        except TimeoutError:
            wrong = f"not over after {LIMIT:g} s"
        except ConnectionError as problem:
            wrong = f"{problem.strerror or 'reset'}, which was not due"
            excused = self._excuse(end.session)
        finally:
            end.close()
            self.moved += end.received
        if wrong and not excused:
            wrong += f" ({end.sent} bytes sent, {end.received} received)"
            self._violations.add(
                end.session, "client" if end.client else "server", wrong
            )

    def _excuse(self, session: Session, *, late: bool = True) -> bool:
        """Whether a timeout that ended a session is not the relay's fault.

        :param late: this process may have been too late to keep it alive.
        """
        if not session.excused:
            if is_held_back(session, self._drops):
                session.excused = "the kernel had dropped segments, and held bytes back"
            elif late and acted_late(session, self._loop.time(), self._stops):
                session.excused = "this process was late"
            else:
                return False
            self.excused[session.excused] += 1
        return True

    # -- the log

    def check_line(self, line: SessionLine) -> None:
        """Check the relay's log line about a session that has ended."""
        self.endings[line.ending] += 1
        if self._closed:
            return
        session = self._unreported.pop((line.client, line.listener), None)
        if session is None:
            self._violations.add(
                None, "log", f"a line about an unknown session: {line}"
            )
            return
        session.ending = line.ending
        now = self._loop.time()
        wrong = judge_line(line, session, now, self._stops)
        if wrong and line.ending in QUIET and self._excuse(session):
            wrong = judge_line(line, session, now, self._stops, excused=True)
        if wrong:
            self._violations.add(session, "log", wrong)

    def miss_lines(self) -> None:
        """Count the sessions that should have been logged by now."""
        for session in self._unreported.values():
            self._violations.add(session, "log", "no line about it")
        self._unreported.clear()

    # -- the end

    async def over(self) -> None:
        """Wait until every session has finished."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End every session now, without a verdict."""
        self._closed = True
        for sock in self._servers.listening:
            self._loop.remove_reader(sock)
        for task in self._tasks:
            task.cancel()
        await self.over()
