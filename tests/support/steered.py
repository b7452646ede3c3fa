"""A steered relayd on a reactor that stands still: all that it does is done at once.

Its listeners are real sockets, on an address that is this process's alone, so that two
relays can swap ports that no other test has.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFDSet
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.given import Layers
from relayd.configuring.source import Source
from relayd.control.steering import Asker, Work
from relayd.operating.changing import Relays
from relayd.operating.logs import Logs
from relayd.operating.steering import Steered, SteeringTimers

if sys.platform == "linux":
    from relayd.plane.poller import Plane

ME = Asker(0, 0, 1)

#: Of this process: loopback has an address for each.
HOST = "127.{}.{}.{}".format(*(os.getpid() % (1 << 22)).to_bytes(3, "big"))


class Threads:
    """A pool of threads that does at once what it is given.

    :ivar waits: what it was given, while it is `busy`.
    """

    busy = False

    def __init__(self) -> None:
        self.waits: list[Callable[[], object]] = []

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], object], work: Callable[..., Any], *args: Any
    ) -> None:
        def do() -> None:
            try:
                found = work(*args)
            except Exception:
                done(False, Failure())
            else:
                done(True, found)

        if self.busy:
            self.waits.append(do)
        else:
            do()

    def go_on(self) -> None:
        """Do what waits, and what comes at once."""
        self.busy = False
        while self.waits:
            self.waits.pop(0)()


@implementer(IReactorFDSet)
class Standing(Clock):
    """A reactor that stands still; a plane works with it, and Twisted's ports do.

    :ivar readers: what it watches; `writers` likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        self.threads = Threads()
        self.addReader, self.removeReader = self.readers.add, self.readers.discard
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def getReaders(self) -> list[Any]:
        return list(self.readers)

    def getWriters(self) -> list[Any]:
        return list(self.writers)

    def removeAll(self) -> list[Any]:
        raise NotImplementedError

    def listenTCP(
        self, port: int, factory: Any, backlog: int = 50, interface: str = ""
    ) -> Any:
        made = tcp.Port(port, factory, backlog, interface, self)
        made.startListening()
        return made

    def listenSSL(
        self,
        port: int,
        factory: Any,
        contextFactory: Any,  # noqa: N803
        backlog: int = 50,
        interface: str = "",
    ) -> Any:
        wrapped = TLSMemoryBIOFactory(contextFactory, False, factory, self)
        return self.listenTCP(port, wrapped, backlog, interface)

    def getThreadPool(self) -> Threads:
        return self.threads

    def callWhenRunning(self, call: Callable[..., object], *args: Any) -> None:
        call(*args)

    def callFromThread(self, call: Callable[..., object], *args: Any) -> None:
        call(*args)

    def turn(self, turns: int = 3) -> None:
        """What is readable is read, and what is due is called."""
        for _ in range(turns):
            for each in list(self.readers):
                if each in self.readers:
                    self._lost(each, each.doRead())
            for each in list(self.writers):
                if each in self.writers:
                    self._lost(each, each.doWrite())
            self.advance(0)

    def _lost(self, each: Any, why: Any) -> None:
        """As a reactor of Twisted's takes the end of a connection."""
        if why is None:
            return
        self.readers.discard(each)
        if why is CONNECTION_DONE and hasattr(each, "readConnectionLost"):
            each.readConnectionLost(Failure(why))
        else:
            self.writers.discard(each)
            each.connectionLost(Failure(why))

    def until(self, condition: Callable[[], object], what: str = "") -> None:
        """Take turns until this is so."""
        for turn in range(7000):
            if condition():
                return
            self.turn(1)
            # The kernel may take a while, as for an ACK: some 40 ms, or 200.
            time.sleep(0.001 if turn > 2000 else 0)
        raise AssertionError(f"never happened: {what or condition}")


class Relayd:
    """A process's relays, with what steers them.

    :ivar path: of its file.
    """

    def __init__(self, path: Path, tables: Mapping[str, Any]) -> None:
        self.path = path
        self.reactor: Any = Standing()
        self.write(tables)
        own = Layers((), ())
        first = own.over(read_layers(str(path)))
        source = Source(own, first, str(path), read_layers)
        logs = Logs(self.reactor, "relayd")
        self.relays = Relays(configure(first), self.reactor, logs)
        self.steered = Steered(self.reactor, self.relays, source, logs)
        self.timers = SteeringTimers(self.steered)

    def write(self, tables: Mapping[str, Any]) -> None:
        """What its file says from now on; it is read when it is reloaded."""
        self.path.write_text(toml(tables))

    @property
    def service(self) -> Any:
        return self.relays.service

    def start(self) -> None:
        relays = self.relays
        for each in (self.timers, relays.checks, relays.tasks, relays.service):
            each.startService()

    def stop(self) -> Deferred[Any]:
        """At once."""
        self.service.shutdown_delay = self.service.drain_timeout = 0
        stopped: Deferred[Any] = self.service.stopService()
        for each in (self.relays.tasks, self.relays.checks, self.timers):
            each.stopService()
        return stopped

    def unit(self, name: str) -> Any:
        return self.relays.units[name]

    def served(self, name: str) -> Any:
        """The first factory of a relay, or the UDP relay."""
        return self.unit(name).parts[0].served

    def state(self, name: str) -> str:
        return str(self.steered.relay(name)["state"])

    def set(self, name: str, **settings: Any) -> Any:
        return result(self.steered.set(name, settings, ME))

    def reload(self, *, discard: bool = False, confirm: float | None = None) -> Any:
        return result(self.steered.reload(discard, confirm, ME))

    def do(self, what: str, name: str, *args: Any) -> Any:
        """`start`, `stop`, `drain`, `pause` or `resume`."""
        more = {"stop": (False,), "drain": (None,), "pause": (None,)}.get(what, ())
        return result(getattr(self.steered, what)(name, *(args or more), ME))


@contextmanager
def running(path: Path, tables: Mapping[str, Any]) -> Iterator[Relayd]:
    """A relayd that has started, and leaves nothing behind."""
    relayd = Relayd(path / "relayd.toml", tables)
    relayd.start()
    try:
        yield relayd
    finally:
        relayd.stop()
        relayd.reactor.turn()
    plane = Plane.of(relayd.reactor) if sys.platform == "linux" else None
    assert not relayd.reactor.readers | relayd.reactor.writers
    assert not relayd.reactor.getDelayedCalls()
    if plane is not None:
        assert plane.fileno() == -1


def toml(tables: Mapping[str, Any]) -> str:
    """Tables of settings as a file; a text is what the file says, as it is."""
    import tomli_w

    return tables if isinstance(tables, str) else tomli_w.dumps(dict(tables))


def result(found: Any) -> Any:
    """What a Deferred has, or raises what it failed with; or the thing itself."""
    if not isinstance(found, Deferred):
        return found
    got: list[Any] = []
    found.addBoth(got.append)
    assert got, "it waits"
    if isinstance(got[0], Failure):
        got[0].raiseException()
    return got[0]


def whole(work: Work) -> Any:
    """The answer of some work."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def at(port: int) -> str:
    """A listener that no other process has."""
    return f"{HOST}:{port}"


def datagrams(port: int = 0) -> socket.socket:
    """A socket of a client, or of a server of datagrams."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, port))
    sock.settimeout(5)
    return sock
