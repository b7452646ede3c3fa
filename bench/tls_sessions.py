"""Short TLS sessions through a relay that does not end TLS: the benchmark's own load.

The relay moves what it would of any client: a ClientHello, the server's answer, a
request and its response.  Both ends are slower than a relay, but only what it uses is
counted.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from bench.children import PATIENCE, CannotMeasure
from bench.connections import KEEPING
from bench.loads import AT_ONCE
from bench.origins import BODY, NAME


def tls_sessions(port: int, count: int, trusted: Path) -> None:
    """Make `count` sessions, `AT_ONCE` at a time, with one request each.

    The client closes first, when it has the response.

    :param trusted: the server's certificate.
    :raises CannotMeasure: one failed, or nothing moved for `PATIENCE`.
    """
    context = ssl.create_default_context(cafile=str(trusted))
    poll = select.epoll()
    sessions: dict[int, tuple[ssl.SSLSocket, Iterator[int]]] = {}
    started = ended = 0
    try:
        while ended < count:
            while started < count and len(sessions) < AT_ONCE:
                # On loopback it is connected at once, unless the relay's queue is full.
                plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
                plain.setblocking(False)
                tls = context.wrap_socket(
                    plain, server_hostname=NAME, do_handshake_on_connect=False
                )
                sessions[tls.fileno()] = tls, _session(tls)
                # It is ready to write, and so begins.
                poll.register(tls.fileno(), select.EPOLLOUT)
                started += 1
            events = poll.poll(PATIENCE)
            if not events:
                raise CannotMeasure(f"TLS sessions hang, {ended} of {count} done")
            for number, _ in events:
                tls, going = sessions[number]
                wanted = next(going, None)
                if wanted is not None:
                    poll.modify(number, wanted)
                    continue
                tls.close()
                del sessions[number]
                ended += 1
    except OSError as error:
        raise CannotMeasure(f"a TLS session failed: {error}") from error
    finally:
        poll.close()
        for tls, _ in sessions.values():
            tls.close()


def _session(tls: ssl.SSLSocket) -> Iterator[int]:
    """One of them; yields the events that it waits for."""
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            yield select.EPOLLIN
        except ssl.SSLWantWriteError:
            yield select.EPOLLOUT
    tls.send(KEEPING)
    answer = b""
    while not answer.endswith(BODY):
        try:
            part = tls.recv(65536)
        except ssl.SSLWantReadError:
            yield select.EPOLLIN
            continue
        if not part:
            raise CannotMeasure("a TLS session ended without its response")
        answer += part
