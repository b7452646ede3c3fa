"""The rows of the table of settings for pools: which server, and whether it is up."""

from __future__ import annotations

from typing import Any

from relayd.core.check_grammar import EXPECTED_CHECK, Check, parse_check
from relayd.core.setting_types import Count, Kind, Seconds, Setting, Written, rows_in
from relayd.core.settings import SERVERS

#: The kinds of relay that have servers of their own.
POOLS: tuple[Kind, ...] = ("tcp", "udp")

CHECK = Setting[Check | None](
    name="check",
    type=Written("CHECK", parse_check, EXPECTED_CHECK),
    default=None,
    otherwise="none",
    help="Check each server, and send no new client to one that is down. tcp: it"
    " accepts a connection (tcp send=TEXT expect=TEXT: and answers)."
    " http://:8008/primary: it answers there with a status of 200 to 399 (expect=TEXT:"
    " and this is in the body). python:MODULE:FUNCTION: a coroutine function that is"
    " given the server, and returns True, False or a weight.",
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
