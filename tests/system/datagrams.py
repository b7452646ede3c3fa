"""What the tests of the UDP relay share: servers on free ports, and flows."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from tests.support.ports import free_port
from tests.support.process import PATIENCE, RelayProcess, eventually, relay


@attrs.frozen
class FlowLine:
    """What the relay's log says of a flow.

    :ivar relay: the relay's name.
    :ivar port: the relay's own address towards the server.
    :ivar up: datagrams and bytes from the client to the server.
    :ivar down: the same, back.
    """

    relay: str
    client: str
    listener: str
    port: str
    server: str
    age: float = attrs.field(converter=float)
    up: tuple[int, int]
    down: tuple[int, int]
    ending: str
    by: str = ""

    @classmethod
    def of(cls, fields: dict[str, str]) -> FlowLine:
        """From the fields of a line, as text."""
        up, down = (_counted(fields[way]) for way in ("up", "down"))
        return cls(**{**fields, "up": up, "down": down})


def _counted(text: str) -> tuple[int, int]:
    datagrams, size = map(int, text.split("/"))
    return datagrams, size


def carried(flows: list[FlowLine]) -> tuple[int, int]:
    """The datagrams of these flows, up and down."""
    return sum(each.up[0] for each in flows), sum(each.down[0] for each in flows)


def bound(port: int) -> bool:
    """Whether a program has this port for IPv4 datagrams."""
    # A look that binds could get in the way of the program.
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") for line in lines)


@contextmanager
def serving(
    *command: str | Path, saying: str = "", port: int = 0
) -> Iterator[RelayProcess]:
    """A server that runs in the foreground, for the length of a block.

    :param saying: what it prints once it serves.
    :param port: which port it has, once it serves.
    """
    # Until its log is read as one, nothing in RelayProcess is about relays.
    first, second, *rest = map(str, command)
    running = RelayProcess(*rest, twistd=(first,), plugin=second)
    try:
        if saying:
            running.wait_for(saying)
        if port:
            eventually(lambda: bound(port), f"{first} has port {port}")
        yield running
    finally:
        # A server that is asked to end, ends its children and removes its files.
        running.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            running.process.wait(PATIENCE / 2)
        running.stop()


@contextmanager
def relayed(
    server: int, *args: str, host: str = "127.0.0.1", streams: bool = False
) -> Iterator[RelayProcess]:
    """A relay to a port of 127.0.0.1, from a free one.

    :param host: where it listens; "" is everywhere.
    :param streams: relay connections, too, between the same two ports.
    """
    port, colon = free_port(), ":" if host else ""
    given = [
        "--listen",
        f"udp:{host}{colon}{port}",
        "--dest",
        f"udp:127.0.0.1:{server}",
    ]
    if streams:
        given += ["--listen", f"{host}:{port}", "--dest", f"127.0.0.1:{server}"]
    # A flow that ends with the relay needs no time to finish in.
    with relay("--drain-timeout", "0", *given, *args) as running:
        running.listening(1 + streams)
        yield running


def flows_of(running: RelayProcess, server: int) -> list[FlowLine]:
    """Stop the relay: the flows that it has had, all of them with this server."""
    running.signal()
    assert running.wait() == 0
    flows = flows_so_far(running)
    assert {each.server for each in flows} == {f"127.0.0.1:{server}"}
    ports = {each.listener.rpartition(":")[2] for each in flows}
    assert ports == {str(running.port)}
    return flows


def flows_so_far(running: RelayProcess) -> list[FlowLine]:
    """The flows that have ended, in that order."""
    return [FlowLine.of(fields) for fields in running.flows(0)]
