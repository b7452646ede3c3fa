"""The rows of the table of settings for who may come in, and for how long.

Those whose values have a grammar (rules, hours, rates) are in
:mod:`relayd.configuring.address_settings`.
"""

from __future__ import annotations

from typing import Any

from relayd.core.setting_types import (
    ALL_KINDS,
    STREAMS,
    Count,
    Flag,
    Seconds,
    Setting,
)
from relayd.core.settings import ACCESS, LIMITS, TIMEOUTS

HOURS_END = Setting[bool](
    name="hours-end",
    type=Flag(),
    default=False,
    help="With --hours: when they are over, end what is under way, too.",
    kinds=ALL_KINDS,
    group=ACCESS,
)
QUEUE_TIMEOUT = Setting[float](
    name="queue-timeout",
    type=Seconds(never=False),
    default=30.0,
    help="Time for which a client waits in the queue; then it is refused.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
MAX_AGE = Setting[float](
    name="max-age",
    type=Seconds(),
    default=0.0,
    help="Time after which a session is ended whatever it does; each up to 10 % sooner,"
    " so that clients don't all come back at once.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
MAX_SESSIONS = Setting[int | None](
    name="max-sessions",
    type=Count(),
    default=None,
    otherwise="none",
    help="Limit of a relay's sessions at once; more are refused, or see --queue. UDP"
    " relays have --max-flows.",
    kinds=STREAMS,
    group=LIMITS,
)
MAX_SESSIONS_PER_CLIENT = Setting[int | None](
    name="max-sessions-per-client",
    type=Count(),
    default=None,
    otherwise="none",
    help="The same for the sessions of one client address (see --client-prefix). UDP"
    " relays have --max-flows-per-client.",
    kinds=STREAMS,
    group=LIMITS,
)
QUEUE = Setting[int | None](
    name="queue",
    type=Count(),
    default=None,
    otherwise="none",
    help="Instead of being refused by --max-sessions, so many clients wait, in order;"
    " nothing is read from them, and no server is dialled.",
    kinds=STREAMS,
    group=LIMITS,
)

TABLE: tuple[Setting[Any], ...] = (
    *(HOURS_END, QUEUE_TIMEOUT, MAX_AGE),
    *(MAX_SESSIONS, MAX_SESSIONS_PER_CLIENT, QUEUE),
)
