"""Attacks on the SOCKS4 proxy: to reach what it guards, and to exhaust it.

The guarded proxy listens on all addresses, so its guards stand; its clients are this
machine's.  Each destination is asked for with a port on which a canary listens on all
addresses, and which nobody may reach.  Which transport it has makes no difference to
what it refuses; to what it buffers it does.
"""

from __future__ import annotations

import ipaddress
import random
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from relayd.core.observers import Observer
from relayd.net.resolving import SocketAddress
from relayd.preludes.socks4 import (
    REPLY_SIZE,
    Code,
    Command,
    Reply,
    read_reply,
    write_reply,
    write_request,
)
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory
from tests.support.fakes import (
    FakeEndpoint,
    FakePort,
    FakeServerEndpoint,
    FakeTransport,
)
from tests.support.process import (
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

GUARDED = ("--listen", "0.0.0.0:0", "--allow-client", "127.0.0.0/8")

#: The guarded proxy lets its clients go there: to see that it relays at all.
ALLOWED = "127.0.0.9"


def as_address(command: Command, host: str, port: int) -> bytes:
    """A request for an IPv4 address, whichever it is."""
    return bytes((4, command)) + port.to_bytes(2) + socket.inet_aton(host) + b"\0"


def as_name(command: Command, host: str, port: int) -> bytes:
    """A 4a request with these bytes for a name."""
    start = bytes((4, command)) + port.to_bytes(2)
    return start + b"\0\0\0\1\0" + host.encode("ascii") + b"\0"


def answer(client: socket.socket) -> Reply:
    """The next reply of the proxy."""
    found = read_reply(read_exactly(client, REPLY_SIZE))
    assert found is not None
    return found


def own_addresses() -> set[str]:
    """This machine's addresses, and the broadcast addresses of its networks."""
    found = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    table = Path("/proc/net/fib_trie")
    if table.exists():
        found |= set(
            re.findall(
                r"\|-- (\S+)\n +/32 (?:host LOCAL|link BROADCAST)", table.read_text()
            )
        )
    table = Path("/proc/net/if_inet6")
    if table.exists():
        found |= {
            str(ipaddress.IPv6Address(int(line.split()[0], 16)))
            for line in table.read_text().splitlines()
        }
    return {str(address) for address in found if "%" not in str(address)}


#: Ports that are tried, until one is free of both versions of IP.
TRIES = 20


class Canary:
    """Listens on one port of all addresses, IPv4 and IPv6."""

    def __init__(self) -> None:
        self.six = socket.socket(socket.AF_INET6)
        self.six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # What is free of IPv4 may be taken of IPv6.
        for left in reversed(range(TRIES)):
            self.four = socket.socket()
            self.four.bind(("0.0.0.0", 0))
            self.port: int = self.four.getsockname()[1]
            try:
                self.six.bind(("::", self.port))
                break
            except OSError:
                self.four.close()
                if not left:
                    raise
        for each in (self.four, self.six):
            each.listen()
            each.setblocking(False)

    def visitors(self) -> list[socket.socket]:
        """Those who have connected since it was last asked."""
        found = []
        for each in (self.four, self.six):
            with suppress(BlockingIOError):
                while True:
                    found.append(each.accept()[0])
        return found

    def close(self) -> None:
        self.four.close()
        self.six.close()


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with closing(Canary()) as listening:
        yield listening


@pytest.fixture(scope="module")
def guarded() -> Iterator[RelayProcess]:
    """A proxy that other machines could reach."""
    with relay(*GUARDED, "--allow-dest", ALLOWED, plugin="socks4") as running:
        yield running


def ask(proxy: RelayProcess, request: bytes) -> tuple[int, float, bytes]:
    """The code of the reply, how long it took, and what came behind it."""
    started = time.monotonic()
    with connect(proxy.port) as client:
        client.sendall(request)
        code = answer(client).code
        taken = time.monotonic() - started
        return code, taken, read_all(client) if code != Code.GRANTED else b""


def assert_unreachable(proxy: RelayProcess, canary: Canary, request: bytes) -> None:
    """The request is refused at once, and nobody comes to the canary."""
    # A machine may be busy for a second; a look-up would take one each time.
    for left in (2, 1, 0):
        code, taken, behind = ask(proxy, request)
        visitors = canary.visitors()
        for each in visitors:
            each.close()
        assert (code, visitors, behind) == (Code.REJECTED, [], b"")
        if taken < 1:
            return
        assert left, "it is not refused at once"


# -- to reach what is guarded


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND], ids=str)
@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3"),
        *("169.254.169.254", "100.100.100.200", "169.254.1.1"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1"),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    ],
)
def test_no_way_by_address(
    guarded: RelayProcess, canary: Canary, host: str, command: Command
) -> None:
    # 0.1.2.3 and not 0.0.0.x, which is how 4a says that a name follows.
    assert_unreachable(guarded, canary, as_address(command, host, canary.port))
    assert_unreachable(guarded, canary, as_name(command, host, canary.port))


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND], ids=str)
@pytest.mark.parametrize(
    "host",
    [
        # What resolvers take for 127.0.0.1.
        *("127.1", "127.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1"),
        *(
            "017700000001",
            "127.0.0.1.",
            "127.1.",
            "localhost",
            "LocalHost",
            "localhost.",
        ),
        *("0", "0x0", "00000000"),
        # IPv6, and IPv4 in its clothes.
        *("::1", "::", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "::ffff:7f00:1"),
        *("::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::"),
        *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "::ffff:0.0.0.0"),
        *("fe80::1", "fe80::1%lo", "::1%lo", "fd00::1", "fd00:ec2::254", "ff02::1"),
        # No names at all.
        *("[::1]", "127.0.0.1:80", "127.0.0.1/8", " 127.0.0.1", "127.0.0.1 ", "."),
        *("a\r\nb", "unix:/run/x", "http://127.0.0.1/", "-", "a..b"),
    ],
)
def test_no_way_by_name(
    guarded: RelayProcess, canary: Canary, host: str, command: Command
) -> None:
    assert_unreachable(guarded, canary, as_name(command, host, canary.port))


def test_no_way_to_the_machine_s_own_addresses(
    guarded: RelayProcess, canary: Canary
) -> None:
    own = own_addresses()
    assert own
    for host in own:
        for each in Command:
            request = as_name(each, host, canary.port)
            assert_unreachable(guarded, canary, request)
            if ":" not in host:
                request = as_address(each, host, canary.port)
                assert_unreachable(guarded, canary, request)
    # It does relay, and the canary can hear it: to the one address that is allowed.
    with connect(guarded.port) as client:
        client.sendall(as_address(Command.CONNECT, ALLOWED, canary.port))
        assert answer(client) == Reply(Code.GRANTED, ALLOWED, canary.port)
        [visitor] = canary.visitors()
        visitor.close()


def test_the_log_says_what_was_refused_and_why(
    guarded: RelayProcess, canary: Canary
) -> None:
    # Not a port that others ask for in this module.
    request = as_name(Command.CONNECT, "::ffff:10.9.8.7", 987)
    assert_unreachable(guarded, canary, request)
    [found] = guarded.wait_for(r"requested=\[::ffff:10.9.8.7\]:987 (.*)")
    assert found[1] == (
        "reply=91 detail='::ffff:10.9.8.7 stands for 10.9.8.7, which is private: it"
        " takes --allow-dest 10.0.0.0/8'"
    )


# -- a name whose owner changes its address


class Rebinding:
    """Answers with a public address at first, and then with what is guarded."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def addresses(
        self, host: str, port: int, owner: str
    ) -> Deferred[list[SocketAddress]]:
        self.asked += 1
        return succeed(
            [(socket.AF_INET, (address, port)) for address in self.answers.pop(0)]
        )


PUBLIC = "198.51.100.7"


class Guarded:
    """A guarded proxy on fakes."""

    def __init__(self, *answers: list[str]) -> None:
        self.resolver = Rebinding(*answers)
        self.dialled: list[Any] = []
        self.servers: list[FakeEndpoint] = []
        self.ports: list[FakePort] = []
        self.clock = Clock()
        self.factory = Socks4Factory(
            self.clock,
            dialer=self._dial,
            listener=self._listen,
            resolver=self.resolver,
            policy=ProxyPolicy(own=lambda ip: False),
            bind_address="192.0.2.2",
            observer=Observer(),
        )

    def _dial(self, addresses: Any) -> FakeEndpoint:
        self.dialled.append(addresses)
        self.servers.append(FakeEndpoint(self.clock))
        return self.servers[-1]

    def _listen(self, host: str) -> Any:
        listener = FakeServerEndpoint(host, self.clock)
        listening = listener.listen

        def listen(factory: Any) -> Any:
            opened = listening(factory)
            self.ports.append(listener.open())
            return opened

        listener.listen = listen  # type: ignore[method-assign]
        return listener

    def client(self, data: bytes) -> FakeTransport:
        """A client connects, and sends this."""
        transport = FakeTransport(clock=self.clock)
        protocol: Any = self.factory.buildProtocol(transport.peer)
        transport.connect(protocol)
        transport.receive(data)
        return transport

    def close(self) -> None:
        self.factory.abort_all()
        self.clock.advance(0)
        self.factory.stopFactory()
        assert self.clock.getDelayedCalls() == []


REJECTED = write_reply(Code.REJECTED)


def test_what_is_dialled_is_what_was_checked() -> None:
    with closing(Guarded([PUBLIC], ["127.0.0.1"])) as proxy:
        request = write_request(Command.CONNECT, "rebinding.example", 80)
        first = proxy.client(request)
        assert proxy.resolver.asked == 1
        assert proxy.dialled == [[(socket.AF_INET, (PUBLIC, 80))]]
        proxy.servers[0].dial.connect(IPv4Address("TCP", PUBLIC, 80))
        first.take()
        assert first.taken == write_reply(Code.GRANTED, PUBLIC, 80)
        second = proxy.client(request)
        assert proxy.resolver.asked == 2
        assert len(proxy.dialled) == 1
        assert second.dataBuffer == REJECTED
        second.take()


def test_of_several_answers_only_the_public_ones_are_dialled() -> None:
    with closing(Guarded(["127.0.0.1", PUBLIC, "10.0.0.1"])) as proxy:
        proxy.client(write_request(Command.CONNECT, "rebinding.example", 80))
        assert proxy.resolver.asked == 1
        assert proxy.dialled == [[(socket.AF_INET, (PUBLIC, 80))]]


def test_who_may_come_is_who_was_checked() -> None:
    with closing(Guarded([PUBLIC, "127.0.0.1"], ["127.0.0.1"])) as proxy:
        client = proxy.client(write_request(Command.BIND, "rebinding.example", 80))
        client.take()
        assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
        assert not proxy.ports[0].accept("127.0.0.1").connected
        assert client.dataBuffer == REJECTED
        client.take()
        assert proxy.resolver.asked == 1


# -- whatever is sent


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.sampled_from([b"\4\1\0\x50", b"\0\0\0\1", b"\x01\2\3\4", b"\0"]),
        ),
        max_size=8,
    )
)
def test_nothing_that_is_sent_does_more_than_end_its_session(
    pieces: list[bytes],
) -> None:
    with closing(Guarded(*[[PUBLIC]] * 8)) as proxy:
        client = proxy.client(b"")
        for piece in pieces:
            if client.reading:
                client.receive(piece)
        [*session] = proxy.factory.sessions.values()
        if client.disconnecting:
            assert client.dataBuffer == REJECTED
            client.take()
        else:
            assert session
            assert session[0].session.ending is None
            assert len(proxy.factory.handshakes) == (not proxy.dialled)


# -- to exhaust it


@contextmanager
def many_descriptors() -> Iterator[None]:
    """This process, and those that it starts, may open as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


LISTEN = ("--listen", "127.0.0.1:0")


def test_a_thousand_who_stop_in_mid_handshake_keep_nobody_out() -> None:
    bound = ("--max-handshakes-per-client", "300")
    with many_descriptors(), ExitStack() as held:
        server = held.enter_context(Server())
        proxy = held.enter_context(relay(*LISTEN, *bound, plugin="socks4"))
        port = server.socket.getsockname()[1]
        request = write_request(Command.CONNECT, "localhost", port)
        before, began = proxy.descriptors, time.monotonic()
        mute = []
        for _ in range(1000):
            mute.append(held.enter_context(connect(proxy.port)))
            mute[-1].sendall(request[:-1])
        started = time.monotonic()
        with connect(proxy.port) as client:
            client.sendall(request + b"good")
            with server.accept() as upstream:
                assert read_exactly(upstream, 4) == b"good"
                assert answer(client).code == Code.GRANTED
        assert time.monotonic() - started < 2, "the good client waited"
        proxy.ended("evicted", 701)
        assert read_all(mute[0]) == REJECTED
        eventually(lambda: proxy.descriptors == before + 299, "the others are gone")
        # Those that are left may still say what they want.
        mute[-1].sendall(request[-1:])
        server.accept().close()
        assert answer(mute[-1]).code == Code.GRANTED
        lines = proxy.wait_for("300 handshakes of 127.0.0.1 wait", 1)
        took = time.monotonic() - began
        assert len(lines) <= 1 + took, "once a second at most"
        assert not any("Traceback" in line for line in proxy.lines)


@pytest.mark.parametrize("addresses", [1, 20])
def test_by_default_those_who_are_mute_keep_nobody_out(addresses: int) -> None:
    """Even if there are more of them than the proxy could hold."""

    def as_a_shell_limits_it() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with many_descriptors(), ExitStack() as held:
        server = held.enter_context(Server())
        limited = relay(*LISTEN, plugin="socks4", preexec_fn=as_a_shell_limits_it)
        proxy = held.enter_context(limited)
        port = server.socket.getsockname()[1]
        for number in range(1200):
            own = (f"127.0.0.{1 + number % addresses}", 0)
            mute = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE, own)
            held.enter_context(mute)
        started = time.monotonic()
        with connect(proxy.port) as client:
            client.sendall(write_request(Command.CONNECT, "127.0.0.1", port))
            server.accept().close()
            assert answer(client).code == Code.GRANTED
        assert time.monotonic() - started < 2, "the good client waited"
        assert not any("hardly any" in line for line in proxy.lines)


def test_without_descriptors_the_mute_make_room() -> None:
    """Where there may be more of them than the proxy can hold."""

    def low_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    bounds = ("--max-handshakes", "1000", "--max-handshakes-per-client", "1000")
    with ExitStack() as held:
        server = held.enter_context(Server())
        limited = relay(*LISTEN, *bounds, plugin="socks4", preexec_fn=low_limit)
        proxy = held.enter_context(limited)
        port = server.socket.getsockname()[1]
        for _ in range(120):
            held.enter_context(connect(proxy.port))
        with connect(proxy.port) as client:
            client.sendall(write_request(Command.CONNECT, "127.0.0.1", port))
            server.accept().close()
            assert answer(client).code == Code.GRANTED
        proxy.wait_for("hardly any file descriptor is left")
        proxy.ended("evicted", 32)


def test_a_flood_of_binds_gets_no_more_listeners_than_its_share() -> None:
    with relay(*LISTEN, "--max-binds-per-client", "4", plugin="socks4") as proxy:
        before = proxy.descriptors
        with ExitStack() as held:
            codes = []
            for _ in range(40):
                client = connect(proxy.port)
                # A client that only ended its side would be waited for.
                held.callback(reset, client)
                client.sendall(write_request(Command.BIND, "127.0.0.1", 20))
                codes.append(answer(client).code)
            assert codes == [Code.GRANTED] * 4 + [Code.REJECTED] * 36
            other = socket.socket()
            held.callback(reset, other)
            other.settimeout(PATIENCE)
            other.bind(("127.0.0.77", 0))
            other.connect(("127.0.0.1", proxy.port))
            other.sendall(write_request(Command.BIND, "127.0.0.1", 20))
            assert answer(other).code == Code.GRANTED
            lines = proxy.ended("refused", 36)
            assert {line["reply"] for line in lines} == {"91"}
        eventually(lambda: proxy.descriptors == before, "all listeners are closed")
        with connect(proxy.port) as client:
            client.sendall(write_request(Command.BIND, "127.0.0.1", 20))
            assert answer(client).code == Code.GRANTED


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_those_who_send_and_send_before_anybody_reads_are_paused(kind: str) -> None:
    count, chunk = 5, random.Random(1).randbytes(1 << 18)
    with transport(kind), ExitStack() as held:
        started = relay(*LISTEN, plugin="socks4", fresh=True)
        proxy = held.enter_context(started)
        with connect(proxy.port) as warm:
            warm.sendall(write_request(Command.BIND, "127.0.0.1", 20))
            answer(warm)
        proxy.ended("client_left")
        before = proxy.rss
        sent: dict[socket.socket, int] = {}
        where = []
        for _ in range(count):
            client = held.enter_context(connect(proxy.port))
            client.sendall(write_request(Command.BIND, "127.0.0.1", 20))
            where.append(answer(client).port)
            client.setblocking(False)
            sent[client] = 0
        quiet = 0
        while quiet < 3:
            quiet += 1
            for client in sent:
                with suppress(BlockingIOError):
                    while True:
                        rest = memoryview(chunk)[sent[client] % len(chunk) :]
                        sent[client] += client.send(rest)
                        quiet = 0
            time.sleep(0.05)
        # The kernel's buffers are full; the proxy has taken no more than its share: 128
        # KiB at most, if the bytes come in pieces, and holes that those leave.  On a
        # busy machine its look for huge pages comes in between.
        assert min(sent.values()) > 300_000
        assert (proxy.rss - before) / count <= 750_000
        client, taken = next(iter(sent.items()))
        client.settimeout(PATIENCE)
        with connect(where[0]) as peer:
            assert answer(client).code == Code.GRANTED
            data = read_exactly(peer, taken)
        assert data == (chunk * (taken // len(chunk) + 1))[:taken]
