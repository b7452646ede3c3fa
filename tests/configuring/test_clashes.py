"""Listeners that can't be open at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.configuring.address_settings import LISTEN
from relayd.configuring.clashes import clashes
from relayd.configuring.given import Given, Place, RelaySection
from relayd.core.setting_types import Kind
from tests.support.files import RELAY, config_of, problems


def relay(name: str, *listeners: str) -> RelaySection:
    """A relay with listeners; its kind is that of the first."""
    kind: Kind = "udp" if listeners and listeners[0].startswith("udp:") else "tcp"
    place = Place("f", name)
    return RelaySection(
        kind,
        name,
        [
            Given(LISTEN, text, LISTEN.parse(text), place.below("listen"))
            for text in listeners
        ],
        place,
    )


def clash(one: str, other: str) -> bool:
    """Whether two listeners clash, which does not depend on who is first."""
    found = [
        list(clashes([relay("a", first), relay("b", second)]))
        for first, second in ((one, other), (other, one))
    ]
    assert bool(found[0]) == bool(found[1])
    return bool(found[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("80", "80"),
        ("80", ":80"),
        ("80", "00080"),
        ("80", "127.0.0.1:80"),
        ("80", "[::1]:80"),
        ("80", "0.0.0.0:80"),
        ("80", "[::]:80"),
        ("80", "db:80"),
        ("80", "localhost:80"),
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("[::]:80", "[::1]:80"),
        ("[::1]:80", "[0:0::1]:80"),
        ("[::ffff:127.0.0.1]:80", "127.0.0.1:80"),
        ("db:80", "DB.:80"),
        ("localhost:80", "LOCALHOST:80"),
        ("localhost:80", "127.0.0.1:80"),
        ("localhost:80", "[::1]:80"),
        ("localhost:80", "0.0.0.0:80"),
        ("80", "tcp:80"),
        ("tcp:80", "tcp:port=80"),
        ("tcp:80:interface=127.0.0.1", "127.0.0.1:80"),
        ("tcp:80:interface=\\:\\:1", "[::1]:80"),
        ("tcp6:80", "[::1]:80"),
        ("ssl:80:privateKey=k", "80"),
        ("80-85", "85"),
        ("80-85", "83-90"),
        ("127.0.0.1:80-85", "81"),
        ("127.0.0.1:80-85", "tcp:84"),
        ("udp:53", "udp:127.0.0.1:53"),
        ("udp:50-53", "udp:[::1]:53"),
        ("unix:/run/x", "unix:/run/x"),
        ("unix:/run/x", "unix:/run/../run//x"),
        ("unix:/run/x", "unix:/run/x:mode=600"),
        ("systemd:web", "systemd:web"),
        ("tcp:http", "tcp:http"),
    ],
)
def test_one_address_twice(one: str, other: str) -> None:
    assert clash(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("80", "81"),
        ("80", "udp:80"),
        ("0", "0"),
        ("0.0.0.0:80", "[::]:80"),
        ("127.0.0.1:80", "127.0.0.2:80"),
        ("127.0.0.1:80", "[::1]:80"),
        ("tcp:80", "[::1]:80"),
        ("db:80", "web:80"),
        ("80-85", "86"),
        ("127.0.0.1:80-85", "127.0.0.2:80-85"),
        ("unix:/run/x", "unix:/run/y"),
        ("systemd:web", "systemd:dns"),
        ("systemd:domain=INET:index=0", "systemd:domain=INET:index=0"),
        ("tcp:http", "tcp:https"),
    ],
)
def test_two_addresses(one: str, other: str) -> None:
    assert not clash(one, other)


def test_one_relay_may_not_have_an_address_twice() -> None:
    assert list(clashes([relay("a", "80", "127.0.0.1:80", "81")])) == [
        (
            "f: a.listen: listen = '127.0.0.1:80' is the address of another listener,"
            " listen = '80' (f: a.listen): give each its own"
        )
    ]


def test_a_symlink_to_a_unix_socket(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert clash(f"unix:{tmp_path}/link", f"unix:{tmp_path}/real")


def test_each_listener_is_told_once() -> None:
    """A range has many ports, and one line."""
    found = list(clashes([relay("a", "80-180"), relay("b", "80-180"), relay("c", "9")]))
    assert len(found) == 1


def test_a_proxy_that_says_no_listener(tmp_path: Path) -> None:
    """It has the default."""
    where = f"{tmp_path / 'f'}: socks4.a.listen"
    for other in ("[socks4.b]\n", "[socks4.b]\nlisten = '127.0.0.1:1080'\n"):
        [line] = problems(tmp_path / "f", f"[socks4.a]\n{other}")
        assert line == (
            "socks4.b.listen: listen = '127.0.0.1:1080' is the address of another"
            f" listener, listen = '127.0.0.1:1080' ({where}): give each its own"
        )
    text = "[socks4.a]\n[socks4.b]\nlisten = '127.0.0.1:1081'\n"
    assert len(config_of(tmp_path / "f", text).relays) == 2
    # Of one that could not be read, nothing is known.
    [line] = problems(tmp_path / "f", "[socks4.a]\n[socks4.b]\nlisten = 3\n")
    assert line.startswith("socks4.b.listen: found 3")


@pytest.mark.parametrize("metrics", ["127.0.0.1:8080", "localhost:8080", "tcp:8080"])
def test_the_metrics_have_an_address_of_their_own(metrics: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    text = f"metrics = '{metrics}'\nmetrics_open = true\n[tcp.a]\n{RELAY}"
    assert problems(path, text) == [
        (
            f"metrics: metrics = '{metrics}' is the address of another listener,"
            f" listen = '8080' ({path}: tcp.a.listen): give each its own"
        )
    ]
    assert config_of(path, text.replace("8080", "8081", 1)).metrics
