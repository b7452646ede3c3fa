"""A stand-in for the part of a kernel that `nft` and `ip` change.

It takes the commands that :mod:`relayd.netfilter` gives, as libnftables-json(5) and
ip(8) have them, and answers as those programs do.  A transaction of nft is done whole
or not at all.  `tests/system/test_netfilter.py` has the real programs do the same.
"""

from __future__ import annotations

import copy
import ipaddress
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from relayd.netfilter import applying, programs
from relayd.netfilter.programs import Ended

Json = dict[str, Any]

NO_TABLE = "No such file or directory"


class FakeKernel:
    """Rules, routing rules and routes.

    :ivar tables: by family and name: chains by name, each with its definition (`chain`)
        and its `rules`.
    :ivar rules: routing rules, as words, by version of IP.
    :ivar routes: of the tables of routes, as words, likewise.
    :ivar refuses: why a command of nft is refused, or nothing.
    :ivar asked: the programs that were run, with their words.
    :ivar changes: how many of these changed something.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[str, str], dict[str, Json]] = {}
        self.rules: dict[int, list[list[str]]] = {4: [], 6: []}
        self.routes: dict[int, list[list[str]]] = {4: [], 6: []}
        self.refuses: Callable[[Json], str] = lambda _: ""
        self.asked: list[tuple[str, ...]] = []
        self.changes = 0
        self._handles = itertools.count(1)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have programs that are run be these; the real kernel's lock is left alone."""
        monkeypatch.setattr(programs, "run", self.run)
        monkeypatch.setattr(applying, "_NAMESPACE", "/none/of/them")

    def run(self, name: str, *words: str, given: str = "") -> Ended:
        """Stands in for :func:`relayd.netfilter.programs.run`."""
        self.asked.append((name, *words))
        return self._nft(words, given) if name == "nft" else self._ip(words)

    @property
    def all(self) -> Any:
        """What there is, for comparisons; handles say nothing."""
        tables = {
            key: {
                name: [{**each, "handle": 0} for each in chain["rules"]]
                for name, chain in chains.items()
            }
            for key, chains in self.tables.items()
        }
        return copy.deepcopy((tables, self.rules, self.routes))

    # -- nft

    def _nft(self, words: tuple[str, ...], given: str) -> Ended:
        if words[:3] == ("-j", "list", "table"):
            return self._listed(words[3], words[4])
        assert words in (("-j", "-f", "-"), ("-c", "-j", "-f", "-"))
        before = copy.deepcopy(self.tables)
        for command in json.loads(given)["nftables"]:
            problem = self.refuses(command) or self._do(command)
            if problem:
                self.tables = before
                return Ended("", problem)
        if "-c" in words:
            self.tables = before
        else:
            self.changes += 1
        return Ended("", "")

    def _listed(self, family: str, name: str) -> Ended:
        table = self.tables.get((family, name))
        if table is None:
            return Ended("", NO_TABLE)
        found: list[Json] = [{"metainfo": {"json_schema_version": 1}}]
        found.append({"table": {"family": family, "name": name}})
        found += [{"chain": each["chain"]} for each in table.values()]
        found += [{"rule": rule} for each in table.values() for rule in each["rules"]]
        return Ended(json.dumps({"nftables": found}), "")

    def _do(self, command: Json) -> str:
        [(verb, what)] = command.items()
        [(kind, named)] = what.items()
        key = (named["family"], named["name" if kind == "table" else "table"])
        if kind == "table":
            if verb == "add":
                self.tables.setdefault(key, {})
            elif self.tables.pop(key, None) is None:
                return NO_TABLE
            return ""
        chains = self.tables.get(key)
        if chains is None:
            return NO_TABLE
        if kind == "chain" and verb == "add":
            there = chains.setdefault(named["name"], {"chain": named, "rules": []})
            return "" if there["chain"] == named else "File exists"
        chain = chains.get(named["chain" if kind == "rule" else "name"])
        if chain is None:
            return NO_TABLE
        if kind == "rule" and verb == "add":
            chain["rules"].append({**named, "handle": next(self._handles)})
        elif kind == "rule":
            left = [e for e in chain["rules"] if e["handle"] != named["handle"]]
            if len(left) == len(chain["rules"]):
                return NO_TABLE
            chain["rules"] = left
        elif verb == "flush":
            chain["rules"] = []
        elif chain["rules"]:
            return "Device or resource busy"
        else:
            del chains[named["name"]]
        return ""

    # -- ip

    def _ip(self, words: tuple[str, ...]) -> Ended:
        at = next(n for n, each in enumerate(words) if each in ("list", "add", "del"))
        *options, version, kind = words[:at]
        verb, rest = words[at], list(words[at + 1 :])
        number = int(version.removeprefix("-"))
        if verb == "list":
            assert "-j" in options
            return self._list_ip(number, kind, words)
        own = self.rules[number] if kind == "rule" else self.routes[number]
        self.changes += 1
        if verb == "add":
            if rest in own:
                return Ended("", "RTNETLINK answers: File exists")
            own.append(rest)
        elif rest in own:
            own.remove(rest)
        else:
            return Ended("", "RTNETLINK answers: No such process")
        return Ended("", "")

    def _list_ip(self, version: int, kind: str, words: tuple[str, ...]) -> Ended:
        if kind == "rule":
            rows = [_row(words) for words in self.rules[version]]
            rows.append({"priority": 0, "src": "all", "table": "255"})
            rows.append({"priority": 32766, "src": "all", "table": "254"})
            rows.sort(key=lambda each: each["priority"])
            return Ended(json.dumps(rows), "")
        found = [each for each in self.routes[version] if each[-1] == words[-1]]
        if not found:
            return Ended("[", f"ipv{version}: FIB table does not exist.")
        shown = [
            {"type": kind, "dst": dst, "dev": dev} for kind, dst, _, dev, *_ in found
        ]
        return Ended(json.dumps(shown), "")


def _row(words: list[str]) -> Json:
    """A routing rule as `ip -N -j` lists it."""
    row: Json = {"priority": 0, "src": "all"}
    rest = iter(words)
    for word in rest:
        if word in ("nop", "not"):
            row[word] = None
        elif word == "fwmark":
            mark, _, mask = next(rest).partition("/")
            row |= {"fwmark": mark} | ({"fwmask": mask} if mask else {})
        elif word == "lookup":
            table = next(rest)
            row["table"] = "254" if table == "main" else table
        else:
            key = {"pref": "priority"}.get(word, word)
            value = next(rest)
            row[key] = int(value) if value.isdecimal() else value
    return row


def takes(rule: list[Json], packet: Json) -> bool:
    """Whether a packet meets the conditions of a rule.

    :param packet: its `iifname`, `nfproto`, `l4proto`, `saddr`, `daddr`, `sport`,
        `dport`, and of the socket that waits for it `wildcard` and `transparent`.
    """
    return all(_meets(each["match"], packet) for each in rule if "match" in each)


def _meets(match: Json, packet: Json) -> bool:
    [(kind, what)] = match["left"].items()
    if kind == "payload":
        name = what["field"]
        if what["protocol"] not in (packet["l4proto"], _IP[packet["nfproto"]]):
            return False
    else:
        name = what["key"]
    return _is(packet[name], match["right"]) is (match["op"] == "==")


_IP = {"ipv4": "ip", "ipv6": "ip6"}


def _is(value: Any, right: Any) -> bool:
    if not isinstance(right, dict):
        if isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address):
            return str(value) == right
        return bool(value == right)
    [(kind, what)] = right.items()
    if kind == "set":
        return any(_is(value, each) for each in what)
    if kind == "range":
        return bool(what[0] <= value <= what[1])
    return value in ipaddress.ip_network(f"{what['addr']}/{what['len']}")
