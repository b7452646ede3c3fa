"""Rules are installed and removed, in a stand-in for the kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relayd.core.errors import NetfilterError
from relayd.netfilter import applying, documents, ip_routes, programs
from relayd.netfilter.expressions import written
from relayd.netfilter.rules import Answers, Intake, RelayRules
from tests.support.kernel import FakeKernel

MARK = 0x1000

#: What is there beside ours, and stays.
OTHERS = {("inet", "filter"): {}, ("ip", "relayd"): {}}

OURS = ("inet", "relayd")

TCP = Answers(4)


def intake(version: int = 4, *, tproxy: bool, host: str | None = None) -> Intake:
    return Intake(version, None, ((80, 80),), None, None, tproxy, host, 16000)


#: By NAT alone; and transparent; by TPROXY; to an address; datagrams.
REDIRECTED = RelayRules("web", "tcp", (intake(tproxy=False),), False, ())
TRANSPARENT = RelayRules("web", "tcp", (intake(tproxy=False),), True, (TCP,))
TPROXIED = RelayRules("six", "tcp", (intake(6, tproxy=True),), True, ())
DNAT = RelayRules("own", "tcp", (intake(tproxy=False, host="192.168.0.2"),), False, ())
DATAGRAMS = RelayRules("dns", "udp", (intake(tproxy=True),), False, ())


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    """It has IPv6."""
    made = FakeKernel()
    made.install(monkeypatch)
    made.tables.update(OTHERS)
    path = tmp_path / "disable_ipv6"
    path.write_text("0\n")
    monkeypatch.setattr(ip_routes, "_NO_IPV6", path)
    return made


def chains(kernel: FakeKernel) -> dict[str, int]:
    """How many rules each chain of ours has."""
    table = kernel.tables.get(("inet", "relayd"), {})
    return {name: len(each["rules"]) for name, each in table.items()}


def routed(kernel: FakeKernel) -> dict[int, list[int]]:
    """The tables that what is marked goes by, by version of IP."""
    for version in (4, 6):
        marks = [each[-1] for each in kernel.routes[version]]
        own = [each for each in kernel.rules[version] if "lookup" in each]
        assert marks == [each[-1] for each in own]
        # What goes past them, and where to.
        for word in ("goto", "nop"):
            there = [each for each in kernel.rules[version] if word in each]
            by = [each[each.index("fwmark") + 1] for each in there]
            assert by == [each[3] for each in own]
    return {
        version: [int(each[-1]) for each in found]
        for version, found in kernel.routes.items()
        if found
    }


def test_to_apply_and_to_remove(kernel: FakeKernel) -> None:
    before = kernel.all
    applying.apply([TRANSPARENT, TPROXIED], MARK)
    assert chains(kernel) == {"divert-web": 4, "redirect-web": 1, "divert-six": 4}
    assert routed(kernel) == {4: [MARK], 6: [MARK]}
    applying.remove(["six"], MARK)
    assert chains(kernel) == {"divert-web": 4, "redirect-web": 1}
    # Whoever needs it for one version has it for the other, until nobody does.
    assert routed(kernel) == {4: [MARK], 6: [MARK]}
    applying.remove(["web"], MARK)
    assert kernel.all == before


def test_nothing_is_there_twice(kernel: FakeKernel) -> None:
    applying.apply([TRANSPARENT, TPROXIED], MARK)
    once = kernel.all
    applying.apply([TRANSPARENT, TPROXIED], MARK)
    assert kernel.all == once


def test_a_relay_loses_what_it_needs_no_more(kernel: FakeKernel) -> None:
    applying.apply([TRANSPARENT], MARK)
    applying.apply([REDIRECTED], MARK)
    assert chains(kernel) == {"redirect-web": 1}
    assert routed(kernel) == {}
    applying.apply([attrs.evolve(DATAGRAMS, name="web")], MARK)
    assert chains(kernel) == {"divert-web": 1}


def test_nothing_to_do_runs_nothing(kernel: FakeKernel) -> None:
    applying.apply([], MARK)
    applying.remove([], MARK)
    assert kernel.asked == []


def test_what_is_not_there_is_removed(kernel: FakeKernel) -> None:
    before = kernel.all
    applying.remove(["web"], MARK)
    applying.remove_all(MARK)
    assert kernel.all == before
    assert kernel.changes == 0


ALL = [TRANSPARENT, TPROXIED, DNAT]


def test_nothing_is_lost(kernel: FakeKernel) -> None:
    applying.apply(ALL, MARK)
    before = kernel.changes
    assert applying.lost(ALL, MARK) == []
    assert kernel.changes == before
    # Those that mark nothing need no route.
    assert applying.lost([DNAT], 2 * MARK) == []


@pytest.mark.parametrize(
    ("gone", "whose"),
    [
        (lambda kernel: kernel.tables.clear(), ["web", "six", "own"]),
        (lambda kernel: kernel.tables[OURS].pop("redirect-own"), ["own"]),
        (lambda kernel: kernel.tables[OURS]["divert-web"]["rules"].pop(), ["web"]),
        (lambda kernel: kernel.rules[6].pop(0), ["six"]),
        (lambda kernel: kernel.rules[4].pop(), ["web"]),
        (lambda kernel: kernel.routes[6].clear(), ["six"]),
        (lambda kernel: kernel.routes[4].clear(), ["web"]),
    ],
)
def test_what_others_have_removed(
    gone: Callable[[FakeKernel], object], whose: list[str], kernel: FakeKernel
) -> None:
    """It is known whose it was, and to apply it again is enough."""
    applying.apply(ALL, MARK)
    there = kernel.all
    kernel.tables.update(OTHERS)
    gone(kernel)
    assert applying.lost(ALL, MARK) == whose
    applying.apply([each for each in ALL if each.name in whose], MARK)
    assert applying.lost(ALL, MARK) == []
    kernel.tables.update(OTHERS)
    for ours, before in zip(kernel.all[1:], there[1:], strict=True):
        assert {v: sorted(each) for v, each in ours.items()} == {
            v: sorted(each) for v, each in before.items()
        }


def test_others_keep_theirs(kernel: FakeKernel) -> None:
    """Relays of another process, which may have another mark."""
    applying.apply([TPROXIED], 0x2000)
    theirs = kernel.all
    applying.apply([TRANSPARENT], MARK)
    assert routed(kernel) == {4: [MARK], 6: [0x2000]}
    applying.remove(["web"], MARK)
    assert kernel.all == theirs


def test_another_mark(kernel: FakeKernel) -> None:
    """What nobody uses any more goes."""
    applying.apply([TRANSPARENT], 0x2000)
    applying.apply([TPROXIED], 0x2000)
    applying.apply([TRANSPARENT], MARK)
    assert routed(kernel) == {4: [0x2000, MARK], 6: [0x2000]}
    applying.apply([TPROXIED], MARK)
    assert routed(kernel) == {4: [MARK], 6: [MARK]}


def test_all_is_removed(kernel: FakeKernel) -> None:
    """Whoever has made it."""
    before = kernel.all
    applying.apply([TRANSPARENT, DATAGRAMS], 0x2000)
    applying.apply([TPROXIED], 0x4000)
    applying.remove_all(MARK)
    assert kernel.all == before


def test_all_are_removed_though_the_table_is_gone(kernel: FakeKernel) -> None:
    """By the routing rules, it is known which mark there was."""
    before = kernel.all
    kernel.rules[4].append(["pref", "4096", "fwmark", "0x8000/0x8000", "lookup", "7"])
    others = kernel.all
    applying.apply([TRANSPARENT, TPROXIED], 0x2000)
    del kernel.tables[OURS]
    applying.remove_all(MARK)
    assert kernel.all == others
    kernel.rules[4].clear()
    assert kernel.all == before


def test_whose_rules_there_are(kernel: FakeKernel) -> None:
    assert applying.relays_there() == set()
    applying.apply(ALL, MARK)
    assert applying.relays_there() == {"web", "six", "own"}


#: A routing rule without a mark; of every packet but those of a mark; of another bit.
AHEAD = [
    "pref 4094 lookup main",
    "pref 1 not fwmark 0xca6c lookup 51820",
    "pref 10 fwmark 0x1/0x1 lookup 7",
    "pref 10 fwmark 0x1000 lookup 7",
    "pref 10 fwmark 0x1000/0x1000 lookup 7",
    "pref 4095 fwmark 0x2000/0x2000 lookup main",
]

#: Of what this machine sends; of all that is its own; it leads nowhere; marks without
#: ours, twice; behind ours; another relayd's.
HARMLESS = [
    "pref 4000 iif lo lookup 4096",
    "pref 5 lookup 255",
    "pref 4094 nop",
    "pref 4094 fwmark 0x0/0x1000 lookup main",
    "pref 4094 fwmark 0x1 lookup main",
    "pref 10000 lookup main",
    "pref 4095 iif lo fwmark 0x2000/0x2000 goto 4097",
    "pref 4096 fwmark 0x2000/0x2000 lookup 8192",
]


@pytest.mark.parametrize("words", AHEAD)
def test_routing_rules_that_come_first(kernel: FakeKernel, words: str) -> None:
    applying.apply(ALL, MARK)
    assert applying.cautions(ALL, MARK) == []
    kernel.rules[6].append(words.split())
    [said] = applying.cautions(ALL, MARK)
    place = words.split()[1]
    assert said.startswith(
        f"routing rules of others (ip -6 rule: pref {place}) come before relayd's"
    )
    # Those of whom nothing is marked have none.
    assert applying.cautions([DNAT], MARK) == []


@pytest.mark.parametrize("words", HARMLESS)
def test_routing_rules_that_do_not_matter(kernel: FakeKernel, words: str) -> None:
    applying.apply(ALL, MARK)
    kernel.rules[4].append(words.split())
    assert applying.cautions(ALL, MARK) == []


@pytest.mark.parametrize(
    ("lo", "others", "is_told"),
    [("1", "0", True), ("1", "1", False), ("0", "0", False)],
)
def test_lo_alone_has_no_ipv6(
    kernel: FakeKernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lo: str,
    others: str,
    is_told: bool,
) -> None:
    ip_routes._NO_IPV6.write_text(f"{lo}\n")
    path = tmp_path / "all"
    path.write_text(f"{others}\n")
    monkeypatch.setattr(ip_routes, "_NONE_HAS_IPV6", path)
    applying.apply(ALL, MARK)
    said = applying.cautions(ALL, MARK)
    assert [each[:27] for each in said] == ["IPv6 is disabled on lo alon"] * is_told


def test_a_relay_is_closed_to_new_clients(kernel: FakeKernel) -> None:
    """What sockets wait for is delivered still, and NAT goes on."""
    applying.apply([TRANSPARENT, TPROXIED, DATAGRAMS], MARK)
    closed = [each for one in (TRANSPARENT, TPROXIED) if (each := one.closed())]
    for _ in range(2):
        applying.apply(closed, MARK)
        found = chains(kernel)
        assert found.pop("redirect-web") == 1
        assert found == {"divert-web": 4, "divert-six": 4, "divert-dns": 1}
        assert routed(kernel) == {4: [MARK], 6: [MARK]}
        for name in ("divert-web", "divert-six"):
            for left in kernel.tables["inet", "relayd"][name]["rules"]:
                brings = "tproxy" in left["expr"][-1]
                assert brings == ("dport 0 " in written(left["expr"]))
        nat = kernel.tables["inet", "relayd"]["redirect-web"]["rules"]
        assert not any("redirect" in each for one in nat for each in one["expr"])
    applying.apply([TRANSPARENT], MARK)
    assert chains(kernel)["redirect-web"] == 1


@pytest.mark.parametrize("text", ["1\n", None])
def test_without_ipv6(kernel: FakeKernel, tmp_path: Path, text: str | None) -> None:
    """There is no route for it; rules for it harm nobody."""
    if text is None:
        ip_routes._NO_IPV6.unlink()
    else:
        ip_routes._NO_IPV6.write_text(text)
    both = attrs.evolve(TRANSPARENT, answers=(Answers(),))
    applying.apply([both], MARK)
    assert routed(kernel) == {4: [MARK]}


@pytest.mark.parametrize(
    ("rules", "kind", "module"),
    [
        (TPROXIED, "tproxy", "nft_tproxy"),
        (TRANSPARENT, "socket", "nft_socket"),
        (REDIRECTED, "redirect", "nft_redir"),
        (DNAT, "dnat", "nft_nat"),
    ],
)
def test_what_the_kernel_lacks(
    kernel: FakeKernel, rules: RelayRules, kind: str, module: str
) -> None:
    """It is said, and nothing of the rest is left."""
    before = kernel.all
    why = "No such file or directory"
    kernel.refuses = lambda each: why if f'"{kind}"' in json.dumps(each) else ""
    with pytest.raises(NetfilterError) as caught:
        applying.apply([attrs.evolve(REDIRECTED, intakes=()), rules], MARK)
    [lacking] = [
        written(each)
        for chain in documents.chains_of(rules, MARK).values()
        for each in chain
        if f"{kind} " in written(each)
    ][:1]
    assert str(caught.value) == (
        f"the kernel refuses a rule for relay {rules.name} ({lacking}): {why}; it may"
        f" lack {module}"
    )
    assert kernel.all == before


def test_a_refusal_that_no_rule_explains(kernel: FakeKernel) -> None:
    """The rules of before stay, and their routes."""
    applying.apply([TRANSPARENT], MARK)
    before = kernel.all
    kernel.refuses = lambda each: "Too many" if "delete" in each else ""
    with pytest.raises(NetfilterError, match="^nft refuses the rules: Too many$"):
        applying.apply([TPROXIED], MARK)
    assert kernel.all == before
    with pytest.raises(NetfilterError, match="^nft can't change the table relayd: Too"):
        applying.remove(["web"], MARK)
    assert kernel.all == before


def test_a_routing_table_of_somebody_else(kernel: FakeKernel) -> None:
    kernel.routes[4].append(["unicast", "10.9.0.0/16", "dev", "eth0", "table", "4096"])
    before = kernel.all
    with pytest.raises(NetfilterError) as caught:
        applying.apply([TRANSPARENT], MARK)
    assert str(caught.value) == (
        "the routing table 4096 has routes of others (to 10.9.0.0/16): choose another"
        " --netfilter-mark (in a file: netfilter_mark)"
    )
    assert kernel.all == before
    applying.remove_all(MARK)
    assert kernel.all == before


def test_there_may_be_so_many(kernel: FakeKernel) -> None:
    """Those that have rules already count."""
    many = [attrs.evolve(TPROXIED, name=f"r-{each}") for each in range(applying.MOST)]
    applying.apply(many, MARK)
    applying.apply(many, MARK)
    before = kernel.all
    with pytest.raises(NetfilterError, match="^513 relays would have rules, and 512 m"):
        applying.apply([TRANSPARENT], MARK)
    assert kernel.all == before
    applying.remove(["r-0"], MARK)
    applying.apply([TRANSPARENT], MARK)


def test_without_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours can be there; and nothing can be made."""

    def run(name: str, *_: str, given: str = "") -> Any:
        raise programs.Missing(f"{name} is not installed")

    monkeypatch.setattr(programs, "run", run)
    applying.remove(["web"], MARK)
    applying.remove_all(MARK)
    with pytest.raises(NetfilterError, match="is not installed"):
        applying.apply([REDIRECTED], MARK)


def test_one_at_a_time(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who is held up for too long goes on."""
    waited = []
    namespace = tmp_path / "net"
    namespace.touch()
    monkeypatch.setattr(applying, "_NAMESPACE", str(namespace))

    class Waits:
        def wait(self, seconds: float) -> None:
            waited.append(seconds)

    monkeypatch.setattr(applying, "Event", Waits)
    with applying._locked():
        assert waited == []
        applying.apply([REDIRECTED], MARK)
        assert sum(waited) == pytest.approx(applying.LOCK_TIMEOUT)
    waited.clear()
    applying.apply([REDIRECTED], MARK)
    assert waited == []


# -- whatever is done, in whatever order

NAMES = ["a", "b", "c"]
MARKS = [0x1000, 0x2000]

rules = st.builds(
    RelayRules,
    st.sampled_from(NAMES),
    st.sampled_from(["tcp", "udp"]),
    st.lists(
        st.builds(intake, st.sampled_from([4, 6]), tproxy=st.booleans()), max_size=2
    ).map(tuple),
    st.booleans(),
    st.sampled_from([(Answers(4),), (Answers(6),), (Answers(),)]),
)


class Changes(RuleBasedStateMachine):
    """Relays come, change and go; what there is follows from who is there."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.kernel = FakeKernel()
        self.kernel.install(self.patch)
        self.kernel.tables.update(OTHERS)
        self.patch.setattr(ip_routes, "is_here", lambda version: True)
        #: What each relay has, and by which mark.
        self.there: dict[str, tuple[RelayRules, int]] = {}

    def teardown(self) -> None:
        self.patch.undo()

    @rule(
        found=st.lists(rules, max_size=3, unique_by=lambda each: each.name),
        mark=st.sampled_from(MARKS),
    )
    def apply(self, found: list[RelayRules], mark: int) -> None:
        applying.apply(found, mark)
        for each in found:
            self.there[each.name] = each, mark

    @rule(names=st.sets(st.sampled_from(NAMES)), mark=st.sampled_from(MARKS))
    def remove(self, names: set[str], mark: int) -> None:
        applying.remove(names, mark)
        for each in names:
            self.there.pop(each, None)

    @rule(name=st.sampled_from(NAMES))
    def close(self, name: str) -> None:
        if name in self.there:
            relay, mark = self.there[name]
            if (closed := relay.closed()) is not None:
                self.apply([closed], mark)

    @rule(mark=st.sampled_from(MARKS))
    def remove_all(self, mark: int) -> None:
        applying.remove_all(mark)
        self.there.clear()

    def expected(self) -> Iterator[tuple[str, list[Any]]]:
        for relay, mark in self.there.values():
            for prefix, chain in documents.chains_of(relay, mark).items():
                if chain:
                    yield prefix + relay.name, [list(each) for each in chain]

    @invariant()
    def there_is_what_relays_need(self) -> None:
        table = self.kernel.tables.get(("inet", "relayd"), {})
        found = {
            name: [each["expr"] for each in chain["rules"]]
            for name, chain in table.items()
        }
        assert found == dict(self.expected())
        others = {key: self.kernel.tables[key] for key in OTHERS}
        assert others == OTHERS

    @invariant()
    def what_is_marked_is_delivered(self) -> None:
        used = {
            (version, mark)
            for relay, mark in self.there.values()
            for version in relay.versions
        }
        ways = routed(self.kernel)
        found = {(version, mark) for version, marks in ways.items() for mark in marks}
        assert used <= found
        assert {mark for _, mark in found} <= {mark for _, mark in used}
        assert len(found) == sum(map(len, ways.values()))


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
