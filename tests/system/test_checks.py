"""Checks of real servers, and HAProxy's checks beside ours.

nginx is frozen, killed and started again behind a relay that asks it by HTTP.  A server
that says of itself what it is (as Redis does while it loads) is asked by HAProxy's
`tcp-check` and by `--check` with the same words: both send clients to the same servers.
"""

from __future__ import annotations

import http.client
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.process import Server, connect, eventually, relay
from tests.system.datagrams import serving
from tests.system.programs import listens, program
from tests.system.web_servers import nginx

pytestmark = pytest.mark.system

FAST = ("--check-every", "100ms", "--check-timeout", "300ms", "--retries", "0")


def asked(port: int) -> str:
    """Who answers by HTTP, or nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


def shares(port: int, count: int = 40) -> dict[str, int]:
    """How many clients each has served."""
    return dict(Counter(asked(port) for _ in range(count)))


def test_nginx_frozen_killed_and_started(tmp_path: Path) -> None:
    """Once it is down no client comes to it; once it is up its share is back."""
    ports = free_port(), free_port()
    first, second = (
        nginx(tmp_path, name, port) for name, port in zip("ab", ports, strict=True)
    )
    to = [part for port in ports for part in ("-d", f"127.0.0.1:{port}")]
    with ExitStack() as stack:
        running = stack.enter_context(
            relay("--check", "http:///", *FAST, "-l", "127.0.0.1:0", *to)
        )
        stack.enter_context(serving(*second))
        with serving(*first) as frozen:
            even = {"a": 20, "b": 20}
            eventually(lambda: shares(running.port, 4) == {"a": 2, "b": 2})
            assert shares(running.port) == even
            # Its kernel accepts connections still: only a question shows it.
            frozen.signal(signal.SIGSTOP)
            eventually(lambda: shares(running.port, 2) == {"b": 2})
            assert shares(running.port) == {"b": 40}
            frozen.signal(signal.SIGCONT)
            eventually(lambda: shares(running.port, 4) == {"a": 2, "b": 2})
            assert shares(running.port) == even
        eventually(lambda: shares(running.port, 2) == {"b": 2})
        assert shares(running.port) == {"b": 40}
        with serving(*first):
            eventually(lambda: shares(running.port, 4) == {"a": 2, "b": 2})
            assert shares(running.port) == even


# -- beside HAProxy

HAPROXY = """
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen all
  bind 127.0.0.1:{port}
  balance roundrobin
  option tcp-check
  tcp-check connect
  tcp-check send PING\\r\\n
  tcp-check expect string +PONG
  default-server check inter 100ms rise 2 fall 3
  server a {a}
  server b {b}
"""

CHECK = r'tcp send="PING\r\n" expect="+PONG"'


class Redis:
    """A server that answers PING as it is told, and anything else by its name."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.answer = b"+PONG\r\n"
        self.server = Server()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                with self.server.accept() as client, suppress(OSError):
                    said = client.recv(100)
                    client.sendall(self.answer if b"PING" in said else self.name)


@contextmanager
def started(server: Redis) -> Iterator[Redis]:
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.server.socket.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.server.close()


def who(port: int) -> str:
    """Which server a client comes to."""
    with connect(port) as client, suppress(OSError):
        client.sendall(b"who")
        return client.recv(10).decode()
    return ""


def test_haproxy_and_relayd_find_the_same(tmp_path: Path) -> None:
    with started(Redis("a")) as a, started(Redis("b")) as b, ExitStack() as stack:
        port = free_port()
        config = tmp_path / "haproxy.cfg"
        where = a.server.address, b.server.address
        config.write_text(HAPROXY.format(port=port, a=where[0], b=where[1]))
        stack.enter_context(serving(program("haproxy"), "-db", "-f", config))
        eventually(lambda: listens(port), "HAProxy listens")
        to = ("-l", "127.0.0.1:0", "-d", where[0], "-d", where[1])
        running = stack.enter_context(
            relay("--check", CHECK, "--rise", "2", "--fall", "3", *FAST, *to)
        )
        both = running.port, port

        def found(*names: str) -> bool:
            """Whether clients of both come to these, in turn."""
            each = dict.fromkeys(names, 4 // len(names))
            return all(Counter(who(p) for _ in range(4)) == each for p in both)

        eventually(lambda: found("a", "b"), "both are up")
        a.answer = b"-LOADING Redis is loading the dataset in memory\r\n"
        eventually(lambda: found("b"), "a is down")
        a.answer = b"+PONG\r\n"
        eventually(lambda: found("a", "b"), "a is up again")
        b.answer = b""
        eventually(lambda: found("a"), "b is down")
