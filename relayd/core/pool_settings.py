"""The rows of the table of settings for pools: which server, and what if it fails."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from relayd.core.check_grammar import EXPECTED_CHECK, Check, parse_check
from relayd.core.number_types import CountOrNone, Percent
from relayd.core.setting_types import (
    STREAMS,
    Choice,
    Count,
    Kind,
    Seconds,
    Setting,
    Written,
    rows_in,
)
from relayd.core.settings import SERVERS, TIMEOUTS

#: The kinds of relay that have servers of their own.
POOLS: tuple[Kind, ...] = ("tcp", "udp")

_TCP: tuple[Kind, ...] = ("tcp",)

#: What becomes of the sessions of a server that goes down.
OnDown = Literal["keep", "cut"]

#: How a server is chosen.
Balance = Literal["round-robin", "least-sessions", "random", "client-hash", "first"]

#: What a server is chosen for.
UdpBalance = Literal["flow", "datagram"]

#: The most retries of one session, and the most failed dials that are counted.
MAX_RETRIES = 100

#: Seconds for all attempts of a session, if one has less.
LONGEST_DIAL = 30.0

EXPECTED_NONE = "fail, try-all, or wait=SECONDS"


@attrs.frozen
class WhenNone:
    """What becomes of new clients while no server can be chosen.

    :ivar what: `fail`: they are refused; `try-all`: servers that are down are tried,
        too; `wait`: they wait for one.
    :ivar limit: the seconds for which they wait.
    """

    what: Literal["fail", "try-all", "wait"] = "fail"
    limit: float = 0.0

    def __str__(self) -> str:
        if self.what != "wait":
            return self.what
        return f"wait={Seconds().show(self.limit)}"


def parse_when_none(text: str) -> WhenNone:
    """`fail`, `try-all` or `wait=SECONDS`.

    :raises ValueError: it is something else.
    """
    if text == "fail":
        return WhenNone()
    if text == "try-all":
        return WhenNone("try-all")
    word, is_wait, seconds = text.partition("=")
    if word == "wait" and is_wait:
        return WhenNone("wait", Seconds(never=False).parse(seconds))
    raise ValueError(f"expected {EXPECTED_NONE}")


BALANCE = Setting[Balance](
    name="balance",
    type=Choice[Balance](Balance),
    default="round-robin",
    help="How a server is chosen, each by its weight: in turn (round-robin), the one"
    " with the fewest sessions (least-sessions), the better of two at random (random),"
    " always the same for a client (client-hash), or the first that has room (first).",
    kinds=POOLS,
    group=SERVERS,
)
UDP_BALANCE = Setting[UdpBalance](
    name="udp-balance",
    type=Choice[UdpBalance](UdpBalance),
    default="flow",
    help="All that a client sends goes to one server (flow), or each datagram to the"
    " next (datagram), for protocols without answers: none is passed on.",
    kinds=("udp",),
    group=SERVERS,
)
RETRIES = Setting[int | None](
    name="retries",
    type=CountOrNone(MAX_RETRIES),
    default=None,
    otherwise="2; with one server 0",
    help="If a server can't be reached, or resets before a byte has passed, try others,"
    " so many times; the same one after a pause, if there is no other.",
    kinds=_TCP,
    group=SERVERS,
)
DIAL_TIMEOUT = Setting[float | None](
    name="dial-timeout",
    type=Seconds(),
    default=None,
    otherwise="30; at least --connect-timeout",
    help="Time for all attempts of a session together.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
MAX_FAILS = Setting[int](
    name="max-fails",
    type=CountOrNone(MAX_RETRIES),
    default=3,
    help="Take a server out after so many failed dials, or sessions that it has reset"
    " without a word, within --fail-time; 0 for never. Not for a single server, nor for"
    " HOST:original. Of UDP: flows that it refuses, or does not answer.",
    kinds=POOLS,
    group=SERVERS,
)
FAIL_TIME = Setting[float](
    name="fail-time",
    type=Seconds(never=False),
    default=10.0,
    help="Time in which failed dials are counted, and for which a server is taken out"
    " then; each time in a row it doubles.",
    kinds=POOLS,
    group=SERVERS,
)
FAIL_MAX = Setting[float](
    name="fail-max",
    type=Seconds(never=False),
    default=300.0,
    help="The longest time for which a server is taken out.",
    kinds=POOLS,
    group=SERVERS,
)
EJECT_MOST = Setting[int](
    name="eject-most",
    type=Percent(),
    default=50,
    help="Limit of a relay's servers that are out for failed dials at once; never the"
    " last one.",
    kinds=POOLS,
    group=SERVERS,
)
ON_DOWN = Setting[OnDown](
    name="on-down",
    type=Choice[OnDown](OnDown),
    default="keep",
    help="When checks, or an operator, say that a server is down, its sessions go on"
    " (keep) or are cut off by a reset (cut). Of UDP: its flows go to another server"
    " when it refuses or does not answer (keep), or at once, and end if there is none"
    " (cut).",
    kinds=POOLS,
    group=SERVERS,
)
SLOW_START = Setting[float](
    name="slow-start",
    type=Seconds(),
    default=0.0,
    help="Time over which the weight of a server that has come up grows to its own.",
    kinds=POOLS,
    group=SERVERS,
)
WHEN_NONE = Setting[WhenNone](
    name="when-none",
    type=Written[WhenNone]("WHAT", parse_when_none, EXPECTED_NONE),
    default=WhenNone(),
    help="When no server can be chosen, new clients are refused (fail), those that are"
    " down are tried, too (try-all), or clients wait so long for one (wait=SECONDS)."
    " Of UDP: their first datagrams wait.",
    kinds=POOLS,
    group=SERVERS,
)

RESOLVE_EVERY = Setting[float | None](
    name="resolve-every",
    type=Seconds(never=False),
    default=None,
    otherwise="the answer's TTL",
    help="Time after which the name of a server dns: or srv: is looked up again, 10 %"
    " more or less.",
    kinds=POOLS,
    group=SERVERS,
)
RESOLVE_GRACE = Setting[float](
    name="resolve-grace",
    type=Seconds(),
    default=60.0,
    help="Time for which servers stay whose name has no address any more.",
    kinds=POOLS,
    group=SERVERS,
)
CHECK = Setting[Check | None](
    name="check",
    type=Written("CHECK", parse_check, EXPECTED_CHECK),
    default=None,
    otherwise="none",
    help="Check each server, and send no new client to one that is down. tcp: it"
    " accepts a connection (tcp send=TEXT expect=TEXT: and answers)."
    " http://:8008/primary: it answers there with a status of 200 to 399 (expect=TEXT:"
    " and this is in the body). udp send=TEXT expect=TEXT: a UDP server answers."
    " python:MODULE:FUNCTION: a coroutine function that is given the server, and"
    " returns True, False or a weight.",
    kinds=POOLS,
    group=SERVERS,
)
CHECK_EVERY = Setting[float](
    name="check-every",
    type=Seconds(never=False),
    default=5.0,
    help="Time between two checks of a server; 10 % more or less, so that they spread.",
    kinds=POOLS,
    group=SERVERS,
)
CHECK_TIMEOUT = Setting[float](
    name="check-timeout",
    type=Seconds(never=False),
    default=2.0,
    help="Time that one check may take, connection and TLS handshake included.",
    kinds=POOLS,
    group=SERVERS,
)
RISE = Setting[int](
    name="rise",
    type=Count(1000),
    default=2,
    help="Checks in a row that must succeed until a server that was down is up.",
    kinds=POOLS,
    group=SERVERS,
)
FALL = Setting[int](
    name="fall",
    type=Count(1000),
    default=3,
    help="Checks in a row that must fail until a server is down. The first check of all"
    " decides alone.",
    kinds=POOLS,
    group=SERVERS,
)

TABLE: tuple[Setting[Any], ...] = rows_in(globals())
