"""The SOCKS4 proxy on fakes: ident, policies, the log, and programs that embed it."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import UNIXAddress
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from zope.interface.verify import verifyClass, verifyObject

from relayd.core.interfaces import IGate, IProxyPolicy
from relayd.core.session import Ending
from relayd.net.resolving import Resolver
from relayd.observing.json_lines import JsonLines
from relayd.preludes.socks4 import Code, Command, write_request
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import parse_rule
from relayd.socks.session import Socks4Session
from relayd.socks4 import Socks4Factory
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.proxies import (
    BIND,
    BIND_ANY,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    SERVER,
    Counter,
    Porter,
    Proxy,
    line,
    refused,
)

# -- ident


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_ident_that_agrees(request_: bytes) -> None:
    proxy = Proxy(ident=True, ident_port=1113)
    client = proxy.client(request_ + b"data")
    [(host, port, *_, source)] = proxy.clock.tcpClients
    assert (host, port, source) == ("192.0.2.1", 1113, ("192.0.2.2", 0))
    assert not proxy.dialled
    assert not proxy.ports
    question, transport = proxy.identd()
    assert transport.value() == b"50000, 80\r\n"
    question.dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    assert not len(proxy.factory.handshakes)
    if request_ == CONNECT:
        server = proxy.server.dial.connect()
    else:
        server = proxy.port.accept(SERVER)
    server.take()
    assert server.taken == b"data"
    client.lose()
    proxy.over(Ending.DOWNSTREAM_RESET)


@pytest.mark.parametrize(
    ("said", "shown"),
    [(b"eve", "'eve'"), (b"\xff", r"b'\xff'"), (rb"\xff", r"'\\xff'")],
)
def test_ident_that_names_another(said: bytes, shown: str) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : " + said + b"\r\n")
    refused(client, Code.WRONG_IDENT)
    assert proxy.dialled == []
    assert proxy.session.reply == 93
    assert proxy.session.detail == f"identd says {shown}"
    proxy.over(Ending.IDENT_FAILED)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"50000, 80 : ERROR : NO-USER\r\n", "NO-USER"),
        (b"nonsense\r\n", "nonsense"),
        (b"50000, 81 : USERID : UNIX : joe\r\n", "50000, 81"),
        (b"", "left without an answer"),
    ],
)
def test_ident_that_names_nobody(answer: bytes, why: str) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    question, _ = proxy.identd()
    if answer:
        question.dataReceived(answer)
    else:
        question.connectionLost(Failure(error.ConnectionDone()))
    refused(client, Code.NO_IDENT)
    assert proxy.dialled == []
    assert proxy.session.reply == 92
    assert why in proxy.session.detail
    proxy.over(Ending.IDENT_FAILED)


def test_ident_that_can_not_be_asked() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    [(_, _, factory, *_)] = proxy.clock.tcpClients
    [connector] = proxy.clock.connectors
    factory.clientConnectionFailed(connector, Failure(error.ConnectionRefusedError()))
    refused(client, Code.NO_IDENT)
    proxy.over(Ending.IDENT_FAILED)


def test_ident_that_does_not_answer() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    _, transport = proxy.identd()
    proxy.clock.pump([1] * 9)
    assert client.connected
    assert client.dataBuffer == b""
    proxy.clock.pump([1] * 2)
    assert transport.disconnecting
    refused(client, Code.NO_IDENT)
    assert "did not answer in 10 s" in proxy.session.detail
    proxy.over(Ending.IDENT_FAILED)


def test_the_handshake_s_deadline_holds_for_identd_as_well() -> None:
    proxy = Proxy(ident=True, handshake_timeout=4)
    client = proxy.client(CONNECT)
    proxy.clock.pump([0.5] * 10)
    refused(client, Code.NO_IDENT)
    assert "identd" in proxy.session.detail
    assert proxy.clock.connectors[0].stoppedConnecting
    proxy.over(Ending.IDENT_FAILED)


def test_a_unix_client_has_no_identd() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT, peer=UNIXAddress(None), facing=UNIXAddress("/run/x"))
    refused(client, Code.NO_IDENT)
    assert proxy.clock.tcpClients == []
    proxy.over(Ending.IDENT_FAILED)


def test_nobody_is_asked_about_a_user_who_is_not_admitted() -> None:
    proxy = Proxy(ident=True)
    proxy.policy.unwanted = {b"joe"}
    refused(proxy.client(CONNECT))
    assert proxy.clock.tcpClients == []


# -- a policy with a bug


@pytest.mark.parametrize(
    "request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME], ids=str
)
@pytest.mark.parametrize("ident", [False, True], ids=["", "after ident"])
def test_a_policy_with_a_bug_ends_its_session_only(
    request_: bytes, ident: bool, logged_failures: LoggedFailures
) -> None:
    proxy = Proxy(ident=ident)
    other = proxy.client()
    proxy.policy.problem = ZeroDivisionError("in the policy")
    client = proxy.client(request_)
    if ident:
        proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    if proxy.resolver.asked:
        proxy.resolver.answer(SERVER)
    client.take()
    assert not client.connected
    logged_failures.take("in the policy")
    assert proxy.witness.sessions[1].ending is Ending.FAILED
    assert (proxy.dialled, proxy.listeners) == ([], [])
    proxy.policy.problem = None
    assert other.connected
    assert len(proxy.factory.sessions) == 1
    other.lose()
    proxy.nothing_left()


def test_a_policy_with_a_bug_for_whoever_comes_ends_the_session(
    logged_failures: LoggedFailures,
) -> None:
    proxy = Proxy(bind_any=True)
    client = proxy.client(BIND_ANY)
    client.take()
    proxy.policy.problem = ZeroDivisionError("in the policy")
    assert not proxy.port.accept("203.0.113.99").connected
    assert not client.connected
    logged_failures.take("in the policy")
    proxy.over(Ending.FAILED)


def test_an_admission_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("in admit")

    monkeypatch.setattr(proxy.policy, "admit", broken)
    assert not proxy.client(CONNECT).connected
    logged_failures.take("in admit")
    proxy.over(Ending.FAILED)


# -- the log


def test_the_log_says_what_was_asked_for_and_answered() -> None:
    proxy = Proxy()
    client, server = proxy.joined()
    client.receive_eof()
    server.receive_eof()
    text = line(proxy)
    assert " ending=done code=-- " in text
    assert text.endswith(f"command=connect user='joe' requested={SERVER}:80 reply=90")


def test_the_log_of_a_bind_by_name() -> None:
    proxy = Proxy()
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(SERVER)
    proxy.port.accept("203.0.113.13", 1313)
    client.take()
    text = line(proxy)
    assert " upstream=203.0.113.13:1313 " in text
    assert " command=bind user='joe' requested=example.com:80 reply=91 " in text
    assert text.endswith(f" detail='203.0.113.13:1313 came instead of {SERVER}'")


def test_the_log_of_one_who_never_asked() -> None:
    proxy = Proxy()
    proxy.client().lose()
    assert line(proxy).endswith(" command=- user=- requested=- reply=-")


def test_an_object_of_the_log_leaves_out_what_there_is_not() -> None:
    """And nothing that a client has said, whatever it is."""
    session = Socks4Session(1, "client", "listener", 0.0)
    assert JsonLines().facts(session.facts.items()) == ""
    session.user_id, session.notes = b"-", {"first_up": "-"}
    assert JsonLines().facts(session.facts.items()) == (
        ""","relayd.fact.user":"'-'","relayd.fact.first_up":"-\""""
    )


def test_the_log_of_an_ipv6_destination() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, "2001:db8::1", 80))
    client.lose()
    assert " user=- requested=[2001:db8::1]:80 reply=- " in line(proxy) + " "


@pytest.mark.parametrize(
    "user",
    [
        b"joe\r\nsession=1 ending=done",
        b"\x1b[2J",
        b"\xff\xfe",
        "\u202e".encode(),
        b"' reply=90",
    ],
)
def test_a_user_id_can_not_break_the_line(user: bytes) -> None:
    proxy = Proxy()
    proxy.client(b"\4\1\0\x50\1\2\3\4" + user + b"\0").lose()
    text = line(proxy)
    assert text.isascii()
    assert text.isprintable()
    shown = text.partition(" user=")[2].rpartition(" requested=")[0]
    assert ast.literal_eval(shown) in (user, user.decode("utf-8", "replace"))
    # One that is no text is written as bytes.
    shown = shown.removeprefix("b")
    assert shown[0] == shown[-1]
    assert shown[0] in "'\""
    assert shown[0] not in shown[1:-1]


@pytest.mark.parametrize(
    ("user", "shown"),
    [
        (b"joe", "'joe'"),
        (b"a b", r"'a\x20b'"),
        ("\u00ff".encode(), r"'\xff'"),
        (b"\xff", r"b'\xff'"),
        (rb"\xff", r"'\\xff'"),
        (b"\xff b", r"b'\xff\x20b'"),
        (rb"b'\xff'", '"' + r"b'\\xff'" + '"'),
    ],
)
def test_a_user_id_that_is_no_text_can_be_told_from_text(
    user: bytes, shown: str
) -> None:
    proxy = Proxy()
    proxy.client(b"\4\1\0\x50\1\2\3\4" + user + b"\0").lose()
    assert f" user={shown} requested=" in line(proxy)


def test_the_detail_names_the_rule() -> None:
    rule = parse_rule("--deny-dest", "198.51.100.0/24:80", allow=False)
    proxy = Proxy(policy=ProxyPolicy([rule], guarded=False))
    refused(proxy.client(CONNECT))
    assert "--deny-dest 198.51.100.0/24:80" in line(proxy)
    guarded = Proxy(policy=ProxyPolicy())
    refused(guarded.client(write_request(Command.CONNECT, "10.1.2.3", 80)))
    assert "--allow-dest 10.0.0.0/8" in line(guarded)


# -- in somebody's program


def test_it_is_embedded_with_a_reactor_and_nothing_else() -> None:
    clock = Clock()
    factory = Socks4Factory(clock)
    assert factory.resolver is Resolver.of(clock)
    assert isinstance(factory.policy, ProxyPolicy)
    assert factory.policy.guarded, "an open proxy is a decision"
    transport = FakeTransport()
    protocol: Any = factory.buildProtocol(transport.peer)
    transport.connect(protocol)
    transport.receive(write_request(Command.CONNECT, "127.0.0.1", 80))
    refused(transport)
    factory.stopFactory()
    assert clock.getDelayedCalls() == []


def test_its_own_listener_is_one_of_relayd_s() -> None:
    factory = Socks4Factory(MemoryReactorClock())
    assert factory.listener("127.0.0.1").where == "127.0.0.1:0"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"handshake_timeout": -1}, "handshake must not be negative"),
        ({"bind_timeout": float("nan")}, "bind_timeout must not be negative"),
        ({"connect_timeout": -1}, "connect must not be negative"),
        ({"max_handshakes": 0}, "max_handshakes must be at least 1"),
        ({"max_handshakes_per_client": 0}, "per_client must be at least 1"),
        ({"max_binds": 0}, "max_binds must be at least 1"),
        ({"max_binds_per_client": -5}, "per_client must be at least 1"),
        ({"bind_address": "::1"}, "::1"),
        ({"external_address": "example.com"}, "example.com"),
    ],
)
def test_what_can_not_be_meant(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Socks4Factory(Clock(), **options)


def test_the_fakes_are_what_is_asked_for() -> None:
    assert verifyClass(IProxyPolicy, Porter)
    assert verifyObject(IGate, Counter())
