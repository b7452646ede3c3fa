"""Many connections that stay, in a process of their own.

`holding.py server` accepts all that come; it says its port.  `holding.py clients PORT
COUNT` connects so many times, and says so.  Both end with their input.
"""

from __future__ import annotations

import select
import socket
import sys
from contextlib import suppress


def server() -> None:
    held: list[socket.socket] = []
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listening.setblocking(False)
    print(f"Serving on port {listening.getsockname()[1]}", flush=True)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        with suppress(BlockingIOError):
            while True:
                held.append(listening.accept()[0])


def clients(port: int, count: int) -> None:
    held = []
    for number in range(count):
        # One client may not have all that there is.
        source = (f"127.200.0.{1 + number // 400}", 0)
        held.append(socket.create_connection(("127.0.0.1", port), 60, source))
    print(f"Holding {count}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server()
    else:
        clients(*map(int, sys.argv[2:]))
