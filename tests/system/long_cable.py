"""A cable between two machines on which every packet takes its time.

Not every kernel has netem, its own way to do that.  So each machine gets a TUN device
(Documentation/networking/tuntap.rst of the kernel), and a thread carries the packets
from one to the other.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.system.namespaces import Machine
from tests.system.programs import lacking, program, run

#: linux/if_tun.h: TUNSETIFF, IFF_TUN and IFF_NO_PI.
_TUNSETIFF, _TUN, _PLAIN = 0x400454CA, 0x0001, 0x1000

_LINK = "long"

#: The largest packet, in bytes.
_LARGEST = 65536


def _device(machine: Machine, address: str) -> int:
    """A TUN device there, with its address; its descriptor."""
    with machine.inside():
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        except OSError as problem:
            lacking(f"no TUN devices here: {problem}")
        asked = struct.pack("16sH22x", _LINK.encode(), _TUN | _PLAIN)
        fcntl.ioctl(device, _TUNSETIFF, asked)
    ip = program("ip")
    run(ip, "-n", machine.name, "address", "add", f"{address}/30", "dev", _LINK)
    run(ip, "-n", machine.name, "link", "set", _LINK, "up")
    return device


def _carry(devices: tuple[int, int], delay: float, stop: threading.Event) -> None:
    """Take packets from each to the other, until `stop` is set."""
    others = dict(zip(devices, reversed(devices), strict=True))
    under_way: deque[tuple[float, int, bytes]] = deque()
    while not stop.is_set():
        wait = under_way[0][0] - time.monotonic() if under_way else 0.05
        for device in select.select(devices, [], [], max(0.0, min(wait, 0.05)))[0]:
            packet = os.read(device, _LARGEST)
            under_way.append((time.monotonic() + delay, others[device], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, device, packet = under_way.popleft()
            with suppress(BlockingIOError):
                os.write(device, packet)


@contextmanager
def long_cable(
    one: tuple[Machine, str], other: tuple[Machine, str], delay: float
) -> Iterator[None]:
    """Connect two machines, each with its address, for the length of a block.

    :param delay: seconds that a packet takes, one way.
    """
    devices = _device(*one), _device(*other)
    stop = threading.Event()
    thread = threading.Thread(target=_carry, args=(devices, delay, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for device in devices:
            os.close(device)
