"""Which local ports dials get."""

from __future__ import annotations

import platform
import re
import socket
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.net import all_ports
from relayd.net.all_ports import use_all_ports
from relayd.net.dial_options import DialOptions
from relayd.net.dialing import SocketEndpoint
from relayd.net.with_options import having
from relayd.plane.endpoints import PlaneSocketEndpoint
from tests.support.contracts import Recorder
from tests.support.dials import making, over
from tests.support.process import Server, own_host

_FOUND = re.match(r"(\d+)\.(\d+)", platform.release())
KERNEL = (int(_FOUND[1]), int(_FOUND[2])) if _FOUND else (0, 0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


@pytest.fixture(params=[SocketEndpoint, PlaneSocketEndpoint])
def kind(request: pytest.FixtureRequest) -> type[SocketEndpoint]:
    """Who dials."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.skipif(KERNEL < (6, 8), reason="of Linux 6.8")
@pytest.mark.parametrize("source", [False, True])
@pytest_twisted.ensureDeferred
async def test_odd_ports_are_not_left_for_later(kind: Any, source: bool) -> None:
    """Linux would give every one of these an even port, while there are any."""
    if source:
        kind = having(kind, DialOptions(source4=own_host()))
    with Server() as server, ExitStack() as accepted:
        where = kind(reactor, socket.AF_INET, server.socket.getsockname())
        # As if it were another machine.
        where.is_near = False
        odd = set()
        for _ in range(32):
            made = Recorder()
            await where.connect(making(made))
            peer = accepted.enter_context(server.accept())
            odd.add(peer.getpeername()[1] % 2)
            await over(made)
        assert odd == {0, 1}


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_whoever_is_near_needs_no_more(host: str, monkeypatch: Any) -> None:
    """A port is free again after a second there, so the call is spared."""
    asked = []
    monkeypatch.setattr("relayd.net.dialing.use_all_ports", asked.append)

    class Refusing(SocketEndpoint):
        def open_socket(self, caller: Any) -> Any:
            sock: Any = super().open_socket(caller)
            # Nothing is to be sent.
            sock.close()
            return sock

    failures: list[Any] = []

    class Caller:
        dial_failed = failures.append

        def speaks_first(self) -> bool:
            return False

    Refusing(reactor, socket.AF_INET, (host, 9)).dial(Caller())  # type: ignore[arg-type]
    assert len(failures) == 1
    assert bool(asked) == (host == "192.0.2.1")


@pytest.mark.skipif(KERNEL < (6, 3), reason="of Linux 6.3")
def test_all_of_the_machine_s_own_range() -> None:
    """And of none other: it has no lower bound, and no upper one that counts."""
    with socket.socket() as sock:
        use_all_ports(sock)
        said = sock.getsockopt(socket.IPPROTO_IP, 51, 4)
    assert int.from_bytes(said, sys.byteorder) == 65535 << 16


@pytest.mark.parametrize("number", [None, 51])
def test_a_kernel_without_it(number: int | None, monkeypatch: Any) -> None:
    """Ports are chosen as ever."""
    monkeypatch.setattr(all_ports, "LOCAL_PORT_RANGE", number)
    asked = []

    class Old:
        def setsockopt(self, *words: Any) -> None:
            asked.append(words)
            raise OSError(92, "Protocol not available")

    use_all_ports(Old())  # type: ignore[arg-type]
    assert len(asked) == (number is not None)
