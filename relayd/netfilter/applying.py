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
from functools import partial
from threading import Event

from relayd.core.errors import NetfilterError
from relayd.netfilter import documents, ip_routes, programs
from relayd.netfilter.documents import DIVERT, FAMILY, REDIRECT, TABLE
from relayd.netfilter.expressions import Json, written
from relayd.netfilter.rules import RelayRules

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
        versions = list(filter(ip_routes.is_here, documents.versions_of(rules)))
        new = []
        try:
            for version in versions:
                there = ip_routes.rules_there(version, mark)
                if not there:
                    new.append(version)
                ip_routes.add_route(version, mark, there)
            if problem := _transaction(documents.commands(rules, mark)):
                raise NetfilterError(_why(rules, mark, problem))
        except NetfilterError:
            ip_routes.drop_routes([mark], new)
            raise
        ip_routes.drop_routes(_marks(before) - rest - ({mark} if versions else set()))


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
        _remove(None, mark, *ip_routes.marks_routed())


def cautions(rules: Sequence[RelayRules], mark: int) -> list[str]:
    """What may keep from these relays what was applied for them: a line for each.

    Routing rules of others may come first, and IPv6 may not be had on lo.

    :raises NetfilterError: nobody can tell.
    """
    found = map(partial(ip_routes.caution, mark=mark), documents.versions_of(rules))
    return [each for each in found if each]


def relays_there() -> set[str]:
    """The names of the relays of which there are rules, of whichever process.

    :raises NetfilterError: they can't be listed.
    """
    return {each.partition("-")[2] for each in _listed()}


def lost(rules: Sequence[RelayRules], mark: int) -> list[str]:
    """The relays that lack something of what was applied for them.

    A chain has other rules than were put in it if it has another number of them.

    :raises NetfilterError: nobody can tell.
    """
    with _locked():
        there = _listed()
        versions = set()
        for version in filter(ip_routes.is_here, documents.versions_of(rules)):
            if not ip_routes.are_whole(version, mark):
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


def _remove(chains: Collection[str] | None, *marks: int) -> None:
    """Remove chains, or all of them; and routes by these marks, if nothing has them."""
    there = _listed()
    gone = there.keys() if chains is None else there.keys() & chains
    _change(_without(gone, there))
    ip_routes.drop_routes({*marks, *_marks(there)} - _marks(_others(there, gone)))


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
