"""Three machines in a row: a client, the proxy and a server.

Each is a network namespace.  The client and the server know no way to each other,
so that whatever gets from one to the other has been through the proxy.  Nothing of
this machine's own network is touched, and its ports, 113 among them, are free.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tests.support.process import command
from tests.support.setns import NAMED, enter
from tests.system.programs import lacking, program, run

#: The client's machine; the proxy's, which has an address in both networks; the
#: server's.
CLIENT = "10.231.8.2"
PROXY = "10.231.8.1"
OUTSIDE = "10.231.9.1"
SERVER = "10.231.9.2"

#: The network that the server is in.
SERVERS = "10.231.9.0/30"


@attrs.frozen
class Machine:
    """A network namespace."""

    name: str

    def runs(self, *program: str | Path) -> tuple[str, ...]:
        """The command that runs a program there.

        Neither `ip` nor a shell stays between: the process is the program's.
        """
        return ("ip", "netns", "exec", self.name, *map(str, program))

    @property
    def twistd(self) -> tuple[str, ...]:
        """What `process.relay` takes to run there."""
        return self.runs(*command())

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are that machine's."""
        with open("/proc/thread-self/ns/net") as here:
            with open(NAMED / self.name) as there:
                enter(there.fileno())
            try:
                yield
            finally:
                enter(here.fileno())

    def set(self, name: str, value: int) -> None:
        """Set one of the kernel's settings below net, of this machine's own."""
        with self.inside():
            Path("/proc/sys/net", name).write_text(str(value))

    def cable(self, link: str, state: str) -> None:
        """Pull the cable out of this machine (`down`), or plug it in (`up`)."""
        run(program("ip"), "-n", self.name, "link", "set", link, state)


@attrs.frozen
class Machines:
    client: Machine
    proxy: Machine
    server: Machine


@contextmanager
def machines() -> Iterator[Machines]:
    """Three of them, connected, for the length of a block."""
    with made("client", "proxy", "server") as (client, proxy, server):
        connect("inside", (client, [f"{CLIENT}/30"]), (proxy, [f"{PROXY}/30"]))
        connect("outside", (proxy, [f"{OUTSIDE}/30"]), (server, [f"{SERVER}/30"]))
        yield Machines(client, proxy, server)


#: Of those that this process has made.
_count = itertools.count()


@contextmanager
def made(*parts: str) -> Iterator[list[Machine]]:
    """Machines of these names, each with its loopback, for the length of a block."""
    ip = program("ip")
    if os.geteuid() != 0:
        lacking("network namespaces take root")
    # Others may run these tests, too; and some of ours last while others are made.
    which = f"relayd-{os.getpid()}-{next(_count)}"
    there = []
    try:
        for part in parts:
            machine = Machine(f"{which}-{part}")
            _make(ip, machine.name)
            there.append(machine)
            machine.cable("lo", "up")
        yield there
    finally:
        # With the namespaces go the cables that end in them.
        for machine in there:
            run(ip, "netns", "delete", machine.name)


def _make(ip: str, name: str) -> None:
    """Make a namespace, if this machine lets us: some containers don't."""
    done = subprocess.run(
        [ip, "netns", "add", name], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lacking(f"no network namespaces here: {done.stderr.strip()}")


def connect(link: str, *ends: tuple[Machine, list[str]]) -> None:
    """Lay a cable between two machines, each with its addresses on it.

    It is made inside, so that its name is free.
    """
    ip = program("ip")
    (one, _), (other, _) = ends
    run(
        *(ip, "-n", one.name, "link", "add", link, "type", "veth"),
        *("peer", "name", link, "netns", other.name),
    )
    for machine, addresses in ends:
        for address in addresses:
            run(ip, "-n", machine.name, "address", "add", address, "dev", link)
        machine.cable(link, "up")
