"""Rules for clients: how they are written, and that the first one decides."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.admission import client_rules
from relayd.admission.client_rules import (
    ClientRule,
    ClientRules,
    parse_client_rule,
    span_of,
)

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def rule(text: str, *, allow: bool = True) -> ClientRule:
    return parse_client_rule(text, allow=allow)


def naive(rules: list[ClientRule], host: str) -> bool:
    """One rule after the other, as an operator reads them."""
    for each in rules:
        if not host:
            matches = each.unix
        elif each.unix:
            matches = False
        else:
            address = ipaddress.ip_address(host)
            mapped = getattr(address, "ipv4_mapped", None)
            matches = (mapped or address) in ipaddress.ip_network(each.text)
        if matches:
            return each.allow
    return not any(each.allow for each in rules)


#: Addresses that are close to each other, so that networks lie within each other.
FEW = st.one_of(
    st.integers(0, 31).map(lambda n: ipaddress.IPv4Address(0xC0000200 + n)),
    st.sampled_from(["0.0.0.0", "255.255.255.255"]).map(ipaddress.IPv4Address),
    st.integers(0, 31).map(lambda n: ipaddress.IPv6Address((0x20010DB8 << 96) + n)),
    st.sampled_from(["::", "ffff:" * 7 + "ffff"]).map(ipaddress.IPv6Address),
)


@st.composite
def networks(draw: st.DrawFn) -> str:
    """One around an address; mostly a small one."""
    address = draw(FEW)
    least = draw(st.sampled_from([0, address.max_prefixlen - 5]))
    length = draw(st.integers(least, address.max_prefixlen))
    if address.version == 6 and length < 96 and int(address) < 1 << 32:
        # Part of it would be v4-mapped, which `ipaddress` does not take for IPv4.
        length = 96
    return str(ipaddress.ip_network((int(address), length), strict=False))


RULES = st.lists(
    st.builds(
        lambda text, allow: parse_client_rule(text, allow=allow),
        networks() | st.just("unix"),
        st.booleans(),
    ),
    max_size=8,
)


@given(RULES, st.lists(FEW.map(str) | st.just(""), min_size=1, max_size=8))
def test_the_first_rule_that_matches_decides(
    rules: list[ClientRule], hosts: list[str]
) -> None:
    """As if they were read one after the other, for any rules and any client."""
    ready = ClientRules(rules)
    for host in hosts:
        assert ready.admits(host) is naive(rules, host)


def test_what_none_matches_is_admitted_unless_others_are_named() -> None:
    assert ClientRules([]).admits("192.0.2.1")
    assert ClientRules([rule("10.0.0.0/8", allow=False)]).admits("192.0.2.1")
    assert not ClientRules([rule("10.0.0.0/8")]).admits("192.0.2.1")
    # `unix` is a rule as any other.
    assert not ClientRules([rule("10.0.0.0/8")]).admits("")
    assert ClientRules([rule("10.0.0.0/8"), rule("unix")]).admits("")
    assert not ClientRules([rule("unix", allow=False)]).admits("")
    assert not ClientRules([rule("unix")]).admits("192.0.2.1")


def test_which_rule_it_was() -> None:
    ready = ClientRules(
        [rule("192.0.2.7"), rule("192.0.2.0/24", allow=False), rule("::/0")]
    )
    assert [ready.decides(host) for host in ("192.0.2.7", "192.0.2.8", "::1")] == [
        *(0, 1, 2)
    ]
    assert ready.decides("192.0.3.1") == -1
    assert ready.decides("::ffff:192.0.2.7") == 0
    for host in ("somebody", "1.2.3", "1.2.3.4.5", "::g", "fe80::1%eth0"):
        with pytest.raises(ValueError, match="is no address"):
            ready.decides(host)


def test_a_file_of_networks(tmp_path: Path) -> None:
    """One a line; comments, blank lines, any end of line, a mark at its begin."""
    path = tmp_path / "office"
    path.write_bytes(
        b"\xef\xbb\xbf# the office\r\n10.0.0.0/8 # all of it\r\n\n  2001:db8::/32\n"
        b"192.0.2.1"
    )
    ready = ClientRules([rule(f"@{path}")])
    for host, inside in (
        ("10.255.0.1", True),
        ("11.0.0.0", False),
        ("2001:db8:ffff::", True),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
    ):
        assert ready.admits(host) is inside
    path.write_text("# nobody\n")
    assert not ClientRules([rule(f"@{path}")]).admits("10.0.0.1")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"10.0.0.0/8\n10.0.0.1/8\n", "2: '10.0.0.1/8' has bits beyond its prefix:"),
        (b"#\n\nlan # not ours\n", "3: expected"),
        (b"10.0.0.0/8 10.1.0.0/16", "1: expected"),
        (b"10.0.0.0/8\x0b\x0c\n\xff\n", "2: expected"),
        (b"x" * 5000, "1: expected"),
        (b"unix", "1: expected"),
        (b"10.0.0.0/\xd9\xa8", "1: expected"),
    ],
)
def test_a_bad_line_is_told_in_one(tmp_path: Path, content: bytes, wrong: str) -> None:
    """The file and the line; its text, if it may be a network."""
    path = tmp_path / "office"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line") as caught:
        rule(f"@{path}")
    message = str(caught.value)
    assert message.startswith(f"{str(path)!r}, line {wrong}")
    assert "\n" not in message
    assert len(message) < 1000


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "none", "", "a\0b", tmp_path / "fifo"):
        with pytest.raises(ValueError, match="can't be read"):
            rule(f"@{path}")


def test_a_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.admission.client_rules.LONGEST", 1 << 20)
    path = tmp_path / "office"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="longer than 1 MiB"):
        rule(f"@{path}")


@given(st.ip_addresses(), st.integers(0, 128))
def test_a_network_is_as_ipaddress_says(address: Ip, length: int) -> None:
    length = min(length, address.max_prefixlen)
    text = f"{address}/{length}"
    network = ipaddress.ip_network(text, strict=False)
    if getattr(address, "ipv4_mapped", None) is not None:
        return
    if address == network.network_address:
        first = int(network.network_address)
        expected = network.version, first, first + network.num_addresses - 1
        assert span_of(text) == expected
    else:
        with pytest.raises(ValueError, match=f"you may mean {network}$"):
            span_of(text)


@pytest.mark.parametrize(
    "text",
    ["192.0.2.0/24", "192.0.2.1", "2001:db8::/32", "2001:db8::a", "2001:db8::1"],
)
def test_plain_networks_of_long_files_are_read_the_short_way(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ipaddress` would take seconds for a hundred thousand IPv6 networks."""
    network = ipaddress.ip_network(text)
    monkeypatch.setattr(client_rules, "parse_network", None)
    first = int(network.network_address)
    expected = network.version, first, first + network.num_addresses - 1
    assert span_of(text) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("2001:db8::1:53", "write brackets"),
        ("fe80::1%eth0/128", "has a scope"),
        ("2001:db8::/129", "does not appear to be"),
        ("::1.2.3.4/64", "you may mean ::/64"),
    ],
)
def test_what_is_wrong_with_ipv6_is_told(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        span_of(text)


def test_mapped_networks_are_those_of_ipv4() -> None:
    assert span_of("::ffff:192.0.2.0/120") == span_of("192.0.2.0/24")
    assert span_of("::ffff:192.0.2.1") == span_of("192.0.2.1")


@pytest.mark.cost
def test_many_rules_cost_a_client_no_more_than_a_search() -> None:
    """A hundred thousand networks are a few stretches more than that."""
    rules = [
        ClientRule(False, ((4, n << 12, (n << 12) + 4095),), False, str(n))
        for n in range(0, 20000, 2)
    ]
    ready = ClientRules(rules)
    starts, _ = ready._stretches[4]
    assert len(starts) <= 2 * len(rules) + 1
    one = ClientRule(False, tuple((4, n, n) for n in range(100_000)), False, "@f")
    starts, _ = ClientRules([one])._stretches[4]
    assert len(starts) == 2, "neighbours under one rule are one stretch"


def test_a_file_of_something_else_is_not_quoted(tmp_path: Path) -> None:
    """Whoever may steer a relay can name any file that relayd can read."""
    path = tmp_path / "shadow"
    path.write_text("root:$y$j9T$secret:20228:0:99999:7:::\n")
    with pytest.raises(ValueError, match="line 1: expected an address") as caught:
        rule(f"@{path}")
    assert "secret" not in str(caught.value)
