"""Rules of netfilter, by the real nft and ip, on a machine that tests make."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import NetfilterError
from relayd.netfilter import applying, documents, programs
from relayd.netfilter.rules import RelayRules, rules_of
from tests.support.kernel import FakeKernel
from tests.support.process import relay
from tests.system.gateway import (
    GATEWAY_PORT,
    V4,
    V6,
    Gateway,
    accepted,
    asking,
    gateway,
    listening,
    says,
)
from tests.system.namespaces import Machine, made
from tests.system.programs import program, run

pytestmark = pytest.mark.system

RELAYCTL = str(Path(sys.executable).parent / "relayctl")

MARK = 0x1000

#: Rules of every kind.
FILE = """\
[tcp.web]
listen = "16000"
dest = ["192.168.0.1:80", "[fd00:192::1]:80"]
transparent = true
intercept = ["192.168.0.2:80", "[fd00:192::2]:80"]

[tcp.own]
listen = ["192.0.2.1:16001", "[2001:db8::1]:16001"]
dest = "192.168.0.1:80"
intercept = [":81,82,1000-2000", "[2001:db8::/32]:*,from=fd00::/8,interface=eth1"]

[tcp.original]
listen = "16002"
dest = "original"
transparent = true
intercept = "10.0.0.0/8:80,interface=eth1"

[tcp.near]
listen = ["127.0.0.1:16003", "[::1]:16003"]
dest = "192.168.0.1:80"
intercept = ["0.0.0.0/0:8080,by=tproxy", "[::/0]:8080,from=2001:db8::/32,by=tproxy"]

[udp.dns]
listen = "16000"
dest = "original"
transparent = true
intercept = [":53", "192.168.0.2:5353"]

[udp.media]
listen = "5000-5010"
dest = "[fd00:192::1]:6000-6010"
transparent = true

[udp.names]
listen = "16003"
dest = "dns:ns.example.com:53"
transparent = true
intercept = "192.168.0.3:54"

[udp.anywhere]
listen = "16004"
dest = "srv:_dns._udp.example.com"
transparent = true
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    program("nft")
    with made("rules") as [one]:
        yield one


@pytest.fixture(scope="module")
def network() -> Iterator[Gateway]:
    with gateway() as made:
        for name in BY_MARKS:
            made.relay.set(name, 1)
        yield made


@pytest.fixture
def inside(machine: Machine) -> Iterator[Machine]:
    """What the test runs, it runs there, where nothing is but what it makes."""
    with machine.inside():
        bare = state()
        yield machine
        applying.remove_all(MARK)
        assert state() == bare


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "relayd.toml"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def rules(file: str) -> list[RelayRules]:
    return rules_in(file)


def rules_in(file: str) -> list[RelayRules]:
    found = []
    for each in configure(read_layers(file)).relays:
        assert isinstance(each, Relay | UdpRelay)
        own = rules_of(each)
        assert own is not None
        found.append(own)
    return found


def state() -> list[str]:
    """All rules and routes, where this runs."""
    return [
        run("nft", "list", "ruleset"),
        *(run("ip", f"-{version}", "rule") for version in (4, 6)),
        *(run("ip", f"-{each}", "route", "show", "table", "all") for each in (4, 6)),
    ]


def table() -> str:
    return run("nft", "list", "table", "inet", "relayd")


def bare(text: str) -> str:
    """Without comments."""
    return "".join(
        each for each in text.splitlines(keepends=True) if not each.startswith("#")
    )


def test_what_is_shown_is_what_nft_lists(
    inside: Machine, rules: list[RelayRules]
) -> None:
    applying.apply(rules, MARK)
    assert table() == bare(documents.as_text(rules, MARK))


def test_what_is_shown_can_be_given_to_nft_and_ip(inside: Machine, file: str) -> None:
    """By hand, in place of `apply`."""
    rules = rules_in(file)
    applying.apply(rules, MARK)
    applied = state()
    applying.remove_all(MARK)
    shown = run(RELAYCTL, "netfilter", "show", "--config", file)
    path = Path(file).with_name("rules.nft")
    path.write_text(shown)
    run("nft", "-f", path)
    for line in shown.splitlines():
        if line.startswith("# "):
            run(*line.removeprefix("# ").split())
    assert state() == applied
    applying.remove_all(MARK)
    # And as JSON.
    path.write_text(run(RELAYCTL, "netfilter", "show", "--json", "--config", file))
    run("nft", "-j", "-f", path)
    for words in json.loads(path.read_text())["ip"]:
        run(*words)
    assert state() == applied


def test_what_is_listed_is_what_was_said(
    inside: Machine, rules: list[RelayRules]
) -> None:
    """nft reads the JSON as it is meant: it lists the same."""
    applying.apply(rules, MARK)
    said = [
        each["add"]["rule"]["expr"]
        for each in documents.as_json(rules, MARK)["nftables"]
        if "rule" in each.get("add", {})
    ]
    listed = json.loads(run("nft", "-j", "list", "table", "inet", "relayd"))
    found = [each["rule"] for each in listed["nftables"] if "rule" in each]
    assert [each["expr"] for each in found] == said
    assert {each["comment"] for each in found} == {
        f"relayd: relay {each.name}" for each in rules
    }


def test_nothing_is_there_twice(inside: Machine, rules: list[RelayRules]) -> None:
    applying.apply(rules, MARK)
    once = state()
    applying.apply(rules, MARK)
    applying.apply(rules[:2], MARK)
    assert sorted("".join(state()).splitlines()) == sorted("".join(once).splitlines())


OTHERS = """\
table ip relayd {
\tchain divert-web {
\t\ttype filter hook prerouting priority mangle; policy accept;
\t}
}
table inet filter {
\tchain divert-web {
\t\ttcp dport 80 accept
\t}
}
"""


def test_all_goes_though_somebody_has_removed_the_table(
    inside: Machine, rules: list[RelayRules]
) -> None:
    """Which mark there was is known by the routing rules."""
    there = state()
    applying.apply(rules, 0x2000)
    run("nft", "delete", "table", "inet", "relayd")
    assert state() != there
    applying.remove_all(MARK)
    assert state() == there


def test_nothing_else_is_touched(
    inside: Machine, rules: list[RelayRules], tmp_path: Path
) -> None:
    path = tmp_path / "others.nft"
    path.write_text(OTHERS)
    run("nft", "-f", path)
    run("ip", "rule", "add", "pref", "4096", "fwmark", "0x1000", "lookup", "main")
    run("ip", "route", "add", "192.0.2.0/24", "dev", "lo", "table", "4097")
    there = state()
    try:
        applying.apply(rules, MARK)
        applying.remove([each.name for each in rules], MARK)
        assert state() == there
        applying.apply(rules, MARK)
        applying.remove_all(MARK)
        assert state() == there
    finally:
        run("nft", "delete", "table", "ip", "relayd")
        run("nft", "delete", "table", "inet", "filter")
        run("ip", "rule", "del", "pref", "4096", "fwmark", "0x1000")
        run("ip", "route", "flush", "table", "4097")


def test_a_routing_table_of_somebody_else(
    inside: Machine, rules: list[RelayRules]
) -> None:
    """It is left alone, and nothing is applied."""
    run("ip", "route", "add", "192.0.2.0/24", "dev", "lo", "table", "4096")
    there = state()
    try:
        with pytest.raises(
            NetfilterError, match="^the routing table 4096 has routes of"
        ):
            applying.apply(rules, MARK)
        assert state() == there
        applying.remove_all(MARK)
        assert state() == there
        # With another mark there is another table.
        applying.apply(rules, 0x8000_0000)
        applying.remove_all(0x8000_0000)
        assert state() == there
    finally:
        run("ip", "route", "flush", "table", "4096")


def test_without_ipv6(inside: Machine, rules: list[RelayRules]) -> None:
    inside.set("ipv6/conf/lo/disable_ipv6", 1)
    try:
        applying.apply(rules, MARK)
        assert "fwmark 0x1000/0x1000" in run("ip", "-4", "rule")
        assert "fwmark" not in run("ip", "-6", "rule")
        applying.remove_all(MARK)
    finally:
        inside.set("ipv6/conf/lo/disable_ipv6", 0)


def test_what_the_kernel_can_t_do(
    inside: Machine, rules: list[RelayRules], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nft is asked again, a rule at a time, which one it was; nothing stays."""
    there = state()

    def tproxy(version: int, host: str | None, port: int) -> Any:
        return {"tproxy": {"family": "ip", "addr": "fd00::1", "port": port}}

    monkeypatch.setattr("relayd.netfilter.expressions.to_listener", tproxy)
    with pytest.raises(NetfilterError) as caught:
        applying.apply(rules, MARK)
    assert str(caught.value).startswith(
        "the kernel refuses a rule for relay web (meta nfproto ipv4 tcp dport 0 tproxy"
    )
    assert str(caught.value).endswith("; it may lack nft_tproxy")
    assert state() == there


def test_without_the_right(inside: Machine, file: str) -> None:
    """What is lacking is said in a line; root alone is no such right."""
    drop = (program("setpriv"), "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    there = state()
    for words in (
        ("apply", "--config", file),
        ("remove", "--config", file),
        ("remove", "--all"),
    ):
        done = _failing(*drop, RELAYCTL, "netfilter", *words)
        assert done == (
            "rules of netfilter can't be seen or changed: that takes the right"
            " CAP_NET_ADMIN; run it as root\n"
        )
    assert state() == there
    # To show them takes none.
    run(*drop, RELAYCTL, "netfilter", "show", "--config", file)


def test_that_right_alone_is_enough(
    inside: Machine, rules: list[RelayRules], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a user who is not root."""
    applying.apply(rules, MARK)
    there = state()
    applying.remove_all(MARK)
    real = programs.run
    words = ("--reuid=65534", "--clear-groups", "--inh-caps=-all,+net_admin")
    more = ("--ambient-caps=+net_admin", "--bounding-set=-all,+net_admin")

    def drops(name: str, *args: str, given: str = "") -> Any:
        # nft opens its standard input again: it must be this user's.
        shell = ("sh", "-c", 'cat | "$@"', "sh")
        return real("setpriv", *words, *more, *shell, name, *args, given=given)

    monkeypatch.setattr(programs, "run", drops)
    applying.apply(rules, MARK)
    assert state() == there
    applying.remove([each.name for each in rules], MARK)


def _failing(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_several_at_once(machine: Machine, rules: list[RelayRules]) -> None:
    """Each has what is its own, whatever others do meanwhile; as processes would."""
    problems: list[BaseException] = []

    def changes(own: RelayRules) -> None:
        try:
            with machine.inside():
                for _ in range(4):
                    applying.apply([own], MARK)
                    applying.remove([own.name], MARK)
                applying.apply([own], MARK)
                for prefix, chain in documents.chains_of(own, MARK).items():
                    assert (f"chain {prefix}{own.name} " in table()) is bool(chain)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=changes, args=(each,)) for each in rules]
    with machine.inside():
        there = state()
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert problems == []
        applying.remove([each.name for each in rules], MARK)
        assert state() == there


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_the_tests_stand_in_does_what_they_do(
    inside: Machine, rules: list[RelayRules], data: st.DataObject
) -> None:
    """Whatever is done in whatever order."""
    fake = FakeKernel()
    marks = st.sampled_from([MARK, 0x2000])
    some = st.lists(
        st.sampled_from(rules), max_size=3, unique_by=lambda each: each.name
    )
    steps = data.draw(
        st.lists(st.tuples(st.sampled_from("arrc"), some, marks), max_size=5)
    )
    changes: dict[str, Any] = {
        "a": applying.apply,
        "r": applying.remove,
        "c": close,
    }
    applying.remove_all(MARK)
    for kind, relays, mark in steps:
        who: Any = [each.name for each in relays] if kind == "r" else relays
        changes[kind](who, mark)
        with pytest.MonkeyPatch.context() as patch:
            fake.install(patch)
            changes[kind](who, mark)
        assert seen(programs.run) == seen(fake.run)


def close(relays: list[RelayRules], mark: int) -> None:
    """Have them take no new client."""
    applying.apply([each for one in relays if (each := one.closed())], mark)


def seen(runs: Any) -> Any:
    """What programs list of it, in their own words."""
    done = runs("nft", "-j", "list", "table", "inet", "relayd")
    listed = json.loads(done.output)["nftables"] if not done.problem else []
    found = {each["rule"]["chain"]: [] for each in listed if "rule" in each} | {
        each["chain"]["name"]: [] for each in listed if "chain" in each
    }
    for each in listed:
        if "rule" in each:
            found[each["rule"]["chain"]].append(each["rule"]["expr"])
    ways = []
    for version in ("-4", "-6"):
        done = runs("ip", "-N", "-j", version, "rule", "list")
        rows = [each for each in json.loads(done.output) if "fwmark" in each]
        ways.append(sorted(sorted(each.items()) for each in rows))
        for mark in (MARK, 0x2000):
            done = runs("ip", "-j", version, "route", "list", "table", str(mark))
            routes = [] if done.problem else json.loads(done.output or "[]")
            ways.append([(each["type"], each["dst"], each["dev"]) for each in routes])
    return bool(listed), found, ways


#: What an operator may have, and what it asks of marks: that the way back to a sender
#: is looked for by them, and that connections and answers of the kernel have them.
BY_MARKS = [
    "ipv4/conf/all/src_valid_mark",
    *("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"),
]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (V4.asked, "-d 192.168.0.1:80 --intercept 192.168.0.2:80"),
        (V4.server, "-d original --intercept 192.168.0.1:80"),
        (V6.asked, "-d [fd00:192::1]:80 --intercept [fd00:192::2]:80"),
        (V6.server, "-d original --intercept [fd00:192::1]:80"),
    ],
)
def test_where_marks_are_used_otherwise(
    network: Gateway, asked: str, words: str
) -> None:
    """What comes from this machine goes its way, whatever mark it has."""
    family = V6 if ":" in asked else V4
    options = ("-l", str(GATEWAY_PORT), "--transparent", *words.split())
    with network.relaying(*options) as running, listening(network, family.server) as to:
        running.listening()
        with asking(network, asked) as client:
            server, peer = accepted(to)
            with server:
                assert peer.startswith((f"{family.client}:", f"[{family.client}]:"))
                says(client, server, b"question")
                says(server, client, b"answer")


def test_of_a_relayd_that_runs(inside: Machine, tmp_path: Path) -> None:
    """As its settings are now; it has no such right, and changes nothing itself."""
    path = str(tmp_path / "control.sock")
    netfilter = (RELAYCTL, "--control", path, "netfilter")
    with relay(
        *("--control", f"unix:{path}", "--netfilter-mark", "0x2000"),
        *("-l", "127.0.0.1:16000", "-d", "127.0.0.1:1", "--name", "web"),
        *("--intercept", "192.0.2.1:80,by=tproxy"),
        namespace=inside.name,
    ) as running:
        running.listening()
        there = state()
        assert run(*netfilter, "apply") == "web: applied\n"
        assert "ip daddr 192.0.2.1 tcp dport 80 tproxy ip to 127.0.0.1:16000" in table()
        assert "fwmark 0x2000/0x2000 lookup 8192" in run("ip", "rule")
        run(RELAYCTL, "--control", path, "set", "web", "intercept=:81,by=tproxy")
        assert run(*netfilter, "apply", "web") == "web: applied\n"
        assert "tcp dport 81 tproxy" in table()
        assert "tcp dport 80 " not in table()
        assert run(*netfilter, "show") == (
            f"{table()}"
            "# ip -4 rule add pref 4097 fwmark 0x2000/0x2000 nop\n"
            "# ip -4 rule add pref 4095 iif lo fwmark 0x2000/0x2000 goto 4097\n"
            "# ip -4 rule add pref 4096 fwmark 0x2000/0x2000 lookup 8192\n"
            "# ip -4 route add local default dev lo table 8192\n"
        )
        assert run(*netfilter, "remove") == "web: removed\n"
        assert state() == there
