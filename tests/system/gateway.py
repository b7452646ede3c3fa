"""A relay that is its servers' gateway, as the kernel relay was: three in a row.

    client 10.0.0.1 -- 10.0.0.254 relay 192.168.0.2 -- 192.168.0.1 server

and the same with addresses of IPv6.  Each is a network namespace.  The relay forwards,
and is the only way from one network to the other.  Nothing of this machine's own
network is touched.  The relay's kernel checks where packets may come from (rp_filter),
as strictly as it can.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.support.process import PATIENCE, RelayProcess, read_exactly, relay
from tests.system.namespaces import Machine, connect, made
from tests.system.programs import lacking, run
from tests.system.wire import Packet, Wire, at, packets

#: The relay's own port, which no client asks for.
GATEWAY_PORT = 16000

#: What clients of the web ask for.
PORT = 80

#: The relay's links: to the client, and to the server.
INSIDE, OUTSIDE = "inside", "outside"

RELAYCTL = str(Path(sys.executable).parent / "relayctl")


@attrs.frozen
class Addresses:
    """Those of one family.

    :ivar client: and the relay's address in the client's network.
    :ivar asked: the relay's address in the server's network, which clients ask for.
    :ivar other: another address of the server's.
    :ivar bits: of each network's prefix.
    """

    family: int
    client: str
    inner: str
    asked: str
    server: str
    other: str
    bits: int

    @property
    def kind(self) -> socket.AddressFamily:
        """The family of a socket."""
        return socket.AF_INET6 if self.family == 6 else socket.AF_INET


V4 = Addresses(
    family=4,
    client="10.0.0.1",
    inner="10.0.0.254",
    asked="192.168.0.2",
    server="192.168.0.1",
    other="192.168.0.10",
    bits=24,
)
V6 = Addresses(
    family=6,
    client="fd00:10::1",
    inner="fd00:10::fe",
    asked="fd00:192::2",
    server="fd00:192::1",
    other="fd00:192::10",
    bits=64,
)

FAMILIES = (V4, V6)

each_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@attrs.frozen
class Way:
    """One of the ways on which a client comes to its server.

    :ivar options: of the relay, in words of an `Addresses`.
    :ivar asked: which of its hosts the client asks for.
    :ivar rewritten: the kernel gives the client's connection another destination.
    """

    options: str
    asked: str
    rewritten: bool

    def args(self, family: Addresses) -> list[str]:
        def written(host: str) -> str:
            return f"[{host}]" if family.family == 6 else host

        every = "::" if family.family == 6 else "0.0.0.0"
        hosts = {
            name: written(getattr(family, name))
            for name in ("asked", "server", "other")
        }
        text = self.options.format(**hosts, every=written(every), port=GATEWAY_PORT)
        return text.split()

    def host(self, family: Addresses) -> str:
        asked: str = getattr(family, self.asked)
        return asked


@attrs.frozen
class Wires:
    """What is on the relay's two cables, from when they are captured."""

    inside: Wire
    outside: Wire
    folder: Path

    def forget(self) -> None:
        self.inside.forget()
        self.outside.forget()

    def packets(self) -> list[list[Packet]]:
        """Those on the client's cable so far, and those on the server's."""
        return packets(self.folder, self.inside, self.outside)


@attrs.frozen
class Translation:
    """What the kernel's conntrack knows of a connection whose address it changes.

    :ivar asked: whom the client asked for,
    :ivar given: and whom it is connected to.
    """

    client: str
    asked: str
    given: str


@attrs.frozen
class Gateway:
    """The three machines."""

    client: Machine
    relay: Machine
    server: Machine

    @contextmanager
    def captured(self, folder: Path) -> Iterator[Wires]:
        """Capture both cables for the length of a block."""
        with (
            closing(Wire(self.relay, INSIDE)) as inside,
            closing(Wire(self.relay, OUTSIDE)) as outside,
        ):
            yield Wires(inside, outside, folder)

    @contextmanager
    def relaying(self, *args: str, **options: Any) -> Iterator[RelayProcess]:
        """A relay on its machine, which looks after the rules itself.

        It is stopped at the end, if it has not been.
        """
        given = ("--manage-netfilter", "--drain-timeout", "0", *args)
        with relay(*given, namespace=self.relay.name, **options) as running:
            yield running
            stopped(running)

    def relayctl(self, *args: str | Path) -> str:
        """Run a command of relayctl's there, which must succeed."""
        return run(*self.relay.runs(RELAYCTL, *args))

    def sockets(self, kind: str, *which: str) -> set[tuple[str, str]]:
        """Both ends of what is connected there: by getsockname, and by getpeername.

        :param which: as ss(8) has it; unless given, all.
        """
        words = {"tcp": "-t", "udp": "-u"}[kind]
        lines = run(*self.relay.runs("ss", "-Hn", words, *which)).splitlines()
        # Behind what waits to be read and to be sent.
        return {(own, peer) for *_, own, peer in map(str.split, lines)}

    def translations(self) -> set[Translation]:
        """What conntrack knows there of connections whose destination it changes."""
        with self.relay.inside():
            try:
                text = Path("/proc/thread-self/net/nf_conntrack").read_text()
            except FileNotFoundError:
                lacking("this kernel has no /proc/net/nf_conntrack")
        found = set()
        for line in text.splitlines():
            # Twice: as the first packet is, and as its answer is to be.
            tuples = re.findall(_TUPLE, line)
            if len(tuples) == 2:
                (client, asked, own, port), (given, _, given_port, _) = tuples
                if (asked, port) != (given, given_port):
                    ends = ((client, own), (asked, port), (given, given_port))
                    found.add(Translation(*(_end(*each) for each in ends)))
        return found

    def state(self) -> str:
        """All rules and routes of the relay's machine.

        But those of the addresses that IPv6 gives to each link, when it likes.
        """
        shown = [
            run(*self.relay.runs(*words.split()))
            for words in (
                "nft list ruleset",
                *("ip -4 rule", "ip -6 rule"),
                *("ip -4 route show table all", "ip -6 route show table all"),
            )
        ]
        lines = "".join(shown).splitlines()
        return "\n".join(each for each in lines if "fe80:" not in each)


def stopped(running: RelayProcess) -> None:
    """Stop a relay, which ends well."""
    running.signal()
    assert running.wait() == 0
    assert not [line for line in running.lines if "Traceback" in line]


_TUPLE = r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)"


def _end(host: str, port: str) -> str:
    """One that conntrack writes with all of its digits."""
    return at(str(ipaddress.ip_address(host)), port)


@contextmanager
def gateway() -> Iterator[Gateway]:
    """Three machines, connected, for the length of a block."""
    with made("client", "relay", "server") as (client, relaying, server):
        for machine in (client, relaying, server):
            # An address of IPv6 does not wait until it is known to be nobody else's.
            for which in ("all", "default"):
                machine.set(f"ipv6/conf/{which}/accept_dad", 0)
        connect(INSIDE, (client, _networks("client")), (relaying, _networks("inner")))
        connect(
            OUTSIDE,
            (relaying, _networks("asked")),
            (server, [*_networks("server"), *_networks("other")]),
        )
        for family in FAMILIES:
            for machine, host in ((client, family.inner), (server, family.asked)):
                flag, way = f"-{family.family}", ("default", "via", host)
                run(*machine.runs("ip", flag, "route", "add", *way))
        relaying.set("ipv4/ip_forward", 1)
        relaying.set("ipv6/conf/all/forwarding", 1)
        for which in ("all", INSIDE, OUTSIDE):
            relaying.set(f"ipv4/conf/{which}/rp_filter", 1)
        yield Gateway(client, relaying, server)


def _networks(name: str) -> list[str]:
    """One of the `Addresses` of each family, with the length of its prefix."""
    return [f"{getattr(each, name)}/{each.bits}" for each in FAMILIES]


def end(sock: socket.socket) -> str:
    """A socket's own end."""
    return at(*sock.getsockname()[:2])


def says(one: socket.socket, other: socket.socket, data: bytes) -> None:
    """What one end says comes to the other."""
    one.sendall(data)
    assert read_exactly(other, len(data)) == data


def both_ways(one: str, other: str) -> set[str]:
    return {f"{one} > {other}", f"{other} > {one}"}


@contextmanager
def listening(network: Gateway, host: str) -> Iterator[socket.socket]:
    """A server's socket, at one of its addresses."""
    with network.server.inside():
        server = socket.create_server((host, PORT), family=_kind(host), backlog=1000)
    with server:
        server.settimeout(PATIENCE)
        yield server


def accepted(server: socket.socket) -> tuple[socket.socket, str]:
    """A server's next connection, and whose it is, by its own getpeername."""
    connection, peer = server.accept()
    connection.settimeout(PATIENCE)
    return connection, at(*peer[:2])


def asking(network: Gateway, host: str) -> socket.socket:
    """A client that asks for this host."""
    with network.client.inside():
        client = socket.create_connection((host, PORT), PATIENCE)
    client.settimeout(PATIENCE)
    return client


def _kind(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
