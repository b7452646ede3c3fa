"""Where a proxy's clients may go: rules as they are written, guards, and stand-ins."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from relayd import destinations
from relayd.destinations import (
    OWN_FOR,
    Ip,
    Network,
    OwnHosts,
    ProxyPolicy,
    Rule,
    address_towards,
    is_own,
    parse_network,
    parse_rule,
    stands_for,
)
from relayd.errors import ConfigError, Refused
from relayd.interfaces import IProxyPolicy
from relayd.session import Session

SESSION = Session(1, 0, "203.0.113.1:50000", "203.0.113.2:1080", 0.0)

#: No special address of any kind; nobody's guard.
ANYWHERE = "8.8.8.8"


def nobody(address: Ip) -> bool:
    """A machine without addresses, as which test machine it is must not matter."""
    return False


def rules_of(*texts: str) -> list[Rule]:
    """Rules; `+` allows and `-` denies."""
    return [
        parse_rule("--allow-dest", text[1:], allow=True)
        if text[0] == "+"
        else parse_rule("--deny-dest", text[1:], allow=False)
        for text in texts
    ]


def policy(
    *texts: str, guarded: bool = True, own: Callable[[Ip], bool] = nobody
) -> ProxyPolicy:
    """A policy with these rules."""
    return ProxyPolicy(rules_of(*texts), guarded=guarded, own=own)


def refusal(judge: ProxyPolicy, address: str, port: int = 80, name: str = "") -> str:
    """Why the policy is against it, in one line; empty if it is not."""
    try:
        judge.permit(address, port, name, SESSION)
    except Refused as refused:
        assert refused.why.isprintable()
        assert refused.why
        return refused.why
    return ""


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
        ("10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        ("example.com/8", f"'example.com/8' {_NETWORK}"),
        ("2001:db8::/129", f"'2001:db8::/129' {_NETWORK}"),
        ("2001:db8::1/32", "2001:db8::1/32 has host bits set"),
        ("[2001:db8::1/32]:80", "2001:db8::1/32 has host bits set"),
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


def test_a_network() -> None:
    """Or an address, which is a network of one."""
    assert parse_network("192.0.2.1") == ipaddress.ip_network("192.0.2.1/32")
    assert parse_network("fd00::/8") == ipaddress.ip_network("fd00::/8")
    for text in ("", "x", "10.0.0.1/8", "fe80::%eth0", "fe80::%eth0/10", "127.1"):
        with pytest.raises(ValueError, match="network|host bits|scope"):
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


@pytest.mark.parametrize("text", ["::ffff:10.0.0.0/8", "::ffff:0:0/95"])
def test_a_mapped_network_that_is_too_large_is_refused(text: str) -> None:
    """Who writes it means another one."""
    with pytest.raises(ValueError, match="takes a prefix from 96 to 128: write the"):
        parse_network(text)
    for bits in ("::ffff:10.0.0.1/104", "::ffff:a00:1/104"):
        with pytest.raises(ValueError, match="has host bits set"):
            parse_network(bits)


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


# -- guards

#: By the requirements and IANA's registries, not by the module.
GUARDS = {
    "127.0.0.0/8": "loopback",
    "::1/128": "loopback",
    "169.254.0.0/16": "link-local",
    "fe80::/10": "link-local",
    "10.0.0.0/8": "private",
    "172.16.0.0/12": "private",
    "192.168.0.0/16": "private",
    "100.64.0.0/10": "private",
    "192.0.0.0/24": "private",
    "198.18.0.0/15": "private",
    "fc00::/7": "private",
    "fec0::/10": "private",
    "2001:db8::/32": "private",
    "169.254.169.254/32": "cloud metadata",
    "100.100.100.200/32": "cloud metadata",
    "168.63.129.16/32": "cloud metadata",
    "fd00:ec2::254/128": "cloud metadata",
    "fd20:ce::254/128": "cloud metadata",
}

NEVER = {
    "0.0.0.0/8": "unspecified",
    "::/128": "unspecified",
    "224.0.0.0/4": "multicast",
    "ff00::/8": "multicast",
    "240.0.0.0/4": "reserved",
}


def some_of(text: str) -> Iterator[Ip]:
    """The first and last address of a network, and one in its middle."""
    network = ipaddress.ip_network(text)
    yield from {network[0], network[-1], network[network.num_addresses // 2]}


def around(text: str) -> Iterator[Ip]:
    """The addresses right before a network and right after it."""
    network = ipaddress.ip_network(text)
    kind: Any = type(network[0])
    for number in (int(network[0]) - 1, int(network[-1]) + 1):
        if 0 <= number < 2**network.max_prefixlen:
            yield kind(number)


def is_special(address: Ip) -> bool:
    """Whether one of the tables has it."""
    return any(address in ipaddress.ip_network(text) for text in {**GUARDS, **NEVER})


def innermost(address: Ip) -> str:
    """The smallest network that guards an address."""
    behind = [text for text in GUARDS if address in ipaddress.ip_network(text)]
    return max(behind, key=lambda text: ipaddress.ip_network(text).prefixlen)


@pytest.mark.parametrize("text", GUARDS)
def test_a_guard(text: str) -> None:
    """It stands unless an allow rule is about its network or a part of it."""
    everything = ("+0.0.0.0/0", "+::/0", "+*", "+host.example", "+*.example")
    halves = ("+0.0.0.0/1", "+128.0.0.0/1", "+::/1", "+8000::/1")
    for ip in some_of(text):
        address, guard = str(ip), innermost(ip)
        takes = f"{address} is {GUARDS[guard]}: it takes --allow-dest {guard}"
        for rules in ((), everything, halves, ("-8.8.8.8",)):
            assert refusal(policy(*rules), address, 80, "host.example") == takes
        for rule in (f"+{guard}", f"+{address}"):
            assert not refusal(policy(rule), address)
            assert not refusal(policy(*everything, rule), address)
            # It is allowed with its ports only.
            colon = "+[{}]:80,90-99" if ip.version == 6 else "+{}:80,90-99"
            judge = policy(colon.format(rule[1:]))
            assert not refusal(judge, address, 95)
            assert refusal(judge, address, 81) == takes
        # Another of the same kind says nothing about this one.
        other = [f"+{each}" for each in GUARDS if ip not in ipaddress.ip_network(each)]
        assert refusal(policy(*other), address) == takes
        # A proxy for this machine's own programs has none.
        for rules in ((), ("+*",), ("-8.8.8.8",)):
            assert not refusal(policy(*rules, guarded=False), address)


@pytest.mark.parametrize("text", [*GUARDS, *NEVER])
def test_a_guard_ends_where_its_network_ends(text: str) -> None:
    """The addresses next to it are everybody's, if they are not another's."""
    for ip in around(text):
        inner = stands_for(ip)
        special = is_special(ip) or (inner is not None and is_special(inner))
        assert bool(refusal(policy(), str(ip))) == special, ip


@pytest.mark.parametrize("text", NEVER)
def test_where_nobody_goes(text: str) -> None:
    """Whatever the rules say, guarded or not."""
    for ip in some_of(text):
        why = f"{ip} is {NEVER[text]}"
        for rules in ((), ("+*",), (f"+{text}",), (f"+{ip}",)):
            for guarded in (True, False):
                assert refusal(policy(*rules, guarded=guarded), str(ip)) == why


def test_a_deny_rule_before_it_is_what_decides() -> None:
    """A guard is lifted by a rule that is reached, and by the first that is."""
    assert "denied by" in refusal(policy("-10.1.0.0/16", "+10.0.0.0/8"), "10.1.2.3")
    assert not refusal(policy("+10.1.0.0/16", "-10.0.0.0/8"), "10.1.2.3")
    assert "denied by" in refusal(policy("+10.1.0.0/16", "-10.0.0.0/8"), "10.2.0.0")
    # What does not lift the guard does not decide either.
    assert "denied by" in refusal(policy("+0.0.0.0/0", "-10.0.0.0/8"), "10.2.0.0")
    assert "denied by" in refusal(
        policy("+*.example", "-*"), "10.2.0.0", 80, "a.example"
    )
    assert not refusal(policy("+*.example", "-*"), ANYWHERE, 80, "a.example")


def test_one_guard_within_another() -> None:
    """Both must be lifted: metadata is not what link-local was allowed for."""
    metadata = "169.254.169.254"
    wide = policy("+169.254.0.0/16")
    assert not refusal(wide, "169.254.1.1")
    assert refusal(wide, metadata) == (
        f"{metadata} is cloud metadata: it takes --allow-dest {metadata}/32"
    )
    assert not refusal(policy("+169.254.0.0/16", f"+{metadata}"), metadata)
    assert refusal(policy("+100.64.0.0/10"), "100.100.100.200")
    assert refusal(policy("+fc00::/7"), "fd00:ec2::254")
    assert not refusal(policy("+fd00:ec2::254"), "fd00:ec2::254")


def test_the_machines_own_addresses() -> None:
    """Are asked for each time, and only when it matters."""
    asked: list[str] = []
    mine = {"8.8.8.8", "10.0.0.1", "2606:4700::1111"}

    def own(address: Ip) -> bool:
        asked.append(str(address))
        return str(address) in mine

    for address in sorted(mine):
        bits = 32 if "." in address else 128
        takes = f"is this machine's own: it takes --allow-dest {address}/{bits}"
        for rules in (
            (),
            ("+*", "+0.0.0.0/0", "+::/0"),
            ("+8.8.8.0/24", "+10.0.0.0/8"),
        ):
            judge = policy(*rules, own=own)
            assert refusal(judge, address) == f"{address} {takes}"
        assert not refusal(policy(f"+{address}", own=own), address)
    assert not refusal(policy(own=own), "8.8.4.4")
    mine.add("8.8.4.4")
    assert refusal(policy(own=own), "8.8.4.4")
    asked.clear()
    for unguarded in (
        policy(guarded=False, own=own),
        policy("+*", guarded=False, own=own),
    ):
        assert not refusal(unguarded, "8.8.8.8")
    assert not asked


def test_loopback_is_allowed_by_its_network() -> None:
    """Though it is this machine's own as well, each address of it."""

    def own(address: Ip) -> bool:
        return True

    assert refusal(policy(own=own), "127.0.0.1") == (
        "127.0.0.1 is loopback: it takes --allow-dest 127.0.0.0/8"
    )
    for address in ("127.0.0.1", "127.255.255.255"):
        assert not refusal(policy("+127.0.0.0/8", own=own), address)
    assert not refusal(policy("+::1", own=own), "::1")


# -- addresses that stand for another

#: How an IPv6 address carries an IPv4 address: RFC 4291 (two), 6052, 8215, 3056.
STAND_INS: dict[str, Callable[[int], int]] = {
    "mapped": lambda ip: 0xFFFF << 32 | ip,
    "compatible": lambda ip: ip,
    "NAT64": lambda ip: 0x64FF9B << 96 | ip,
    "local NAT64": lambda ip: 0x64FF9B0001 << 80 | ip,
    "6to4": lambda ip: 0x2002 << 112 | ip << 80 | 0x1,
}


def stand_ins(address: str) -> dict[str, IPv6Address]:
    """All of them, but for those that are something else: `::` and `::1`."""
    number = int(IPv4Address(address))
    made = {kind: IPv6Address(make(number)) for kind, make in STAND_INS.items()}
    return {
        k: ip for k, ip in made.items() if ip not in (IPv6Address(0), IPv6Address(1))
    }


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


_SPECIAL = st.sampled_from(
    [str(ip) for text in (*GUARDS, *NEVER) if "." in text for ip in some_of(text)]
    + ["8.8.8.8", "8.8.4.4", "93.184.216.34"]
)


@given(
    _SPECIAL | st.ip_addresses(v=4).map(str),
    st.lists(
        st.sampled_from(
            [
                *("+0.0.0.0/0", "+::/0", "+*", "-*", "-8.8.8.8", "+*:80"),
                *("+10.0.0.0/8", "-10.0.0.0/8", "+127.0.0.0/8", "+64:ff9b::/96"),
                *(
                    "+::ffff:0:0/96",
                    "+2002::/16",
                    "-93.184.216.0/24",
                    "+169.254.0.0/16",
                ),
            ]
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_no_stand_in_reaches_what_its_address_may_not(
    address: str, rules: list[str], guarded: bool
) -> None:
    """With any rules: what is refused is refused in each of its forms."""
    judge = policy(*rules, guarded=guarded)
    if refusal(judge, address):
        for kind, ip in stand_ins(address).items():
            assert refusal(judge, str(ip)), kind


@given(_SPECIAL | st.ip_addresses(v=4).map(str))
def test_a_stand_in_is_refused_only_for_a_reason(address: str) -> None:
    """It may reach what its address may, as behind NAT64 it must."""
    judge = policy("+64:ff9b:1::/48")
    refused = bool(refusal(judge, address))
    for kind, ip in stand_ins(address).items():
        assert bool(refusal(judge, str(ip))) == refused, kind


def test_a_stand_in_is_judged_as_both() -> None:
    """A rule about either denies it; the guard of its IPv4 address takes that rule."""
    mapped = "::ffff:10.0.0.1"
    assert not refusal(policy("+10.0.0.0/8"), mapped)
    assert not refusal(policy(f"+{mapped}"), mapped)
    for rule in ("+::ffff:0:0/96", "+::/0", "+0.0.0.0/0", "+::ffff:10.0.0.2"):
        assert refusal(policy(rule), mapped)
    assert refusal(policy("-::ffff:0:0/96", "+10.0.0.0/8"), mapped)
    for guarded in (True, False):
        judge = policy("-8.8.8.8", guarded=guarded)
        assert refusal(judge, "64:ff9b::808:808") == (
            "64:ff9b::808:808 stands for 8.8.8.8, which is denied by"
            " --deny-dest 8.8.8.8"
        )
        assert not refusal(judge, "64:ff9b::808:809")


def test_a_stand_in_of_the_machines_own_address() -> None:
    """Is no way around that guard."""

    def own(address: Ip) -> bool:
        return str(address) == "8.8.8.8"

    judge = policy("+64:ff9b:1::/48", own=own)
    for kind, ip in stand_ins("8.8.8.8").items():
        why = refusal(judge, str(ip))
        assert "stands for 8.8.8.8, which is this machine's own" in why, kind


def test_a_networks_own_nat64_is_private() -> None:
    """Its translator may look for the IPv4 address where we don't (RFC 6052, 2.2)."""
    takes = "is private: it takes --allow-dest 64:ff9b:1::/48"
    for text in (
        "64:ff9b:1::808:808",
        # 10.0.0.5 after prefixes of 48, 56 and 64 bits; in our place there is another.
        "64:ff9b:1:a00:0:500:808:808",
        "64:ff9b:1:a:0:5:808:808",
        "64:ff9b:1:0:a:0:500:0",
    ):
        for rules in ((), ("+::/0", "+*"), ("+64:ff9b::/32",)):
            assert refusal(policy(*rules), text) == f"{text} {takes}"
    assert not refusal(policy("+64:ff9b:1::/48"), "64:ff9b:1::808:808")
    assert refusal(policy("+64:ff9b:1::/48"), "64:ff9b:1::a00:5")
    assert not refusal(policy("+64:ff9b:1::/48", "+10.0.0.0/8"), "64:ff9b:1::a00:5")


def test_a_stand_in_of_where_nobody_goes() -> None:
    """Is somewhere else where nobody goes, guarded or not."""
    for address, kind in (("0.0.0.0", "unspecified"), ("224.0.0.1", "multicast")):
        for ip in stand_ins(address).values():
            for guarded in (True, False):
                judge = policy("+*", guarded=guarded)
                assert refusal(judge, str(ip)) == f"{ip} is {kind}"


# -- what the standard library thinks of it

#: What is permitted though it is said not to be global, and an address of each.  None
#: of it is anybody's own network: examples for books, a sink, and experiments.
PERMITTED = {
    "192.0.2.0/24": "192.0.2.1",
    "198.51.100.0/24": "198.51.100.1",
    "203.0.113.0/24": "203.0.113.1",
    "3fff::/20": "3fff::1",
    "100::/64": "100::1",
    "100:0:0:1::/64": "100:0:0:1::1",
    # Benchmarking and ORCHID are in it; Teredo is, too, and guarded.
    "2001::/23": "2001:2::1",
    "5f00::/16": "5f00::1",
    # Judged by the IPv4 address within; newer versions call all of it private.
    "2002::/16": "2002:808:808::1",
}
NOT_GLOBAL_BUT_PERMITTED = [ipaddress.ip_network(text) for text in PERMITTED]

#: What is refused though it is said to be global.
GLOBAL_BUT_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        *("224.0.0.0/4", "ff00::/8"),
        # A cloud's metadata service stands at a public address.
        "168.63.129.16/32",
        # IETF's own; few versions call the same parts of it global.
        "192.0.0.0/24",
        # What private networks had before fc00::/7.
        "fec0::/10",
    )
]


def within(address: Ip, networks: list[Network]) -> bool:
    """Whether one of the networks has it."""
    return any(address in network for network in networks)


_BORDERS = st.sampled_from(
    [
        ip
        for network in [*NOT_GLOBAL_BUT_PERMITTED, *GLOBAL_BUT_REFUSED]
        for ip in (*some_of(str(network)), *around(str(network)))
    ]
)


@given(st.ip_addresses() | _BORDERS)
@settings(max_examples=1000)
def test_a_guarded_proxy_reaches_what_is_global(address: Ip) -> None:
    """Without rules: that, and of the rest what stands above with a reason."""
    inner = stands_for(address)
    permitted = not refusal(policy(), str(address))
    if permitted and not within(address, NOT_GLOBAL_BUT_PERMITTED):
        assert address.is_global
    if permitted and inner is not None:
        assert inner.is_global or within(inner, NOT_GLOBAL_BUT_PERMITTED)
    if not permitted and inner is None and not within(address, GLOBAL_BUT_REFUSED):
        assert not address.is_global


@pytest.mark.parametrize(("network", "address"), PERMITTED.items())
def test_what_is_permitted_though_it_is_not_global(network: str, address: str) -> None:
    """The table is not longer than it must be."""
    assert ipaddress.ip_address(address) in ipaddress.ip_network(network)
    assert not refusal(policy(), address)


@pytest.mark.parametrize("network", GLOBAL_BUT_REFUSED, ids=str)
def test_what_is_refused_though_it_is_global(network: Network) -> None:
    """Whole."""
    for ip in some_of(str(network)):
        assert refusal(policy(), str(ip))


# -- users


def test_everyone_is_admitted_unless_users_are_named() -> None:
    """Exactly those, byte by byte."""
    everyone, some = ProxyPolicy(), ProxyPolicy(user_ids=[b"joe", b"\xff"])
    for user_id in (b"", b"joe", b"JOE", b"joe ", b"\xff", b"eve"):
        everyone.admit(user_id, SESSION)
        if user_id in (b"joe", b"\xff"):
            some.admit(user_id, SESSION)
        else:
            with pytest.raises(Refused) as caught:
                some.admit(user_id, SESSION)
            assert caught.value.why == "no --userid names this user"
    with pytest.raises(Refused):
        ProxyPolicy(user_ids=[]).admit(b"", SESSION)


def test_a_policy_is_one() -> None:
    """And is guarded unless it is told otherwise."""
    assert verifyObject(IProxyPolicy, ProxyPolicy())
    assert ProxyPolicy().guarded


# -- this machine

#: RFC 5737 and 3849: these belong to no machine that is set up well.
NOBODYS = (IPv4Address("203.0.113.254"), IPv6Address("2001:db8::dead:beef"))


def addresses_of_this_machine() -> list[Ip]:
    """As far as they can be had: loopback, the kernel's list, the way outside."""
    found: list[Ip] = [IPv4Address("127.0.0.1"), IPv4Address("127.1.2.3")]
    table = Path("/proc/net/if_inet6")
    if table.exists():
        rows = [line.split() for line in table.read_text().splitlines()]
        # 20 is link-local, which takes its scope to be bound to.
        found += [IPv6Address(int(row[0], 16)) for row in rows if row[3] != "20"]
    for address in NOBODYS:
        try:
            found.append(ipaddress.ip_address(address_towards(address)))
        except OSError:
            continue
    return found


def test_own_addresses_are_told_from_others() -> None:
    """Loopback whole, those of the interfaces; not those of nobody."""
    own = addresses_of_this_machine()
    assert own
    assert [address for address in own if not is_own(address)] == []
    others = (*NOBODYS, IPv4Address(ANYWHERE))
    assert [address for address in others if is_own(address)] == []


def test_own_addresses_where_the_kernel_binds_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way to an own address starts from itself, and to another's does not."""
    own = addresses_of_this_machine()

    class BindsAnything(socket.socket):
        def bind(self, address: Any) -> None:
            """As if it were this machine's."""

    monkeypatch.setattr(socket, "socket", BindsAnything)
    assert is_own(NOBODYS[0]), "the fake is none"
    monkeypatch.setattr(destinations, "_binds_anything", lambda version: True)
    for text in ("127.0.0.1", "::1"):
        address = ipaddress.ip_address(text)
        # There may be no IPv6 here.
        assert is_own(address) == (address in own)
    for address in NOBODYS:
        assert not is_own(address)


def test_a_stand_in_of_an_own_address_is_refused_here() -> None:
    """With the machine's own answer, not an injected one."""
    for text in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"):
        assert refusal(ProxyPolicy(), text)


#: What the kernel may say when it is asked, and whether that lets a client pass.
NOT_OWN = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


@pytest.mark.parametrize("step", ["socket", "bind"])
@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_a_guard_falls_by_no_errno(
    monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    """But by those that say that the address is another machine's.

    Who uses up the descriptors, or the ports, must not get past it.
    """

    class Refusing(socket.socket):
        def __init__(self, *args: Any) -> None:
            if step == "socket":
                raise OSError(number, "no")
            super().__init__(*args)

        def bind(self, address: Any) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    own = is_own(IPv4Address(ANYWHERE))
    assert own == (number not in NOT_OWN)
    assert bool(refusal(ProxyPolicy(), ANYWHERE)) == own


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_a_guard_falls_by_no_errno_where_the_kernel_binds_anything(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """But by the one that says that there is no way to that address."""

    class Refusing(socket.socket):
        def bind(self, address: Any) -> None:
            """As if it were this machine's."""

        def connect(self, address: Any) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    monkeypatch.setattr(destinations, "_binds_anything", lambda version: True)
    assert is_own(IPv4Address(ANYWHERE)) == (number != errno.ENETUNREACH)


def test_own_addresses_are_asked_for_without_a_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When all ports are used up, the guard still knows; it refuses nobody else."""
    bound: list[Any] = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            bound.append(self.getsockname()[1])

    monkeypatch.setattr(socket, "socket", Watched)
    assert is_own(IPv4Address("127.0.0.1"))
    assert not is_own(IPv4Address(ANYWHERE))
    assert bound == ([0] if sys.platform == "linux" else bound)


def test_own_addresses_on_a_kernel_without_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked with a port."""

    class Older(socket.socket):
        def setsockopt(self, *args: Any) -> None:
            raise OSError(errno.ENOPROTOOPT, "no such option")

    monkeypatch.setattr(socket, "socket", Older)
    assert is_own(IPv4Address("127.0.0.1"))
    assert not is_own(IPv4Address(ANYWHERE))


def test_the_way_to_an_address() -> None:
    """Starts from an address of this machine; nothing is sent."""
    assert address_towards(IPv4Address("127.0.0.1")) == "127.0.0.1"
    for address in NOBODYS:
        try:
            start = address_towards(address)
        except OSError:
            continue
        assert is_own(ipaddress.ip_address(start))
    # Nothing is sent to everybody without being asked for twice.
    with pytest.raises(OSError, match="denied|unreachable"):
        address_towards(IPv4Address("255.255.255.255"))


def test_whether_the_kernel_binds_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its setting says; where there is none, it does not."""
    answers: dict[str, str] = {}

    def read_text(path: Path) -> str:
        if str(path) in answers:
            return answers[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    setting = "/proc/sys/net/ipv{}/ip_nonlocal_bind"
    for version in (4, 6):
        assert not destinations._binds_anything(version)
        answers[setting.format(version)] = "0\n"
        assert not destinations._binds_anything(version)
        answers[setting.format(version)] = "1\n"
        assert destinations._binds_anything(version)


def test_hosts_that_are_this_machine_are_remembered_for_a_while() -> None:
    clock, asked = Clock(), []

    def own(address: Ip) -> bool:
        asked.append(str(address))
        return str(address) == "192.0.2.1"

    hosts = OwnHosts(clock.seconds, own)
    for _ in range(3):
        assert hosts("192.0.2.1")
        assert hosts("::ffff:192.0.2.1")
        assert not hosts("192.0.2.2")
    assert asked == ["192.0.2.1", "192.0.2.1", "192.0.2.2"]
    clock.advance(OWN_FOR)
    assert not hosts("192.0.2.2")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "127.0.0.2", "::1", "::ffff:127.0.0.1", "a.name"]
)
def test_hosts_that_are_this_machine_by_definition(host: str) -> None:
    """Or can't be asked about."""
    assert OwnHosts(Clock().seconds, lambda address: False)(host)


def test_few_hosts_are_remembered() -> None:
    hosts = OwnHosts(Clock().seconds, lambda address: False)
    for number in range(3000):
        hosts(str(IPv4Address(number + 0x0A000000)))
        assert len(hosts._known) <= 1024
