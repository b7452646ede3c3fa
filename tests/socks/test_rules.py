"""Rules about destinations as they are written, and which of them decides."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.errors import ConfigError
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import Rule, parse_rule
from tests.support.policies import (
    ANYWHERE,
    policy,
    refusal,
)


def config_refusal(text: str) -> str:
    """What an operator is told of a bad rule, in one line that quotes it."""
    with pytest.raises(ConfigError) as caught:
        parse_rule("--deny-dest", text, allow=False)
    message = str(caught.value)
    assert message.isprintable()
    start = f"bad --deny-dest {text!r}: "
    assert message.startswith(start)
    return message.removeprefix(start)


# -- rules as they are written


@pytest.mark.parametrize(
    ("text", "network", "name", "ports"),
    [
        ("10.0.0.0/8", "10.0.0.0/8", "", ()),
        ("192.0.2.1", "192.0.2.1/32", "", ()),
        ("192.0.2.1:443", "192.0.2.1/32", "", ((443, 443),)),
        ("10.0.0.0/8:80,443", "10.0.0.0/8", "", ((80, 80), (443, 443))),
        ("0.0.0.0/0:8000-8999", "0.0.0.0/0", "", ((8000, 8999),)),
        ("0.0.0.0/0:1-65535", "0.0.0.0/0", "", ((1, 65535),)),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8", "", ()),
        ("2001:db8::/32", "2001:db8::/32", "", ()),
        ("::1", "::1/128", "", ()),
        ("::", "::/128", "", ()),
        ("::/0", "::/0", "", ()),
        ("[::1]", "::1/128", "", ()),
        ("[2001:db8::/32]:443", "2001:db8::/32", "", ((443, 443),)),
        ("[::/0]:1-3,5,7-9", "::/0", "", ((1, 3), (5, 5), (7, 9))),
        ("*", None, "*", ()),
        ("*:25", None, "*", ((25, 25),)),
        ("example.com", None, "example.com", ()),
        ("example.com:80", None, "example.com", ((80, 80),)),
        ("EXAMPLE.Com.", None, "example.com", ()),
        ("*.example.com", None, "*.example.com", ()),
        ("*.Example.com.:80-81", None, "*.example.com", ((80, 81),)),
        ("localhost", None, "localhost", ()),
        ("*.xn--p1ai", None, "*.xn--p1ai", ()),
        ("_sip._tcp.example", None, "_sip._tcp.example", ()),
        ("1and1.com", None, "1and1.com", ()),
        ("-a.b-.example-:80", None, "-a.b-.example-", ((80, 80),)),
        ("*.-a.example", None, "*.-a.example", ()),
    ],
)
def test_a_rule(
    text: str, network: str | None, name: str, ports: tuple[tuple[int, int], ...]
) -> None:
    """A network or a name, and ports if it is about some."""
    known = None if network is None else ipaddress.ip_network(network)
    for allow in (True, False):
        rule = parse_rule("--x", text, allow=allow)
        assert rule == Rule(allow, known, name, ports, text)


_PORTS = "is not a list of ports such as 443, 80,443 or 8000-8999"
_EXPECTED = (
    "expected CIDR[:PORTS] or NAME[:PORTS], such as 10.0.0.0/8 or *.example.com:443"
)
_NETWORK = "does not appear to be an IPv4 or IPv6 network"
_BEYOND = "has bits beyond its prefix: you may mean"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", _EXPECTED),
        (" ", _EXPECTED),
        (".", _EXPECTED),
        ("*.", _EXPECTED),
        ("*.*", _EXPECTED),
        ("*.*.com", _EXPECTED),
        ("www.*.com", _EXPECTED),
        ("*example.com", _EXPECTED),
        (".example.com", _EXPECTED),
        ("example..com", _EXPECTED),
        ("example.com..", _EXPECTED),
        ("-1", _EXPECTED),
        ("127.0.0.1-", _EXPECTED),
        ("example.com ", _EXPECTED),
        ("example.com\n", _EXPECTED),
        ("exämple.com", _EXPECTED),
        # Its small letter is the k of ASCII.
        ("\N{KELVIN SIGN}.com", _EXPECTED),
        ("a" * 64, _EXPECTED),
        (".".join(["a" * 61] * 5), _EXPECTED),
        # No client can ask for these: a rule with them would do nothing.
        ("0x7f.1", _EXPECTED),
        ("0x7f000001", _EXPECTED),
        ("*.1", _EXPECTED),
        ("127.1", f"'127.1' {_NETWORK}"),
        ("2130706433", f"'2130706433' {_NETWORK}"),
        ("0177.0.0.1", f"'0177.0.0.1' {_NETWORK}"),
        ("256.0.0.1", f"'256.0.0.1' {_NETWORK}"),
        ("10.0.0.0/33", f"'10.0.0.0/33' {_NETWORK}"),
        ("10.0.0.0/-1", f"'10.0.0.0/-1' {_NETWORK}"),
        ("10.0.0.0/", f"'10.0.0.0/' {_NETWORK}"),
        ("10.0.0.1/8", f"'10.0.0.1/8' {_BEYOND} 10.0.0.0/8"),
        ("example.com/8", f"'example.com/8' {_NETWORK}"),
        ("2001:db8::/129", f"'2001:db8::/129' {_NETWORK}"),
        ("2001:db8::1/32", f"'2001:db8::1/32' {_BEYOND} 2001:db8::/32"),
        ("[2001:db8::1/32]:80", f"'2001:db8::1/32' {_BEYOND} 2001:db8::/32"),
        ("fe80::1%eth0", "'fe80::1%eth0' has a scope"),
        ("[fe80::1%eth0]:80", "'fe80::1%eth0' has a scope"),
        ("[example.com]:80", f"'example.com' {_NETWORK}"),
        ("[*]", f"'*' {_NETWORK}"),
        ("[]", f"'' {_NETWORK}"),
        ("[::1", _EXPECTED),
        ("[::1]80", _EXPECTED),
        ("[::1]]:80", _EXPECTED),
        ("[[::1]]", _EXPECTED),
        ("::1]:80", f"'::1]:80' {_NETWORK}"),
        ("10.0.0.0/8:80:90", f"'10.0.0.0/8:80:90' {_NETWORK}"),
        ("example.com:", f"'' {_PORTS}"),
        ("[::1]:", f"'' {_PORTS}"),
        ("example.com:http", f"'http' {_PORTS}"),
        ("example.com:0", f"'0' {_PORTS}"),
        ("example.com:0-80", f"'0-80' {_PORTS}"),
        ("example.com:65536", f"'65536' {_PORTS}"),
        ("example.com:999999", f"'999999' {_PORTS}"),
        ("example.com:90-80", f"'90-80' {_PORTS}"),
        ("example.com:80-", f"'80-' {_PORTS}"),
        ("example.com:-80", f"'-80' {_PORTS}"),
        ("example.com:1-2-3", f"'1-2-3' {_PORTS}"),
        ("example.com:80,", f"'80,' {_PORTS}"),
        ("example.com:80,,81", f"'80,,81' {_PORTS}"),
        ("example.com:80, 81", f"'80, 81' {_PORTS}"),
        ("example.com:+80", f"'+80' {_PORTS}"),
        ("example.com:٨٠", f"'٨٠' {_PORTS}"),
        ("example.com:80\n", f"'80\\n' {_PORTS}"),
        (":80", _EXPECTED),
    ],
)
def test_what_is_no_rule(text: str, why: str) -> None:
    """The option and the text are quoted, and what is wrong with it is said."""
    assert config_refusal(text) == why


@given(
    st.text()
    | st.text("0123456789abcxf.:/*-[]%,_ \n", max_size=30)
    | st.builds("{}:{}".format, st.ip_addresses(), st.text("0123456789,-", max_size=9))
)
def test_any_text_is_a_rule_or_one_line(text: str) -> None:
    """And what is a rule is about a network, or a name that a client can send."""
    try:
        rule = parse_rule("--deny-dest", text, allow=False)
    except ConfigError:
        config_refusal(text)
    else:
        assert rule.text == text
        assert (rule.network is None) == bool(rule.name)
        assert rule.name.isascii()
        assert all(1 <= low <= high <= 65535 for low, high in rule.ports)


def test_a_mapped_rule_is_about_the_ipv4_address() -> None:
    """In each of its spellings, and of this machine's own too."""
    judge = policy("-::ffff:8.8.8.8", guarded=False)
    for asked in ("8.8.8.8", "::ffff:8.8.8.8"):
        assert "denied by --deny-dest ::ffff:8.8.8.8" in refusal(judge, asked)
    assert not refusal(judge, "8.8.4.4")
    mine = ProxyPolicy(
        [parse_rule("--allow-dest", "::ffff:203.0.113.5", allow=True)],
        own=lambda ip: "203.0.113.5" in str(getattr(ip, "ipv4_mapped", None) or ip),
    )
    for asked in ("203.0.113.5", "::ffff:203.0.113.5"):
        assert not refusal(mine, asked)
        assert "it takes --allow-dest 203.0.113.5/32" in refusal(
            ProxyPolicy(own=mine._own), asked
        )


# -- which rule decides


def test_the_first_match_decides() -> None:
    """And what none matches is allowed."""
    judge = policy("-203.0.113.7", "+203.0.113.0/24", "-*", guarded=False)
    assert refusal(judge, "203.0.113.7") == (
        "203.0.113.7 is denied by --deny-dest 203.0.113.7"
    )
    assert not refusal(judge, "203.0.113.8")
    assert refusal(judge, ANYWHERE) == f"{ANYWHERE} is denied by --deny-dest *"
    other_way_round = policy("+203.0.113.0/24", "-203.0.113.7", guarded=False)
    assert not refusal(other_way_round, "203.0.113.7")
    assert not refusal(policy("-203.0.113.0/24", guarded=False), ANYWHERE)


# Eight addresses, the networks that they have in common, and three ports.
_FEW = [str(address) for address in ipaddress.ip_network("8.8.8.0/29")]
_RULES = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from(
            [
                *_FEW,
                *("8.8.8.0/30", "8.8.8.4/30", "8.8.8.2/31", "0.0.0.0/0", "*"),
                *("::/0", "a.example", "*.example", "b.example"),
            ]
        ),
        st.sampled_from(["", ":1", ":2-3", ":1,3"]),
    ),
    max_size=8,
)
_PORTS_OF = {"": {1, 2, 3}, ":1": {1}, ":2-3": {2, 3}, ":1,3": {1, 3}}
_ABOUT: dict[str, Callable[[str, str], bool]] = {
    "*": lambda address, name: True,
    "::/0": lambda address, name: False,
    "a.example": lambda address, name: name == "a.example",
    "b.example": lambda address, name: name == "b.example",
    "*.example": lambda address, name: name.endswith(".example"),
}


@given(_RULES, st.booleans())
def test_rules_are_like_coats_of_paint(
    rules: list[tuple[bool, str, str]], guarded: bool
) -> None:
    """Laid on from the last to the first, what is seen at the end decides.

    The addresses are nobody's guard, so that it is the same with guards and without.
    """
    everything = [
        (address, name, port)
        for address in _FEW
        for name in ("", "a.example", "c.example", "example", "xexample")
        for port in (1, 2, 3)
    ]
    allowed = dict.fromkeys(everything, True)
    for allow, what, ports in reversed(rules):
        for address, name, port in everything:
            if port not in _PORTS_OF[ports]:
                continue
            if what in _ABOUT:
                about = _ABOUT[what](address, name)
            else:
                about = IPv4Address(address) in ipaddress.ip_network(what)
            if about:
                allowed[address, name, port] = allow
    judge = policy(
        *(
            f"{'+' if allow else '-'}{f'[{what}]' if ':' in what else what}{ports}"
            for allow, what, ports in rules
        ),
        guarded=guarded,
    )
    assert allowed == {
        (address, name, port): not refusal(judge, address, port, name)
        for address, name, port in everything
    }


def test_names() -> None:
    """Case and a last dot mean nothing, in the rule and in the request."""
    for rule in ("-www.Example.com", "-WWW.example.com."):
        judge = policy(rule)
        for name in ("www.example.com", "WWW.EXAMPLE.COM", "www.example.com."):
            assert refusal(judge, ANYWHERE, 80, name)
        for name in ("", "example.com", "a.www.example.com", "www.example.com.org"):
            assert not refusal(judge, ANYWHERE, 80, name)


def test_wildcards() -> None:
    """Any name below it, however deep, and not itself; `*` is the rest as well."""
    judge = policy("-*.example.com")
    for name in ("www.example.com", "a.b.Example.com", "x.example.com."):
        assert refusal(judge, ANYWHERE, 80, name)
    for name in ("", "example.com", "badexample.com", "example.com.org", "com"):
        assert not refusal(judge, ANYWHERE, 80, name)
    for name in ("", "www.example.com", "example.org"):
        assert refusal(policy("-*"), ANYWHERE, 80, name)


def test_ports() -> None:
    """Ranges include their ends; a rule without them is about all."""
    judge = policy("-*:25,8000-8999")
    for port in (25, 8000, 8500, 8999):
        assert refusal(judge, ANYWHERE, port) == (
            f"{ANYWHERE} is denied by --deny-dest *:25,8000-8999"
        )
    for port in (1, 24, 26, 7999, 9000, 65535):
        assert not refusal(judge, ANYWHERE, port)


def test_a_network_of_the_other_kind_matches_nothing() -> None:
    """`0.0.0.0/0` is IPv4, and `::/0` is IPv6."""
    assert not refusal(policy("-::/0"), ANYWHERE)
    assert not refusal(policy("-0.0.0.0/0"), "2606:4700::1111")
    assert refusal(policy("-::/0"), "2606:4700::1111")
