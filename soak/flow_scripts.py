"""The scripts of UDP clients, and the client.

Like a DNS or QUIC client, it asks again a few times if there is no answer.  That there
is no answer at all is the relay's fault.  A single loss may be the kernel's, and is
counted: in the end it must be in some counter of drops (`soak/verdict.py`).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable

import attrs

from soak.datagrams import LARGEST, UDP_TIMEOUT, USUAL, Flow, draw_size
from soak.stops import Stops
from soak.timeouts import Violation

#: Seconds that a client waits for an answer, and how often it asks.
WAIT, TRIES = 3.0, 3

#: The receive buffer of a client, in bytes.
BUFFER = 1 << 20

#: Size of a read, in bytes.
READ_SIZE = 65536

#: Datagrams that are read in one go.
AT_ONCE = 32


@attrs.frozen(eq=False)
class FlowScript:
    """What a client does.

    :ivar weight: how many of the flows follow it, relative to other scripts.
    :ivar answered: the server echoes what it receives.
    :ivar streams: the server goes on sending after the first datagram.
    """

    name: str
    weight: int
    client: Callable[[FlowClient], Awaitable[None]]
    answered: bool = True
    streams: bool = False


class FlowClient:
    """A client that sends datagrams, and its flow.

    :param dice: for what the script leaves open.
    :ivar label: its name in violations.
    :ivar sent: datagrams; likewise `received`.
    :ivar streaming: the server is sending by itself.
    """

    def __init__(
        self, flow: Flow, script: FlowScript, dice: random.Random, stops: Stops
    ) -> None:
        self.flow = flow
        self.script = script
        self.dice = dice
        self.label = f"flow {flow.number}"
        self.ending = ""
        self.violated = False
        self.sent = self.received = 0
        self.streaming = False
        #: Datagrams that the server sends by itself, and the seconds between two.
        self.rounds = dice.randint(12, 40)
        self.pause = dice.uniform(0.1, 0.3)
        self._stops = stops
        self._wrong = ""
        self._pending: range = range(0)
        self._event = asyncio.Event()

    async def follow(self, sock: socket.socket) -> None:
        """Follow the script.

        :param sock: connected to the relay.
        :raises Violation: the relay broke a rule.
        """
        self._socket = sock
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, self._read)
        try:
            await self.script.client(self)
            if self.flow.owed:
                await self._settle()
        finally:
            loop.remove_reader(sock)
        self._check()

    async def _settle(self) -> None:
        """Wait for late answers."""
        self._pending = range(len(self.flow.up))
        self._event.clear()
        await self._stops.wait(self._event, TRIES * WAIT)

    def _check(self) -> None:
        if self._wrong:
            raise Violation(self._wrong)

    def _read(self) -> None:
        for _ in range(AT_ONCE):
            try:
                data = self._socket.recv(READ_SIZE)
            except BlockingIOError:
                return
            except ConnectionError:
                # The listener is closed; that there is no answer is reported instead.
                return
            self.received += 1
            wrong = self.flow.receive(data, time.monotonic())
            self._wrong = self._wrong or wrong
            up = self.flow.up
            if self.script.streams or all(up[n].received for n in self._pending):
                self._event.set()

    # -- what scripts do

    def send(self, size: int) -> None:
        """Send the next datagram."""
        data = self.flow.ask(size, time.monotonic(), answered=self.script.answered)
        try:
            self._socket.send(data)
        except ConnectionError:
            # An earlier one was refused; the failed call cleared the error.
            self._socket.send(data)
        self.sent += 1
        self.flow.asked(time.monotonic())

    async def ask(self, count: int = 1, most: int = LARGEST) -> None:
        """Send some of one size at once, and wait for answers.

        :param most: bytes of each.
        :raises Violation: there are none.
        """
        for _ in range(TRIES):
            # Without a number, a datagram could open a flow unnoticed; a flow in use
            # exists already.
            size = draw_size(self.dice, named=not self.flow.in_use)
            first = len(self.flow.up)
            for _ in range(count):
                self.send(min(size, most))
            self._pending = range(first, first + count)
            self._event.clear()
            if await self._stops.wait(self._event, WAIT):
                return
            self._check()
            if any(self.flow.up[n].received for n in self._pending):
                return
        raise Violation(f"no answer to {TRIES * count} datagrams")

    async def converse(self, seconds: float) -> None:
        """Ask and be answered for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.dice.random() < 0.3:
                await self.ask(self.dice.randint(2, 8), USUAL)
            else:
                await self.ask()
            self._check()
            await asyncio.sleep(self.dice.uniform(0.05, 0.8))

    async def listen(self) -> None:
        """Send once, and receive what the server sends by itself.

        :raises Violation: it does not arrive, or breaks off.
        """
        for _ in range(TRIES):
            received = False
            self._event.clear()
            self.send(USUAL)
            while await self._stops.wait(self._event, WAIT):
                received = True
                self._event.clear()
                self._check()
                if not self.streaming and not self.flow.owed:
                    return
            if self.streaming and self.flow.in_use:
                raise Violation("the stream of a flow in use breaks off")
            if received and not self.streaming:
                return
        raise Violation(f"no stream after {TRIES} datagrams")

    async def reach(self) -> None:
        """Wait until the server has received a datagram.

        :raises Violation: it receives none.
        """
        for _ in range(TRIES):
            if any(sent.port for sent in self.flow.up.values()):
                return
            await self._stops.wait(asyncio.Event(), WAIT)
        raise Violation(f"no word of {self.sent} datagrams at the server")


# -- the scripts


async def _converse(client: FlowClient) -> None:
    await client.converse(client.dice.uniform(3, 9))


async def _converse_with_pauses(client: FlowClient) -> None:
    """Pauses shorter than the timeout; with a stop of the relay, longer for it."""
    await client.converse(4)
    for _ in range(client.dice.randint(1, 2)):
        await asyncio.sleep(UDP_TIMEOUT * client.dice.uniform(0.4, 0.8))
        await client.ask()


async def _come_back(client: FlowClient) -> None:
    await client.converse(client.dice.choice((1, 4)))
    await asyncio.sleep(UDP_TIMEOUT + client.dice.uniform(0, 2))
    await client.ask()


async def _ask_once(client: FlowClient) -> None:
    await client.ask()


async def _only_send(client: FlowClient) -> None:
    for _ in range(client.rounds):
        client.send(draw_size(client.dice, named=True))
        await asyncio.sleep(client.pause)
    await client.reach()


async def _listen(client: FlowClient) -> None:
    await client.listen()


FLOW_SCRIPTS = (
    FlowScript("datagrams: a conversation", 6, _converse),
    FlowScript("datagrams: with long pauses", 4, _converse_with_pauses),
    FlowScript("datagrams: asks once", 4, _ask_once),
    FlowScript("datagrams: comes back when it has expired", 2, _come_back),
    FlowScript("datagrams: is not answered", 2, _only_send, answered=False),
    FlowScript("datagrams: a stream", 3, _listen, answered=False, streams=True),
)

_WEIGHTS = [script.weight for script in FLOW_SCRIPTS]


def draw_flow(seed: int, number: int, stops: Stops) -> FlowClient:
    """The client of this number: the same for the same seed."""
    dice = random.Random(f"{seed}/datagrams/{number}")  # noqa: S311 - to be repeated
    [script] = dice.choices(FLOW_SCRIPTS, _WEIGHTS)
    return FlowClient(Flow(number), script, dice, stops)
