"""Sockets that listen already: adopted, or passed on by systemd."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, _SystemdParser
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.python.systemd import ListenFDs
from zope.interface.verify import verifyObject

from relayd.configuring.address_grammar import (
    UdpAddress,
    parse_destination,
    parse_listener,
)
from relayd.core.errors import ConfigError
from relayd.net import activation
from relayd.net.listening import AdoptedListenerEndpoint
from relayd.operating.endpoints import (
    datagram_endpoint,
    dialing_endpoint,
    listening_endpoint,
)
from relayd.plane.endpoints import PlaneAdoptedListenerEndpoint
from relayd.plane.transport import PlaneTransport, PlaneUNIXTransport
from tests.conftest import descriptors
from tests.support.contracts import Recorder
from tests.support.dials import making
from tests.support.plane_listeners import (
    Listening,
    answered,
    bound,
    ended,
    greeted,
    now,
    refusal,
)
from tests.support.process import (
    TWISTD,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
)
from tests.support.standing import Still, still

__all__ = ["still"]

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


# -- adopted sockets


ADOPTED = [
    (socket.AF_INET, ("127.0.0.1", 0)),
    (socket.AF_INET6, ("::1", 0)),
    (socket.AF_UNIX, "s"),
]


@pytest.mark.parametrize(("family", "address"), ADOPTED)
def test_a_socket_that_listens_already_is_adopted(
    family: int, address: Any, still: Still, tmp_path: Path
) -> None:
    """It stays its owner's: it goes on listening, and can be adopted again."""
    if family == socket.AF_UNIX:
        address = str(tmp_path / address)
    with bound(family, address) as sock:
        where = sock.getsockname()
        endpoint = PlaneAdoptedListenerEndpoint(still, [sock.fileno()])
        assert verifyObject(IStreamServerEndpoint, endpoint)
        for _ in range(2):
            before = descriptors()
            made = Listening(still, endpoint)
            assert greeted(still, where if family == socket.AF_UNIX else where[:2])
            tcp = family != socket.AF_UNIX
            [greeter] = made.factory.served
            assert type(greeter.transport) is (
                PlaneTransport if tcp else PlaneUNIXTransport
            )
            assert greeter.options == (tcp, tcp)
            made.stop()
            assert descriptors() == before
            # Whoever connects now waits for the next that adopts it.
            with closing(socket.socket(family)) as waiting:
                waiting.connect(where)
                made = Listening(still, endpoint)
                assert answered(still, waiting) == b"hello"
                made.stop()
        if family == socket.AF_UNIX:
            assert Path(address).exists()


def test_a_descriptor_that_can_not_be_listened_on_is_an_error(still: Still) -> None:
    """Nothing, a file, a socket that does not listen: said at once, and not leaked."""
    before = descriptors()
    with open(__file__) as file, closing(socket.socket()) as idle:
        for number, why in (
            (5000, os.strerror(errno.EBADF)),
            (file.fileno(), os.strerror(errno.ENOTSOCK)),
            (idle.fileno(), "it is a socket that does not listen"),
        ):
            says = refusal(PlaneAdoptedListenerEndpoint(still, [number]))
            assert says == f"can't listen on descriptor {number}: {why}"
    assert descriptors() == before


def test_a_systemd_endpoint_gets_the_planes_connections(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its index or its name; with Twisted's connections it is Twisted's own."""
    with bound(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        environ = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "web",
        }
        passed = ListenFDs.fromEnvironment(environ, start=sock.fileno())
        monkeypatch.setattr(_SystemdParser, "_sddaemon", passed)
        for text in ("systemd:domain=INET:index=0", "systemd:domain=INET:name=web"):
            monkeypatch.setattr("relayd.operating.endpoints.obstacle", lambda _: "")
            endpoint: Any = listening_endpoint(parse_listener(text), still)
            assert type(endpoint) is PlaneAdoptedListenerEndpoint
            made = Listening(still, endpoint)
            assert greeted(still, sock.getsockname())
            made.stop()
            for transport, problem in (("twisted", ""), ("auto", "there is none")):
                monkeypatch.setattr(
                    "relayd.operating.endpoints.obstacle",
                    lambda _, problem=problem: problem,
                )
                theirs = listening_endpoint(
                    parse_listener(text),
                    still,
                    transport=transport,  # type: ignore[arg-type]
                )
                assert type(theirs) is AdoptedStreamServerEndpoint


def test_a_name_is_all_that_is_needed(
    still: Still, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All sockets of a name, of any family."""
    with ExitStack() as opened:
        socks = [
            opened.enter_context(bound(socket.AF_INET, ("127.0.0.1", 0))),
            opened.enter_context(bound(socket.AF_INET6, ("::1", 0))),
            opened.enter_context(bound(socket.AF_UNIX, str(tmp_path / "s"))),
        ]
        passed = [("web", sock.fileno()) for sock in socks]
        monkeypatch.setattr(activation, "passed_sockets", lambda: passed)
        before = descriptors()
        monkeypatch.setattr("relayd.operating.endpoints.obstacle", lambda _: "")
        endpoint: Any = listening_endpoint(parse_listener("systemd:web"), still)
        assert type(endpoint) is PlaneAdoptedListenerEndpoint
        made = Listening(still, endpoint)
        for sock in socks:
            where = sock.getsockname()
            assert greeted(still, where if isinstance(where, str) else where[:2])
        served = made.factory.served
        assert len(served) == 3
        assert all(isinstance(each.transport, PlaneTransport) for each in served)
        made.stop()
        assert descriptors() == before
        theirs = listening_endpoint(
            parse_listener("systemd:web"), still, transport="twisted"
        )
        assert type(theirs) is AdoptedListenerEndpoint


def test_the_line_for_a_name_that_was_not_passed(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        listening_endpoint(parse_listener("systemd:web"), still)
    assert str(caught.value).startswith(
        "bad endpoint 'systemd:web': systemd has passed no sockets to this process"
    )
    monkeypatch.setattr(activation, "passed_sockets", lambda: [("dns", 3)])
    with pytest.raises(ConfigError, match="bad endpoint 'udp:systemd:web': .*'dns'"):
        datagram_endpoint(UdpAddress(None, 0, "web"))


#: Puts the descriptor that it is told of where systemd has it, and becomes the rest.
_AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_relay_serves_the_socket_that_systemd_passes_on() -> None:
    """In a process of its own, as the environment says."""
    with bound(socket.AF_INET, ("127.0.0.1", 0)) as sock, Server() as server:
        passed = sock.fileno()
        running = RelayProcess(
            *("--listen", "systemd:domain=INET:name=web", "--dest", server.address),
            twistd=(
                *(sys.executable, "-c", _AS_SYSTEMD, str(passed)),
                *(TWISTD, "-n", "--pidfile="),
            ),
            env={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"},
            pass_fds=[passed],
        )
        try:
            assert running.port == sock.getsockname()[1]
            with connect(running.port) as client, server.accept() as peer:
                client.sendall(b"request")
                assert read_exactly(peer, 7) == b"request"
                peer.sendall(b"response")
                peer.close()
                assert read_all(client) == b"response"
            running.ended("done")
            running.signal()
            assert running.wait() == 0
        finally:
            running.stop()
        # The next one gets it as it was: it was never closed.
        with connect(sock.getsockname()[1]):
            pass


# -- by their addresses


def test_short_forms_are_the_planes(
    still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what people write to bytes that move, both TCP and UNIX."""
    monkeypatch.setattr("relayd.operating.endpoints.obstacle", lambda _: "")
    unix: Callable[..., Any] = lambda: parse_listener(f"unix:{tmp_socket}")  # noqa: E731
    for where in (parse_listener("127.0.0.1:0"), unix()):
        endpoint: Any = listening_endpoint(where, still)
        made = Listening(still, endpoint)
        host = made.port.getHost()
        text = f"unix:{tmp_socket}" if hasattr(host, "name") else f":{host.port}"
        protocol = Recorder()
        dialing = dialing_endpoint(parse_destination(text), still).connect(
            making(protocol)
        )
        still.until(lambda: protocol.data == b"hello")  # noqa: B023
        assert now(dialing) is protocol
        ended(still, protocol)
        assert isinstance(protocol.transport, PlaneTransport)
        still.until(lambda: made.factory.served[0].lost)  # noqa: B023
        made.stop()
