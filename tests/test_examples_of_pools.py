"""The examples of pools, run as their users would run them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock

from relayd import pools
from tests.support.fakes import FakeEndpoint
from tests.support.live_relays import refused_address
from tests.support.process import PATIENCE, START, Server, connect
from tests.test_examples import EXAMPLES, example


def test_own_selector() -> None:
    """Clients of this machine get the first server; another one if it refuses."""
    with Server() as near, Server() as far:
        args = ("127.0.0.1:0", near.address, far.address)
        with example("own_selector.py", *args) as (program, port):
            for _ in range(3):
                with connect(port), near.accept():
                    pass
            program.terminate()
            assert program.wait(PATIENCE) in (0, -15)
        with example(
            "own_selector.py", "127.0.0.1:0", refused_address(), far.address
        ) as (_, port):
            with connect(port), far.accept():
                pass


@contextmanager
def patroni() -> Iterator[Any]:
    """Answers for one server, as the test says: `status` is what it answers with."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/primary"
            self.send_response(web.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing is logged."""

    web = HTTPServer(("127.0.0.1", 0), Answers)
    web.status = 503  # type: ignore[attr-defined]
    thread = threading.Thread(target=web.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def test_patroni() -> None:
    """Clients follow the primary; while there is none they wait."""
    with Server() as one, Server() as two, patroni() as first, patroni() as second:
        addresses = [
            f"{server.address}@{web.server_address[1]}"
            for server, web in ((one, first), (two, second))
        ]
        with example("patroni.py", "127.0.0.1:0", *addresses) as (program, port):
            with connect(port) as waiting:
                waiting.sendall(b"hello")
                first.status = 200
                with one.accept() as upstream:
                    assert upstream.recv(5) == b"hello"
                    first.status, second.status = 503, 200
                    # Cut off, as its server is the primary no longer.
                    with pytest.raises(ConnectionResetError):
                        waiting.recv(1)
            with connect(port), two.accept():
                pass
            program.terminate()
            assert program.wait(PATIENCE) in (0, -15)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("own_selector.py", ["8080"], "usage: own_selector.py"),
        ("own_selector.py", ["127.0.0.1:0", "udp:1"], "relays streams"),
        ("own_selector.py", ["127.0.0.1:0", "nonsense:"], "bad address 'nonsense:'"),
        ("patroni.py", ["8080"], "usage: patroni.py"),
        ("patroni.py", ["127.0.0.1:0", "db1:5432"], "expected HOST:PORT@PORT"),
    ],
)
def test_what_is_wrong_is_said(name: str, args: list[str], says: str) -> None:
    program = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert program.returncode == 1
    [line] = program.stderr.splitlines()
    assert says in line


def test_what_programs_need_of_pools_is_in_one_place() -> None:
    """A check of a kind that a command line has, by a program."""
    clock = Clock()
    endpoint = FakeEndpoint(clock)
    server = pools.Server(endpoint, "db:5432")
    target = pools.Target(server=server, endpoint=endpoint)
    checker = pools.Checker(clock)
    ask = pools.asks(pools.parse_check("tcp"), target, clock)
    checker.add(server, ask, pools.Schedule(every=5))
    checker.start()
    clock.advance(1)
    endpoint.dials[-1].deferred.errback(ConnectionRefusedError())
    assert not server.checked_up
    checker.stop()
    assert not clock.getDelayedCalls()


def test_it_costs_no_look_ups() -> None:
    """Few programs follow names: twisted.names takes its time to import."""
    code = "import sys, relayd.pools; print('twisted.names' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
