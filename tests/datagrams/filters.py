"""Filters of the tests, and a relay's clients and servers that say more at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from relayd.core.filtering import DatagramWay, FilterFactory
from tests.datagrams.support import CLIENT, Bench, Defect

OTHER = ("192.0.2.2", 4000)


class Sees:
    """A filter of a test: what it does with a datagram, and what it has done."""

    def __init__(self, factory: Filters, way: DatagramWay) -> None:
        self.factory = factory
        self.way = way
        self.held = 0
        self.closed = 0
        self.timers: list[Any] = []

    def datagram(self, data: bytes) -> Sequence[bytes]:
        assert not self.closed
        assert type(data) is bytes
        return self.factory.does(self, data)

    def close(self) -> None:
        self.closed += 1
        for each in self.timers:
            if each.active():
                each.cancel()
        if self.factory.breaks_at_close:
            raise Defect


@attrs.define(eq=False)
class Filters(FilterFactory):
    """Filters of a test; two are equal if they have the same name."""

    does: Callable[[Sees, bytes], Sequence[bytes]]
    courses: str = "up down"
    name: str = "test"
    joins: bool = True
    breaks_at_close: bool = False
    made: list[Sees] = attrs.field(factory=list)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filters) and self.name == other.name

    def build_datagram_filter(self, way: DatagramWay) -> Any:
        if way.course not in self.courses:
            return None
        self.made.append(Sees(self, way))
        return self.made[-1]


def appends(mark: bytes, courses: str = "up down", **more: Any) -> Filters:
    name = mark.decode()
    return Filters(lambda _, data: [data + mark], courses, name=name, **more)


def drops(courses: str) -> Filters:
    return Filters(lambda _, data: [], courses, name="drops")


def doubles(courses: str) -> Filters:
    return Filters(lambda _, data: [data, data], courses, name="doubles")


def delay(one: Sees, data: bytes) -> Sequence[bytes]:
    """Each is passed on after a second."""

    def due() -> None:
        one.held -= 1
        one.way.send(data)

    one.held += 1
    one.timers.append(one.way.clock.callLater(1, due))
    return ()


def delays(courses: str) -> Filters:
    return Filters(delay, courses, name="delays")


def fails(courses: str) -> Filters:
    def fail(_: Sees, data: bytes) -> Sequence[bytes]:
        if b"bad" in data:
            raise Defect
        return [data]

    return Filters(fail, courses, name="fails")


def replies(bench: Bench) -> list[bytes]:
    return [data for data, _ in bench.listener.sent]


def run(bench: Bench, *datagrams: bytes) -> None:
    """A client's datagrams arrive together."""
    bench.listener.inbox += [(data, CLIENT) for data in datagrams]
    bench.watcher.ready(bench.listener.number)


def answers(bench: Bench, *datagrams: bytes) -> None:
    """A server's datagrams arrive together."""
    sock = bench.sockets[-1]
    sock.inbox += datagrams
    while sock.inbox:
        bench.watcher.ready(sock.number)
