"""Which rules relays need: by their settings, and by the packets that they take."""

from __future__ import annotations

import ipaddress
import shlex
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import HostPort, OriginalAddress, UdpAddress
from relayd.configuring.config import Relay, ServerDialing, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.interception import Intercept
from relayd.netfilter.documents import DIVERT, REDIRECT, as_json, as_text, chains_of
from relayd.netfilter.expressions import written
from relayd.netfilter.rules import Answers, RelayRules, rules_of
from relayd.tap import relayd
from tests.support.kernel import takes

MARK = 0x1000


def rules_for(words: str) -> RelayRules | None:
    """Of the relay that a command line has; it is called web."""
    options = relayd.Options()
    options.parseOptions(shlex.split(words))
    [relay] = options.config.relays
    assert isinstance(relay, Relay | UdpRelay)
    return rules_of(relay, "web")


def told(words: str) -> list[str]:
    """The rules of it, each behind its chain's prefix."""
    rules = rules_for(words)
    assert rules is not None
    return [
        prefix + " " + written(each)
        for prefix, chain in chains_of(rules, MARK).items()
        for each in chain
    ]


MARKED = "meta mark set meta mark | 0x00001000"
SOCKET = f"socket wildcard 0 socket transparent 1 {MARKED}"
#: What delivers to the sockets of connections, those that are closed among them.
CONNECTIONS = [
    "divert- meta l4proto tcp socket wildcard 1 return",
    f"divert- meta l4proto tcp socket transparent 1 {MARKED}",
]
#: And the errors about what they have sent.
ERRORS = f"divert- meta l4proto {{ icmp, ipv6-icmp }} socket transparent 1 {MARKED}"
OUTSIDE = 'iifname != "lo"'


def whole(protocol: str, *versions: int) -> list[str]:
    """What has fragments be put together, where TPROXY does not already."""
    ends = {4: "ip to :1", 6: "ip6 to :1"}
    return [
        f"divert- meta nfproto ipv{each} {protocol} dport 0 tproxy {ends[each]}"
        for each in versions
    ]


@pytest.mark.parametrize(
    "words",
    [
        "-l 8080 -d 10.0.0.1:80",
        "-l udp:53 -d udp:10.0.0.1:53",
        # Where clients meant to go is asked of the kernel; who brings them is not said.
        "-l 8080 -d original",
        "-l 8080 -d 10.0.0.1:80,source=127.0.0.1 --transparent",
    ],
)
def test_most_relays_need_none(words: str) -> None:
    assert rules_for(words) is None


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ("-d 192.168.0.1:80 --transparent", [*CONNECTIONS, ERRORS, *whole("tcp", 4)]),
        (
            "-d a.example.com:80 --transparent",
            [*CONNECTIONS, ERRORS, *whole("tcp", 4, 6)],
        ),
        (
            "-d 192.168.0.1:80 --intercept 192.168.0.2:80",
            [
                (
                    f"redirect- {OUTSIDE} ip daddr 192.168.0.2 tcp dport 80"
                    " redirect to :16000"
                )
            ],
        ),
        (
            "-d 192.168.0.1:80 --intercept 10.0.0.0/8:80,443,8000-8999,by=tproxy",
            [
                (
                    f"divert- {OUTSIDE} ip daddr 10.0.0.0/8 tcp dport"
                    f" {{ 80, 443, 8000-8999 }} tproxy ip to :16000 {MARKED}"
                ),
                *CONNECTIONS,
                ERRORS,
            ],
        ),
        (
            "-d 192.168.0.1:80 --intercept :80",
            [
                (
                    f"redirect- {OUTSIDE} meta nfproto ipv4 tcp dport 80"
                    " redirect to :16000"
                ),
                (
                    f"redirect- {OUTSIDE} meta nfproto ipv6 tcp dport 80"
                    " redirect to :16000"
                ),
            ],
        ),
        (
            (
                "-d 192.168.0.1:80"
                " --intercept '[2001:db8::/32]:*,from=fd00::/8,interface=eth1'"
            ),
            [
                (
                    'redirect- iifname "eth1" ip6 saddr fd00::/8 ip6 daddr'
                    " 2001:db8::/32 meta l4proto tcp redirect to :16000"
                )
            ],
        ),
        (
            "-d 192.168.0.1:80 --intercept ':1-1023,from=10.1.0.0/16'",
            [
                (
                    f"redirect- {OUTSIDE} ip saddr 10.1.0.0/16 tcp dport 1-1023"
                    " redirect to :16000"
                )
            ],
        ),
    ],
)
def test_of_connections(words: str, rules: list[str]) -> None:
    assert told(f"-l 16000 {words}") == rules


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        (
            "-d udp:192.168.0.1:53 --transparent",
            [
                f"divert- ip saddr 192.168.0.1 udp sport 53 {SOCKET}",
                ERRORS,
                *whole("udp", 4),
            ],
        ),
        (
            "-d udp:[fd00:192::1]:53 --transparent --intercept [fd00:192::2]:53",
            [
                f"divert- ip6 saddr fd00:192::1 udp sport 53 {SOCKET}",
                ERRORS,
                *whole("udp", 6),
                (
                    f"redirect- {OUTSIDE} ip6 daddr fd00:192::2 udp dport 53"
                    " redirect to :16000"
                ),
            ],
        ),
        # A name may have any address, and a service any port.
        (
            "-d udp:dns:ns.example.com:53 --transparent",
            [f"divert- udp sport 53 {SOCKET}", ERRORS, *whole("udp", 4, 6)],
        ),
        (
            "-d udp:srv:_dns._udp.example.com --transparent",
            [f"divert- meta l4proto udp {SOCKET}", ERRORS, *whole("udp", 4, 6)],
        ),
        # What is sent to everybody's servers comes back from them.
        (
            "-d udp:original --transparent --intercept 10.0.0.0/8:53",
            [
                (
                    f"divert- {OUTSIDE} ip daddr 10.0.0.0/8 udp dport 53"
                    f" tproxy ip to :16000 {MARKED}"
                ),
                f"divert- ip saddr 10.0.0.0/8 udp sport 53 {SOCKET}",
                ERRORS,
            ],
        ),
        (
            "-d udp:192.168.0.1:original --transparent --intercept 192.168.0.2:53,123",
            [
                (
                    f"divert- {OUTSIDE} ip daddr 192.168.0.2 udp dport {{ 53, 123 }}"
                    f" tproxy ip to :16000 {MARKED}"
                ),
                f"divert- ip saddr 192.168.0.1 udp sport {{ 53, 123 }} {SOCKET}",
                ERRORS,
            ],
        ),
        # It has sockets of its own; only what is brought in needs a rule.
        (
            "-d udp:original --intercept 192.168.0.2:53",
            [
                (
                    f"divert- {OUTSIDE} ip daddr 192.168.0.2 udp dport 53"
                    f" tproxy ip to :16000 {MARKED}"
                )
            ],
        ),
        (
            "-d udp:original --transparent",
            [f"divert- meta l4proto udp {SOCKET}", ERRORS, *whole("udp", 4, 6)],
        ),
    ],
)
def test_of_datagrams(words: str, rules: list[str]) -> None:
    assert told(f"-l udp:16000 {words}") == rules


def test_of_ranges_of_ports() -> None:
    """What comes back is of all of them."""
    assert told("-l udp:5000-5003 -d udp:10.0.0.5:6000-6003 --transparent") == [
        f"divert- ip saddr 10.0.0.5 udp sport 6000-6003 {SOCKET}",
        ERRORS,
        *whole("udp", 4),
    ]


def relays_of(tmp_path: Any, text: str) -> list[RelayRules]:
    """Of a file's relays."""
    path = tmp_path / "relayd.toml"
    path.write_text(text)
    found = []
    for relay in configure(read_layers(str(path))).relays:
        assert isinstance(relay, Relay | UdpRelay)
        rules = rules_of(relay)
        if rules is not None:
            found.append(rules)
    return found


FILE = """\
[tcp.web]
listen = ["192.168.0.2:16000", "[fd00:192::2]:16001"]
dest = ["192.168.0.1:80", "[fd00:192::1]:80"]
intercept = ":80"

[tcp.wildcards]
listen = ["0.0.0.0:16010", "[::]:16011"]
dest = "192.168.0.1:443"
intercept = "[::/0]:443,by=tproxy"

[tcp.four]
listen = "0.0.0.0:16002"
dest = "a.example.com:80"
transparent = true
intercept = "10.0.0.0/8:8080"
"""

TEXT = """\
table inet relayd {
\tchain redirect-web {
\t\ttype nat hook prerouting priority dstnat; policy accept;
\t\tiifname != "lo" meta nfproto ipv4 tcp dport 80 dnat ip to 192.168.0.2:16000 \
comment "relayd: relay web"
\t\tiifname != "lo" meta nfproto ipv6 tcp dport 80 dnat ip6 to [fd00:192::2]:16001 \
comment "relayd: relay web"
\t}

\tchain divert-wildcards {
\t\ttype filter hook prerouting priority mangle; policy accept;
\t\tiifname != "lo" ip6 daddr ::/0 tcp dport 443 tproxy ip6 to :16011 \
meta mark set meta mark | 0x00008000 comment "relayd: relay wildcards"
\t\tmeta l4proto tcp socket wildcard 1 return comment "relayd: relay wildcards"
\t\tmeta l4proto tcp socket transparent 1 \
meta mark set meta mark | 0x00008000 comment "relayd: relay wildcards"
\t\tmeta l4proto { icmp, ipv6-icmp } socket transparent 1 \
meta mark set meta mark | 0x00008000 comment "relayd: relay wildcards"
\t}

\tchain divert-four {
\t\ttype filter hook prerouting priority mangle; policy accept;
\t\tmeta l4proto tcp socket wildcard 1 return comment "relayd: relay four"
\t\tmeta l4proto tcp socket transparent 1 \
meta mark set meta mark | 0x00008000 comment "relayd: relay four"
\t\tmeta l4proto { icmp, ipv6-icmp } socket transparent 1 \
meta mark set meta mark | 0x00008000 comment "relayd: relay four"
\t\tmeta nfproto ipv4 tcp dport 0 tproxy ip to :1 comment "relayd: relay four"
\t\tmeta nfproto ipv6 tcp dport 0 tproxy ip6 to :1 comment "relayd: relay four"
\t}

\tchain redirect-four {
\t\ttype nat hook prerouting priority dstnat; policy accept;
\t\tiifname != "lo" ip daddr 10.0.0.0/8 tcp dport 8080 redirect to :16002 \
comment "relayd: relay four"
\t}
}
# ip -4 rule add pref 4097 fwmark 0x8000/0x8000 nop
# ip -4 rule add pref 4095 iif lo fwmark 0x8000/0x8000 goto 4097
# ip -4 rule add pref 4096 fwmark 0x8000/0x8000 lookup 32768
# ip -4 route add local default dev lo table 32768
# ip -6 rule add pref 4097 fwmark 0x8000/0x8000 nop
# ip -6 rule add pref 4095 iif lo fwmark 0x8000/0x8000 goto 4097
# ip -6 rule add pref 4096 fwmark 0x8000/0x8000 lookup 32768
# ip -6 route add local default dev lo table 32768
"""


def test_all_of_a_file(tmp_path: Any) -> None:
    """Each leads to a listener of its version of IP; the mark is as it is told."""
    rules = relays_of(tmp_path, FILE)
    assert as_text(rules, 0x8000) == TEXT
    assert [sorted(each.versions) for each in rules] == [[], [6], [4, 6]]


@pytest.mark.parametrize(
    "said",
    [
        'dest = "10.0.0.1:80"\nroute = "a:b"\n',
        # A balancer's header says where its client meant to go.
        'dest = "original"\nintercept = "10.0.0.1:80"\naccept_proxy = "10.0.0.0/8"\n',
    ],
)
def test_some_may_lead_anywhere(tmp_path: Any, said: str) -> None:
    [rules] = relays_of(
        tmp_path, f'[tcp.web]\nlisten = "8080"\ntransparent = true\n{said}'
    )
    assert rules.answers == (Answers(),)
    assert rules.versions == {4, 6}


def test_for_programs() -> None:
    """What `nft -j -f -` takes, and what ip is told."""
    rules = rules_for("-l 16000 -d 192.168.0.1:80 --transparent")
    assert rules is not None
    found = as_json([rules], MARK)
    table = {"family": "inet", "name": "relayd"}
    chain = {"family": "inet", "table": "relayd", "name": "divert-web"}
    redirect = {**chain, "name": "redirect-web"}
    mark = {"meta": {"key": "mark"}}
    hook = {"hook": "prerouting"}

    def rule(*steps: Any) -> Any:
        where = {"family": "inet", "table": "relayd", "chain": "divert-web"}
        said = {"comment": "relayd: relay web", "expr": list(steps)}
        return {"add": {"rule": where | said}}

    tcp = _match({"meta": {"key": "l4proto"}}, "tcp")
    errors = _match({"meta": {"key": "l4proto"}}, {"set": ["icmp", "ipv6-icmp"]})
    transparent = _match({"socket": {"key": "transparent"}}, 1)
    marked = {"mangle": {"key": mark, "value": {"|": [mark, MARK]}}}
    assert found["nftables"] == [
        {"add": {"table": table}},
        {"add": {"chain": {**chain, **hook, "type": "filter", "prio": -150}}},
        {"flush": {"chain": chain}},
        rule(tcp, _match({"socket": {"key": "wildcard"}}, 1), {"return": None}),
        rule(tcp, transparent, marked),
        rule(errors, transparent, marked),
        rule(
            _match({"meta": {"key": "nfproto"}}, "ipv4"),
            _match({"payload": {"protocol": "tcp", "field": "dport"}}, 0),
            {"tproxy": {"family": "ip", "port": 1}},
        ),
        # What it may have had of another kind goes.
        {"add": {"chain": {**redirect, **hook, "type": "nat", "prio": -100}}},
        {"flush": {"chain": redirect}},
        {"delete": {"chain": redirect}},
    ]
    assert [" ".join(words) for words in found["ip"]] == [
        "ip -4 rule add pref 4097 fwmark 0x1000/0x1000 nop",
        "ip -4 rule add pref 4095 iif lo fwmark 0x1000/0x1000 goto 4097",
        "ip -4 rule add pref 4096 fwmark 0x1000/0x1000 lookup 4096",
        "ip -4 route add local default dev lo table 4096",
    ]
    assert as_json([], MARK) == {"nftables": [], "ip": []}


def _match(left: Any, right: Any) -> Any:
    return {"match": {"op": "==", "left": left, "right": right}}


def test_what_sessions_of_before_need_is_kept() -> None:
    """Of connections, whatever their servers were; of datagrams, those servers."""
    was = rules_for("-l 16000 -d 192.168.0.1:80 --transparent --intercept :81")
    now = rules_for("-l 16000 -d 192.168.0.1:80 --intercept 10.0.0.1:80")
    six = rules_for("-l 16000 -d [fd00::1]:80 --transparent")
    assert was is not None
    assert now is not None
    assert six is not None
    kept = now.keeping(was)
    assert kept.intakes == now.intakes
    assert (now.versions, kept.versions) == (set(), {4})
    assert chains_of(kept, MARK)[DIVERT] == chains_of(was, MARK)[DIVERT]
    assert six.keeping(was).versions == {4, 6}
    assert was.keeping(now) == was.keeping(was) == was
    assert six.keeping(was).translated
    old = rules_for("-l udp:53 -d udp:10.0.0.1:53 --transparent")
    new = rules_for("-l udp:53 -d udp:10.0.0.2:53 --transparent")
    assert old is not None
    assert new is not None
    assert new.keeping(old).answers == (*new.answers, *old.answers)


def test_what_came_in_by_the_other_kind_of_rules_is_let_pass() -> None:
    """A change at run time leaves connections to the rules that have brought them."""
    words = "-l 16000 -d 192.168.0.1:80 --transparent --intercept 192.168.0.2:80,by="
    nat, tproxy = rules_for(words + "redirect"), rules_for(words + "tproxy")
    assert nat is not None
    assert tproxy is not None
    kept = chains_of(tproxy.keeping(nat), MARK)
    assert [written(each) for each in kept[REDIRECT]] == ["ct state established accept"]
    first, *rest = map(written, kept[DIVERT])
    assert first == "ct status dnat return"
    assert rest == [written(each) for each in chains_of(tproxy, MARK)[DIVERT]]
    kept = chains_of(nat.keeping(tproxy), MARK)
    first, *rest = map(written, kept[REDIRECT])
    assert first == "meta mark & 0x00001000 == 0x00001000 return"
    assert rest == [written(each) for each in chains_of(nat, MARK)[REDIRECT]]
    assert kept[DIVERT] == chains_of(nat, MARK)[DIVERT]
    # There and back again: both are there still.
    both = nat.keeping(tproxy).keeping(tproxy)
    assert nat.keeping(both) == nat.keeping(tproxy) == both
    left = both.closed()
    assert left is not None
    assert (left.translated, left.marked) == (True, False)


def test_what_is_left_of_one_that_takes_no_new_client() -> None:
    was = rules_for("-l 16000 -d 192.168.0.1:80 --transparent --intercept :81")
    assert was is not None
    left = was.closed()
    assert left is not None
    found = chains_of(left, MARK)
    assert found[DIVERT] == chains_of(was, MARK)[DIVERT]
    assert [written(each) for each in found[REDIRECT]] == [
        "ct state established accept"
    ]
    assert left.closed() == left
    # By NAT alone.
    nat = rules_for("-l 16000 -d 192.168.0.1:80 --intercept :81")
    assert nat is not None
    left = nat.closed()
    assert left is not None
    assert (left.diverts, left.translated) == (False, True)
    # Of datagrams that come by TPROXY, each by the rule that is gone.
    udp = rules_for("-l udp:53 -d udp:original --intercept :53")
    assert udp is not None
    assert udp.closed() is None


# -- by packets

NETWORKS = [
    None,
    *map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "10.1.2.3", "0.0.0.0/0", "fd00::/8", "fd00::1", "::/0"),
    ),
]
ADDRESSES = [
    *map(
        ipaddress.ip_address,
        ("10.1.2.3", "10.255.0.1", "192.0.2.1", "fd00::1", "fd00::2", "2001:db8::1"),
    )
]
PORTS = [(), ((80, 80),), ((80, 80), (443, 443)), ((1, 1023),), ((53, 53), (81, 90))]

intercepts = st.builds(
    Intercept,
    st.sampled_from(NETWORKS),
    st.sampled_from(PORTS),
    st.sampled_from(NETWORKS),
    st.sampled_from([None, "eth0", "lo"]),
    st.sampled_from([None, False, True]),
).filter(lambda each: len(each.families) == 1 or not (each.network or each.source))

HOSTS = ["10.1.2.3", "192.0.2.1", "fd00::1", "a.example.com", None]
servers = st.one_of(
    st.builds(HostPort, st.sampled_from(HOSTS), st.sampled_from([53, 80])),
    st.builds(OriginalAddress, st.sampled_from([None, "10.1.2.3", "fd00::1"])),
)
udp_servers = st.one_of(
    st.builds(UdpAddress, st.sampled_from(HOSTS), st.sampled_from([53, 80])),
    st.builds(OriginalAddress, st.sampled_from([None, "10.1.2.3"]), st.just(True)),
)
dialing = st.builds(ServerDialing, transparent=st.booleans())
relays = st.one_of(
    st.builds(
        Relay,
        st.just([HostPort(None, 16000)]),
        st.lists(servers, min_size=1, max_size=3),
        st.just("web"),
        dialing=dialing,
        intercepts=st.lists(intercepts, max_size=3),
    ),
    st.builds(
        UdpRelay,
        st.just([UdpAddress(None, 16000)]),
        st.lists(udp_servers, min_size=1, max_size=3),
        st.just("web"),
        dialing=dialing,
        intercepts=st.lists(intercepts, max_size=3),
    ),
)


@st.composite
def packets(draw: st.DrawFn) -> dict[str, Any]:
    daddr = draw(st.sampled_from(ADDRESSES))
    same = [each for each in ADDRESSES if each.version == daddr.version]
    return {
        "iifname": draw(st.sampled_from(["eth0", "eth1", "lo"])),
        "nfproto": f"ipv{daddr.version}",
        "l4proto": draw(st.sampled_from(["tcp", "udp"])),
        "saddr": draw(st.sampled_from(same)),
        "daddr": daddr,
        "sport": draw(st.sampled_from([53, 80, 1024, 5000])),
        "dport": draw(st.sampled_from([53, 80, 85, 443, 1024])),
        "wildcard": draw(st.sampled_from([0, 1])),
        "transparent": draw(st.sampled_from([0, 1])),
    }


def is_meant(intercept: Intercept, packet: dict[str, Any]) -> bool:
    """Whether an operator would say so."""
    if intercept.interface is None:
        there = packet["iifname"] != "lo"
    else:
        there = packet["iifname"] == intercept.interface
    return (
        there
        and (intercept.network is None or packet["daddr"] in intercept.network)
        and (intercept.source is None or packet["saddr"] in intercept.source)
        and (
            not intercept.ports
            or any(low <= packet["dport"] <= high for low, high in intercept.ports)
        )
    )


@given(relays, packets())
def test_what_is_brought_in_is_what_intercepts_say(
    relay: Relay | UdpRelay, packet: dict[str, Any]
) -> None:
    """No less, and no more."""
    rules = rules_of(relay)
    own = "udp" if isinstance(relay, UdpRelay) else "tcp"
    meant = packet["l4proto"] == own and any(
        is_meant(each, packet) for each in relay.intercepts
    )
    chains = chains_of(rules, MARK) if rules is not None else {}
    found = [
        each
        for chain in chains.values()
        for each in chain
        if takes(list(each), packet)
        and any(kind in step for step in each for kind in ("tproxy", "redirect"))
    ]
    assert bool(found) is meant


@given(relays, packets())
def test_what_is_delivered_is_for_transparent_sockets(
    relay: Relay | UdpRelay, packet: dict[str, Any]
) -> None:
    """Of datagrams, only what comes from a server's address and port."""
    rules = rules_of(relay)
    chain = chains_of(rules, MARK)[DIVERT] if rules is not None else []
    found = []
    for each in chain:
        if takes(list(each), packet):
            if "return" in each[-1]:
                break
            assert "mangle" in each[-1]
            if not any("tproxy" in step for step in each):
                found.append(each)
    waits = packet["transparent"] == 1 and packet["wildcard"] == 0
    assert not found or waits
    if isinstance(relay, UdpRelay) and waits and packet["l4proto"] == "udp":
        plain = [each for each in relay.destinations if isinstance(each, UdpAddress)]
        is_a_server = any(
            each.port == packet["sport"]
            and each.host in (str(packet["saddr"]), "a.example.com")
            for each in plain
        )
        if is_a_server and relay.dialing.transparent:
            assert found
        if len(plain) == len(relay.destinations) and found:
            assert is_a_server


@given(relays)
def test_text_and_json_say_the_same_of_any_relay(relay: Relay | UdpRelay) -> None:
    rules = rules_of(relay)
    if rules is None:
        assert not relay.intercepts
        return
    text = as_text([rules], MARK)
    assert text.isascii()
    adds = [
        each["add"]["rule"]
        for each in as_json([rules], MARK)["nftables"]
        if "rule" in each.get("add", {})
    ]
    assert adds
    for each in adds:
        assert f'\t{written(each["expr"])} comment "relayd: relay web"\n' in text
        assert each["chain"] in (f"{DIVERT}web", f"{REDIRECT}web")
    marks = any("mangle" in step for each in adds for step in each["expr"])
    assert bool(rules.versions) is marks
    # Whatever is compared: it is a value.
    assert rules == attrs.evolve(rules)
