"""Ports that nobody has, for servers that can't be told to pick one and say which.

They are from below the range that the kernel gives out by itself: no other program,
and no other test, gets one by chance between the look and the server's own bind.  Of
a port from that range it is only known that one address has it free.
"""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

#: Where they are looked for, as far as the kernel gives out none of them; not those
#: that tests have on addresses of their own (`steered`), beside one that has all.
_PORTS = range(20100, 32768)

_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")

#: Which of the processes that share the tests this one is, and how many there are.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

_given: set[int] = set()

#: For all addresses of each family.
_ANY = {socket.AF_INET: "", socket.AF_INET6: "::"}


def free_port() -> int:
    """A port that nobody has on any address, neither for datagrams nor for streams.

    Each is given once, and to one of the processes that share the tests: it may take a
    while until it is listened on.
    """
    first = int(_GIVEN_OUT.read_text().split()[0])
    ports = [port for port in _PORTS if port < first] or list(_PORTS)
    mine = ports[_WORKER::_WORKERS]
    # Not the generator that pytest-randomly seeds: two runs may have one seed.
    random.SystemRandom().shuffle(mine)
    for port in mine:
        if port not in _given and is_free(port):
            _given.add(port)
            return port
    raise AssertionError("no port is free")


def is_free(port: int, *kinds: socket.SocketKind) -> bool:
    """Whether nobody has a port on any address.

    :param kinds: of sockets; unless given, datagrams and streams.
    """
    with ExitStack() as stack, suppress(OSError):
        for kind in kinds or (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            for family, host in _ANY.items():
                sock = stack.enter_context(socket.socket(family, kind))
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, port))
        return True
    return False
