"""Clients that come at a steady rate, however long the others have to wait.

Such a load is open: a server that answers late gets no fewer requests for it, and what
a request takes is counted from when it was due (Schroeder, Open Versus Closed, NSDI
2006).
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs

from tests.support.process import PATIENCE
from tests.system.namespaces import Machine

REQUEST = b"GET / HTTP/1.0\r\n\r\n"

#: How many requests a second there are.
RATE = 200


@attrs.define
class Request:
    """One request.

    :ivar answer: the body; empty: it has failed, or is under way.
    :ivar problem: why it has failed.
    :ivar seconds: from when it was due to the end of its answer.
    """

    due: float
    answer: str = ""
    problem: str = ""
    seconds: float = 0.0
    over: bool = False


def answers(requests: Sequence[Request]) -> Counter[str]:
    """How often each answer, or problem, was there."""
    return Counter(each.answer or each.problem for each in requests)


def p99(requests: Sequence[Request]) -> float:
    """The seconds that all but one in a hundred took at most."""
    return sorted(each.seconds for each in requests)[len(requests) * 99 // 100 - 1]


class OpenLoop:
    """A steady load, in a thread of its own.

    :param machine: where the clients are.
    :param address: whom they ask.
    :param rate: how many of them a second.
    :param silence: seconds for which a client says nothing, once it is connected.

    :ivar requests: those that have begun, in order.
    """

    def __init__(
        self,
        machine: Machine,
        address: tuple[str, int],
        rate: int = RATE,
        silence: float = 0.0,
    ) -> None:
        self._silence = silence
        self._machine = machine
        self._address = address
        self._every = 1 / rate
        self._news = threading.Condition()
        self.requests: list[Request] = []
        self._change: Callable[[], object] | None = None
        self._begun = 0
        self._problem: BaseException | None = None
        self._ends = False
        self.thread = threading.Thread(target=self._run)

    # -- for the test

    def next(self, count: int = RATE) -> list[Request]:
        """Wait until the next so many are over; these."""
        begun, _ = self.under_way()
        return self.wait(begun, count)

    def wait(self, begun: int, count: int) -> list[Request]:
        """Wait until those are over that are so many from the `begun`th on."""
        with self._news:
            assert self._news.wait_for(
                lambda: (
                    len(self.requests) >= begun + count
                    and all(each.over for each in self.requests[begun : begun + count])
                ),
                2 * PATIENCE,
            ), f"{count} requests are not over: {answers(self.requests[begun:])}"
            return self.requests[begun : begun + count]

    def under_way(self) -> tuple[int, list[Request]]:
        """How many have begun, and those that are not over."""
        with self._news:
            begun = list(self.requests)
        return len(begun), [each for each in begun if not each.over]

    def pausing(self, change: Callable[[], object]) -> int:
        """Do this while no request is under way, so that none is cut off by it.

        None is due meanwhile: what the change takes is nobody's latency.

        :return: how many had begun.
        """
        with self._news:
            self._change = change
            assert self._news.wait_for(lambda: self._change is None, PATIENCE)
            if self._problem is not None:
                raise self._problem
            # Others may have begun before this thread is told.
            return self._begun

    def end(self) -> list[Request]:
        """Wait for all that have begun; all of them."""
        self._ends = True
        self.thread.join()
        return self.requests

    # -- the thread

    def _run(self) -> None:
        with self._machine.inside():
            asyncio.run(self._clients())

    async def _clients(self) -> None:
        now = asyncio.get_running_loop().time
        due, running = now(), set[asyncio.Task[None]]()
        while not self._ends:
            if self._change is not None:
                await _over(running)
                with self._news:
                    self._begun = len(self.requests)
                    try:
                        self._change()
                    except BaseException as problem:
                        self._problem = problem
                    self._change = None
                    self._news.notify_all()
                due = now()
            await asyncio.sleep(max(due - now(), 0))
            request = Request(due)
            with self._news:
                self.requests.append(request)
            task = asyncio.create_task(self._client(request))
            running.add(task)
            task.add_done_callback(running.discard)
            due += self._every
        await _over(running)

    async def _client(self, request: Request) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                request.answer = await self._ask()
        except (OSError, ValueError) as problem:
            request.problem = repr(problem)
        request.seconds = asyncio.get_running_loop().time() - request.due
        with self._news:
            request.over = True
            self._news.notify_all()

    async def _ask(self) -> str:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            if self._silence:
                await asyncio.sleep(self._silence)
            writer.write(REQUEST)
            said = (await reader.read()).decode()
        finally:
            writer.transport.abort()
        head, _, body = said.partition("\r\n\r\n")
        if " 200 " not in head:
            raise ValueError(said)
        return body


async def _over(running: set[asyncio.Task[None]]) -> None:
    while running:
        await asyncio.wait(running)


@contextmanager
def steady(
    machine: Machine, address: tuple[str, int], rate: int = RATE, silence: float = 0.0
) -> Iterator[OpenLoop]:
    """A load, for the length of a block."""
    load = OpenLoop(machine, address, rate, silence)
    load.thread.start()
    try:
        yield load
    finally:
        load.end()
