"""The transport contract, as relayd's own tests run it."""

from __future__ import annotations

import pytest

from relayd.testing import (
    Plain,
    Producer,
    Recorder,
    SocketConnectionContract,
    SocketTransportContract,
    StreamTransportContract,
    turns,
    until,
)
from relayd.testing import SocketPeer as Peer
from relayd.testing.suite import Suite
from tests.conftest import LoggedFailures

__all__ = (
    "Contract",
    "FakeContract",
    "Peer",
    "Plain",
    "Producer",
    "Recorder",
    "ShortContract",
    "turns",
    "until",
)


class _Logged(Suite):
    """What a test expects to be logged does not fail it here either."""

    @pytest.fixture(autouse=True)
    def _logged(self, logged_failures: LoggedFailures) -> None:
        self._all = logged_failures

    def logged(self, kind: type[Exception]) -> None:
        super().logged(kind)
        self._all.take(kind.__name__)


class FakeContract(_Logged, StreamTransportContract):
    """Of a transport that has no socket."""


class ShortContract(_Logged, SocketConnectionContract):
    """Of a kind that differs from another in its addresses alone."""


class Contract(_Logged, SocketTransportContract):
    """All of it."""
