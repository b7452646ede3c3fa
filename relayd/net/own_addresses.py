"""Whether an address is one of this machine's own, by asking the kernel.

The kernel is asked each time: an interface may get another address at any moment.
:class:`OwnHosts` caches the answers for a few seconds, for callers that ask often.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from relayd.core.networks import Ip, unmapped

#: bind(2): no interface has this address, or an address of this family.  The only
#: errors by which the kernel says that an address is not its own.
_NOT_OWN = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

#: ip(7), Linux: bind the address only, and choose a port when it is needed.
_BIND_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)

#: `OwnHosts` caches an answer for so many seconds, and for so many hosts.
OWN_FOR, HOSTS_REMEMBERED = 5.0, 1024

#: ip-sysctl.rst: whether bind(2) takes any address; by the version of IP.
NONLOCAL_BIND = "/proc/sys/net/ipv{}/ip_nonlocal_bind"


def is_own(address: Ip) -> bool:
    """Whether this machine has this address now.

    A socket is bound to it, which the kernel allows only for its own addresses.  Where
    it is set to allow any (`net.ipv4.ip_nonlocal_bind`), the address counts as own if
    the route to it starts from the address itself.

    A guard must not fail open.  Unless the kernel says that it has no such address, the
    address counts as own: the check may fail for want of a descriptor or a port (no
    port is bound where the kernel can do without), or be refused by a sandbox.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            with suppress(OSError):  # an older kernel, or not Linux
                probe.setsockopt(socket.IPPROTO_IP, _BIND_NO_PORT, 1)
            probe.bind((str(address), 0))
    except OSError as problem:
        return problem.errno not in _NOT_OWN
    if not _binds_anything(address.version):
        return True
    try:
        return str(address) == address_towards(address)
    except OSError as problem:
        # The machine's own addresses always have a route.
        return problem.errno != errno.ENETUNREACH


class OwnHosts:
    """Whether hosts are this machine, cached for :data:`OWN_FOR` seconds.

    :param now: returns the time in seconds.
    :param own: whether an address is this machine's.
    """

    def __init__(
        self, now: Callable[[], float], own: Callable[[Ip], bool] = is_own
    ) -> None:
        self._now = now
        self._own = own
        #: By host: the answer, and when it expires.
        self._known: dict[str, tuple[bool, float]] = {}

    def __call__(self, host: str) -> bool:
        """Whether an address, as text, is own; anything else counts as own."""
        now = self._now
        known = self._known.get(host)
        if known is not None and now() < known[1]:
            return known[0]
        if len(self._known) >= HOSTS_REMEMBERED:
            # A proxy's clients choose the hosts, so the cache needs a limit.
            self._known.clear()
        found = self._find(host)
        self._known[host] = found, now() + OWN_FOR
        return found

    def _find(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return True
        address = unmapped(address)
        # connect(2) takes an unspecified address for this machine.
        return address.is_loopback or address.is_unspecified or self._own(address)


def _binds_anything(version: int) -> bool:
    try:
        return Path(NONLOCAL_BIND.format(version)).read_text().strip() != "0"
    except OSError:
        return False


def address_towards(address: Ip) -> str:
    """The local address of the route to `address`; nothing is sent.

    :raises OSError: there is no route.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Any port does.
        probe.connect((str(address), 9))
        return str(probe.getsockname()[0])
