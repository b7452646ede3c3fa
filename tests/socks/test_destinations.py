"""Where a proxy's clients may go: guards, stand-ins, users."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from relayd.core.errors import Refused
from relayd.core.interfaces import IProxyPolicy
from relayd.core.networks import Ip, Network, stands_for
from relayd.socks.destinations import ProxyPolicy
from tests.support.policies import (
    ANYWHERE,
    GUARDS,
    NEVER,
    SESSION,
    around,
    policy,
    refusal,
    some_of,
    stand_ins,
)


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
