"""Settings: listeners matched with destinations and names, who may use a proxy."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    UnixPath,
)
from relayd.configuring.address_settings import (
    ALLOW_CLIENT,
    DEST,
    LISTEN,
    NAME,
    RELAYD,
    SOCKS4,
    SOCKS4_LISTENER,
    USERID,
    Given,
)
from relayd.configuring.config import (
    Config,
    Relay,
    Socks4Config,
    Socks4Settings,
    StreamSettings,
    UdpRelay,
    UdpSettings,
    fill,
    is_local,
    pair,
    refuse_open_proxy,
)
from relayd.core.errors import ConfigError
from relayd.core.setting_types import Setting


def refusal(parse: Callable[..., object], *args: Any) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    message = str(caught.value)
    assert message.isprintable()
    return message


# -- listeners and destinations


def listen(port: int) -> Given:
    """`--listen`, and a port."""
    return Given(LISTEN, str(port), HostPort(None, port))


def dest(port: int) -> Given:
    """`--dest`, and a port."""
    return Given(DEST, str(port), HostPort(None, port))


def name(text: str) -> Given:
    """`--name`, and the name."""
    return Given.of(NAME, text)


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


def test_a_listener_or_destination_without_a_partner_is_quoted() -> None:
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


def test_a_name_belongs_to_the_listener_before_it() -> None:
    """One that has none is numbered later; a single listener's may stand before it."""
    relays = pair([listen(1), name("web"), dest(2), listen(3), dest(4)])
    assert [relay.name for relay in relays] == ["web", None]
    [relay] = pair([name("web"), dest(2), listen(1)])
    assert (relay.name, relay.destinations) == ("web", (HostPort(None, 2),))


def test_a_name_that_can_not_be_kept_is_quoted() -> None:
    """It is somebody else's, or a second one, or nobody's."""
    for given_, message in (
        (
            [listen(1), dest(2), name("a"), listen(3), dest(4), name("a")],
            "bad --name 'a': another relay has it already; give each relay its own",
        ),
        (
            [listen(1), dest(2), name("a"), name("b")],
            "--listen '1' has two names, 'a' and 'b': give one",
        ),
        ([name("a"), dest(2)], "--name 'a' has no --listen"),
        (
            [name("a"), listen(1), dest(2), listen(3), dest(4)],
            "--name 'a' stands before the first of several --listen: put each --name",
        ),
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
            partial(refuse_open_proxy, listeners, bounded=False, opened=False)
        )
        assert message == (
            f"--listen '{listener}' would be an open proxy, for everybody who can"
            " reach it. Add --allow-client CIDR for your clients (such as"
            " --allow-client 192.168.0.0/16), or --open"
        )
    for bounded in (True, False):
        refuse_open_proxy([listener], bounded=bounded, opened=not bounded)


def test_a_local_proxy_needs_no_option() -> None:
    """And may have it."""
    for bounded, opened in ((False, False), (True, False), (False, True)):
        refuse_open_proxy(LOCAL, bounded=bounded, opened=opened)


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
def test_allow_client_is_refused_behind_a_balancer(text: str) -> None:
    """The gate would see the balancer: nobody is kept out, or everybody."""
    listener = EndpointString(text)
    for listeners in ([listener], [*LOCAL, listener]):
        message = refusal(
            partial(refuse_open_proxy, listeners, bounded=True, opened=False)
        )
        assert message.startswith(
            f"--allow-client can't be applied to --listen {text!r}: the relay sees the"
            " balancer's address there"
        )
    refuse_open_proxy([listener], bounded=False, opened=True)
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
def test_allow_client_is_accepted_where_clients_are_known(text: str) -> None:
    """TLS does, as TCP; and a name is only a name."""
    refuse_open_proxy([EndpointString(text)], bounded=True, opened=False)


def test_open_and_allow_client_contradict_each_other() -> None:
    """Whichever the listeners are."""
    for listeners in (LOCAL, REACHABLE, ()):
        assert refusal(
            partial(refuse_open_proxy, listeners, bounded=True, opened=True)
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
        assert ALLOW_CLIENT.parse(text) == ipaddress.ip_network(network)
    for text in (
        *("", "x", "*", "192.168.0.1/16", "192.168.0.0/33", "192.168", "10.0.0.0/8:80"),
        *("fe80::1%eth0", "[::1]", "localhost", "10.0.0.0/8,10.1.0.0/16", "10\n"),
        "::ffff:10.0.0.0/8",
    ):
        message = refusal(ALLOW_CLIENT.parse, text)
        assert message.startswith(f"bad --allow-client {text!r}: ")
        assert message.endswith(
            "; expected an address or a network such as 192.168.0.0/16"
        )


@given(st.text() | st.text("0123456789abcdef.:/%[]", max_size=20))
def test_any_text_is_a_network_of_clients_or_refused(text: str) -> None:
    """In one line."""
    try:
        ALLOW_CLIENT.parse(text)
    except ConfigError:
        assert repr(text) in refusal(ALLOW_CLIENT.parse, text)


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
        assert USERID.parse(text) == encoded
    for text in ("", "u" * 256, "\u00e9" * 128, "a\0b"):
        assert refusal(USERID.parse, text) == (
            f"bad --userid {text!r}: expected 1 to 255 bytes, none of them 0"
        )


# -- the settings


def test_datagrams_go_to_datagrams() -> None:
    """A listener's destinations are of its own kind, each of them."""

    for texts in (("udp:1", "udp:2", "3"), ("1", "2", "udp:3")):
        options = [Given.of(LISTEN, texts[0])]
        options += [Given.of(DEST, text) for text in texts[1:]]
        assert refusal(pair, options).startswith(
            f"--listen '{texts[0]}' can't be relayed to --dest '{texts[2]}': datagrams"
        )
        [relay] = pair(options[:2])
        assert type(relay) is (UdpRelay if texts[0] == "udp:1" else Relay)


def test_the_defaults() -> None:
    """Those that the requirements name."""
    config = Config(())
    assert config.stream == StreamSettings(
        connect_timeout=10,
        stall_timeout=10,
        idle_timeout=3600,
        half_close_timeout=300,
        handshake_timeout=30,
    )
    assert config.drain_timeout == 10
    assert (config.udp.timeout, config.udp.unreplied_timeout) == (300, 30)
    assert (config.verbose, config.demo) == (False, False)


def test_the_defaults_of_the_proxy() -> None:
    """Those that the requirements name: this machine's own, and nothing for ever."""
    config = Socks4Config()
    assert config.listeners == (SOCKS4_LISTENER,)
    assert str(SOCKS4_LISTENER) == "127.0.0.1:1080"
    assert is_local(SOCKS4_LISTENER)
    assert config.stream == Config(()).stream
    assert (config.clients, config.rules, config.user_ids) == ((), (), ())
    # None is what the limit of open files allows.
    assert config.socks4 == Socks4Settings(
        ident=False,
        bind=True,
        bind_any=False,
        bind_address=None,
        external_address=None,
        bind_timeout=120,
        max_handshakes=None,
        max_handshakes_per_client=None,
        max_binds=256,
        max_binds_per_client=8,
    )


def fields(kind: Any) -> list[str]:
    """The names of a kind of settings, and of their groups."""
    found = []
    for field in attrs.fields(kind):
        group = getattr(field.default, "factory", None)
        found += [field.name] if group is None else fields(group)
    return found


@pytest.mark.parametrize(
    ("kind", "rows"),
    [(Config, RELAYD), (Socks4Config, SOCKS4)],
    ids=["relayd", "socks4"],
)
def test_each_setting_has_one_field_and_each_field_a_setting(
    kind: Any, rows: tuple[Setting[Any], ...]
) -> None:
    """So that none is read and ignored, and none can't be set."""
    names = fields(kind)
    assert sorted(names) == sorted({row.field for row in rows})
    for row in rows:
        if not row.repeatable:
            # And the field has the row's default.
            assert fill(kind, REQUIRED) == fill(
                kind, {**REQUIRED, row.field: row.default}
            )


#: What has no default.
REQUIRED: dict[str, Any] = {"relays": ()}


def test_a_group_of_settings_is_filled_as_the_whole_is() -> None:
    config = fill(Config, {**REQUIRED, "idle_timeout": 5.0, "timeout": 6.0})
    assert config == Config(
        (), stream=StreamSettings(idle_timeout=5), udp=UdpSettings(timeout=6)
    )


def test_settings_do_not_change() -> None:
    """A relay that runs can rely on what it was given."""
    relay = Relay(HostPort(None, 1), (HostPort(None, 80),))
    made = (relay, Config((relay,)), Socks4Config(), Socks4Settings(), StreamSettings())
    for frozen in made:
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(frozen, attrs.fields(type(frozen))[0].name, None)
