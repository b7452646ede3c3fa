"""Sockets that are watched on the plane of a reactor that stands still."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator

import pytest
from twisted.python.failure import Failure

from relayd.plane.poller import Plane
from tests.support.standing import Still, still

__all__ = ["still"]

_EDGE = select.EPOLLIN | select.EPOLLET


class Watched:
    """One end of a pair of sockets, on the plane; keeps what it is told.

    :ivar on: what to do when it is told that it is ready, or to proceed.
    :ivar far: the other end.
    """

    def __init__(self, plane: Plane, mask: int = _EDGE) -> None:
        self.plane = plane
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.told: list[str] = []
        self.masks: list[int] = []
        self.on: Callable[[], object] = lambda: None
        try:
            plane.watch(self.near.fileno(), self, mask)
        except OSError:
            self.near.close()
            self.far.close()
            raise

    def ready(self, mask: int) -> None:
        self.told.append("ready")
        self.masks.append(mask)
        self.on()

    def proceed(self) -> None:
        self.told.append("proceed")
        self.on()

    def connectionLost(self, reason: Failure) -> None:
        self.told.append("lost")
        self.close()

    def close(self) -> None:
        self.plane.unwatch_and_close(self.near)
        self.far.close()


@pytest.fixture
def plane(still: Still) -> Plane:
    """The plane of a reactor that stands still."""
    return Plane.of(still)


@pytest.fixture
def pair(plane: Plane) -> Iterator[tuple[Watched, Watched]]:
    """Two that are watched."""
    two = Watched(plane), Watched(plane)
    yield two
    for each in two:
        each.close()
