"""What the kernel is to bring to a relay: its grammar."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.interception import MAX_RANGES, Intercept, parse_intercept


def net(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:80", Intercept(net("192.0.2.1"), ((80, 80),))),
        ("10.0.0.0/8:80", Intercept(net("10.0.0.0/8"), ((80, 80),))),
        ("[2001:db8::/32]:443", Intercept(net("2001:db8::/32"), ((443, 443),))),
        ("[2001:db8::1]:443", Intercept(net("2001:db8::1"), ((443, 443),))),
        (":80", Intercept(None, ((80, 80),))),
        (":*", Intercept(None, ())),
        ("[::/0]:1-1023", Intercept(net("::/0"), ((1, 1023),))),
        ("0.0.0.0/0:80,443", Intercept(net("0.0.0.0/0"), ((80, 80), (443, 443)))),
        (
            ":53,from=10.1.0.0/16,interface=eth1,by=tproxy",
            Intercept(None, ((53, 53),), net("10.1.0.0/16"), "eth1", True),
        ),
        (":53,by=redirect", Intercept(None, ((53, 53),), tproxy=False)),
        (":53,from=2001:db8::1", Intercept(None, ((53, 53),), net("2001:db8::1"))),
    ],
)
def test_how_one_is_written(text: str, expected: Intercept) -> None:
    assert parse_intercept(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("10.1.2.3/32:80-80", "10.1.2.3:80"),
        (":443,80,81", ":80-81,443"),
        (":1-10,5-7,10,11", ":1-11"),
        (":1-65535", ":*"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1:80"),
        (":80,by=tproxy,interface=a,from=10.0.0.1", ":80,from=10.0.0.1,interface=a,"),
    ],
)
def test_how_it_may_be_written_as_well(text: str, plain: str) -> None:
    assert str(parse_intercept(text)).startswith(plain)


NETWORKS4 = st.builds(
    lambda bits, length: ipaddress.ip_network((bits, length), strict=False),
    # Loopback has rules of its own.
    st.ip_addresses(v=4)
    .filter(lambda ip: 0 < int(ip) >> 24 < 224 and not ip.is_loopback)
    .map(int),
    st.integers(1, 32),
)
NETWORKS6 = st.builds(
    lambda bits, length: ipaddress.ip_network((bits, length), strict=False),
    st.ip_addresses(v=6, network="2000::/3").map(int),
    st.integers(3, 128),
)
RANGES = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(0, 300)).map(
        lambda each: f"{each[0]}-{min(sum(each), 65535)}"
    ),
    min_size=1,
    max_size=MAX_RANGES,
).map(",".join)


@given(
    st.sampled_from([NETWORKS4, NETWORKS6]).flatmap(
        lambda networks: st.tuples(st.none() | networks, st.none() | networks)
    ),
    RANGES | st.just("*"),
    st.none() | st.from_regex(r"[a-z][a-z0-9.@-]{0,14}", fullmatch=True),
    st.sampled_from([None, True, False]),
)
def test_it_is_read_again_as_it_is_shown(
    networks: tuple[object, object], ports: str, interface: str, way: bool | None
) -> None:
    """Ports are in order and apart, so that a set of nftables takes them."""
    network, source = networks
    text = f"{'' if network is None else network}:{ports}"
    if ":" in str(network):
        text = f"[{network}]:{ports}"
    text += "" if source is None else f",from={source}"
    text += "" if interface is None else f",interface={interface}"
    text += {None: "", True: ",by=tproxy", False: ",by=redirect"}[way]
    found = parse_intercept(text)
    assert parse_intercept(str(found)) == found
    assert (found.network, found.source) == networks
    assert (found.interface, found.tproxy) == (interface, way)
    numbers = [number for each in found.ports for number in each]
    assert numbers == sorted(numbers)
    assert all(
        high + 1 < low
        for (_, high), (low, _) in zip(found.ports, found.ports[1:], strict=False)
    )
    if ports != "*":
        asked = {
            port
            for low, high in (map(int, each.split("-")) for each in ports.split(","))
            for port in range(low, high + 1)
        }
        kept = found.ports or ((1, 65535),)
        assert asked == {port for low, high in kept for port in range(low, high + 1)}


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        found = parse_intercept(text)
    except ValueError as problem:
        assert str(problem).isprintable()
    else:
        assert parse_intercept(str(found)) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected an address or a network, with ports"),
        ("80", "expected an address or a network, with ports"),
        ("db.example.com:80", "'db.example.com' is no address and no network"),
        ("2001:db8::1:80", r"write IPv6 in brackets, such as \[2001:db8::1\]:443"),
        ("[10.0.0.1]:80", "expected an address or a network"),
        ("[::1:80", "expected an address or a network"),
        ("10.0.0.1/8:80", "'10.0.0.1/8' has bits beyond its prefix"),
        ("0.0.0.0:80", "write 0.0.0.0/0 for all of them"),
        ("[::]:80", "write ::/0 for all of them"),
        ("224.0.0.1:80", "multicast and broadcast stay"),
        ("255.255.255.255:80", "multicast and broadcast stay"),
        ("[ff02::1]:80", "multicast and broadcast stay"),
        ("10.0.0.1:", "'' is not a list of ports such as 443"),
        ("10.0.0.1:0", "'0' is not a list of ports"),
        ("10.0.0.1:65536", "'65536' is not a list of ports"),
        ("10.0.0.1:9-8", "'9-8' is not a list of ports"),
        ("10.0.0.1:http", "'http' is not a list of ports"),
        (":" + ",".join(map(str, range(1, 131, 2))), "more than 64 ports"),
        (":80,to=10.0.0.1", "expected an address or a network"),
        (":80,by", "expected an address or a network"),
        (":80,by=dnat", "expected by=redirect or by=tproxy"),
        (":80,by=tproxy,by=tproxy", "by is given twice"),
        (":80,from=eth1", "'eth1' is no address and no network"),
        (":80,from=", "'' is no address and no network"),
        (":80,interface=", "expected the name of an interface"),
        (":80,interface=eth*", r"no rule can name the interface 'eth\*'"),
        (':80,interface=a"b', "no rule can name the interface"),
        (":80,interface=@a", "no rule can name the interface"),
        ("127.0.0.1:80", "arrives there alone: add interface=lo,by=tproxy"),
        ("[::1]:80,interface=eth1", "arrives there alone: add interface=lo"),
        (":80,from=127.0.0.0/8", "arrives there alone: add interface=lo,by=tproxy"),
        ("10.0.0.1:80,from=2001:db8::1", "from IPv4 to IPv6, or the other way"),
    ],
)
def test_what_is_none(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_intercept(text)


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("192.0.2.1:80", (4,)),
        ("[::/0]:80", (6,)),
        (":80", (4, 6)),
        (":80,from=10.0.0.0/8", (4,)),
        (":80,from=2001:db8::/32", (6,)),
    ],
)
def test_its_families(text: str, families: tuple[int, ...]) -> None:
    assert parse_intercept(text).families == families


@pytest.mark.parametrize(
    ("text", "host", "port", "about"),
    [
        ("10.0.0.0/8:80,443", "10.1.2.3", 443, True),
        ("10.0.0.0/8:80,443", "10.1.2.3", 81, False),
        ("10.0.0.0/8:80", "11.1.2.3", 80, False),
        ("10.0.0.0/8:80", "::1", 80, False),
        (":80", "::1", 80, True),
        (":*", "10.0.0.1", 1, True),
        # A name, which may be looked up as anything.
        ("10.0.0.1:80", None, 80, True),
        ("10.0.0.1:80", None, 81, False),
    ],
)
def test_what_it_is_about(text: str, host: str | None, port: int, about: bool) -> None:
    address = None if host is None else ipaddress.ip_address(host)
    assert parse_intercept(text).about(address, port) is about
