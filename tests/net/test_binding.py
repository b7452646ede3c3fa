"""Which sockets a listener gets: addresses, names, and UNIX socket files."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.logger import capturedLogs, formatEvent

from relayd.core.errors import ListenError
from relayd.net import binding
from relayd.net.listener import Listener, Listeners
from relayd.net.listening import TCPListenerEndpoint
from tests.conftest import descriptors
from tests.support.listeners import (
    Greeters,
    greeted,
    listen_tcp,
    refusal,
    refuses,
    unix,
    where,
)


@pytest_twisted.ensureDeferred
async def test_each_wildcard_binds_one_family_only() -> None:
    """`[::]` is IPv6 only: `0.0.0.0` can be another relay's on the same port."""
    for tries_left in range(15, -1, -1):
        v6 = await listen_tcp("::", Greeters())
        number = v6.getHost().port
        try:
            v4 = await listen_tcp("0.0.0.0", Greeters(), number)
        except ListenError:
            # Another program may have that port, which was free in IPv6 only.
            assert tries_left
            await v6.stopListening()
        else:
            break
    await v6.stopListening()
    assert await greeted(("127.0.0.1", number))
    await v4.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_is_listened_on_at_every_address() -> None:
    """Each once, all on the same port."""
    factory = Greeters()
    port = await listen_tcp("localhost", factory)
    ports = port.ports if isinstance(port, Listeners) else [port]
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    assert {where(each)[0] for each in ports} == {item[4][0] for item in found}
    assert len(ports) == len({where(each)[0] for each in ports})
    assert len({where(each)[1] for each in ports}) == 1
    for each in ports:
        assert await greeted(where(each))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_with_the_same_address_twice_is_listened_on_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As hosts files have it; a second socket would find the port in use."""
    really = socket.getaddrinfo

    def twice(host: str, *args: Any, **keywords: Any) -> Any:
        found = really("127.0.0.1", *args, **keywords)
        return found * 2 if host == "twice.example" else found

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", twice)
        port = await listen_tcp("twice.example", Greeters())
    assert type(port) is Listener
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_without_an_address_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which says the name and what the resolver said."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", unknown)
        says = await refusal(TCPListenerEndpoint(reactor, "no.invalid", 80, 16))
    assert says == "can't listen on no.invalid:80: Name or service not known"


@pytest_twisted.ensureDeferred
async def test_an_interface_that_is_not_there_is_an_error() -> None:
    """Named with its scope."""
    says = await refusal(TCPListenerEndpoint(reactor, "fe80::1%no-such-if", 80, 16))
    assert says.startswith("can't listen on [fe80::1%no-such-if]:80: ")


@pytest_twisted.ensureDeferred
async def test_a_port_that_is_taken_is_an_error() -> None:
    """On one address, and on one of all; nothing stays open."""
    before = descriptors()
    with closing(socket.socket(socket.AF_INET6)) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        says = await refusal(TCPListenerEndpoint(reactor, "::1", number, 16))
        assert says == f"can't listen on [::1]:{number}: Address already in use"
        says = await refusal(TCPListenerEndpoint(reactor, None, number, 16))
        assert says == (
            f"can't listen on port {number} of all addresses: Address already in use"
        )
        assert refuses(("127.0.0.1", number))
    assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_not_local_is_an_error() -> None:
    """192.0.2.1 is nobody's (RFC 5737)."""
    says = await refusal(TCPListenerEndpoint(reactor, "192.0.2.1", 80, 16))
    assert says == "can't listen on 192.0.2.1:80: Cannot assign requested address"


@pytest_twisted.ensureDeferred
async def test_a_broadcast_address_is_an_error() -> None:
    """The kernel would let us listen where nobody can connect."""
    says = await refusal(TCPListenerEndpoint(reactor, "127.255.255.255", 0, 16))
    assert says.startswith("can't listen on 127.255.255.255:0: it is a broadcast addr")


@contextmanager
def failing_v6(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> Iterator[list[int]]:
    """Let IPv6 sockets fail to bind `times` times; yields the ports that were tried."""
    tried: list[int] = []
    really = binding.bind_tcp

    def bind(host: str, port: int, backlog: int) -> socket.socket:
        if ":" in host:
            tried.append(port)
            if len(tried) <= times:
                raise OSError(number, os.strerror(number))
        return really(host, port, backlog)

    with monkeypatch.context() as patched:
        patched.setattr("relayd.net.listening.bind_tcp", bind)
        yield tried


@pytest_twisted.ensureDeferred
async def test_a_free_port_must_be_free_in_both_families(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's choice for one family may be taken in the other: choose again."""
    with failing_v6(monkeypatch, errno.EADDRINUSE, 3) as tried:
        ports = await listen_tcp(None, Greeters())
    assert len(tried) == 4
    assert len({where(each)[1] for each in ports.ports}) == 1
    await ports.stopListening()


@pytest_twisted.ensureDeferred
async def test_no_port_that_is_free_in_both_families_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not tried for ever, and not at all for a port that was asked for."""
    before = descriptors()
    with failing_v6(monkeypatch, errno.EADDRINUSE, 10_000) as tried:
        says = await refusal(TCPListenerEndpoint(reactor, None, 0, 16))
        assert says == "can't listen on port 0 of all addresses: Address already in use"
        assert 1 < len(tried) < 100
    tried = []
    for _ in range(20):
        with closing(socket.socket()) as sock:
            # Bound for as long, so that no other test's connection gets the port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
            number = sock.getsockname()[1]
            with failing_v6(monkeypatch, errno.EADDRINUSE, 10_000) as tried:
                where = TCPListenerEndpoint(reactor, None, number, 16)
                assert "in use" in await refusal(where)
        if tried:
            break
        # One has it already, at another address: IPv4 was refused.
    assert tried == [number]
    assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_a_machine_without_ipv6_listens_on_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All addresses are those that there are; one that is named must be there."""
    for number in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
        with failing_v6(monkeypatch, number, 10):
            port = await listen_tcp(None, Greeters())
            assert type(port) is Listener
            assert port.getHost().host == "0.0.0.0"
            await port.stopListening()
            says = await refusal(TCPListenerEndpoint(reactor, "::1", 0, 16))
            assert says == f"can't listen on [::1]:0: {os.strerror(number)}"


@pytest_twisted.ensureDeferred
async def test_a_stale_unix_socket_is_replaced(tmp_socket: Path) -> None:
    """One that a process left behind which had no time to remove it."""
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_socket))
        dead.listen()
    assert tmp_socket.is_socket()
    port: Any = await unix(tmp_socket).listen(Greeters())
    assert await greeted(str(tmp_socket))
    await port.stopListening()
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_a_live_unix_socket_is_left_alone(tmp_socket: Path) -> None:
    """Two relays can't have the same one; the first goes on."""
    first: Any = await unix(tmp_socket).listen(Greeters())
    says = await refusal(unix(tmp_socket))
    assert says == f"can't listen on unix:{tmp_socket}: Address already in use"
    # What asked whether anybody listens was a client of the first, and is gone.
    assert await greeted(str(tmp_socket))
    await first.stopListening()


@pytest_twisted.ensureDeferred
async def test_another_kind_of_file_is_left_alone(tmp_socket: Path) -> None:
    """A typing error must not cost anyone a file."""
    tmp_socket.write_text("precious")
    says = await refusal(unix(tmp_socket))
    assert says == f"can't listen on unix:{tmp_socket}: Address already in use"
    assert tmp_socket.read_text() == "precious"
    tmp_socket.unlink()
    tmp_socket.mkdir()
    assert "in use" in await refusal(unix(tmp_socket))
    assert tmp_socket.is_dir()


@pytest_twisted.ensureDeferred
async def test_a_datagram_socket_is_left_alone(tmp_socket: Path) -> None:
    """It is somebody's, though no stream can be opened to it."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as other:
        other.bind(str(tmp_socket))
        assert "in use" in await refusal(unix(tmp_socket))
        assert tmp_socket.is_socket()


@pytest_twisted.ensureDeferred
async def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """The folder is the operator's to make."""
    says = await refusal(unix(tmp_path / "no" / "s"))
    assert says == f"can't listen on unix:{tmp_path}/no/s: No such file or directory"


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_that_is_not_ready_leaves_no_file(
    tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound, but then something failed: as if it had never been."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "chmod", refuse)
        assert "not permitted" in await refusal(unix(tmp_socket))
    assert descriptors() == before
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_another_socket_in_its_place_is_not_removed(tmp_socket: Path) -> None:
    """A relay that was started anew has taken the path over."""
    old: Any = await unix(tmp_socket).listen(Greeters())
    tmp_socket.unlink()
    new: Any = await unix(tmp_socket).listen(Greeters())
    await old.stopListening()
    assert await greeted(str(tmp_socket))
    await new.stopListening()
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_a_socket_file_that_was_removed_is_no_error(tmp_socket: Path) -> None:
    """Somebody tidied up before us."""
    factory = Greeters()
    port: Any = await unix(tmp_socket).listen(factory)
    tmp_socket.unlink()
    with capturedLogs() as events:
        await port.stopListening()
    assert events == []
    assert factory.running == 0


@pytest_twisted.ensureDeferred
async def test_a_socket_that_can_not_be_removed_stops_nothing_else(
    tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the relay has given up the rights that it made the file with."""
    factory = Greeters()
    port: Any = await unix(tmp_socket).listen(factory)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        patched.setattr(os, "remove", refuse)
        with capturedLogs() as events:
            await port.stopListening()
    assert factory.running == 0
    # Whoever wonders why the file is still there finds the reason.
    assert [event for event in events if str(tmp_socket) in formatEvent(event)]
