"""A relay that reads which server its TLS clients ask for, on fakes."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.preludes.client_hello import UNRECOGNIZED_NAME, hello_of
from tests.support.fakes import FakeEndpoint
from tests.support.relays import Relay


class ByName(Relay):
    """A relay with a pool for each of three names."""

    def __init__(self, *, others: bool = False, **options: Any) -> None:
        self.www, self.below, self.any = FakeEndpoint(), FakeEndpoint(), FakeEndpoint()
        names = {"www.example.com": "www", "*.example.com": "below"}
        super().__init__(
            pools={
                "www": Upstream(self.www, "www"),
                "below": Upstream(self.below, "below"),
                "any": Upstream(self.any, "any"),
            },
            sni={**names, "": "any"} if others else names,
            **options,
        )


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("www.example.com", "www"),
        ("WWW.Example.COM", "www"),
        ("a.example.com", "below"),
        ("b.a.example.com", "below"),
        ("example.com", "any"),
        ("www.example.org", "any"),
        (None, "any"),
    ],
)
def test_where_a_client_goes(name: str | None, where: str) -> None:
    made = ByName(others=True)
    client = made.client()
    hello = hello_of(name)
    for at in range(0, len(hello), 50):
        assert made.session.stage is Stage.PRELUDE
        client.receive(hello[at : at + 50])
    client.receive(b"and so on")
    server = getattr(made, where).dial.connect()
    server.take()
    assert server.taken == hello + b"and so on"
    asked = {} if name is None else {"sni": name.lower()}
    assert made.session.facts == {**asked, "pool": where}


def test_one_that_asks_for_what_is_not_served_is_told() -> None:
    made = ByName()
    client = made.client()
    client.receive(hello_of("www.example.org"))
    client.take()
    assert client.taken == UNRECOGNIZED_NAME
    session = made.session
    assert session.ending is Ending.DENIED
    assert session.detail == "no server for the name 'www.example.org'"
    client.receive_eof()
    made.clock.advance(0)
    made.over("opened", "closed denied")


def test_and_one_that_asks_for_nothing() -> None:
    made = ByName()
    made.client().receive(hello_of(None))
    assert made.session.detail == "no server for a client that names none"


def test_what_is_no_tls_is_a_bad_request() -> None:
    made = ByName(others=True)
    made.client().receive(b"GET / HTTP/1.1\r\n\r\n")
    assert made.session.ending is Ending.BAD_REQUEST


def test_a_hello_that_does_not_come() -> None:
    made = ByName(handshake_timeout=2.0)
    made.client().receive(hello_of("www.example.com")[:-1])
    made.clock.pump([0.5] * 6)
    assert made.session.ending is Ending.HANDSHAKE_TIMEOUT
    assert made.session.detail == "no ClientHello in 2 s"


def test_those_whose_hello_has_not_come_are_limited() -> None:
    made = ByName(max_deciding=4)
    made.client()
    made.client()
    assert [each.ending for each in made.witness.sessions] == [Ending.EVICTED, None]


def test_one_that_leaves_in_the_middle_of_it() -> None:
    made = ByName()
    client = made.client()
    client.receive(hello_of("www.example.com")[:-1])
    client.receive_eof()
    assert made.session.ending is Ending.CLIENT_LEFT
    assert made.session.detail == "in the middle of its ClientHello"
