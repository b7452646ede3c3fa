"""From a command line to a service: the settings reach the relays and the proxy."""

from __future__ import annotations

import re
from typing import Any

import pytest
from twisted.application.service import IServiceMaker
from twisted.internet import reactor
from zope.interface.verify import verifyObject

import relayd
import relayd.stream.relay
import relayd.tap.options
from relayd.core.errors import CannotStart, Refused
from relayd.core.session import Session
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.running import RelayService
from relayd.socks.rules import parse_rule
from relayd.stream.bridge import Timeouts
from relayd.tap import socks4
from relayd.tap.relayd import Options, makeService
from tests.support.command_lines import GOOD, make
from twisted.plugins import relayd_plugin

# -- the service


def test_the_settings_reach_the_relays() -> None:
    """Each listener has them, and its own destinations."""
    relays = make(
        *("--name=web", "-l", "127.0.0.1:0", "-d", "80", "-d", "db:5432"),
        *("-l", "unix:/s", "-d", "81"),
        *("--connect-timeout=1", "--stall-timeout=2", "--idle-timeout=3"),
        *("--half-close-timeout=4", "--drain-timeout=5", "--handshake-timeout=6"),
        "--shutdown-delay=7",
    )
    assert relays.drain_timeout == 5
    assert relays.shutdown_delay == 7
    shown = [(each.name, each.factory.name, each.purpose) for each in relays.listenings]
    numbered = shown[1][1]
    assert re.fullmatch(r"relay\d+", numbered)
    assert shown == [
        ("127.0.0.1:0", "web", "relaying to 127.0.0.1:80, db:5432"),
        ("unix:/s", numbered, "relaying to 127.0.0.1:81"),
    ]
    for each in relays.listenings:
        assert each.factory.timeouts == Timeouts(1, 2, 3, 4, 6)


def test_the_log_is_as_verbose_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the factories are given to report to."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.stream.relay, "Observers", lambda *them: given.extend(them)
    )
    make(*GOOD)
    make(*GOOD, "-v")
    assert [type(each) for each in given] == [SessionLog, VerboseSessionLog]


def test_what_twisted_can_not_use_is_one_line() -> None:
    """The endpoint strings are only looked into when they are made."""
    for argv, says in (
        (("-l", "tcp:http", "-d", "80"), "bad endpoint 'tcp:http': 'http' is not"),
        (("-l", "80", "-d", "tcp:80"), "bad endpoint 'tcp:80': it lacks 'port'"),
    ):
        options = Options()
        options.parseOptions(argv)
        with pytest.raises(CannotStart) as caught:
            makeService(options, reactor)
        message = str(caught.value.code)
        assert message.startswith(f"relayd: {says}")
        assert message.isprintable()


def test_the_running_reactor_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`twistd` calls with the options alone."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.tap.options,
        "make_service",
        lambda _, reactor, *more: given.append(reactor),
    )
    options = Options()
    options.parseOptions(GOOD)
    makeService(options)
    assert given == [reactor]


def test_the_plugins_name_their_modules() -> None:
    """`twistd` finds the options and the service by them."""
    assert verifyObject(IServiceMaker, relayd_plugin.relayd)
    assert relayd_plugin.relayd.tapname == "relayd"
    assert relayd_plugin.relayd.options is Options
    assert relayd_plugin.relayd.makeService is makeService
    assert verifyObject(IServiceMaker, relayd_plugin.socks4)
    assert relayd_plugin.socks4.tapname == "socks4"
    assert relayd_plugin.socks4.options is socks4.Options
    assert relayd_plugin.socks4.makeService is socks4.makeService


# -- the proxy's service


def make_socks4(*argv: str) -> RelayService:
    """The proxies that a command line makes."""
    options = socks4.Options()
    options.parseOptions(argv)
    service = socks4.makeService(options, reactor)
    [proxies] = [each for each in service if isinstance(each, RelayService)]
    return proxies


def factories(*argv: str) -> list[Any]:
    """What serves the clients of each listener."""
    return [each.factory for each in make_socks4(*argv).listenings]


def test_the_settings_reach_the_proxy() -> None:
    """Each of them."""
    [factory] = factories(
        *("--connect-timeout=1", "--stall-timeout=2", "--idle-timeout=3"),
        *("--half-close-timeout=4", "--handshake-timeout=5", "--bind-timeout=6"),
        *("--ident", "--bind-any", "--bind-address=127.0.0.9", "--userid=joe"),
        *("--external-address=192.0.2.2", "--deny-dest=*:25", "--max-handshakes=2"),
        *("--max-handshakes-per-client=1", "--max-binds=4", "--max-binds-per-client=3"),
    )
    assert factory.timeouts == Timeouts(1, 2, 3, 4, 5)
    assert factory.bind_timeout == 6
    assert (factory.ident, factory.bind, factory.bind_any) == (True, True, True)
    assert factory.bind_address == "127.0.0.9"
    assert factory.external_address == "192.0.2.2"
    assert factory.policy.rules == (parse_rule("", "*:25", allow=False),)
    assert factory.policy.user_ids == {b"joe"}
    assert [
        (waiting.limit, waiting.limit_per_client)
        for waiting in (factory.handshakes, factory.binds)
    ] == [(2, 1), (4, 3)]
    [factory] = factories("--no-bind")
    assert not factory.bind
    assert factory.policy.user_ids is None


def test_a_proxy_is_guarded_where_others_can_reach_it() -> None:
    """Listener by listener, whoever was allowed to."""
    listeners = ("127.0.0.1:0", "0.0.0.0:0", "unix:/s", "0", "tcp:0", "[::1]:0")
    allowed = ("--allow-client", "10.0.0.0/8", "--allow-client", "unix")
    for word in (("--open",), allowed):
        made = factories(*word, *(f"-l{each}" for each in listeners))
        guarded = [factory.policy.guarded for factory in made]
        assert guarded == [False, True, False, True, True, False]


def test_the_listening_line_says_whom_a_proxy_serves() -> None:
    """And the gate admits only these."""
    for argv, purpose, strangers in (
        (("-l", "127.0.0.1:0"), "this machine", True),
        (("--open", "-l", "0"), "everybody", True),
        (
            ("-l0", "--allow-client=10.0.0.0/8", "--allow-client=192.0.2.1"),
            "10.0.0.0/8, 192.0.2.1",
            False,
        ),
    ):
        [listening] = make_socks4(*argv).listenings
        assert listening.purpose == f"a SOCKS4 proxy for {purpose}"
        factory: Any = listening.factory
        assert (factory.gate is None) == strangers
        for client, comes in (("192.0.2.1:5", True), ("192.0.2.2:5", strangers)):
            session = Session(1, client, "192.0.2.3:1080", 0.0)
            if factory.gate is None:
                assert comes
            elif comes:
                factory.gate.enter(session).release()
            else:
                with pytest.raises(Refused):
                    factory.gate.enter(session)


def test_a_proxy_has_one_name() -> None:
    """However many listeners it has."""
    listeners = ("-l", "127.0.0.1:0", "-l", "[::1]:0")
    made = make_socks4(*listeners, "--name", "socks").listenings
    assert [each.factory.name for each in made] == ["socks", "socks"]
    one, other = factories(*listeners)
    assert one.name == other.name
    assert re.fullmatch(r"relay\d+", one.name)


def test_the_limits_count_the_clients_of_all_listeners() -> None:
    """Whichever of the listeners they came by."""
    made = factories("-l", "127.0.0.1:0", "-l", "[::1]:0", "-l", "unix:/s")
    assert len({id(factory.handshakes) for factory in made}) == 1
    assert len({id(factory.binds) for factory in made}) == 1
    assert len({id(factory.policy) for factory in made}) == 3


def test_the_proxys_log_is_as_verbose_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the factories are given to report to."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.stream.relay, "Observers", lambda *them: given.extend(them)
    )
    for argv in ((), ("-v",), ("-q",)):
        make_socks4(*argv)
    kinds = [SessionLog, VerboseSessionLog, QuietSessionLog]
    assert [type(each) for each in given] == kinds


def test_what_twisted_can_not_use_is_one_line_of_the_proxy() -> None:
    """The endpoint strings are only looked into when they are made."""
    options = socks4.Options()
    options.parseOptions(["-l", "tcp:http", "--open"])
    with pytest.raises(CannotStart) as caught:
        socks4.makeService(options, reactor)
    message = str(caught.value.code)
    assert message.startswith("socks4: bad endpoint 'tcp:http': 'http' is not a")
    assert message.isprintable()


def test_the_running_reactor_is_the_proxys_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`twistd` calls with the options alone."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.tap.options,
        "make_service",
        lambda _, it, *more: given.append(it),
    )
    socks4.makeService(socks4.Options())
    assert given == [reactor]
