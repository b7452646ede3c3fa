"""The words of an nftables rule: as JSON for `nft -j -f`, and as `nft list` writes it.

Each function makes one statement of a rule as libnftables-json(5) has it.
:func:`written` writes such a statement as nft(8) would, for people: there is one source
of what a rule says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from relayd.core.names import host_port
from relayd.core.networks import Network

Json = dict[str, Any]
Ports = Sequence[tuple[int, int]]
Side = Literal["s", "d"]

#: What both versions of IP are called.
_IP = {4: "ip", 6: "ip6"}

#: And what says what is wrong with a packet of theirs.
ICMP = ("icmp", "ipv6-icmp")


def from_outside(interface: str | None) -> Json:
    """A packet comes in by an interface; unless given, by any but loopback."""
    if interface is None:
        return _match("!=", {"meta": {"key": "iifname"}}, "lo")
    return _match("==", {"meta": {"key": "iifname"}}, interface)


def has_version(version: int) -> Json:
    """It is one of a version of IP, 4 or 6."""
    return _match("==", {"meta": {"key": "nfproto"}}, f"ipv{version}")


def has_address(side: Side, network: Network) -> Json:
    """Its source (`s`) or destination (`d`) is in a network."""
    value: Any = str(network.network_address)
    if network.prefixlen < network.max_prefixlen:
        value = {"prefix": {"addr": value, "len": network.prefixlen}}
    field = {"protocol": _IP[network.version], "field": f"{side}addr"}
    return _match("==", {"payload": field}, value)


def has_protocol(*protocols: str) -> Json:
    """It is of one of these: `tcp`, `udp`, and of :data:`ICMP`."""
    value: Any = {"set": list(protocols)} if len(protocols) > 1 else protocols[0]
    return _match("==", {"meta": {"key": "l4proto"}}, value)


def has_port(protocol: str, side: Side, ports: Ports) -> Json:
    """Its source or destination port is in one of these ranges, which don't touch each
    other; none: it is any."""
    if not ports:
        return has_protocol(protocol)
    values = [
        {"range": [first, last]} if first < last else first for first, last in ports
    ]
    value: Any = {"set": values} if len(values) > 1 else values[0]
    field = {"protocol": protocol, "field": f"{side}port"}
    return _match("==", {"payload": field}, value)


def has_socket(*, wildcard: bool) -> Json:
    """A socket of this machine waits for it: one on all addresses, or on its own.

    What the kernel keeps of a connection whose socket is closed is neither.
    """
    return _match("==", {"socket": {"key": "wildcard"}}, int(wildcard))


def has_transparent_socket() -> Json:
    """A transparent socket of this machine waits for it.

    Of an error of ICMP: that has sent what it quotes.
    """
    return _match("==", {"socket": {"key": "transparent"}}, 1)


def passes() -> Json:
    """It goes on as it is, past the rest of the chain."""
    return {"return": None}


def add_mark(mark: int) -> Json:
    """Mark it, beside what marks it has."""
    key = {"meta": {"key": "mark"}}
    return {"mangle": {"key": key, "value": {"|": [key, mark]}}}


def has_mark(mark: int) -> Json:
    """It has this mark, beside others."""
    key = {"&": [{"meta": {"key": "mark"}}, mark]}
    return _match("==", key, mark)


def is_translated() -> Json:
    """It is of a connection whose destination is changed by NAT."""
    return _match("in", {"ct": {"key": "status"}}, "dnat")


def known_connections() -> list[Json]:
    """A rule for NAT that changes nothing: the first packet of a connection alone gets
    to such a chain, which is none of these.

    The kernel goes on translating what belongs to a connection for as long as some rule
    asks what it knows of connections.
    """
    return [_match("in", {"ct": {"key": "state"}}, "established"), {"accept": None}]


def to_listener(version: int, host: str | None, port: int) -> Json:
    """TPROXY: a listener gets it as it is.

    :param host: the listener's own address, if it has one.
    """
    where: Json = {"family": _IP[version], "port": port}
    return {"tproxy": where if host is None else {**where, "addr": host}}


def change_destination(version: int, host: str | None, port: int) -> Json:
    """NAT: it goes to another address and port; unless given, to an address of the
    interface that it came in by."""
    if host is None:
        return {"redirect": {"port": port}}
    return {"dnat": {"family": _IP[version], "addr": host, "port": port}}


def _match(op: str, left: Json, right: Any) -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


# -- for people

#: What nft writes without quotes, of what it knows of a packet.
_WORDS = ("tcp", "udp", "ipv4", "ipv6", *ICMP)


def written(statements: Iterable[Json]) -> str:
    """A rule as `nft list` writes it."""
    return " ".join(map(_written, statements))


def _written(statement: Json) -> str:
    [(kind, what)] = statement.items()
    if kind == "match":
        sign = f"{what['op']} " if what["op"] == "!=" else ""
        left, right = what["left"], what["right"]
        if "&" in left:
            return f"meta mark & 0x{right:08x} == 0x{right:08x}"
        return f"{_left(left)} {sign}{_right(right, 'meta' in left)}"
    if kind == "mangle":
        return f"meta mark set meta mark | 0x{what['value']['|'][1]:08x}"
    if kind in ("accept", "return"):
        return kind
    port = what["port"]
    if kind == "redirect":
        return f"redirect to :{port}"
    # Of tproxy and dnat.
    host = what.get("addr")
    where = f":{port}" if host is None else host_port(host, port)
    return f"{kind} {what['family']} to {where}"


def _left(left: Mapping[str, Any]) -> str:
    [(kind, what)] = left.items()
    if kind == "payload":
        return f"{what['protocol']} {what['field']}"
    # nft writes the names of interfaces without `meta`.
    key: str = what["key"]
    return key if key == "iifname" else f"{kind} {key}"


def _right(right: Any, is_meta: bool) -> str:
    if isinstance(right, dict):
        [(kind, what)] = right.items()
        if kind == "prefix":
            return f"{what['addr']}/{what['len']}"
        if kind == "range":
            return f"{what[0]}-{what[1]}"
        return "{ " + ", ".join(_right(each, is_meta) for each in what) + " }"
    if is_meta and right not in _WORDS:
        return f'"{right}"'
    return str(right)
