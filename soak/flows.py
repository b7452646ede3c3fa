"""UDP flows through one relay: opened, flooded, driven, checked.

:class:`Flows` has the servers of the relay's UDP listeners, keeps about as many clients
open as asked for, and now and then floods the listeners from more ports than the
relay's table holds.  Half of the floods are answered, each port once.  An eighth of the
clients have the flood's addresses, and so its limit of flows for a client.

Its counters are compared with the relay's in the end (`soak/verdict.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections import Counter, deque
from collections.abc import Container, Coroutine
from contextlib import suppress
from typing import Any

import attrs

from soak.datagrams import (
    HEADER,
    LOUD,
    SILENT,
    UDP_TIMEOUT,
    draw_size,
)
from soak.echoes import Echoes, flow_bound, kernel_drops
from soak.flow_scripts import AT_ONCE, BUFFER, READ_SIZE, FlowClient, draw_flow
from soak.log import FlowLine
from soak.servers import address_name
from soak.stops import LONGEST, Stops
from soak.timeouts import LIMIT, SLACK, Violation
from soak.traffic import BUSY
from soak.violations import Violations

#: Addresses and ports of floods, used round robin, so that none is used again while its
#: flow may still exist.
FLOOD_HOSTS = ("127.4.0.1", "127.4.0.2")
FLOOD_PORTS = range(10_000, 30_000)

#: The ports of clients with the flood's addresses.
SHARED_PORTS = range(30_000, 32_700)

#: The size of a flood, as a multiple of the relay's limit of flows.
OVERFLOW = 1.5

#: Seconds that a flood takes, and datagrams that are sent at once.
FLOOD, PIECE = 1.0, 50

#: Answers that are kept for each of the relay's ports: as many as a client may have
#: pending when its flow is evicted.
ANSWERS = 16

#: Seconds for which a finished client is kept: then its flow has expired.
MEMORY = UDP_TIMEOUT + LONGEST + 4 * SLACK


def client_socket(number: int, avoided: Container[int]) -> socket.socket:
    """A client's socket, at an address that no other client has for a long time.

    :param avoided: ports of servers.  A server may answer at each address of its
        machine, so the relay drops what comes from one of these ports there: it would
        come back, and be relayed again for ever.
    """
    block = number % 65536
    own = f"127.2.{block // 256}.{block % 256}", 0
    shared = (
        FLOOD_HOSTS[number // 8 % len(FLOOD_HOSTS)],
        SHARED_PORTS[number // 8 % len(SHARED_PORTS)],
    )
    address = own if number % 8 else shared
    while True:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            sock.bind(address)
            if sock.getsockname()[1] not in avoided:
                return sock
            sock.close()
        except OSError:
            sock.close()
            if address is own:
                raise
        # The port is in use: take an address of its own.
        address = own


@attrs.define(eq=False)
class Tally:
    """Datagrams, as counted by clients, servers and floods.

    :ivar sent: by clients.
    :ivar flooded: by the floods.
    :ivar arrived: at servers.
    :ivar replied: by servers.
    :ivar received: by clients.
    :ivar lost: of finished flows: must have been dropped somewhere.
    :ivar dropped: by the kernel, at clients and servers.
    :ivar strays: answers that reached the next flow of the relay's port.
    """

    sent: int = 0
    flooded: int = 0
    arrived: int = 0
    replied: int = 0
    received: int = 0
    lost: int = 0
    dropped: int = 0
    strays: int = 0


class Flows:
    """The flows of one soak.

    :param listeners: the relay's datagram listeners.
    :ivar alive: clients that are following their script.
    :ivar endings: of flows, by the relay's log.
    """

    def __init__(
        self,
        seed: int,
        servers: Echoes,
        listeners: list[tuple[str, int]],
        violations: Violations,
        stops: Stops,
    ) -> None:
        self._seed = seed
        self._servers = servers
        self._listeners = listeners
        self._violations = violations
        self._stops = stops
        self.tally = Tally()
        self.endings: Counter[str] = Counter()
        self.opened = self.alive = self.floods = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[int, asyncio.Task[None]] = {}
        #: Clients that may still be in the log: by number, and by client and listener.
        self._clients: dict[int, FlowClient] = {}
        self._named: dict[tuple[str, str], FlowClient] = {}
        #: Finished clients, with the time when they are forgotten.
        self._forgotten_at: deque[tuple[float, FlowClient, tuple[str, str]]] = deque()
        #: The last answers to each of the relay's ports: their hashes.
        self._answers: dict[str, deque[int]] = {}
        self._flood_ports = itertools.cycle(
            port for port in FLOOD_PORTS if port not in servers.ports
        )
        for sock in servers.sockets:
            self._loop.add_reader(sock, self._serve, sock)

    # -- clients

    async def keep(self, flows: int, rate: float) -> None:
        """Keep so many clients open, opening no more than `rate` a second.

        Runs until it is cancelled.
        """
        before, credit = time.monotonic(), 0.0
        while True:
            await asyncio.sleep(0.02)
            now = time.monotonic()
            # If this process was late, it does not catch up all at once.
            credit = min(credit + rate * (now - before), max(1.0, rate * BUSY))
            before = now
            while credit >= 1 and self.alive < flows:
                credit -= 1
                self._open()
            self._forget(now)

    def _open(self) -> None:
        self.opened += 1
        client = draw_flow(self._seed, self.opened, self._stops)
        self.expect(client)
        self.alive += 1
        self._start(self._run_client(client))

    def expect(self, client: FlowClient) -> None:
        """Let the servers expect a client."""
        self._clients[client.flow.number] = client

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            # Most likely not the relay's fault, but it must not be overlooked.
            self._violations.add(None, "the soak itself", repr(problem))

    async def _run_client(self, client: FlowClient) -> None:
        try:
            with client_socket(client.flow.number, self._servers.ports) as sock:
                listener = self._listeners[client.flow.number % len(self._listeners)]
                sock.connect(listener)
                key = address_name(sock.getsockname()), address_name(listener)
                self._named[key] = client
                wrong = await self._follow(client, sock)
                self.tally.dropped += kernel_drops(sock)
        finally:
            self.alive -= 1
            self.tally.sent += client.sent
            self.tally.received += client.received
        self.tally.strays += len(client.flow.strays)
        if wrong := wrong or client.flow.judge_strays():
            self._violations.add(client, "client", wrong)
        self._forgotten_at.append((time.monotonic() + MEMORY, client, key))

    async def _follow(self, client: FlowClient, sock: socket.socket) -> str:
        """Let a client follow its script; the error, if any."""
        try:
            async with asyncio.timeout(LIMIT):
                await client.follow(sock)
        except Violation as violation:
            return f"{violation} ({client.sent} sent, {client.received} received)"
        except TimeoutError:
            return f"not over after {LIMIT:g} s"
        return ""

    # -- servers

    def _serve(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, source = sock.recvfrom(READ_SIZE)
            except BlockingIOError:
                return
            self.tally.arrived += 1
            if data == SILENT:
                continue
            if len(data) < HEADER.size:
                self._send(sock, data, source)
                continue
            number, sequence = HEADER.unpack_from(data)
            client = self._clients.get(number)
            if client is None:
                what = f"{len(data)} bytes of no flow: {data[:16]!r}"
                self._violations.add(None, "server", what)
                continue
            port = address_name(source)
            if port != client.flow.port:
                client.flow.answered_before.update(self._answers.get(port, ()))
            wrong = client.flow.arrive(sequence, data, port)
            if wrong:
                self._violations.add(client, "server", wrong)
            if client.script.streams:
                self._begin_stream(client, sock, source)
            elif client.script.answered:
                self._send(sock, data, source)

    def _send(self, sock: socket.socket, data: bytes, to: tuple[str, int]) -> None:
        # If the queue is full: as if the network had lost it.
        with suppress(BlockingIOError):
            sock.sendto(data, to)
            self.tally.replied += 1
            port = address_name(to)
            if port not in self._answers:
                self._answers[port] = deque(maxlen=ANSWERS)
            self._answers[port].append(hash(data))

    def _begin_stream(
        self, client: FlowClient, sock: socket.socket, to: tuple[str, int]
    ) -> None:
        number = client.flow.number
        if number in self._streams:
            self._streams[number].cancel()
        client.streaming = True
        self._streams[number] = self._start(self._stream(client, sock, to))

    async def _stream(
        self, client: FlowClient, sock: socket.socket, to: tuple[str, int]
    ) -> None:
        for _ in range(client.rounds):
            size = draw_size(client.dice, named=True)
            self._send(sock, client.flow.stream(size, time.monotonic()), to)
            await asyncio.sleep(client.pause)
        client.streaming = False
        del self._streams[client.flow.number]

    # -- floods

    async def flood_now_and_then(
        self, flows: int, dice: random.Random, every: float
    ) -> None:
        """Flood a listener again and again, until this is cancelled."""
        while True:
            await asyncio.sleep(every * dice.uniform(0.5, 1.5))
            listener = self._listeners[self.floods // 2 % len(self._listeners)]
            data = (LOUD, SILENT)[self.floods % 2]
            self.floods += 1
            await self._flood(listener, data, int(OVERFLOW * flow_bound(flows)))

    async def _flood(self, listener: tuple[str, int], data: bytes, count: int) -> None:
        pause = FLOOD / max(1, count // PIECE)
        for number in range(count):
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                # If the port is in use, skip it.
                with suppress(OSError):
                    host = FLOOD_HOSTS[number % len(FLOOD_HOSTS)]
                    sock.bind((host, next(self._flood_ports)))
                    sock.sendto(data, listener)
                    self.tally.flooded += 1
            if number % PIECE == PIECE - 1:
                await asyncio.sleep(pause)

    # -- the log

    def check_line(self, line: FlowLine) -> None:
        """Check the relay's log line about a flow that has ended."""
        self.endings[line.ending] += 1
        if self._closed:
            return
        client = self._named.get((line.client, line.listener))
        if client is None:
            host, _, port = line.client.rpartition(":")
            if host not in FLOOD_HOSTS or int(port) not in FLOOD_PORTS:
                self._violations.add(
                    None, "log", f"a line about an unknown flow: {line}"
                )
            return
        client.ending = line.ending
        wrong = client.flow.judge(line, time.monotonic(), self._stops)
        if wrong:
            self._violations.add(client, "log", wrong)

    def _forget(self, now: float) -> None:
        while self._forgotten_at and self._forgotten_at[0][0] < now:
            _, client, key = self._forgotten_at.popleft()
            if client.flow.in_use:
                self._violations.add(client, "log", "no line about a flow in use")
            self.tally.lost += client.flow.lost
            del self._clients[client.flow.number]
            if self._named.get(key) is client:
                del self._named[key]

    def forget_all(self) -> None:
        """Check the finished clients: their flows have expired and been logged."""
        self._forget(float("inf"))

    # -- the end

    async def over(self) -> None:
        """Wait until every client has finished."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End every flow now, without a verdict."""
        self._closed = True
        for sock in self._servers.sockets:
            self._loop.remove_reader(sock)
            self.tally.dropped += kernel_drops(sock)
        for task in self._tasks:
            task.cancel()
        await self.over()
