"""Settings: numbers as they are written, and listeners matched with destinations."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.bridge import Timeouts
from relayd.config import (
    BACKLOG_LIMIT,
    RECEIVE_BUFFER_LIMIT,
    SOCKS4_LISTENER,
    TIMEOUT_LIMIT,
    Config,
    Given,
    Limits,
    Relay,
    Socks4Config,
    UdpRelay,
    backlog,
    bound,
    check_openness,
    client_network,
    ipv4_address,
    is_local,
    lifetime,
    pair,
    ratio,
    receive_buffer,
    seconds,
    user_id,
)
from relayd.endpoints import Address, EndpointString, HostPort, UnixPath, parse_listener
from relayd.errors import ConfigError


def refusal(parse: Callable[..., object], *args: Any) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    message = str(caught.value)
    assert message.isprintable()
    return message


# -- numbers


def test_seconds() -> None:
    """Whole numbers, fractions, and 0 for those who want no limit."""
    for text, value in (
        ("0", 0.0),
        ("10", 10.0),
        ("0.25", 0.25),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("100000000", TIMEOUT_LIMIT),
    ):
        assert seconds("--idle-timeout", text) == value


def test_what_is_no_timeout_is_refused() -> None:
    """With the option, the text, and what is expected."""
    bad = ["", "x", "10s", "-1", "-0.001", "nan", "inf", "-inf", "1e400", "0x10"]
    bad += ["100000001", "1,5", "1 0", "10\n20"]
    for text in bad:
        assert refusal(seconds, "--idle-timeout", text) == (
            f"bad --idle-timeout {text!r}: expected seconds from 0 to 100000000"
        )


@given(st.floats(0, TIMEOUT_LIMIT))
def test_every_timeout_in_range_can_be_written(value: float) -> None:
    """As Python writes a number, it is read."""
    assert seconds("--x", repr(value)) == value


@given(st.text() | st.floats().map(str) | st.text("0123456789.e-+_ infa"))
def test_any_text_is_a_timeout_or_refused(text: str) -> None:
    """Nothing but a finite number in range gets through."""
    try:
        value = seconds("--x", text)
    except ConfigError as problem:
        message = str(problem)
        assert repr(text) in message
    else:
        assert math.isfinite(value)
        assert 0 <= value <= TIMEOUT_LIMIT


def test_what_is_no_backlog_is_refused() -> None:
    """With the text, and what is expected."""
    bad = ["", "x", "0", "-1", "+1", "1.0", "1e3", " 1", "1_0", "65536", "9" * 5000]
    bad += ["²", "٣"]  # digits, but not of a number that anyone writes here
    for text in bad:
        assert refusal(backlog, text) == (
            f"bad --backlog {text!r}: expected a number from 1 to 65535"
        )


@given(st.integers(-10, 10 * BACKLOG_LIMIT))
def test_a_backlog(number: int) -> None:
    """Exactly the numbers in range are taken."""
    if 1 <= number <= BACKLOG_LIMIT:
        assert backlog(str(number)) == number
    else:
        assert repr(str(number)) in refusal(backlog, str(number))


# -- listeners and destinations


def listen(port: int) -> Given:
    """`--listen`, and a port."""
    return Given("--listen", str(port), HostPort(None, port))


def dest(port: int) -> Given:
    """`--dest`, and a port."""
    return Given("--dest", str(port), HostPort(None, port))


def ports(relays: tuple[Relay, ...]) -> list[tuple[int, list[int]]]:
    """Each listener's port, and its destinations'."""
    assert isinstance(relays, tuple)
    found: list[Any] = [(each.listen, each.destinations) for each in relays]
    assert all(isinstance(own, tuple) for _, own in found)
    return [(where.port, [one.port for one in own]) for where, own in found]


def test_one_listener_and_its_destinations() -> None:
    """In the order given; with one listener they may stand before it."""
    assert ports(pair([listen(1), dest(2)])) == [(1, [2])]
    assert ports(pair([dest(2), listen(1)])) == [(1, [2])]
    assert ports(pair([dest(3), listen(1), dest(2)])) == [(1, [3, 2])]
    assert ports(pair([listen(1), dest(2), dest(2)])) == [(1, [2, 2])]


def test_several_listeners_own_what_follows_them() -> None:
    """Two that are written alike stay two."""
    given_ = [listen(1), dest(2), dest(3), listen(1), dest(4)]
    assert ports(pair(given_)) == [(1, [2, 3]), (1, [4])]


def test_what_has_no_partner_is_quoted() -> None:
    """Which one it is, and what to do about it."""
    for given_, message in (
        ([], "nothing to relay: give --listen and --dest"),
        ([dest(2), dest(3)], "--dest '2' has no --listen"),
        ([listen(1)], "--listen '1' has no --dest"),
        ([listen(1), listen(4), dest(2)], "--listen '1' has no --dest"),
        ([listen(1), dest(2), listen(4)], "--listen '4' has no --dest"),
        ([dest(2), listen(1), listen(4)], "--dest '2' stands before the first"),
        ([dest(2), listen(1), dest(3), listen(4), dest(5)], "--dest '2' stands"),
    ):
        assert refusal(pair, given_).startswith(message)


@given(st.lists(st.booleans(), max_size=8))
def test_any_order_of_options_is_paired_or_refused(kinds: list[bool]) -> None:
    """Nothing is lost, doubled or reordered, and no listener is without a server."""
    given_ = [listen(i) if kind else dest(i) for i, kind in enumerate(kinds)]
    listeners = [i for i, kind in enumerate(kinds) if kind]
    try:
        paired = ports(pair(given_))
    except ConfigError:
        # What has an answer is not refused: one that leads, each with its own.
        sections = "".join("L" if kind else "d" for kind in kinds).split("L")
        alone = len(listeners) == 1 and "d" in sections[0] + sections[1]
        assert not alone
        assert len(listeners) < 2 or sections[0] or "" in sections[1:]
    else:
        assert [port for port, _ in paired] == listeners
        assert all(own for _, own in paired)
        served = [port for _, own in paired for port in own]
        assert served == [i for i, kind in enumerate(kinds) if not kind]
        if len(paired) > 1:
            assert all(port < min(own) for port, own in paired)


# -- who may use a proxy

LOCAL: tuple[Address, ...] = (
    HostPort("127.0.0.1", 1080),
    HostPort("127.255.0.1", 0),
    HostPort("::1", 1080),
    HostPort("localhost", 1080),
    UnixPath("/run/socks"),
)

REACHABLE: tuple[Address, ...] = (
    HostPort(None, 1080),
    HostPort("0.0.0.0", 1080),
    HostPort("::", 1080),
    HostPort("192.168.0.1", 1080),
    HostPort("2001:db8::1", 1080),
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
        message = refusal(
            partial(check_openness, listeners, bounded=False, opened=False)
        )
        assert message == (
            f"--listen '{listener}' would be a proxy for everybody who can reach it:"
            " add --allow-client CIDR for those that it is for (such as"
            " --allow-client 192.168.0.0/16), or --open"
        )
    for bounded in (True, False):
        check_openness([listener], bounded=bounded, opened=not bounded)


def test_a_local_proxy_needs_no_leave() -> None:
    """And may have it."""
    for bounded, opened in ((False, False), (True, False), (False, True)):
        check_openness(LOCAL, bounded=bounded, opened=opened)


@pytest.mark.parametrize(
    "text",
    [
        "haproxy:tcp:1080",
        "HAProxy:tcp:1080:interface=127.0.0.1",
        "haproxy:ssl:1080:privateKey=key.pem",
        "haproxy:haproxy:tcp:1080",
        "haproxy:systemd:domain=INET:index=0",
        "haproxy:unix:/run/x.sock",
        # As a type that wraps others has them, one that we don't know.
        "other:1:endpoint=haproxy\\:tcp\\:1080",
        "other:haproxy\\:tcp\\:1080",
        "other:haproxy:tcp:1080",
    ],
)
def test_a_balancers_clients_can_not_be_told_apart(text: str) -> None:
    """The gate would see the balancer: nobody is kept out, or everybody."""
    listener = EndpointString(text)
    for listeners in ([listener], [*LOCAL, listener]):
        message = refusal(
            partial(check_openness, listeners, bounded=True, opened=False)
        )
        assert message.startswith(
            f"--allow-client can't be kept on --listen {text!r}: what is seen there is"
            " the balancer's address"
        )
    check_openness([listener], bounded=False, opened=True)
    assert not is_local(listener)


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
def test_a_listener_that_shows_its_clients_has_a_gate(text: str) -> None:
    """TLS does, as TCP; and a name is only a name."""
    check_openness([EndpointString(text)], bounded=True, opened=False)


def test_open_for_some_and_for_all_contradict_each_other() -> None:
    """Whichever the listeners are."""
    for listeners in (LOCAL, REACHABLE, ()):
        assert refusal(
            partial(check_openness, listeners, bounded=True, opened=True)
        ) == ("--open and --allow-client contradict each other: give one")


def test_a_network_of_clients() -> None:
    """Or one client."""
    for text, network in (
        ("192.168.0.0/16", "192.168.0.0/16"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
    ):
        assert client_network(text) == ipaddress.ip_network(network)
    for text in (
        *("", "x", "*", "192.168.0.1/16", "192.168.0.0/33", "192.168", "10.0.0.0/8:80"),
        *("fe80::1%eth0", "[::1]", "localhost", "10.0.0.0/8,10.1.0.0/16", "10\n"),
        "::ffff:10.0.0.0/8",
    ):
        message = refusal(client_network, text)
        assert message.startswith(f"bad --allow-client {text!r}: ")
        assert message.endswith(
            "; expected an address or a network such as 192.168.0.0/16"
        )


@given(st.text() | st.text("0123456789abcdef.:/%[]", max_size=20))
def test_any_text_is_a_network_of_clients_or_refused(text: str) -> None:
    """In one line."""
    try:
        client_network(text)
    except ConfigError:
        assert repr(text) in refusal(client_network, text)


def test_a_user_id() -> None:
    """As it was typed, byte by byte; what can be none is refused."""
    for text, encoded in (
        ("joe", b"joe"),
        ("a b:c", b"a b:c"),
        ("jos\u00e9", os.fsencode("jos\u00e9")),
        # A byte that is no text here, as Python has it in sys.argv.
        ("\udcff", b"\xff"),
        ("u" * 255, b"u" * 255),
    ):
        assert user_id(text) == encoded
    for text in ("", "u" * 256, "\u00e9" * 128, "a\0b"):
        assert refusal(user_id, text) == (
            f"bad --userid {text!r}: expected 1 to 255 bytes, none of them 0"
        )


def test_an_ipv4_address() -> None:
    """And nothing that stands for one."""
    for text in ("192.0.2.1", "0.0.0.0", "255.255.255.255"):
        assert ipv4_address("--bind-address", text) == text
    for text in (
        *("", "x", "::1", "::ffff:192.0.2.1", "192.0.2", "192.0.2.01", "192.0.2.1/32"),
        *("192.0.2.1:80", " 192.0.2.1", "192.0.2.1\n", "3221225985", "localhost"),
    ):
        assert refusal(ipv4_address, "--bind-address", text) == (
            f"bad --bind-address {text!r}: expected an IPv4 address such as 192.0.2.1"
        )


def test_a_bound() -> None:
    """A number from 1 up."""
    for text, number in (("1", 1), ("0010", 10), ("9999999", 9_999_999)):
        assert bound("--max-binds", text) == number
    for text in (
        *("", "x", "0", "-1", "+1", "1.0", "1e3", " 1", "1_0", "10000000", "9" * 5000),
        *("²", "٣"),
    ):
        assert refusal(bound, "--max-binds", text) == (
            f"bad --max-binds {text!r}: expected a number from 1 to 9999999"
        )


# -- the settings


def test_datagrams_go_to_datagrams() -> None:
    """A listener's destinations are of its own kind, each of them."""

    def given_(kind: str, text: str) -> Given:
        return Given(kind, text, parse_listener(text))

    for texts in (("udp:1", "udp:2", "3"), ("1", "2", "udp:3")):
        options = [given_("--listen", texts[0])]
        options += [given_("--dest", text) for text in texts[1:]]
        assert refusal(pair, options).startswith(
            f"--listen '{texts[0]}' can't be relayed to --dest '{texts[2]}': datagrams"
        )
        [relay] = pair(options[:2])
        assert type(relay) is (UdpRelay if texts[0] == "udp:1" else Relay)


def test_a_lifetime() -> None:
    """Any timeout but never."""
    assert lifetime("--x", "0.5") == 0.5
    for text in ("0", "0.0", "-0"):
        assert "a flow that never expires" in refusal(lifetime, "--x", text)
    assert refusal(lifetime, "--x", "y").startswith("bad --x 'y': expected seconds")


@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_text_is_a_ratio_and_a_buffer_or_refused(text: str) -> None:
    """Nothing but a number in range gets through."""
    for parse, most in (
        (partial(ratio, "--reply-cap"), math.inf),
        (receive_buffer, RECEIVE_BUFFER_LIMIT),
    ):
        try:
            value = parse(text)
        except ConfigError as problem:
            assert repr(text) in str(problem)
        else:
            assert 0 <= value <= most
            assert value < math.inf


def test_the_largest_buffer() -> None:
    """The kernel takes it, and one more byte is refused."""
    assert receive_buffer(str(RECEIVE_BUFFER_LIMIT)) == RECEIVE_BUFFER_LIMIT
    assert "expected 1 to" in refusal(receive_buffer, str(RECEIVE_BUFFER_LIMIT + 1))


def test_the_defaults() -> None:
    """Those that the requirements name."""
    config = Config(())
    assert config.timeouts == Timeouts(
        connect=10, stall=10, idle=3600, half_close=300, handshake=30
    )
    assert config.drain_timeout == 10
    assert (config.verbose, config.demo) == (False, False)


def test_the_defaults_of_the_proxy() -> None:
    """Those that the requirements name: this machine's own, and nothing for ever."""
    config = Socks4Config()
    assert config.listeners == (SOCKS4_LISTENER,)
    assert str(SOCKS4_LISTENER) == "127.0.0.1:1080"
    assert is_local(SOCKS4_LISTENER)
    assert config.timeouts == Config(()).timeouts
    assert config.bind_timeout == 120
    assert (config.clients, config.rules, config.user_ids) == ((), (), ())
    assert (config.ident, config.bind, config.bind_any) == (False, True, False)
    assert (config.bind_address, config.external_address) == (None, None)
    # None is what the limit of open files allows.
    assert attrs.astuple(config.limits) == (None, None, 256, 8)


def test_settings_do_not_change() -> None:
    """A relay that runs can rely on what it was given."""
    relay = Relay(HostPort(None, 1), (HostPort(None, 80),))
    for frozen in (relay, Config((relay,)), Socks4Config(), Limits()):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(frozen, attrs.fields(type(frozen))[0].name, None)
