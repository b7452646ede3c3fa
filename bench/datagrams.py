"""Datagrams: an echo server, and the load generator.

Both are in datagrams.c, which is compiled once in a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, child, program
from bench.places import HERE, Place, Places
from relayd.core.settings import UDP_RCVBUF

#: Bytes of a datagram.
SIZE = 200

#: The fixed rate at which losses are counted: datagrams a second.
RATE = 10_000

#: Flows that share it.
RATE_FLOWS = 50

#: Where bursts go round the flows: flows that have one pending, and its datagrams.
BURSTS, BURST = 50, 4

#: The share of the pending datagrams that may be lost while costs are measured.  The
#: load goes on without them; with many more lost it would not be the same load.
LOST = 0.1

#: Seconds by which the last datagram of a fixed rate may be late: another program may
#: have the processor when it is due.
LATE = 0.25


@frozen
class Moved:
    """The counters of a load.

    :ivar seconds: that it took.
    """

    sent: int
    received: int
    seconds: float


@cache
def _compiled() -> tempfile.TemporaryDirectory[str]:
    # Its folder is removed when this program ends.
    folder = tempfile.TemporaryDirectory(prefix="relayd-bench-")
    source = Path(__file__).with_name("datagrams.c")
    argv = [program("gcc"), "-O2", "-o", "datagrams", str(source)]
    with child("gcc", argv, Path(folder.name), read=True) as running:
        running.output(4 * PATIENCE)
    return folder


def built() -> str:
    """The path of the compiled program.

    :raises CannotMeasure: it can't be compiled.
    """
    return str(Path(_compiled().name) / "datagrams")


@contextmanager
def echo(place: Place = HERE.server) -> Iterator[int]:
    """A server that sends back each datagram, for the length of a block; its port."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        argv = place.runs([built(), "echo", place.host])
        with child("the echo server", argv, Path(name), read=True) as running:
            yield int(running.line())


@contextmanager
def round_trips(
    port: int, flows: int, at_once: int, seconds: float, places: Places = HERE
) -> Iterator[Callable[[], int]]:
    """Flows through a relay, each of which has carried datagrams.

    Yields a function that makes round trips for so many seconds, with so many pending
    on each flow, and returns how many.  Nothing is pending before and after.

    :raises CannotMeasure: a flow was not answered, or too much was lost.
    """
    with _repeated(
        ["load", places.relay.host, port, flows, at_once, SIZE, seconds],
        flows * at_once,
        places.client,
    ) as load:
        yield load


@contextmanager
def bursts_in_turn(
    port: int, flows: int, seconds: float
) -> Iterator[Callable[[], int]]:
    """As :func:`round_trips`; bursts are pending on some flows, round robin."""
    with _repeated(
        ["turns", HERE.relay.host, port, flows, BURSTS, BURST, SIZE, seconds],
        BURSTS * BURST,
    ) as load:
        yield load


@contextmanager
def new_flows(
    port: int, flows: int, places: Places = HERE
) -> Iterator[Callable[[], int]]:
    """As :func:`round_trips`; so many flows each time, with one round trip each."""
    with _repeated(
        ["new", places.relay.host, port, flows, SIZE], 0, places.client
    ) as load:
        yield load


@contextmanager
def _repeated(
    arguments: Sequence[str | float], under_way: int, place: Place = HERE.client
) -> Iterator[Callable[[], int]]:
    """The function that makes the round trips; see :func:`round_trips`."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        argv = place.runs([built(), *map(str, arguments)])
        with child(
            "the datagrams' load", argv, Path(name), read=True, waits=True
        ) as running:
            running.line()

            def load() -> int:
                running.tell()
                moved = read_moved(running.line())
                lost = moved.sent - moved.received
                if lost > LOST * under_way:
                    raise CannotMeasure(
                        f"{lost} datagrams were lost of {under_way} under way;"
                        f" is net.core.rmem_max below {UDP_RCVBUF.default}?"
                    )
                return moved.received

            yield load


def delivered(port: int, seconds: float) -> float:
    """Per cent of `RATE` datagrams a second that came back through a relay."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        argv = [
            *(built(), "rate", HERE.relay.host, str(port), str(RATE_FLOWS), str(RATE)),
            *(str(SIZE), str(seconds)),
        ]
        with child("the datagrams' load", argv, Path(name), read=True) as running:
            moved = read_moved(running.output(seconds + PATIENCE))
    if moved.seconds > seconds + LATE:
        raise CannotMeasure(
            f"{moved.sent} datagrams were sent in {moved.seconds:.2f} s, not {seconds}"
        )
    return 100 * moved.received / moved.sent


def read_moved(text: str) -> Moved:
    """Parse the program's counters.

    :raises CannotMeasure: they can't be parsed, or nothing was received.
    """
    try:
        sent, received, took = text.split()
        moved = Moved(int(sent), int(received), float(took))
    except ValueError:
        raise CannotMeasure(f"the datagrams' counts are unreadable: {text!r}") from None
    if not moved.received:
        raise CannotMeasure("no datagram came back")
    return moved
