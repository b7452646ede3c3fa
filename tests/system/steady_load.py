"""A steady load of TCP, UDP and SOCKS4, of which it is known who may answer when.

Servers and clients are in one thread.  A *target* is where clients come to, at a steady
rate whatever becomes of the others: each with a connection, or a flow, of its own, from
an address of its own.  Beside them are clients that stay, and ask again and again.

Who may answer is said in *phases*: while something is changed, those of before and of
after.  A request is right if its answer is one of those of the phases that it has seen.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, Self

import attrs

from tests.support.ports import free_port
from tests.support.process import PATIENCE

#: In place of a name: nobody answers, and the connection is closed or reset.
NOBODY = ""

#: What is asked by one who comes once, and by one who stays; and what is answered, but
#: for the name.
ONCE, AGAIN = b"once".ljust(199) + b"\n", b"again".ljust(199) + b"\n"
ANSWER = b"".ljust(990)

#: How long an answer is.
LENGTH = 1000

#: Seconds between two questions of one who stays.
EVERY = 0.05

Kind = Literal["tcp", "udp", "socks4"]


def _answer(name: str) -> bytes:
    return name.encode().ljust(9) + ANSWER + b"\n"


def _name(answer: bytes) -> str:
    assert len(answer) == LENGTH
    return answer[:9].decode().strip()


@attrs.define
class Asked:
    """One request.

    :ivar due: when it was to begin, by the clock of the load's thread.
    :ivar over: when it has ended; 0: it is under way.
    :ivar answer: who has answered; NOBODY: it has failed.
    :ivar problem: why.
    """

    due: float
    over: float = 0.0
    answer: str = NOBODY
    problem: str = ""

    @property
    def seconds(self) -> float:
        """From when it was due to the end of its answer."""
        return self.over - self.due


@attrs.define(eq=False)
class Stays:
    """A client that stays, and asks again and again.

    :ivar who: who has answered it, always.
    :ivar may: who may answer it as well from now on, as it has no connection.
    :ivar count: how many answers it has had.
    :ivar longest: seconds that one took.
    :ivar address: its own, as the relay's listings have it.
    """

    address: str
    who: str = ""
    may: frozenset[str] = frozenset()
    count: int = 0
    longest: float = 0.0
    problem: str = ""
    over: bool = False
    ends: bool = False


@attrs.define(eq=False)
class Target:
    """Where clients come to.

    :ivar server: of a proxy: the port that its clients ask for.
    """

    load: SteadyLoad
    kind: Kind
    port: int
    rate: float
    server: int
    asked: list[Asked] = attrs.field(factory=list)
    phases: list[tuple[float, frozenset[str]]] = attrs.field(factory=list)
    ends: bool = False

    @property
    def by(self) -> frozenset[str]:
        """Who may answer now."""
        return self.phases[-1][1]

    def may(self, names: Collection[str]) -> None:
        """From now on these may answer."""
        self.phases.append((self.load.now(), frozenset(names)))

    @contextmanager
    def changes(
        self, after: Collection[str], meanwhile: Collection[str] = ()
    ) -> Iterator[None]:
        """Once this block is over, these answer; in it, those of before, too."""
        self.may({*self.by, *after, *meanwhile})
        yield
        self.may(after)

    def wrong(self) -> list[Asked]:
        """Those that somebody has answered who may not."""
        return [each for each in self.asked if each.answer not in self._may(each)]

    def _may(self, asked: Asked) -> set[str]:
        ends = [at for at, _ in self.phases[1:]] + [float("inf")]
        return {
            name
            for (begins, names), end in zip(self.phases, ends, strict=True)
            if begins <= asked.over and asked.due < end
            for name in names
        }

    def next(self, count: int) -> list[Asked]:
        """Wait until the next so many are over; these."""
        begun = len(self.asked)
        self.load.next(count, self)
        return self.asked[begun : begun + count]


class SteadyLoad:
    """Servers, targets, and clients that stay, for the length of a block."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.staying: list[tuple[Target, Stays]] = []
        self._news = threading.Condition()
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[Any] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
            self._call(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def now(self) -> float:
        """The clock by which requests are timed."""
        return self._loop.time()

    def until(self, there: Callable[[], bool], what: Callable[[], str]) -> None:
        """Wait for something that the load does."""
        with self._news:
            assert self._news.wait_for(there, 2 * PATIENCE), what()

    def next(self, count: int, *targets: Target) -> None:
        """Wait until the next so many of each target's requests are over."""
        begun = [(each, len(each.asked)) for each in targets]

        def over() -> bool:
            return all(
                len(each.asked) >= first + count
                and all(one.over for one in each.asked[first : first + count])
                for each, first in begun
            )

        self.until(over, lambda: f"some of {count} more are not over")

    def _call(self, doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(2 * PATIENCE)

    # -- servers

    def server(self, name: str, kind: Kind = "tcp") -> int:
        """Serve under a name, on a port of 127.0.0.1; which."""
        port: int = self._call(self._serve(name, kind))
        return port

    async def _serve(self, name: str, kind: Kind) -> int:
        answer = _answer(name)
        if kind == "udp":
            # A client whose own port is that of a server here is taken for it; and one
            # of those that the kernel gives out is given to a client, too, whose
            # address is another.
            transport, _ = await self._loop.create_datagram_endpoint(
                lambda: _Answers(answer), ("127.0.0.1", free_port())
            )
            self._servers.append(transport)
            return int(transport.get_extra_info("sockname")[1])

        async def serve(reader: Any, writer: Any) -> None:
            with suppress(OSError):
                while asked := await reader.readline():
                    writer.write(answer)
                    await writer.drain()
                    if asked == ONCE:
                        break
            writer.close()

        serving = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        self._servers.append(serving)
        return int(serving.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        for each in self._servers:
            each.close()
        # The servers' ends of what is closed.
        await asyncio.sleep(0.05)

    # -- clients

    def target(
        self,
        kind: Kind,
        port: int,
        by: Collection[str],
        rate: float = 50,
        server: int = 0,
    ) -> Target:
        """Have clients come to a port of 127.0.0.1, whom these may answer."""
        target = Target(self, kind, port, rate, server)
        target.may(by)
        self.targets.append(target)
        self._call(self._start(self._come(target)))
        return target

    def stays(self, target: Target) -> Stays:
        """One client more, who stays; it has been answered once."""
        one = Stays(self._own())
        self.staying.append((target, one))
        self._call(self._start(self._stay(target, one)))
        self.until(lambda: one.count > 0 or one.over, lambda: f"nobody answers: {one}")
        return one

    def leave(self, *those: Target) -> None:
        """Nobody comes to these any more; those who came have been answered."""
        for each in those:
            each.ends = True
        self.until(
            lambda: all(asked.over for each in those for asked in each.asked),
            lambda: "some requests have no end",
        )

    def end(self) -> None:
        """Nobody comes any more, those who stay go; all have ended."""
        for target in self.targets:
            target.ends = True
        for _, each in self.staying:
            each.ends = True
        self.until(lambda: not self._tasks, lambda: f"some don't end: {self._tasks}")

    def _own(self) -> str:
        """An address of loopback that nobody else has."""
        number = next(self._numbers)
        return f"127.{100 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"

    async def _start(self, doing: Any) -> None:
        task = self._loop.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        with self._news:
            self._tasks.discard(task)
            self._news.notify_all()
        task.result()

    async def _come(self, target: Target) -> None:
        due = self.now()
        while not target.ends:
            asked = Asked(due)
            target.asked.append(asked)
            await self._start(self._ask(target, asked))
            due += 1 / target.rate
            await asyncio.sleep(max(due - self.now(), 0))

    async def _ask(self, target: Target, asked: Asked) -> None:
        try:
            async with asyncio.timeout(PATIENCE), self._client(target) as ask:
                asked.answer = _name(await ask(ONCE))
        except (OSError, EOFError) as problem:
            asked.problem = repr(problem)
        with self._news:
            asked.over = self.now()
            self._news.notify_all()

    async def _stay(self, target: Target, one: Stays) -> None:
        try:
            async with self._client(target, one) as ask:
                while not one.ends:
                    begun = self.now()
                    async with asyncio.timeout(PATIENCE):
                        who = _name(await ask(AGAIN))
                    one.longest = max(one.longest, self.now() - begun)
                    if one.who not in {"", who} and who not in one.may:
                        one.problem = f"{who} answers, and not {one.who}"
                        break
                    one.who = who
                    with self._news:
                        one.count += 1
                        self._news.notify_all()
                    await asyncio.sleep(EVERY)
        except (OSError, EOFError) as problem:
            one.problem = repr(problem)
        with self._news:
            one.over = True
            self._news.notify_all()

    def _client(self, target: Target, one: Stays | None = None) -> _Client:
        own = self._own() if one is None else one.address
        return (_Datagrams if target.kind == "udp" else _Streams)(target, own, one)


class _Client:
    """A client; in its block, what to ask with."""

    def __init__(self, target: Target, own: str, one: Stays | None) -> None:
        self.target, self.own, self.one = target, own, one

    async def __aenter__(self) -> Any:
        raise NotImplementedError

    async def __aexit__(self, *_: object) -> None:
        raise NotImplementedError

    def named(self, sock: Any) -> None:
        """Say which address and port it has."""
        if self.one is not None:
            host, port = sock.getsockname()
            self.one.address = f"{host}:{port}"


class _Streams(_Client):
    async def __aenter__(self) -> Any:
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        try:
            sock.bind((self.own, 0))
            await loop.sock_connect(sock, ("127.0.0.1", self.target.port))
        except BaseException:
            sock.close()
            raise
        self.named(sock)
        reader, self._writer = await asyncio.open_connection(sock=sock)
        if self.target.kind == "socks4":
            try:
                await self._connect(reader)
            except BaseException:
                self._writer.transport.abort()
                raise
        return partial(self._ask, reader)

    async def _connect(self, reader: asyncio.StreamReader) -> None:
        port = self.target.server.to_bytes(2, "big")
        self._writer.write(b"\x04\x01" + port + socket.inet_aton("127.0.0.1") + b"\0")
        said = await reader.readexactly(8)
        if said[:2] != b"\0\x5a":
            raise ConnectionRefusedError(f"the proxy says {said!r}")

    async def _ask(self, reader: asyncio.StreamReader, what: bytes) -> bytes:
        self._writer.write(what)
        said = await reader.readexactly(LENGTH)
        if what == ONCE:
            # The server ends it, as an end of data.
            assert await reader.read() == b""
        return said

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class _Datagrams(_Client):
    async def __aenter__(self) -> Any:
        self._sock = socket.socket(type=socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.bind((self.own, 0))
        self.named(self._sock)
        self._sock.connect(("127.0.0.1", self.target.port))
        return self._ask

    async def _ask(self, what: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, what)
        return await loop.sock_recv(self._sock, 1 << 16)

    async def __aexit__(self, *_: object) -> None:
        self._sock.close()


class _Answers(asyncio.DatagramProtocol):
    """Answers each datagram with the same."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._transport.sendto(self._answer, addr)
