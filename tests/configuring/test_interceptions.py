"""Which relays are for clients that meant to go elsewhere."""

from __future__ import annotations

import pytest

from relayd.configuring.address_grammar import parse_listener, parse_range
from relayd.configuring.interceptions import (
    by_tproxy,
    listener_for,
    listens_for_others,
    takes_original,
    uses_tproxy,
)
from relayd.core.errors import CannotStart
from relayd.tap import relayd


@pytest.mark.parametrize(
    ("words", "original", "tproxy"),
    [
        ("-l 8080 -d 10.0.0.1:80", False, False),
        ("-l 8080 -d 10.0.0.1:80 --transparent", False, False),
        ("-l 8080 -d 10.0.0.1:80 --intercept :80", False, False),
        ("-l 8080 -d 10.0.0.1:80 --intercept :80,by=tproxy", False, True),
        ("-l 8080 -d original", True, False),
        ("-l 8080 -d original --intercept :80", True, False),
        ("-l 8080 -d 10.0.0.1:80 -d 10.0.0.2:original,backup", True, False),
        ("-l 8080 --sni a=10.0.0.2:original", True, False),
        ("-l 8080 -d 10.0.0.1:80 --route a:b", False, False),
        ("-l 8080 -d original --intercept :80 --transparent", True, True),
        ("-l 8080 -d original --intercept :80,by=redirect", True, False),
        ("-l 8080 -d 10.0.0.1:80 --intercept 10.0.0.2:80 --transparent", False, False),
        # Its dials would look like its clients' own connections.
        ("-l 8080 -d 10.0.0.1:80 --intercept 10.0.0.0/8:80 --transparent", False, True),
        ("-l 8080 -d db:80 --intercept 10.0.0.2:80 --transparent", False, True),
        ("-l 8080 -d db:80 --intercept 10.0.0.2:81 --transparent", False, False),
        ("-l 8080 -d dns:db:80 --intercept 10.0.0.2:80 --transparent", False, True),
        (
            "-l 8080 -d srv:_a._tcp.b --intercept [fd00::1]:80 --transparent",
            False,
            True,
        ),
        ("-l 8080 -d unix:/run/s -d a:81 --intercept :80 --transparent", False, False),
        # The same of datagrams; all of them, as they come to one listener.
        ("-l udp:53 -d udp:10.0.0.1:53 --intercept :53 --transparent", False, True),
        (
            "-l udp:53 -d udp:10.0.0.1:53 --intercept 10.0.0.2:53 --transparent",
            *(False, False),
        ),
        # It may send them there; without something to bring, there is nobody to send.
        ("-l 8080 -d 10.0.0.1:80 --route a:b --intercept :80", True, False),
        ("-l udp:53 -d udp:10.0.0.1:53 --intercept :53", False, False),
        ("-l udp:53 -d udp:original --intercept :53", True, True),
        ("-l udp:53 -d udp:10.0.0.1:original --intercept :53", True, True),
    ],
)
def test_what_a_relay_is_for(words: str, original: bool, tproxy: bool) -> None:
    options = relayd.Options()
    options.parseOptions(words.split())
    [relay] = options.config.relays
    assert takes_original(relay) is original
    assert uses_tproxy(relay) is tproxy
    assert listens_for_others(relay) is (original or tproxy)


@pytest.mark.parametrize(
    ("listeners", "four", "six"),
    [
        ("8080", (None, 8080), (None, 8080)),
        ("0.0.0.0:8080", (None, 8080), None),
        ("[::]:8080", None, (None, 8080)),
        ("10.0.0.1:8080", ("10.0.0.1", 8080), None),
        ("[2001:db8::1]:80 192.0.2.1:81", ("192.0.2.1", 81), ("2001:db8::1", 80)),
        ("127.0.0.2:80 10.0.0.1:81", ("10.0.0.1", 81), None),
        ("127.0.0.2:80 0.0.0.0:81 [::1]:82", (None, 81), ("::1", 82)),
        ("localhost:80", ("127.0.0.1", 80), ("::1", 80)),
        ("[fe80::1%eth0]:80", None, None),
        ("[fe80::1%eth0]:80 [2001:db8::1]:81", None, ("2001:db8::1", 81)),
        ("udp:53", (None, 53), (None, 53)),
        ("0 80-90 unix:/run/s db:80 tcp:80 udp:systemd:dns", None, None),
    ],
)
def test_where_rules_lead(listeners: str, four: object, six: object) -> None:
    addresses = [parse_range(each, parse_listener) for each in listeners.split()]
    assert listener_for(addresses, 4) == four
    assert listener_for(addresses, 6) == six


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        # A listener that is told where datagrams were meant to go takes none without.
        ("--transparent --intercept 10.0.0.2:53 --intercept 10.0.0.1:53", [True, True]),
        ("--intercept :53 --intercept :54,by=tproxy", [True, True]),
        ("--intercept :53 --intercept :54,by=redirect", [False, False]),
        ("--transparent --intercept :53,by=redirect", None),
        ("--intercept :53,by=redirect --intercept :54,by=tproxy", None),
    ],
)
def test_datagrams_of_a_relay_come_in_one_way(
    words: str, ways: list[bool] | None
) -> None:
    options = relayd.Options()
    try:
        options.parseOptions(f"-l udp:53 -d udp:10.0.0.1:53 {words}".split())
    except CannotStart as problem:
        assert ways is None
        assert "by=redirect' is not possible by redirect" in str(problem)
    else:
        [relay] = options.config.relays
        assert [by_tproxy(relay, each) for each in relay.intercepts] == ways
