"""Relays that lead back to themselves are refused before they start."""

from __future__ import annotations

from pathlib import Path

import pytest

import relayd.configuring.cycles
from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.command_line import relay_sections
from relayd.configuring.cycles import cycles
from relayd.configuring.given import Given, RelaySection
from relayd.socks.destinations import Ip

#: The test's machine has these addresses.
OWN = {"127.0.0.1", "127.0.0.2", "::1", "203.0.113.5", "2001:db8::5"}


def own(address: Ip) -> bool:
    """Whether it is one of them."""
    return str(address) in OWN


def section(listener: str, server: str) -> RelaySection:
    """A relay."""
    [made] = relay_sections([Given.of(LISTEN, listener), Given.of(DEST, server)])
    return made


def refusal(*words: str) -> str:
    """Why these relays are refused, or nothing; `L…` listens, `D…` is its server."""
    given = [
        Given.of(LISTEN, word[1:]) if word[0] == "L" else Given.of(DEST, word[1:])
        for word in words
    ]
    return "\n".join(cycles(relay_sections(given), own))


@pytest.mark.parametrize(
    ("listener", "server"),
    [
        ("8080", "8080"),
        ("8080", "127.0.0.1:8080"),
        ("8080", "127.0.0.2:8080"),
        ("8080", "[::1]:8080"),
        ("8080", "[::ffff:127.0.0.1]:8080"),
        ("8080", "203.0.113.5:8080"),
        ("8080", "[2001:db8::5]:8080"),
        ("8080", "localhost:8080"),
        ("8080", "LOCALHOST.:8080"),
        ("8080", "web.localhost:8080"),
        ("0.0.0.0:8080", "203.0.113.5:8080"),
        ("[::]:8080", "[2001:db8::5]:8080"),
        ("127.0.0.1:8080", "8080"),
        ("127.0.0.1:8080", "localhost:8080"),
        ("localhost:8080", "[::1]:8080"),
        ("203.0.113.5:8080", "203.0.113.5:8080"),
        ("unix:/run/x", "unix:/run/x"),
        ("unix:/run/x", "unix:/run/../run/x"),
        ("unix:/run/x:mode=600", "unix:/run/x"),
        ("unix:address=/run/x", "unix:path=/run/x"),
        ("udp:53", "udp:53"),
        ("udp:53", "udp:localhost:53"),
        ("udp:[::]:53", "udp:[2001:db8::5]:53"),
        ("tcp:8080", "127.0.0.1:8080"),
        ("tcp:port=8080", "tcp:host=127.0.0.1:port=8080"),
        ("tcp:8080:interface=127.0.0.1", "8080"),
        (r"tcp:8080:interface=\:\:1", "[::1]:8080"),
        ("8080", "tcp:127.0.0.1:8080"),
        ("8080", "tls:localhost:8080"),
        ("127.0.0.1:8080", "[::ffff:0.0.0.0]:8080"),
        ("tcp6:8080", "[::1]:8080"),
        (r"tcp6:8080:interface=\:\:1", "[::1]:8080"),
        ("8080", r"tls:example.com:443:endpoint=tcp\:127.0.0.1\:8080"),
        ("unix:/run/x", r"tls:example.com:443:endpoint=unix\:/run/x"),
    ],
)
def test_a_relay_to_itself_is_refused(listener: str, server: str) -> None:
    assert refusal(f"L{listener}", f"D{server}").endswith(
        " is relayed to itself: give another --dest"
    )
    # Even if only some of its clients are.
    assert refusal(f"L{listener}", f"D{server}", f"D{server}")


@pytest.mark.parametrize(
    ("listener", "server"),
    [
        ("8080", "8081"),
        ("0", "8080"),
        ("8080", "192.0.2.1:8080"),
        ("8080", "example.com:8080"),
        ("127.0.0.1:8080", "127.0.0.2:8080"),
        ("0.0.0.0:8080", "[::1]:8080"),
        ("[::]:8080", "127.0.0.1:8080"),
        ("example.com:8080", "127.0.0.1:8080"),
        ("tcp:8080", "[::1]:8080"),
        ("tcp6:8080", "8080"),
        ("8080", r"tls:localhost:8080:endpoint=tcp\:10.0.0.5\:8080"),
        ("tcp:8080:interface=203.0.113.5", "8080"),
        ("unix:/run/x", "unix:/run/y"),
        ("unix:/run/x", "8080"),
        ("systemd:domain=INET:index=0", "8080"),
        ("udp:53", "udp:9.9.9.9:53"),
    ],
)
def test_a_relay_to_elsewhere_is_not(listener: str, server: str) -> None:
    assert not refusal(f"L{listener}", f"D{server}")


def test_a_loop_of_relays_is_refused() -> None:
    """By its shortest way round."""
    ring = ("L1001", "D1002", "L1002", "D192.0.2.1:1", "D1003", "L1003", "D1001")
    assert refusal(*ring) == (
        "a loop of relays: --listen '1001' to '1002' to '1003' to '1001':"
        " give one of them another --dest"
    )
    assert refusal("L2001", "D1001", *ring)
    assert refusal("Ludp:1", "Dudp:2", "Ludp:2", "Dudp:1")


def test_a_chain_that_ends_is_not() -> None:
    assert not refusal("L1001", "D1002", "L1002", "D1003", "L1003", "D192.0.2.1:1003")
    # Datagrams and streams have ports of their own.
    assert not refusal(
        "L53", "D1053", "Ludp:1053", "Dudp:53", "Ludp:53", "Dudp:9.9.9.9:53"
    )


def test_a_symlink_to_a_unix_socket_is_that_socket(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert refusal(f"Lunix:{tmp_path}/x", f"Dunix:{tmp_path}/link")


def test_a_name_other_than_localhost_is_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine's own may be of any of its addresses."""
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert not refusal("L127.0.0.1:8080", "Dhere:8080")


def test_relays_that_lead_nowhere_are_not_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search for each relay would take the square of their number."""

    def search(*_: object) -> list[int]:
        raise AssertionError("there is no loop")

    monkeypatch.setattr(relayd.configuring.cycles, "_find_loop", search)
    chain = [section(str(port), f"127.0.0.1:{port + 1}") for port in range(1000, 1100)]
    assert list(cycles(chain, own)) == []
    hub = [section(str(port), "127.0.0.1:999") for port in range(1000, 1100)]
    assert list(cycles([*hub, section("999", "10.9.9.9:1")], own)) == []


def test_only_wildcards_of_the_same_port_are_asked_for() -> None:
    """Each time takes system calls."""
    asked: list[Ip] = []

    def count(address: Ip) -> bool:
        asked.append(address)
        return False

    relays = [section(f"127.0.0.{n}:443", f"10.1.0.{n}:443") for n in range(2, 100)]
    assert list(cycles(relays, count)) == []
    assert asked == []
    assert list(cycles([section("443", "10.1.0.1:443")], count)) == []
    assert list(map(str, asked)) == ["10.1.0.1"]


def test_the_ports_of_a_range_make_one_line() -> None:
    [line] = cycles([section("500-600", "500-600")], own)
    assert "'500-600' is relayed to itself" in line
    [line] = cycles([section("80-90", "81-91"), section("91", "80")], own)
    assert line == (
        "a loop of relays: --listen '80-90' to '91' to '80-90': give one of them"
        " another --dest"
    )
