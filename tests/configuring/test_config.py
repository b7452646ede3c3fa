"""Settings: their defaults, and one field for each."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import HostPort, PortRange, UdpAddress
from relayd.configuring.address_settings import (
    ALL,
    ALLOW_CLIENT,
    SOCKS4_LISTENER,
    USERID,
)
from relayd.configuring.config import (
    Admission,
    Config,
    Relay,
    Socks4Relay,
    Socks4Settings,
    StreamSettings,
    UdpRelay,
    each_port,
    fill,
    is_local,
)
from relayd.configuring.configure import KINDS
from relayd.core.errors import ConfigError
from relayd.core.setting_types import Setting


def refusal(parse: Callable[..., object], *args: Any) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_a_network_of_clients() -> None:
    """Or one client."""
    for text, network in (
        ("192.168.0.0/16", "192.168.0.0/16"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
    ):
        [(version, first, last)] = ALLOW_CLIENT.parse(text).spans
        expected = ipaddress.ip_network(network)
        assert version == expected.version
        assert first == int(expected.network_address)
        assert last == int(expected.broadcast_address)
    for text in (
        *("", "x", "*", "192.168.0.0/33", "192.168", "10.0.0.0/8:80"),
        *("fe80::1%eth0", "[::1]", "localhost", "10.0.0.0/8,10.1.0.0/16", "10\n"),
        *("::ffff:10.0.0.0/8", "10.0.0.0/\u0668", "10.0.0.0/"),
    ):
        message = refusal(ALLOW_CLIENT.parse, text)
        assert message.startswith(f"bad --allow-client {text!r}: ")
        assert message.endswith(
            "; expected an address or a network such as 192.168.0.0/16"
        )
    for text, meant in (
        ("192.168.0.1/16", "192.168.0.0/16"),
        ("2001:db8::1/32", "2001:db8::/32"),
    ):
        assert refusal(ALLOW_CLIENT.parse, text) == (
            f"bad --allow-client {text!r}: {text!r} has bits beyond its prefix: you may"
            f" mean {meant}"
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


def test_the_defaults() -> None:
    """Those that the requirements name."""
    config = Config(())
    relay = Relay((), ())
    assert relay.stream == StreamSettings(
        connect_timeout=10,
        stall_timeout=10,
        idle_timeout=3600,
        half_close_timeout=300,
        handshake_timeout=30,
    )
    assert config.drain_timeout == 10
    udp = UdpRelay((), ()).udp
    assert (udp.timeout, udp.unreplied_timeout) == (300, 30)
    assert (config.verbose, config.demo) == (False, False)


def test_the_defaults_of_the_proxy() -> None:
    """Those that the requirements name: this machine's own, and nothing for ever."""
    config = Socks4Relay()
    assert config.listeners == (SOCKS4_LISTENER,)
    assert str(SOCKS4_LISTENER) == "127.0.0.1:1080"
    assert is_local(SOCKS4_LISTENER)
    assert config.stream == Relay((), ()).stream
    assert (config.admission, config.rules, config.user_ids) == (Admission(), (), ())
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


#: What has no default: what is read elsewhere, and what says what to do.
REQUIRED: dict[str, Any] = {"relays": (), "listeners": (), "destinations": ()}

#: Fields that are no row's, or of several.
MADE = {"relays", "listeners", "destinations", "name"}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (Config, [row for row in ALL if row.process and row.key]),
        *(
            (KINDS[kind], [r for r in ALL if not r.process and kind in r.kinds])
            for kind in KINDS
        ),
    ],
    ids=["process", *KINDS],
)
def test_each_setting_has_one_field_and_each_field_a_setting(
    kind: Any, rows: list[Setting[Any]]
) -> None:
    """So that none is read and ignored, and none can't be set."""
    names = set(fields(kind))
    assert names - MADE == {row.field for row in rows} - MADE
    for row in rows:
        if not row.repeatable:
            # And the field has the row's default.
            assert fill(kind, REQUIRED) == fill(
                kind, {**REQUIRED, row.field: row.default}
            )


def test_a_group_of_settings_is_filled_as_the_whole_is() -> None:
    relay = fill(Relay, {**REQUIRED, "idle_timeout": 5.0, "backlog": 6})
    assert relay == Relay((), (), stream=StreamSettings(idle_timeout=5), backlog=6)


def test_settings_do_not_change() -> None:
    """A relay that runs can rely on what it was given."""
    relay = Relay((HostPort(None, 1),), (HostPort(None, 80),))
    made = (relay, Config((relay,)), Socks4Relay(), Socks4Settings(), StreamSettings())
    for frozen in made:
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(frozen, attrs.fields(type(frozen))[0].name, None)


def test_each_port_of_a_relay() -> None:
    """Of ranges, with the destination of the same number; one port is for all."""
    relay = Relay(
        [PortRange(HostPort(None, 5), 7), PortRange(HostPort("::1", 15), 17)],
        [PortRange(HostPort("db", 25), 27), HostPort("web", 80)],
    )
    assert [
        [[each.port for each in addresses] for addresses in pair]
        for pair in each_port(relay)
    ] == [[[5, 15], [25, 80]], [[6, 16], [26, 80]], [[7, 17], [27, 80]]]
    single = UdpRelay([UdpAddress(None, 5)], [UdpAddress(None, 6)])
    assert list(each_port(single)) == [([UdpAddress(None, 5)], [UdpAddress(None, 6)])]
