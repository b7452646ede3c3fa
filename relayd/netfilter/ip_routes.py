"""Has what is marked be delivered here, by `ip`: routing rules, and a route.

:mod:`relayd.netfilter.documents` names them.  Those of others are read, and left alone:
one that comes first may lead elsewhere what ours are for.

:mod:`relayd.netfilter.applying` calls these, and those that change something with the
network namespace locked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from relayd.core.errors import NetfilterError
from relayd.netfilter import documents, programs
from relayd.netfilter.expressions import Json
from relayd.netfilter.rules import VERSIONS

#: Whether lo has no IPv6: then there is no route for it either; and whether no other
#: interface has.
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
_NONE_HAS_IPV6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")

#: The number of the routing table for what is this machine's, as `ip -N` has it.
_LOCAL = "255"

#: Which bits of a mark a routing rule asks for that does not say which.
_ALL_BITS = "0xffffffff"


def is_here(version: int) -> bool:
    """Whether this machine has a version of IP."""
    return version == 4 or _reads(_NO_IPV6, "0")


def _reads(setting: Path, value: str) -> bool:
    """Whether a setting of the kernel is this; one that is not there is nothing."""
    try:
        return setting.read_text().strip() == value
    except OSError:
        return False


def add_route(version: int, mark: int, there: Sequence[list[str]]) -> None:
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


def drop_routes(marks: Iterable[int], versions: Sequence[int] = VERSIONS) -> None:
    """Undo that."""
    for mark in marks:
        for version in versions:
            try:
                for words in reversed(rules_there(version, mark)):
                    programs.changed("ip", documents.told(words, "del"))
                if any(map(_is_ours, _routes(version, mark))):
                    words = documents.route(version, mark)
                    programs.changed("ip", documents.told(words, "del"))
            except programs.Missing:
                return


def are_whole(version: int, mark: int) -> bool:
    """Whether the route, and all of the routing rules, are there."""
    wanted = documents.routing_rules(version, mark)
    routes = any(map(_is_ours, _routes(version, mark)))
    return routes and rules_there(version, mark) == wanted


def caution(version: int, mark: int) -> str:
    """What may keep answers from being delivered, or nothing.

    :raises NetfilterError: nobody can tell.
    """
    if not is_here(version):
        if not _reads(_NONE_HAS_IPV6, "0"):
            return ""
        return (
            "IPv6 is disabled on lo alone (net.ipv6.conf.lo.disable_ipv6), so that no"
            " answer of IPv6 is delivered"
        )
    others = ", ".join(str(each) for each in _ahead(version, mark))
    if not others:
        return ""
    return (
        f"routing rules of others (ip -{version} rule: pref {others}) come before"
        f" relayd's ({documents.PRIORITY}), and what they match goes their way: give"
        f" them a pref beyond {documents.PAST}"
    )


def rules_there(version: int, mark: int) -> list[list[str]]:
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


def _ahead(version: int, mark: int) -> Iterator[int]:
    """The places of the routing rules of others that may match what is marked, and come
    before ours."""
    for row in _rows(version):
        place = row["priority"]
        if place >= documents.PRIORITY:
            return
        mine = (place, row.get("goto")) == (documents.PRIORITY - 1, documents.PAST)
        if not (mine or row.get("table") == _LOCAL) and _may_match(row, mark):
            yield place


def _may_match(row: Json, mark: int) -> bool:
    """Whether a routing rule may match a packet that came in, and was marked."""
    if "not" in row:
        return True
    if row.get("iif") == "lo" or "l3mdev" in row or "nop" in row:
        # Of what this machine sends; of the interfaces of a VRF; it leads nowhere.
        return False
    bits = mark & int(row.get("fwmask", _ALL_BITS), 0)
    return "fwmark" not in row or bits & int(row["fwmark"], 0) == bits


def marks_routed() -> set[int]:
    """The marks of the routing rules that there are, as ours have them."""
    try:
        rows = [row for version in VERSIONS for row in _rows(version)]
    except programs.Missing:
        # By which they would have been made.
        return set()
    return {
        int(row["table"])
        for row in rows
        if row["priority"] == documents.PRIORITY
        and str(row.get("table", "")).isdecimal()
        and row.get("fwmark") == row.get("fwmask") == hex(int(row["table"]))
    }


def _routes(version: int, mark: int) -> list[Json]:
    """The routes of the table; none if there is no such table."""
    words = ("route", "list", "table", str(mark))
    found: list[Any] = programs.listed("ip", "-j", f"-{version}", *words) or []
    return found


def _is_ours(route: Json) -> bool:
    ours = {"type": "local", "dst": "default", "dev": "lo"}
    return ours.items() <= route.items()
