"""Which addresses are this machine's own, as its kernel says.

The kernel is asked each time: an interface may get another address at any moment.
:class:`OwnHosts` remembers the answers for a few seconds, for what asks often.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from relayd.core.networks import Ip

#: bind(2): no interface has this address, or none has addresses of this family.  The
#: only ways in which the kernel says that an address is another machine's.
_NOT_OWN = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

#: ip(7), Linux: bind the address alone, and choose a port when it is needed.
_BIND_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)

#: For so many seconds, and of so many hosts, `OwnHosts` knows what they are.
OWN_FOR, HOSTS_REMEMBERED = 5.0, 1024

#: ip-sysctl.rst: whether bind(2) takes any address; by the version of IP.
NONLOCAL_BIND = "/proc/sys/net/ipv{}/ip_nonlocal_bind"


def is_own(address: Ip) -> bool:
    """Whether this machine has this address, now.

    Asked by binding to it, which the kernel allows for no other; but for a kernel
    that was told to allow it (`net.ipv4.ip_nonlocal_bind`), where the address counts
    as own if the way to it starts from itself.

    A guard must not fall because the kernel can't be asked: whatever it says but that
    it has no such address, the address counts as own.  No descriptor may be left for
    the question, no port (no port is bound where the kernel can do without), or a
    sandbox may be against it.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            with suppress(OSError):  # the kernel may be older, or not Linux
                probe.setsockopt(socket.IPPROTO_IP, _BIND_NO_PORT, 1)
            probe.bind((str(address), 0))
    except OSError as problem:
        return problem.errno not in _NOT_OWN
    if not _binds_anything(address.version):
        return True
    try:
        return str(address) == address_towards(address)
    except OSError as problem:
        # There always is a way to an address of one's own.
        return problem.errno != errno.ENETUNREACH


class OwnHosts:
    """Whether hosts are this machine, remembered for :data:`OWN_FOR` seconds.

    :param now: tells the time in seconds.
    :param own: tells the addresses of this machine.
    """

    def __init__(
        self, now: Callable[[], float], own: Callable[[Ip], bool] = is_own
    ) -> None:
        self._now = now
        self._own = own
        #: What was found, and until when it holds.
        self._known: dict[str, tuple[bool, float]] = {}

    def __call__(self, host: str) -> bool:
        """Ask for an address as text; what is none counts as own."""
        now = self._now
        known = self._known.get(host)
        if known is not None and now() < known[1]:
            return known[0]
        if len(self._known) >= HOSTS_REMEMBERED:
            # The clients of a proxy may ask for any.
            self._known.clear()
        found = self._find(host)
        self._known[host] = found, now() + OWN_FOR
        return found

    def _find(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return True
        address = getattr(address, "ipv4_mapped", None) or address
        # connect(2) takes an unspecified one for this machine.
        return address.is_loopback or address.is_unspecified or self._own(address)


def _binds_anything(version: int) -> bool:
    try:
        return Path(NONLOCAL_BIND.format(version)).read_text().strip() != "0"
    except OSError:
        return False


def address_towards(address: Ip) -> str:
    """This machine's address on the way to another; nothing is sent.

    :raises OSError: there is no way.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # The port is of no importance.
        probe.connect((str(address), 9))
        return str(probe.getsockname()[0])
