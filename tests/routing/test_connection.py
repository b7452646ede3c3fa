"""What a route knows of its client, and what it says of its session."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface import implementer

from relayd.admission.rates import Rates
from relayd.core.errors import ConfigError
from relayd.core.filtering import Filter, FilterFactory, IFilterFactory
from relayd.core.routing import LONGEST_FACT, MOST_FACTS, NO_LIMITS, RouteLimits
from relayd.core.session import Session
from relayd.filters.first import First
from relayd.preludes.socks4 import Command
from relayd.routing.connection import (
    LONGEST_KEY,
    LONGEST_REPLY,
    MOST_FILTERS,
    Address,
    Connection,
)
from relayd.routing.facts import Facts
from relayd.routing.first_bytes import ConnectionOver
from relayd.routing.router import Router
from relayd.socks.session import Socks4Session
from tests.support.arriving import CLIENT, LISTENER, PEER, Arrived


async def route(conn: Connection) -> Any:
    return conn.pool()


def connection(session: Any = None, **options: Any) -> Connection:
    return Connection(Arrived(session=session), Router(route, **options))


# -- who it is


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.1:40000", "192.0.2.1", 40000),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("[fe80::1%eth0]:443", "fe80::1", 443),
        ("unix:/run/x:80", "", 0),
        ("unix:", "", 0),
        ("-", "", 0),
        ("", "", 0),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = Address(text)
    assert (str(address), address.host, address.port) == (text, host, port)
    assert address == Address(text)
    assert len({address, Address(text)}) == 1


@given(st.text(max_size=30))
def test_an_address_of_any_text_has_a_host_and_a_port(text: str) -> None:
    address = Address(text)
    assert isinstance(address.host, str)
    assert isinstance(address.port, int)


def test_who_it_is() -> None:
    conn = connection()
    assert (str(conn.client), str(conn.peer)) == (CLIENT, PEER)
    assert conn.listener.port == 443
    assert (conn.original and conn.original.host) == "203.0.113.9"
    assert (conn.requested, conn.user_id) == (None, b"")
    assert conn.session.id == 1


def test_who_meant_to_go_nowhere_else() -> None:
    """It came by a UNIX socket; and nobody knows it when it is over."""
    arrived = Arrived()
    arrived.original = ""
    conn = Connection(arrived, Router(route))
    assert conn.original is None
    conn.close()
    with pytest.raises(ConnectionOver):
        assert conn.original


def test_what_a_client_of_a_proxy_asks_for() -> None:
    session = Socks4Session(1, CLIENT, LISTENER, 0.0, command=Command.CONNECT.name)
    conn = connection(session)
    assert conn.requested is None
    session.requested, session.user_id = "example.com:80", b"fred"
    assert (conn.requested, conn.user_id) == ("example.com:80", b"fred")


def test_what_a_client_asks_for_is_not_read_as_an_operators_word() -> None:
    """`ssl:` names files, and reading one of those may take for ever."""
    session = Socks4Session(1, CLIENT, LISTENER, 0.0)
    session.requested = "ssl:h:1:privateKey=/dev/stdin:80"
    read: list[str] = []
    conn = connection(session, server=read.append)
    assert conn.server(conn.requested).server == session.requested
    assert read == []
    conn.server("10.0.0.5:80")
    assert read == ["10.0.0.5:80"]


# -- facts


def test_facts_are_text() -> None:
    facts = connection().facts
    facts["tenant"], facts["count"], facts["share"], facts["new"] = "a", 3, 0.5, True
    expected = {"tenant": "a", "count": "3", "share": "0.5", "new": "True"}
    assert facts == expected
    assert dict(facts) == expected
    assert repr(facts) == repr(expected)
    del facts["count"]
    assert "count" not in facts
    assert len(facts) == 3


@pytest.mark.parametrize("name", ["", "A", "1a", "a b", "a=b", "a" * 33, "é", 5, None])
def test_names_that_no_fact_has(name: Any) -> None:
    facts = Facts()
    with pytest.raises(ValueError, match="no name of a fact"):
        facts[name] = "x"
    with pytest.raises(ValueError, match="no name of a fact"):
        facts.update({name: "x"})
    with pytest.raises(ValueError, match="no name of a fact"):
        facts |= {name: "x"}
    with pytest.raises(ValueError, match="no name of a fact"):
        facts.setdefault(name, "x")
    assert not facts


@pytest.mark.parametrize("value", [None, b"x", [], "x" * (LONGEST_FACT + 1), 10**300])
def test_values_that_no_fact_has(value: Any) -> None:
    facts = Facts()
    with pytest.raises(ValueError, match="the fact tenant"):
        facts["tenant"] = value
    assert not facts


def test_facts_have_a_limit_and_each_can_be_changed() -> None:
    facts = Facts()
    for number in range(MOST_FACTS):
        facts[f"fact_{number}"] = number
    facts["fact_0"] = "changed"
    with pytest.raises(ValueError, match="16 facts at most"):
        facts["one_more"] = 1
    assert len(facts) == MOST_FACTS
    assert facts["fact_0"] == "changed"


def test_facts_are_checked_however_they_are_set() -> None:
    conn: Any = connection()
    conn.facts |= {"tenant": "x"}
    conn.facts |= {"other": 1}
    assert conn.said()["facts"] == {"tenant": "x", "other": "1"}
    conn.facts = {"new": 2}
    assert conn.said()["facts"] == {"new": "2"}
    with pytest.raises(ValueError, match="no name of a fact"):
        conn.facts = {"A": 1}
    assert conn.said()["facts"] == {"new": "2"}


# -- limits


def test_limits_add_up() -> None:
    conn = connection()
    conn.limit("up=1Mbit,down=2MB", key="a")
    conn.limit(max_age=60)
    conn.limit(sessions=3)
    rates = Rates(up=125_000.0, down=2e6)
    assert conn.said()["limits"] == RouteLimits(
        bandwidth=rates, max_age=60, sessions=3, key="a"
    )
    conn.limit(500_000, key="b")
    assert conn.said()["limits"] == RouteLimits(
        bandwidth=Rates(5e5, 5e5), max_age=60, sessions=3, key="b"
    )
    conn.limit(rates)
    assert conn.said()["limits"].bandwidth is rates


@pytest.mark.parametrize(
    "limits",
    [
        *({"bandwidth": "fast"}, {"bandwidth": 0}, {"bandwidth": True}),
        *({"bandwidth": float("inf")}, {"bandwidth": b"1MB"}, {"bandwidth": 1e20}),
        *({"max_age": 0}, {"max_age": -1}, {"max_age": "60"}, {"max_age": True}),
        *({"max_age": float("nan")}, {"sessions": 0}, {"sessions": 1.5}),
        *({"sessions": True}, {"key": 5}, {"key": "k" * (LONGEST_KEY + 1)}),
    ],
)
def test_limits_that_can_not_be(limits: Any) -> None:
    conn = connection()
    with pytest.raises(
        ValueError, match=r"^(bandwidth 'fast': exp|expected|a key|\w+ is a)"
    ):
        conn.limit(**limits)
    assert conn.said() == {}
    assert RouteLimits() == NO_LIMITS


# -- filters


def filters_of(conn: Connection) -> list[Any]:
    return list(conn.said().get("filters", ()))


def test_filters_by_name_and_of_a_programs_own_in_order() -> None:
    own = First(3)
    conn = connection()
    conn.filter("first", size=64)
    conn.filter(own)
    conn.filter("first", size="64")
    assert filters_of(conn) == [First(64), own, First(64)]


def test_equal_filters_of_living_sessions_are_one() -> None:
    router = Router(route)
    one, two, three = (Connection(Arrived(), router) for _ in range(3))
    one.filter("first", size=64)
    two.filter("first", size=64)
    three.filter("first", size=65)
    first, second, third = (filters_of(each)[0] for each in (one, two, three))
    assert first is second
    assert first is not third
    assert len(router._filters) == 2
    del one, two, three, first, second, third
    gc.collect()
    assert not router._filters


def test_captures_into_one_file_are_one(tmp_path: Path) -> None:
    router = Router(route)
    conns = [Connection(Arrived(), router) for _ in range(2)]
    for conn in conns:
        conn.filter("capture", file=str(tmp_path / "a.pcapng"), keep=2)
    first, second = (filters_of(conn)[0] for conn in conns)
    assert first is second
    assert not list(tmp_path.iterdir())


def test_options_that_look_alike_are_not_taken_for_one_another() -> None:
    """In Python, 1 is 1.0 is True."""
    conn = connection()
    conn.filter("first", size=1)
    for bad in (True, 1.0):
        with pytest.raises(ConfigError, match="bad size"):
            conn.filter("first", size=bad)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("frist", {}, "there is no such filter; did you mean first?"),
        ("first:16", {}, "'first:16': a name alone; its options follow as keywords"),
        ("first", {}, "it needs a value"),
        ("first", {"size": [1]}, "bad size"),
        ("first", {"size": 1, "sise": 2}, "did you mean size"),
    ],
)
def test_filters_that_can_not_be(name: str, options: Any, said: str) -> None:
    conn = connection()
    with pytest.raises(ConfigError, match=said):
        conn.filter(name, **options)
    assert filters_of(conn) == []


class ForDatagrams(FilterFactory):
    def build_datagram_filter(self, way: Any) -> Any:
        """None."""


@pytest.mark.parametrize("wanted", [5, None, First, b"first"])
def test_what_is_no_filter(wanted: Any) -> None:
    with pytest.raises(TypeError, match="is no factory of filters"):
        connection().filter(wanted)


def test_factories_that_can_not_be() -> None:
    conn = connection()
    with pytest.raises(ValueError, match="is for UDP flows"):
        conn.filter(ForDatagrams())
    with pytest.raises(ValueError, match="has its options already"):
        conn.filter(First(3), size=5)


def test_filters_have_a_limit() -> None:
    conn = connection()
    for _ in range(MOST_FILTERS):
        conn.filter("first", size=1)
    with pytest.raises(ValueError, match="16 filters"):
        conn.filter("first", size=1)


@implementer(IFilterFactory)
class Slotted:
    """A package's own, to which there can be no weak reference."""

    __slots__ = ("name",)

    def build_filter(self, way: Any) -> Any:
        return Filter()


def test_filters_without_weak_references_are_made_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("relayd.routing.router.filter_of", lambda *_: Slotted())
    conn = connection()
    conn.filter("slotted")
    conn.filter("slotted")
    assert len(set(filters_of(conn))) == 2


# -- a reply


@pytest.mark.parametrize("data", ["text", None, bytearray(b"x")])
def test_a_reply_is_bytes(data: Any) -> None:
    with pytest.raises(ValueError, match="a reply is bytes"):
        connection().reply(data)


def test_a_reply_has_a_limit() -> None:
    conn = connection()
    conn.reply(bytes(LONGEST_REPLY - 1))
    conn.reply(b"x")
    with pytest.raises(ValueError, match="16384 bytes at most"):
        conn.reply(b"x")
    assert len(conn.last_words) == LONGEST_REPLY


def test_a_session_is_only_read() -> None:
    conn = connection()
    assert isinstance(conn.session, Session)
