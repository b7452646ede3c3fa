"""What chooses that a client goes where it meant to go: a server name, or a route.

Each relay has rules of its own, between its client and its servers
(:mod:`tests.system.gateway`).  Clients ask for one host of the server's, and some of
them are sent to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from relayd.preludes.client_hello import hello_of
from tests.support.process import command, relay
from tests.system.gateway import (
    PORT,
    Addresses,
    Gateway,
    Way,
    accepted,
    asking,
    each_family,
    gateway,
    listening,
    says,
    stopped,
)
from tests.system.wire import at

pytestmark = pytest.mark.system

#: What is for either host comes to the relay.
BOTH = "-l {every}:{port} --intercept {server}:80 --intercept {other}:80 "

#: Who asks for the server goes to its other host, on the port that was asked for.
ROUTE = """\
async def route(conn):
    conn.facts["meant"] = conn.original.host
    if conn.original.host == "HOST" and conn.original.port == 80:
        return conn.server("OTHER:original")
    return conn.server("original")
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Gateway]:
    with gateway() as made:
        yield made


def reaches(network: Gateway, asked: str, host: str, said: bytes = b"hello") -> None:
    """A client that asks for one host gets to another one."""
    with listening(network, host) as server, asking(network, asked) as client:
        client.sendall(said)
        upstream, _ = accepted(server)
        with upstream:
            assert upstream.recv(len(said)) == said
            says(upstream, client, b"welcome")


@each_family
def test_a_route(network: Gateway, family: Addresses, tmp_path: Path) -> None:
    """It sees where the client meant to go, and may send it there."""
    written = f"[{family.other}]" if family.family == 6 else family.other
    text = ROUTE.replace("HOST", family.server).replace("OTHER", written)
    (tmp_path / "myroutes.py").write_text(text)
    way = Way(BOTH + "--route myroutes:route", "server", True)
    # A process that is forked can't have modules of its own.
    twistd = network.relay.runs(*command())
    args = ("--manage-netfilter", *way.args(family))
    env = {"PYTHONPATH": str(tmp_path)}
    with relay(*args, twistd=twistd, env=env) as running:
        reaches(network, family.server, family.other)
        reaches(network, family.other, family.other)
        moved, kept = running.ended("done", 2)
        assert (moved["meant"], kept["meant"]) == (family.server, family.other)
        there = at(family.other, PORT)
        assert (moved["upstream"], kept["upstream"]) == (there, there)
        stopped(running)


@each_family
def test_a_server_name(network: Gateway, family: Addresses) -> None:
    names = "--sni other.example.com={other}:original --sni =original"
    way = Way(BOTH + names, "server", True)
    with network.relaying(*way.args(family)):
        for name, host in (
            ("other.example.com", family.other),
            ("www.example.com", family.server),
        ):
            reaches(network, family.server, host, hello_of(name))


@each_family
def test_a_pool(network: Gateway, family: Addresses) -> None:
    """Who can't go where it meant to go gets to a backup."""
    servers = "-d original -d {other}:80,backup --retries 1"
    way = Way(BOTH + servers, "server", True)
    with network.relaying(*way.args(family)) as running:
        reaches(network, family.server, family.server)
        reaches(network, family.server, family.other)
        first, second = running.ended("done", 2)
        assert first["upstream"] == at(family.server, PORT)
        assert second["upstream"] == at(family.other, PORT)
