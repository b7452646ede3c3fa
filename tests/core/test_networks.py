"""Networks as they are written, and what IPv6 addresses stand for."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relayd.core.networks import parse_network, stands_for
from tests.support.policies import (
    policy,
    refusal,
    stand_ins,
)


def test_a_network() -> None:
    """Or an address, which is a network of one."""
    assert parse_network("192.0.2.1") == ipaddress.ip_network("192.0.2.1/32")
    assert parse_network("fd00::/8") == ipaddress.ip_network("fd00::/8")
    for text in ("", "x", "10.0.0.1/8", "fe80::%eth0", "fe80::%eth0/10", "127.1"):
        with pytest.raises(ValueError, match="network|beyond its prefix|scope"):
            parse_network(text)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("::ffff:8.8.8.8", "8.8.8.8/32"),
        ("::ffff:808:808/128", "8.8.8.8/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        # What merely has them in it is a network of IPv6.
        ("::/0", "::/0"),
        ("::/80", "::/80"),
    ],
)
def test_a_mapped_network_is_one_of_ipv4(text: str, network: str) -> None:
    """As its addresses are, whoever asks for them."""
    assert parse_network(text) == ipaddress.ip_network(network)


@pytest.mark.parametrize("text", ["::ffff:10.0.0.0/8", "::ffff:0:0/95"])
def test_a_mapped_network_that_is_too_large_is_refused(text: str) -> None:
    """Who writes it means another one."""
    with pytest.raises(ValueError, match="takes a prefix from 96 to 128: write the"):
        parse_network(text)
    for bits in ("::ffff:10.0.0.1/104", "::ffff:a00:1/104"):
        with pytest.raises(ValueError, match="you may mean 10.0.0.0/8"):
            parse_network(bits)


@given(st.ip_addresses(v=4))
@example(IPv4Address("127.0.0.1"))
def test_what_an_address_stands_for(address: IPv4Address) -> None:
    """Each form is understood, and an IPv4 address stands for itself only."""
    for kind, ip in stand_ins(str(address)).items():
        assert stands_for(ip) == address, kind
    assert stands_for(address) is None


def test_stand_ins_as_they_are_written() -> None:
    """By hand, as the arithmetic above may be wrong as well."""
    for text in (
        *("::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "::7f00:1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1"),
        *("::ffff:0:127.0.0.1", "::ffff:0:7f00:1"),
        *("64:ff9b:1:2:3:4:7f00:1", "2002:7f00:1::", "2002:7f00:1::1"),
        "2002:7f00:1:ffff:ffff:ffff:ffff:ffff",
    ):
        assert stands_for(ipaddress.ip_address(text)) == IPv4Address("127.0.0.1"), text
        assert refusal(policy("+64:ff9b:1::/48"), text).endswith(
            "stands for 127.0.0.1, which is loopback: it takes --allow-dest 127.0.0.0/8"
        )
    for text in (
        "::",
        "::1",
        "2606:4700::7f00:1",
        "64:ff9b:2::7f00:1",
        "2003:7f00:1::",
    ):
        assert stands_for(ipaddress.ip_address(text)) is None, text
