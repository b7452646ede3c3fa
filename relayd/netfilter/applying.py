"""Has the kernel do what relays need, and undoes it: by `nft` and `ip`.

Only the table `inet relayd` is touched, the routing rule and the route that
:mod:`relayd.netfilter.documents` names.  What relays need is applied anew in one
transaction of nft: nobody ever sees half of it, and nothing is there twice.  Other
processes may have relays on this machine: the table goes with its last chain, the
routing rule and its route with the last rule that marks packets for them.

Whoever changes something reads first what there is.  So that nobody changes it between,
the network namespace is locked meanwhile.

These functions wait for programs, 10 s at most for each of a few: call them in a
thread.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from relayd.core.errors import NetfilterError
from relayd.netfilter import documents, programs
from relayd.netfilter.documents import DIVERT, FAMILY, REDIRECT, TABLE
from relayd.netfilter.expressions import Json, written
from relayd.netfilter.rules import VERSIONS, RelayRules

#: The rules of each chain of the table, as nft lists them.
Chains = dict[str, list[Json]]

#: For how many relays there may be rules.  The kernel has 1024 places for chains at a
#: hook (MAX_HOOK_COUNT of nf_hook_entries_grow), and a packet goes through all of them.
MOST = 512

#: For how many seconds the lock is waited for, and how often it is tried.  Any user may
#: hold it, and whoever does for longer does not change rules: it is gone past.
LOCK_TIMEOUT, _LOCK_TRIES = 5.0, 100

#: The network namespace of this thread.
_NAMESPACE = "/proc/thread-self/ns/net"

#: Whether this machine has no IPv6: then there is no route for it either.
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")

#: What the kernel calls the statements of a rule that it may lack, and how it is told
#: that one has them.
_MODULES = {
    "nft_tproxy": "tproxy",
    "nft_socket": "socket",
    "nft_redir": "redirect",
    "nft_nat": "dnat",
}


def apply(rules: Sequence[RelayRules], mark: int) -> None:
    """Have the kernel do what these relays need, in place of what it did for them.

    :param mark: one bit; also the number of the routing table.
    :raises NetfilterError: it can't be had.  Then all is as it was.
    """
    if not rules:
        return
    names = chain_names(each.name for each in rules)
    with _locked():
        before = _listed()
        _check_number({*before, *names})
        rest = _marks(_others(before, names))
        versions = list(filter(_is_here, documents.versions_of(rules)))
        new = []
        try:
            for version in versions:
                there = _rules_there(version, mark)
                if not there:
                    new.append(version)
                _add_route(version, mark, there)
            if problem := _transaction(documents.commands(rules, mark)):
                raise NetfilterError(_why(rules, mark, problem))
        except NetfilterError:
            _drop_routes([mark], new)
            raise
        _drop_routes(_marks(before) - rest - ({mark} if versions else set()))


def remove(names: Collection[str], mark: int) -> None:
    """Undo what was applied for these relays; nothing there is no error.

    :param mark: with which it was.
    :raises NetfilterError: it can't be undone.
    """
    if names:
        with _locked():
            _remove(chain_names(names), mark)


def remove_all(mark: int) -> None:
    """Undo what was applied for any relay, of whichever process.

    :param mark: of routes, beside those marks that rules name.
    :raises NetfilterError: it can't be undone.
    """
    with _locked():
        _remove(None, mark)


def lost(rules: Sequence[RelayRules], mark: int) -> list[str]:
    """The relays that lack something of what was applied for them.

    A chain has other rules than were put in it if it has another number of them.

    :raises NetfilterError: nobody can tell.
    """
    with _locked():
        there = _listed()
        versions = set()
        for version in filter(_is_here, documents.versions_of(rules)):
            routes = any(map(_is_ours, _routes(version, mark)))
            wanted = documents.routing_rules(version, mark)
            if not routes or _rules_there(version, mark) != wanted:
                versions.add(version)
    return [
        each.name
        for each in rules
        if each.versions & versions or _has_lost(each, mark, there)
    ]


def _has_lost(relay: RelayRules, mark: int, there: Chains) -> bool:
    wanted = documents.chains_of(relay, mark)
    return any(
        len(own) != len(there.get(prefix + relay.name, ()))
        for prefix, own in wanted.items()
    )


def _check_number(chains: Collection[str]) -> None:
    relays = {each.partition("-")[2] for each in chains}
    if len(relays) > MOST:
        raise NetfilterError(
            f"{len(relays)} relays would have rules, and {MOST} may: one relay may have"
            " several listeners and intercept several networks"
        )


def chain_names(relays: Iterable[str]) -> set[str]:
    """What the chains of these relays are called, if they have them."""
    return {prefix + name for name in relays for prefix in (DIVERT, REDIRECT)}


def _remove(chains: Collection[str] | None, mark: int) -> None:
    """Remove chains, or all of them."""
    there = _listed()
    gone = there.keys() if chains is None else there.keys() & chains
    _change(_without(gone, there))
    _drop_routes({mark, *_marks(there)} - _marks(_others(there, gone)))


def _without(gone: Collection[str], there: Chains) -> Iterator[Json]:
    """The commands that remove chains; with the last of them goes the table."""
    if gone and len(gone) == len(there):
        yield {"delete": documents.table()}
        return
    for name in gone:
        yield {"flush": documents.chain(name)}
        yield {"delete": documents.chain(name)}


# -- nft


def _listed() -> Chains:
    """What there is; nothing if there is no nft, by which it would have been made."""
    found: Chains = {}
    try:
        listed = programs.listed("nft", "-j", "list", "table", FAMILY, TABLE)
    except programs.Missing:
        return found
    for each in (listed or {}).get("nftables", ()):
        if "chain" in each:
            found.setdefault(each["chain"]["name"], [])
        elif "rule" in each:
            found.setdefault(each["rule"]["chain"], []).append(each["rule"])
    return found


def _others(chains: Chains, names: Collection[str]) -> Chains:
    """The chains that are not called so."""
    return {name: rules for name, rules in chains.items() if name not in names}


def _marks(chains: Chains) -> set[int]:
    """The marks that rules add to packets."""
    return {
        value["|"][1]
        for rules in chains.values()
        for rule in rules
        for each in rule["expr"]
        if isinstance(value := each.get("mangle", {}).get("value"), dict)
        and isinstance(value.get("|"), list)
        and isinstance(value["|"][1], int)
    }


def _change(commands: Iterable[Json]) -> None:
    """Have nft do this, all of it or nothing; nothing asked is nothing done."""
    found = list(commands)
    if found and (problem := _transaction(found)):
        raise NetfilterError(f"nft can't change the table {TABLE}: {problem}")


def _transaction(commands: Sequence[Json], *options: str) -> str:
    """Have nft do this; why it does not, or nothing."""
    document = json.dumps({"nftables": commands}, ensure_ascii=False)
    return programs.run("nft", *options, "-j", "-f", "-", given=document).problem


def _why(rules: Iterable[RelayRules], mark: int, problem: str) -> str:
    """What is wrong with rules that the kernel refuses: nft does not say which.

    One of each kind is tried alone, and none of them stays.
    """
    tried = set()
    for relay in rules:
        for prefix, own in documents.chains_of(relay, mark).items():
            for each in own:
                kinds = written(each)
                module = next(
                    (name for name, word in _MODULES.items() if f"{word} " in kinds), ""
                )
                if module in tried:
                    continue
                tried.add(module)
                alone = _alone(relay, prefix, each)
                if found := _transaction(alone, "-c"):
                    lacks = f"; it may lack {module}" if module else ""
                    return (
                        f"the kernel refuses a rule for relay {relay.name}"
                        f" ({written(each)}): {found}{lacks}"
                    )
    return f"nft refuses the rules: {problem}"


def _alone(relay: RelayRules, prefix: str, rule: documents.Rule) -> list[Json]:
    return [
        {"add": documents.table()},
        *documents.chain_anew(prefix, relay.name, [rule]),
    ]


# -- ip


def _is_here(version: int) -> bool:
    """Whether this machine has a version of IP."""
    if version == 4:
        return True
    try:
        return _NO_IPV6.read_text().strip() == "0"
    except OSError:
        return False


def _add_route(version: int, mark: int, there: Sequence[list[str]]) -> None:
    """Have the kernel deliver here what is marked.

    :param there: those of the routing rules that there are.
    :raises NetfilterError: it can't be had, or the table has somebody else's routes.
    """
    routes = _routes(version, mark)
    others = [each for each in routes if not _is_ours(each)]
    if others:
        raise NetfilterError(
            f"the routing table {mark} has routes of others (to"
            f" {others[0].get('dst')}): choose another --netfilter-mark (in a file:"
            " netfilter_mark)"
        )
    if not routes:
        programs.changed("ip", documents.told(documents.route(version, mark), "add"))
    for words in documents.routing_rules(version, mark):
        if words not in there:
            programs.changed("ip", documents.told(words, "add"))


def _drop_routes(marks: Iterable[int], versions: Sequence[int] = VERSIONS) -> None:
    """Undo that."""
    for mark in marks:
        for version in versions:
            try:
                for words in reversed(_rules_there(version, mark)):
                    programs.changed("ip", documents.told(words, "del"))
                if any(map(_is_ours, _routes(version, mark))):
                    words = documents.route(version, mark)
                    programs.changed("ip", documents.told(words, "del"))
            except programs.Missing:
                return


def _rules_there(version: int, mark: int) -> list[list[str]]:
    """Those of the routing rules for a mark that there are."""
    found = _rows(version)
    own: Json = {"src": "all", "fwmark": hex(mark), "fwmask": hex(mark)}
    past: Json = {**own, "priority": documents.PAST, "nop": None}
    goto: Json = {**own, "priority": documents.PRIORITY - 1, "iif": "lo"}
    goto["goto"] = documents.PAST
    lookup: Json = {**own, "priority": documents.PRIORITY, "table": str(mark)}
    words = documents.routing_rules(version, mark)
    return [
        each
        for each, wanted in zip(words, (past, goto, lookup), strict=True)
        if any(wanted.items() <= row.items() for row in found)
    ]


def _rows(version: int) -> list[Json]:
    """The routing rules, as `ip` lists them."""
    words = ("-N", "-j", f"-{version}", "rule", "list")
    found: list[Any] = programs.listed("ip", *words) or []
    return found


def _routes(version: int, mark: int) -> list[Json]:
    """The routes of the table; none if there is no such table."""
    words = ("route", "list", "table", str(mark))
    found: list[Any] = programs.listed("ip", "-j", f"-{version}", *words) or []
    return found


def _is_ours(route: Json) -> bool:
    ours = {"type": "local", "dst": "default", "dev": "lo"}
    return ours.items() <= route.items()


# -- who else


@contextmanager
def _locked() -> Iterator[None]:
    """Nobody else changes rules in this network namespace for the length of a block."""
    try:
        namespace = os.open(_NAMESPACE, os.O_RDONLY)
    except OSError:
        # This kernel has none.
        yield
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                Event().wait(LOCK_TIMEOUT / _LOCK_TRIES)
            else:
                break
        yield
    finally:
        os.close(namespace)
