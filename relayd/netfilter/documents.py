"""Writes the rules of relays: for `nft -j -f -`, for `ip`, and for people.

All is in one table, `inet relayd`.  A relay has a chain `divert-NAME` there, if
something is marked for it, and a chain `redirect-NAME`, if something is brought to it
by NAT.  What is marked is delivered here by a routing rule and a routing table, which
all relays share; the mark is the number of the table.

To apply is one transaction, which makes what a relay has anew: it may be done again at
any time, and nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from relayd.netfilter import expressions
from relayd.netfilter.expressions import Json, written
from relayd.netfilter.rules import Answers, Intake, RelayRules

#: The table: its family, and its name.
FAMILY, TABLE = "inet", "relayd"

#: What the chains are called: this, and the name of the relay.
DIVERT, REDIRECT = "divert-", "redirect-"

#: How a chain of each is made, and what `nft list` calls its priority.
_HOOKS: Mapping[str, Json] = {
    DIVERT: {"type": "filter", "hook": "prerouting", "prio": -150},
    REDIRECT: {"type": "nat", "hook": "prerouting", "prio": -100},
}
_PRIORITIES = {-150: "mangle", -100: "dstnat"}

#: The place of the routing rule: before that of the main table (32766), whatever the
#: mark is.  What comes from this machine goes past it, from the rule before it to the
#: one behind.
PRIORITY = 4096
PAST = PRIORITY + 1

#: What is said of a rule: whose it is.
_COMMENT = "relayd: relay {}"

Rule = Sequence[Json]


def chains_of(rules: RelayRules, mark: int) -> dict[str, list[Rule]]:
    """The rules of a relay, by the prefix of the chain that they are in."""
    divert = [_by_tproxy(rules, each, mark) for each in rules.intakes if each.tproxy]
    redirect = [_by_nat(rules, each) for each in rules.intakes if not each.tproxy]
    # What one kind of rules has brought is not to meet the other's.
    if divert and rules.translated:
        divert.insert(0, [expressions.is_translated(), expressions.passes()])
    if redirect and rules.marked:
        redirect.insert(0, [expressions.has_mark(mark), expressions.passes()])
    if rules.diverts:
        divert += _delivering(rules, mark)
    if rules.translated:
        redirect.append(expressions.known_connections())
    return {DIVERT: divert, REDIRECT: redirect}


def _chosen(rules: RelayRules, intake: Intake) -> Iterator[Json]:
    """What tells that a packet is to be brought in."""
    yield expressions.from_outside(intake.interface)
    if intake.source is None and intake.network is None:
        yield expressions.has_version(intake.version)
    if intake.source is not None:
        yield expressions.has_address("s", intake.source)
    if intake.network is not None:
        yield expressions.has_address("d", intake.network)
    yield expressions.has_port(rules.protocol, "d", intake.ports)


def _by_tproxy(rules: RelayRules, intake: Intake, mark: int) -> Rule:
    return [
        *_chosen(rules, intake),
        expressions.to_listener(intake.version, intake.host, intake.port),
        expressions.add_mark(mark),
    ]


def _by_nat(rules: RelayRules, intake: Intake) -> Rule:
    return [
        *_chosen(rules, intake),
        expressions.change_destination(intake.version, intake.host, intake.port),
    ]


def _delivering(rules: RelayRules, mark: int) -> Iterator[Rule]:
    """Mark what transparent sockets wait for."""
    end = [expressions.has_transparent_socket(), expressions.add_mark(mark)]
    if rules.protocol == "tcp":
        # A transparent listener on all addresses would be found for each packet to its
        # port, whoever it is for.  A socket of a connection is found for its own ones
        # only; so is what is kept of it after its close, for the FIN of its peer.
        tcp = expressions.has_protocol("tcp")
        yield [tcp, expressions.has_socket(wildcard=True), expressions.passes()]
        yield [tcp, *end]
    else:
        for each in rules.answers:
            own = expressions.has_socket(wildcard=False)
            yield [*_from_servers(each), own, *end]
    # A packet was too large for some router, or nobody listens at the server.
    yield [expressions.has_protocol(*expressions.ICMP), *end]
    yield from _put_together(rules)


def _put_together(rules: RelayRules) -> Iterator[Rule]:
    """Have fragments be put together before they come to these rules.

    By the first fragment alone a socket can be found: the others have no ports.  The
    kernel puts those of a version of IP together for as long as there is a rule with
    TPROXY for it; no statement does that alone.  Port 0, for which this one is, is
    nobody's.
    """
    there = {each.version for each in rules.intakes if each.tproxy}
    for version in sorted(rules.versions - there):
        yield [
            expressions.has_version(version),
            expressions.has_port(rules.protocol, "d", ((0, 0),)),
            expressions.to_listener(version, None, 1),
        ]


def _from_servers(answers: Answers) -> Iterator[Json]:
    if answers.network is not None:
        yield expressions.has_address("s", answers.network)
    elif answers.version is not None:
        yield expressions.has_version(answers.version)
    yield expressions.has_port("udp", "s", answers.ports)


# -- for nft


def table() -> Json:
    """The table, as a command of nft names it."""
    return {"table": {"family": FAMILY, "name": TABLE}}


def chain(name: str) -> Json:
    """A chain of it, likewise."""
    return {"chain": {"family": FAMILY, "table": TABLE, "name": name}}


def commands(relays: Iterable[RelayRules], mark: int) -> list[Json]:
    """The transaction that has the kernel do what these relays need, and no more for
    them than that."""
    found: list[Json] = [{"add": table()}]
    for relay in relays:
        for prefix, rules in chains_of(relay, mark).items():
            found += chain_anew(prefix, relay.name, rules)
    return found


def chain_anew(prefix: str, relay: str, rules: Iterable[Rule]) -> Iterator[Json]:
    """A chain that has these rules; without one there is no chain either."""
    name = prefix + relay
    yield {"add": {"chain": {**chain(name)["chain"], **_HOOKS[prefix]}}}
    yield {"flush": chain(name)}
    empty = True
    for each in rules:
        empty = False
        yield rule_in(name, relay, each)
    if empty:
        yield {"delete": chain(name)}


def rule_in(name: str, relay: str, rule: Rule) -> Json:
    """The command that adds a rule to a chain of this name."""
    where = {"family": FAMILY, "table": TABLE, "chain": name}
    comment = _COMMENT.format(relay)
    return {"add": {"rule": {**where, "comment": comment, "expr": list(rule)}}}


# -- for ip


def routing_rules(version: int, mark: int) -> list[list[str]]:
    """The words of `ip` that name each routing rule, behind its command.

    One has what is marked delivered here.  The two about it except what this machine
    sends, which goes the way that the other rules say: with tcp_fwmark_accept,
    connections have the mark of their first packet.  The kernel looks for the way back
    to a sender as if it sent something itself, by the mark if there is src_valid_mark:
    a way back to lo would have it drop the packet.
    """
    fwmark = ["fwmark", f"{mark:#x}/{mark:#x}"]
    goto = ["pref", str(PRIORITY - 1), "iif", "lo", *fwmark, "goto", str(PAST)]
    lookup = ["pref", str(PRIORITY), *fwmark, "lookup", str(mark)]
    past = ["pref", str(PAST), *fwmark, "nop"]
    return [[f"-{version}", "rule", *words] for words in (past, goto, lookup)]


def route(version: int, mark: int) -> list[str]:
    """The same of the route, by which everything is delivered here."""
    local = ["local", "default", "dev", "lo"]
    return [f"-{version}", "route", *local, "table", str(mark)]


def versions_of(relays: Iterable[RelayRules]) -> list[int]:
    """The versions of IP of which something is marked, for any of them."""
    return sorted(set().union(*(each.versions for each in relays)))


def routing_commands(relays: Iterable[RelayRules], mark: int) -> list[list[str]]:
    """What `ip` is to be told, once: a second rule would be refused."""
    found = []
    for version in versions_of(relays):
        each = (*routing_rules(version, mark), route(version, mark))
        found += [["ip", *told(words, "add")] for words in each]
    return found


def told(words: Sequence[str], command: str) -> list[str]:
    """What `ip` is to do with a routing rule, or a route: the words behind its name."""
    return [*words[:2], command, *words[2:]]


# -- for people


def as_text(relays: Sequence[RelayRules], mark: int) -> str:
    """What `nft list table inet relayd` says once this is applied, and as comments the
    commands of `ip`: a file that nft reads."""
    blocks = [
        "\n".join(_chain_text(prefix, relay.name, rules))
        for relay in relays
        for prefix, rules in chains_of(relay, mark).items()
        if rules
    ]
    lines = [f"table {FAMILY} {TABLE} {{", "\n\n".join(blocks), "}"]
    lines += [f"# {' '.join(words)}" for words in routing_commands(relays, mark)]
    return "\n".join(lines) + "\n"


def _chain_text(prefix: str, relay: str, rules: Iterable[Rule]) -> Iterator[str]:
    hook = _HOOKS[prefix]
    priority = _PRIORITIES[hook["prio"]]
    yield f"\tchain {prefix}{relay} {{"
    yield (
        f"\t\ttype {hook['type']} hook {hook['hook']} priority {priority};"
        " policy accept;"
    )
    for each in rules:
        yield f'\t\t{written(each)} comment "{_COMMENT.format(relay)}"'
    yield "\t}"


def as_json(relays: Sequence[RelayRules], mark: int) -> Json:
    """The same for programs: what `nft -j -f -` takes, and the commands of `ip`."""
    found = commands(relays, mark) if relays else []
    return {"nftables": found, "ip": routing_commands(relays, mark)}
