"""Which clients are let in: by their network, and those without an address."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import UNIXAddress
from zope.interface.verify import verifyObject

from relayd.admission.policy import ClientGate
from relayd.core.addresses import address_name
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.session import Session


def session(client: str) -> Session:
    """Of a client by this name."""
    return Session(1, client, "192.0.2.2:1080", 0.0)


def gate(*networks: str) -> ClientGate:
    """For the clients of these."""
    return ClientGate([ipaddress.ip_network(each) for each in networks])


def lets_in(judge: ClientGate, client: str) -> bool:
    """Whether a client comes in; what it holds then can be given back."""
    try:
        lease = judge.enter(session(client))
    except Refused as refused:
        assert refused.why == "no --allow-client names this client"
        return False
    assert verifyObject(ILease, lease)
    lease.release()
    return True


def test_a_gate_provides_its_interfaces() -> None:
    """Which may be asked again and again, as it counts nothing."""
    judge = gate("192.0.2.0/24")
    assert verifyObject(IGate, judge)
    for _ in range(3):
        assert lets_in(judge, "192.0.2.1:50000")
        assert not lets_in(judge, "198.51.100.1:50000")


@pytest.mark.parametrize(
    ("client", "inside"),
    [
        ("192.0.2.0:1", True),
        ("192.0.2.255:65535", True),
        ("192.0.1.255:1", False),
        ("192.0.3.0:1", False),
        ("198.51.100.7:1", True),
        ("198.51.100.8:1", False),
        ("127.0.0.1:1", False),
        ("[2001:db8::1]:50000", True),
        ("[2001:db9::1]:50000", False),
        ("[fe80::1%eth0]:50000", True),
        ("[fe80::1]:50000", True),
        ("[::1]:50000", False),
        # Only what the kernel itself says of an IPv4 client counts as IPv4.
        ("[::ffff:c000:201]:50000", True),
        ("[::192.0.2.1]:50000", False),
        ("[64:ff9b::192.0.2.1]:50000", False),
        ("[2002:c000:201::1]:50000", False),
    ],
)
def test_clients_by_their_network(client: str, inside: bool) -> None:
    """IPv4, IPv6, and a single address."""
    judge = gate("192.0.2.0/24", "198.51.100.7", "2001:db8::/32", "fe80::/10")
    assert lets_in(judge, client) is inside


def test_a_gate_without_networks_refuses_all() -> None:
    """Has no networks, and lets no address in."""
    assert not lets_in(gate(), "127.0.0.1:1")
    assert not lets_in(gate(), "[::1]:1")


@given(st.ip_addresses(), st.integers(0, 128))
def test_a_network_is_as_ipaddress_says(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: int
) -> None:
    """For any client and any network of its kind."""
    prefix = min(prefix, address.max_prefixlen)
    bits = address.max_prefixlen
    home = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
    mapped = getattr(address, "ipv4_mapped", None)
    shown = f"[{address}]:1" if address.version == 6 else f"{address}:1"
    # What is mapped counts as IPv4, and so as none of an IPv6 network.
    assert lets_in(ClientGate([home]), shown) is (mapped is None)
    if prefix:
        # Of another network: the last bit of its prefix is the other one.
        far = int(address) ^ 1 << (bits - prefix)
        away = ipaddress.ip_network((far, prefix), strict=False)
        assert not lets_in(ClientGate([away]), shown)


def test_clients_without_an_address() -> None:
    """Whoever may open the socket's file comes in; who has no such file does not.

    No listener of ours has clients of the last kind, but an endpoint of somebody else's
    might, and they are not those whom --allow-client names.
    """
    judge = gate("192.0.2.0/24")
    for path in (b"/run/proxy", b"@192.0.2.1", b"", None):
        assert lets_in(judge, address_name(UNIXAddress(path)))
    for client in (address_name(None), "", "somebody"):
        assert not lets_in(judge, client)
