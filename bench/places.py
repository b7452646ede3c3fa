"""Where a measurement's client, relay and server run.

Mostly on this machine, over loopback.  A relay that dials from its clients' own
addresses can't be measured there, as all have the same one: then each of the three has
a network namespace of its own, with veth pairs between them, and the relay is the
server's gateway:

    client 10.0.0.1 --- 10.0.0.254 relay 192.168.0.2 --- 192.168.0.1 server

Nothing of this machine's own network is touched.  The namespaces end with the block
that made them, and with them all that a relay has changed there: its rules, its routes.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, program


@frozen
class Place:
    """Where programs run.

    :param host: its address, where others connect to.
    :param namespace: the name of its network namespace; None: this machine's network.
    """

    host: str
    namespace: str | None = None

    def runs(self, argv: Sequence[str]) -> list[str]:
        """The command that runs a program there, as the same process."""
        if self.namespace is None:
            return [*argv]
        return [program("ip"), "netns", "exec", self.namespace, *argv]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread asks of the network in the block, is asked there."""
        if self.namespace is None:
            yield
            return
        with open("/proc/thread-self/ns/net") as here:
            with open(f"/run/netns/{self.namespace}") as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())


@frozen
class Places:
    """The three of a measurement."""

    client: Place
    relay: Place
    server: Place


#: The client's address; the relay's on its side, and on the server's; the server's.
CLIENT, RELAY = "10.0.0.1", "10.0.0.254"
GATEWAY, SERVER = "192.168.0.2", "192.168.0.1"

_numbers = itertools.count()

#: All on this machine.
HERE = Places(*(Place("127.0.0.1") for _ in range(3)))


def no_namespaces() -> str | None:
    """Why there can be no network namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with _namespace("none"):
            return None
    except CannotMeasure as error:
        return str(error)


@contextmanager
def in_a_row() -> Iterator[Places]:
    """The client, the relay and the server in a row, for the length of a block.

    The client knows no way beyond the relay, and the server none but it.

    :raises CannotMeasure: the namespaces can't be made.
    """
    with ExitStack() as made:
        client, relay, server = (
            made.enter_context(_namespace(part))
            for part in ("client", "relay", "server")
        )
        _connect((client, CLIENT), (relay, RELAY), "inside")
        _connect((server, SERVER), (relay, GATEWAY), "outside")
        _ip("-n", server, "route", "add", "default", "via", GATEWAY)
        places = Places(
            Place(CLIENT, client), Place(RELAY, relay), Place(SERVER, server)
        )
        with places.relay.inside():
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
        yield places


@contextmanager
def _namespace(part: str) -> Iterator[str]:
    """A network namespace for the length of a block; its name, which no other has."""
    name = f"relayd-bench-{os.getpid()}-{next(_numbers)}-{part}"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        # The cables that end in it go with it.
        _ip("netns", "delete", name)


def _connect(one: tuple[str, str], other: tuple[str, str], link: str) -> None:
    """Lay a cable between two namespaces, each with its address on it."""
    # It is made inside, so that its name is free.
    _ip(
        *("-n", one[0], "link", "add", link, "type", "veth"),
        *("peer", "name", link, "netns", other[0]),
    )
    for name, address in (one, other):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        _ip("-n", name, "link", "set", link, "up")


def _ip(*words: str) -> None:
    """Run `ip`.

    :raises CannotMeasure: it fails.
    """
    done = subprocess.run(  # noqa: S603
        [program("ip"), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode != 0:
        raise CannotMeasure(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _enter(namespace: int) -> None:
    """Move this thread there; setns(2), which os has since Python 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
        problem = ctypes.get_errno()
        raise CannotMeasure(f"cannot enter a namespace: {os.strerror(problem)}")
