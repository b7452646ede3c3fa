"""Which local ports a dial may have: all of the machine's range, from the first.

connect(2) chooses a port of `net.ipv4.ip_local_port_range` by which no connection to
the same address is called.  Linux takes half of them, the even ones, before it tries
any other (`__inet_hash_connect`, net/ipv4/inet_hashtables.c): the odd ones it leaves to
bind(2).  Once the even ones are in use, it goes through all of them at each call.

A closed connection has its port for a minute (TIME_WAIT) if this end has closed first,
as a relay does whose client is gone.  So 235 sessions a second to one server are enough
for that: of the usual range 14,000 ports are even, and then connect(2) takes 1.4 ms of
CPU, 200 times what it took before.

Since Linux 6.3 a socket may have a range of its own (IP_LOCAL_PORT_RANGE, ip(7)), and
since 6.8 it is given the ports of one as they come, even and odd.  A bound outside the
machine's range changes nothing but that.  So no port is left out, and twice as many
are in use before the search takes long.

Not over loopback: there Linux takes the port of a closed connection again after a
second (`net.ipv4.tcp_tw_reuse`).
"""

from __future__ import annotations

import socket
import sys

_IP = int(socket.IPPROTO_IP)

#: ip(7).  None: this system has none.
LOCAL_PORT_RANGE: int | None = 51 if sys.platform == "linux" else None

#: The upper bound in the upper half, and no lower one.
_WHOLE = (0xFFFF << 16).to_bytes(4, sys.byteorder)


def use_all_ports(sock: socket.SocketType) -> None:
    """Have connect(2) choose among all ports.

    :param sock: TCP, without a port yet.
    """
    if LOCAL_PORT_RANGE is not None:
        try:  # noqa: SIM105 - suppress() costs more than the call
            sock.setsockopt(_IP, LOCAL_PORT_RANGE, _WHOLE)
        except OSError:
            # An older kernel, or a sandbox.
            pass
