"""Which peers are of some networks."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from relayd.core.peers import Peers


def test_peers_by_their_networks() -> None:
    peers = Peers(["192.0.2.0/24", ipaddress.ip_network("2001:db8::/32"), "10.0.0.1"])
    for inside in (
        "192.0.2.7:1",
        "[2001:db8::1]:1",
        "10.0.0.1:80",
        "[::ffff:10.0.0.1]:1",
    ):
        assert inside in peers
    for outside in ("192.0.3.7:1", "[2001:db9::1]:1", "10.0.0.2:80", "unix:", "-", ""):
        assert outside not in peers


def test_an_address_that_embeds_another_is_not_that_one() -> None:
    """Who connects over 6to4 chooses what it embeds."""
    assert "[2002:c000:201::1]:1" not in Peers(["192.0.2.0/24"])


def test_a_link_local_peer() -> None:
    assert "[fe80::1%eth0]:1" in Peers(["fe80::/10"])


def test_peers_of_unix_sockets() -> None:
    assert "unix:" in Peers(["unix"])
    assert "unix:/run/x" in Peers(["unix"])
    assert "192.0.2.1:1" not in Peers(["unix"])
    assert "-" not in Peers(["unix"])


def test_there_are_peers_or_none() -> None:
    assert not Peers([])
    assert Peers(["unix"])
    assert Peers(["::1"])


@pytest.mark.parametrize("text", ["nobody", "192.0.2.1/24", "192.0.2.1:80", ""])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=".+"):
        Peers([text])


@pytest.mark.parametrize("given", [5, None, b"::1", ipaddress.ip_address("::1")])
def test_what_is_neither_network_nor_text(given: Any) -> None:
    """It would fail for each peer, later."""
    with pytest.raises(ValueError, match="no network, nor how one is written"):
        Peers([given])


def test_a_text_is_no_list() -> None:
    """Its letters would be networks."""
    with pytest.raises(ValueError, match="a list of networks, not one"):
        Peers("192.0.2.0/24")
