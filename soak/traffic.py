"""Thousands of TCP sessions at a time through one relay: opened, driven, checked.

:class:`Traffic` has the servers that the relay dials, opens clients so that about
as many are alive as asked for, and runs both ends of each session through their
script.  The relay's log line about a session is checked here, too: its client's
address tells which session a line is about, so the ending can be held against
the script, and the byte counts against what was sent.
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

#: Seconds that a duration in the log may be too long.
ROUNDING = 0.01

#: A session that is over stays known for so long, in seconds: its server may see
#: the header only when the client has left.
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
    """What is wrong with the log's line on a session; empty where nothing is.

    :param excused: that nothing moved was not the relay's doing.
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
    """Whether bytes of a session are still under way that the kernel may have dropped.

    Between an end and the relay's kernel that is known for certain.  Behind the relay
    only its own kernel knows, so there whatever has not come counts.
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
    sends: each of the three may come as late as anything did in that time.
    """
    ends = [end for end in (session.client, session.server) if end is not None]
    done = any(end.done for end in ends)
    limit = HALF_CLOSE if done or any(end.half_closed for end in ends) else IDLE
    # The longest that its script lets nothing move; once an end is done, the other one
    # has to read, and to close.
    planned = LONGEST_PAUSE if done else max(session.delay, LONGEST_PAUSE)
    return 3 * stops.latest_within(now - limit - SLACK, now) >= limit - planned


def client_host(number: int) -> str:
    """The address that a session's client has.

    The kernel gives a port again as soon as a reset has freed it, when the relay
    may still be busy with the session that had it.  So no two sessions of one
    listener have the same, until half a million later.
    """
    block = number // len(HOSTS) % 65536
    return f"127.1.{block // 256}.{block % 256}"


class Traffic:
    """The sessions of one soak.

    :param listeners: the relay's, by what is behind them.
    :ivar alive: clients that follow their script at this moment.
    :ivar moved: bytes that arrived, of the sessions that are over.
    :ivar excused: sessions that a timeout ended which was not due, and that do not
        count, by the reason.
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
        #: The sessions that are left were cut short, so nothing they show counts.
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Those that may still be asked for, with the time when they are forgotten.
        self._sessions: dict[int, Session] = {}
        self._forgotten_at: deque[tuple[float, int]] = deque()
        #: Those that the log has not spoken of yet, by client and listener.
        self._unreported: dict[tuple[str, str], Session] = {}
        for sock in servers.listening:
            self._loop.add_reader(sock, self._accept, sock)

    # -- opening

    async def keep(self, connections: int, rate: float, seconds: float) -> None:
        """Keep so many alive for so long, opening no more than `rate` a second."""
        before = self._loop.time()
        until = before + seconds
        credit = 0.0
        while before < until:
            await asyncio.sleep(0.02)
            now = self._loop.time()
            credit += rate * (now - before)
            if now - before > BUSY:
                # What is under way comes first.
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
            # Most likely not the relay's fault, but never to be overlooked.
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
        # Not sock_connect: the log may speak of this client before it returns.
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
        """The session that a new connection says it is; None where it says nothing."""
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
        """Let an end do its part of the script; count what it should not have seen."""
        wrong, excused = "", False
        try:
            async with asyncio.timeout(LIMIT):
                if end.client and end.session.script.introduces:
                    await end.introduce()
                await role(end)
            end.done = True
        except Violation as violation:
            wrong = str(violation)
            # For how late this process was, the time already allows.
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
        """Whether it is not the relay's doing that a timeout has ended a session.

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

    def hear(self, line: SessionLine) -> None:
        """The relay's log says that a session has ended."""
        self.endings[line.ending] += 1
        if self._closed:
            return
        session = self._unreported.pop((line.client, line.listener), None)
        if session is None:
            self._violations.add(None, "log", f"a line about nobody: {line}")
            return
        session.ending = line.ending
        now = self._loop.time()
        wrong = judge_line(line, session, now, self._stops)
        if wrong and line.ending in QUIET and self._excuse(session):
            wrong = judge_line(line, session, now, self._stops, excused=True)
        if wrong:
            self._violations.add(session, "log", wrong)

    def miss_lines(self) -> None:
        """Count the sessions that the log should have spoken of by now."""
        for session in self._unreported.values():
            self._violations.add(session, "log", "no line about it")
        self._unreported.clear()

    # -- the end

    async def over(self) -> None:
        """Wait until every session is over."""
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
