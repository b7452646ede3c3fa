"""Errors of datagram sockets by what they mean: refused, too large, shortage."""

from __future__ import annotations

import errno
import sys

#: What a host, or one on the way, reports of an earlier datagram (ICMP), by an error of
#: the next call: `icmp_err_convert` and `icmpv6_err_convert` of Linux.
REFUSALS = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EACCES,
        errno.EPROTO,
        errno.EOPNOTSUPP,
        *([errno.ENONET] if sys.platform == "linux" else []),
    }
)

#: The same, and that one was too large for a part of the way ('fragmentation needed').
#: The call that reports it has done nothing else, so it is made again, once.
REPORTED = REFUSALS | {errno.EMSGSIZE}

#: This process or this machine has no descriptor, port, memory or watch left for
#: another flow, wherever it leads.  EAGAIN is the error of connect() where no port
#: is left.  Any other error is of the server's address: there is no way to it.  So is
#: EADDRNOTAVAIL: there is no address of ours to start from, as without IPv6.
SHORTAGE = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
