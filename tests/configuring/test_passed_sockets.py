"""Listeners that are sockets which systemd has passed on."""

from __future__ import annotations

import pytest

from relayd.configuring.address_grammar import parse_destination, parse_listener
from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.clashes import clashes
from relayd.configuring.command_line import relay_sections
from relayd.configuring.given import Given


def said(*listeners: str) -> list[str]:
    """What is said of relays with these listeners."""
    given = []
    for text in listeners:
        given.append(Given(LISTEN, text, parse_listener(text)))
        to = "udp:9" if text.startswith("udp:") else "9"
        given.append(Given(DEST, to, parse_destination(to)))
    return list(clashes(relay_sections(given)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("systemd:web", "systemd:web"),
        ("udp:systemd:dns", "udp:systemd:dns"),
    ],
)
def test_two_relays_can_not_share_them(one: str, other: str) -> None:
    """Each would get some of the clients, and nobody knows which."""
    [line] = said(one, "8080", other)
    assert "is the address of another listener" in line


def test_others_have_names_of_their_own() -> None:
    """Datagrams and streams may have the same; Twisted's forms are not compared."""
    assert not said("systemd:web", "systemd:ftp", "udp:systemd:web", "udp:systemd:ftp")
    assert not said(*["systemd:domain=INET:index=0"] * 2)
