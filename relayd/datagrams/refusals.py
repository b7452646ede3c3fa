"""Errors of datagram sockets by kind: refusal, too large, shortage."""

from __future__ import annotations

import errno
import sys

#: An ICMP error for an earlier datagram, from its destination or a router, is the error
#: of the next call: `icmp_err_convert` and `icmpv6_err_convert` of Linux.
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

#: The same, and that a datagram was too large for the path ('fragmentation needed').
#: The call that reports the error has done nothing else, so it is made again, once.
REPORTED = REFUSALS | {errno.EMSGSIZE}

#: This process or machine has no descriptor, port, memory or epoll watch left for any
#: flow.  EAGAIN is the error of connect() where no port is left.  Any other error
#: concerns the server's address: there is no route to it, or, with EADDRNOTAVAIL, no
#: local address to send from, as without IPv6.
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
