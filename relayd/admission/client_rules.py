"""Which clients are admitted, by ordered rules: the first that matches decides.

A rule allows or denies an address, a network, the networks of a file, or the clients of
UNIX sockets.  What no rule matches is admitted, unless there is a rule that allows:
whoever lists those that may come means nobody else.

A file may list a hundred thousand networks, so rules are not read one after the other
for each client.  Networks lie within each other or apart, never across, so that one
pass over them, sorted, says for each stretch of addresses which rule is the first; a
client costs one binary search.  A longest-prefix tree would not do: there the most
specific network decides, not the first.
"""

from __future__ import annotations

import re
import socket
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import attrs

from relayd.core.networks import BeyondPrefix, Network, parse_network
from relayd.net.regular_files import open_regular

#: The longest file of networks, in bytes: some millions.
LONGEST = 64 << 20

#: A network as numbers: the IP version, the first address, the last.
Span = tuple[int, int, int]

EXPECTED_NETWORK = "an address or a network such as 192.168.0.0/16"

#: What may be an address or a network with a mistake in it, and nobody's secret.
_LIKE_A_NETWORK = re.compile(r"[0-9A-Fa-f.:/%]{1,80}")

EXPECTED_RULE = f"{EXPECTED_NETWORK}, @FILE with one a line, or unix"


@attrs.frozen
class ClientRule:
    """A rule, as it was written.

    :ivar allow: or else it denies.
    :ivar spans: the networks that it is about.
    :ivar unix: it is about clients of UNIX sockets.
    :ivar text: how it was written.
    """

    allow: bool
    spans: Sequence[Span] = attrs.field(repr=False)
    unix: bool
    text: str

    def __str__(self) -> str:
        return self.text


def parse_client_rule(text: str, *, allow: bool) -> ClientRule:
    """A rule: an address, a network, `@FILE`, or `unix`.

    :raises ValueError: it is none of these; or the file can't be read, or a line of it
        is no network.
    """
    if text == "unix":
        return ClientRule(allow, (), True, text)
    if text.startswith("@"):
        return ClientRule(allow, tuple(_spans_of_file(text[1:])), False, text)
    return ClientRule(allow, (span_of(text),), False, text)


def span_of(text: str) -> Span:
    """A network, or an address, as numbers.

    :raises ValueError: it is neither; if it has bits beyond its prefix, the message
        names the network that was probably meant.
    """
    # A tenth of the time that ipaddress takes; that gets what is not plain, and says
    # what is wrong.
    address, slash, length = text.partition("/")
    version = 6 if ":" in address else 4
    if not slash:
        length = "128" if version == 6 else "32"
        before, _, last = address.rpartition(":")
        if "::" in before and last.isdigit():
            # The last number might be meant as a port.
            length = ""
    if length.isascii() and length.isdigit() and len(length) <= 3:
        bits = (128 if version == 6 else 32) - int(length)
        try:
            its, first = number_of(address)
        except ValueError:
            bits = -1
        if bits >= 0 and its == version and not first & (1 << bits) - 1:
            return version, first, first | (1 << bits) - 1
    try:
        return _span(parse_network(text))
    except BeyondPrefix:
        raise
    except ValueError as problem:
        raise ValueError(f"{problem}; expected {EXPECTED_NETWORK}") from None


def _span(network: Network) -> Span:
    first = int(network.network_address)
    return network.version, first, first + network.num_addresses - 1


def _spans_of_file(path: str) -> Iterator[Span]:
    """The networks of a file, one a line; `#` begins a comment.

    :raises ValueError: it can't be read, or a line is no network.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(LONGEST + 1)
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise ValueError(f"{path!r} can't be read: {why}") from None
    if len(content) > LONGEST:
        raise ValueError(f"{path!r} is longer than {LONGEST >> 20} MiB")
    # By newlines only: `splitlines` would count others, too.
    lines = content.decode("utf-8-sig", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            yield span_of(text)
        except ValueError as problem:
            if not _LIKE_A_NETWORK.fullmatch(text):
                # Not quoted: whoever steers may name any file that relayd can read.
                why = f"{path!r}, line {number}: expected {EXPECTED_NETWORK}"
                raise ValueError(why) from None
            shown = "" if repr(text) in str(problem) else f"{text[:80]!r}: "
            raise ValueError(
                f"{path!r}, line {number}: {shown}{str(problem)[:300]}"
            ) from None


class ClientRules:
    """Rules made ready for many clients.

    :param rules: in their order.

    :ivar otherwise: whether a client is admitted that no rule is about.
    """

    def __init__(self, rules: Iterable[ClientRule]) -> None:
        self.rules = tuple(rules)
        self.otherwise = not any(each.allow for each in self.rules)
        self._unix = next(
            (number for number, each in enumerate(self.rules) if each.unix), -1
        )
        self._stretches = {
            version: _flattened(
                [
                    (first, last, number)
                    for number, each in enumerate(self.rules)
                    for its, first, last in each.spans
                    if its == version
                ]
            )
            for version in (4, 6)
        }

    def admits(self, host: str) -> bool:
        """Whether a client is admitted.

        :param host: its address, or empty: it came by a UNIX socket.
        :raises ValueError: `host` is neither.
        """
        number = self.decides(host)
        return self.otherwise if number < 0 else self.rules[number].allow

    def decides(self, host: str) -> int:
        """The number of the first rule that is about a client; -1: none is.

        :raises ValueError: `host` is no address.
        """
        if not host:
            return self._unix
        version, address = number_of(host)
        starts, rules = self._stretches[version]
        return rules[bisect_right(starts, address) - 1]


def number_of(host: str) -> tuple[int, int]:
    """The IP version of an address, and the address as a number.

    An IPv4 address that is written as an IPv6 one is the former.

    :param host: as :func:`relayd.core.addresses.host_of` has it, without a scope.
    :raises ValueError: it is no address.
    """
    try:
        if ":" not in host:
            return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, host))
        packed = socket.inet_pton(socket.AF_INET6, host)
    except OSError:
        raise ValueError(f"{host!r} is no address") from None
    if packed[:12] == _MAPPED:
        return 4, int.from_bytes(packed[12:])
    return 6, int.from_bytes(packed)


_MAPPED = bytes(10) + b"\xff\xff"


def _flattened(spans: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """Stretches of addresses, each with the first rule that is about it.

    :param spans: the first address, the last, and the number of the rule; of two, one
        is within the other, or they are apart.
    :return: where each stretch begins, in order, and its rule, or -1.
    """
    starts, rules = [0], [-1]

    def begin(at: int, rule: int) -> None:
        if starts[-1] == at:
            rules[-1] = rule
            if at and rules[-2] == rule:
                # Neighbours under one rule are one stretch.
                del starts[-1], rules[-1]
        elif rules[-1] != rule:
            starts.append(at)
            rules.append(rule)

    # Those that the next may be within: their ends, and the first rule of each and of
    # those around it.
    around: list[tuple[int, int]] = []
    # A network before those within it.
    for first, last, rule in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1][0] < first:
            end, _ = around.pop()
            begin(end + 1, around[-1][1] if around else -1)
        if around and around[-1][1] < rule:
            rule = around[-1][1]
        begin(first, rule)
        around.append((last, rule))
    while around:
        end, _ = around.pop()
        begin(end + 1, around[-1][1] if around else -1)
    return starts, rules
