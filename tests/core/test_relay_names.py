"""The names of relays: counted, or given and checked."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core import relay_names as module
from relayd.core.observers import Observer
from relayd.core.relay_names import MAX_LENGTH, check_name, relay_name, relay_names
from relayd.core.session import Session
from relayd.socks4 import Socks4Factory
from relayd.stream.factory import StreamFactory
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool
from tests.support.fakes import FakeTransport


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has made no relay yet."""
    monkeypatch.setattr(module, "_numbers", itertools.count(1))


def test_names_are_numbered_in_a_process() -> None:
    """Those that were given one are not counted."""
    assert relay_name() == "relay1"
    assert relay_name("web") == "web"
    assert relay_name(None) == "relay2"


def test_a_name_is_one_word_of_the_log() -> None:
    for name in ("a", "relay1", "eu-west_1", "9", "-", "x" * MAX_LENGTH):
        assert relay_name(name) == check_name(name) == name
    for name in (
        "",
        "a b",
        "a=b",
        "Web",
        "a.b",
        "é",
        "a\n",
        "relay1 ",
        "x" * (MAX_LENGTH + 1),
        "\u0661",
    ):
        with pytest.raises(
            ValueError, match="expected 1 to 64 small letters"
        ) as caught:
            relay_name(name)
        assert str(caught.value).startswith(f"bad name {name!r}: ")


@given(st.text())
def test_any_text_is_a_name_or_refused_in_one_line(text: str) -> None:
    try:
        check_name(text)
    except ValueError as problem:
        assert str(problem).isprintable()
    else:
        assert text.isascii()
        assert not set(text) & set(" =\n\r")


def test_relays_made_together_have_each_another_name() -> None:
    """A number that somebody was given is left out."""
    assert relay_names(["relay2", None, None, "web", None]) == [
        *("relay2", "relay1", "relay3", "web", "relay4")
    ]
    assert relay_names([]) == []
    assert relay_names([None]) == ["relay5"]


def test_two_relays_can_not_have_one_name() -> None:
    with pytest.raises(ValueError, match="^two relays can't both be called 'web'$"):
        relay_names(["web", None, "web"])
    with pytest.raises(ValueError, match="^bad name 'w b': "):
        relay_names(["web", "w b"])


class Opened(Observer):
    """Keeps the sessions that it hears of."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def opened(self, session: Session) -> None:
        self.sessions.append(session)


@pytest.mark.parametrize("name", ["web", None])
@pytest.mark.parametrize("kind", ["tcp", "socks4"])
def test_a_session_knows_its_relays_name(kind: str, name: str | None) -> None:
    """As the relay was given it, or as it is numbered."""
    clock, seen = Clock(), Opened()
    factory: StreamFactory
    if kind == "tcp":
        factory = RelayFactory(Pool([]), clock=clock, observer=seen, name=name)
    else:
        factory = Socks4Factory(clock, observer=seen, name=name)
    transport = FakeTransport()
    transport.connect(factory.buildProtocol(transport.peer))
    [session] = seen.sessions
    assert session.relay == factory.name == (name or "relay1")
    factory.abort_all()
    factory.stopFactory()


def test_a_factory_refuses_what_is_no_name() -> None:
    with pytest.raises(ValueError, match="^bad name 'a b': "):
        RelayFactory(Pool([]), clock=Clock(), name="a b")
    with pytest.raises(ValueError, match="^bad name '': "):
        Socks4Factory(Clock(), name="")
