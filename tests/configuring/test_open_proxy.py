"""Who may use a proxy: nobody by accident."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from relayd.configuring.about_clients import about_admission, open_proxy
from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    UnixPath,
)
from relayd.configuring.address_settings import ALLOW_CLIENT, SOCKS4_LISTEN
from relayd.configuring.config import is_local
from relayd.configuring.given import Given, RelaySection
from relayd.core.settings import OPEN


def problems(
    listeners: Iterable[Address], *, bounded: bool = False, opened: bool = False
) -> list[str]:
    """What is wrong with a proxy: with --allow-client, or with --open."""
    given = [Given(SOCKS4_LISTEN, str(each), each) for each in listeners]
    if bounded:
        given.append(Given.of(ALLOW_CLIENT, "10.0.0.0/8"))
        given.append(Given.of(ALLOW_CLIENT, "unix"))
    if opened:
        given.append(Given(OPEN, "", True))
    section = RelaySection("socks4", None, given)
    return [*open_proxy(section), *about_admission(section)]


def refusal(listeners: Iterable[Address], **given: bool) -> str:
    """The problem, which is one line."""
    [message] = problems(listeners, **given)
    assert message.isprintable()
    return message


LOCAL: tuple[Address, ...] = (
    HostPort("127.0.0.1", 1080),
    HostPort("127.255.0.1", 0),
    HostPort("::1", 1080),
    HostPort("::ffff:127.0.0.1", 1080),
    HostPort("localhost", 1080),
    UnixPath("/run/socks"),
)

REACHABLE: tuple[Address, ...] = (
    HostPort(None, 1080),
    HostPort("0.0.0.0", 1080),
    HostPort("::", 1080),
    HostPort("192.168.0.1", 1080),
    HostPort("2001:db8::1", 1080),
    HostPort("::ffff:0.0.0.0", 1080),
    HostPort("::ffff:192.168.0.1", 1080),
    HostPort("example.com", 1080),
    HostPort("localhost.example.com", 1080),
    # Where these listen is Twisted's business.
    EndpointString("tcp:1080:interface=127.0.0.1"),
    EndpointString("systemd:domain=INET:index=0"),
)


def test_which_listeners_only_this_machine_can_reach() -> None:
    """Loopback by address or by its name, and socket files; nothing that we guess."""
    assert [each for each in LOCAL if not is_local(each)] == []
    assert [each for each in REACHABLE if is_local(each)] == []


@pytest.mark.parametrize("listener", REACHABLE, ids=str)
def test_a_proxy_is_not_open_by_accident(listener: Address) -> None:
    """One listener that others can reach is enough; the line says what to add."""
    for listeners in ([listener], [*LOCAL, listener], [listener, *LOCAL]):
        message = refusal(listeners)
        assert message == (
            f"--listen '{listener}' would be an open proxy, for everybody who can"
            " reach it. Add --allow-client CIDR for your clients (such as"
            " --allow-client 192.168.0.0/16), or --open"
        )
    for bounded in (True, False):
        assert not problems([listener], bounded=bounded, opened=not bounded)


def test_a_local_proxy_needs_no_option() -> None:
    """And may have it."""
    for bounded, opened in ((False, False), (True, False), (False, True)):
        assert not problems(LOCAL, bounded=bounded, opened=opened)


@pytest.mark.parametrize(
    "text",
    [
        "tcp:1080:interface=127.0.0.1",
        "ssl:1080:privateKey=/etc/haproxy/key.pem",
        "ssl:1080:privateKey=haproxy",
        "unix:haproxy.sock",
        "unix:/run/haproxy",
        "tcp:1080:x=\\",
    ],
)
def test_allow_client_is_accepted_where_clients_are_known(text: str) -> None:
    """TLS does, as TCP."""
    assert not problems([EndpointString(text)], bounded=True)


def test_open_and_allow_client_contradict_each_other() -> None:
    """Whichever the listeners are."""
    for listeners in (LOCAL, REACHABLE, ()):
        assert refusal(listeners, bounded=True, opened=True) == (
            "--open and --allow-client contradict each other: give one"
        )
