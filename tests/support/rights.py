"""What this process may do that not everybody may."""

from __future__ import annotations

import functools
import socket
import sys

import pytest

from relayd.net.dial_options import set_transparent


@functools.cache
def may_be_transparent() -> bool:
    """Whether sockets may have addresses that are none of this machine's."""
    try:
        with socket.socket() as sock:
            set_transparent(sock, socket.AF_INET)
    except OSError:
        return False
    return True


#: For tests of sockets that have.
transparent = pytest.mark.skipif(
    sys.platform != "linux" or not may_be_transparent(),
    reason="IP_TRANSPARENT takes Linux, and the right CAP_NET_RAW",
)
