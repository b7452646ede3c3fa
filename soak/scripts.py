"""The scripts of TCP sessions, and what is drawn for each session.

A script says what each end of a session does (:mod:`soak.roles`), and which endings the
relay may log for it.
"""

from __future__ import annotations

import random

from soak import roles
from soak.ends import Script, Session, Where

_MIB = 1024 * 1024
_BULK = (_MIB // 16, 2 * _MIB)

#: The relay may be reading, writing or dialling when a reset arrives.
_CLIENT_RESET = ("downstream_reset", "downstream_write_failed", "client_left")
_SERVER_RESET = ("upstream_reset", "upstream_write_failed")

SCRIPTS = (
    Script(
        "client closes first",
        8,
        roles.ask,
        roles.answer_and_see_the_end,
        ("done",),
        delay=8,
    ),
    Script(
        "server closes first",
        8,
        roles.ask_and_see_the_end,
        roles.answer,
        ("done",),
        delay=8,
    ),
    Script(
        "server speaks first",
        4,
        roles.ask_greeter,
        roles.answer_and_see_the_end,
        ("done",),
        where=Where.GREETER,
        introduces=False,
    ),
    Script(
        "bulk up", 8, roles.upload, roles.take_upload, ("done",), up=_BULK, seconds=15
    ),
    Script(
        "bulk down",
        8,
        roles.download,
        roles.serve_download,
        ("done",),
        down=_BULK,
        seconds=15,
    ),
    Script(
        "bulk both ways",
        5,
        roles.both_ways,
        roles.both_ways,
        ("done",),
        up=_BULK,
        down=_BULK,
        seconds=15,
    ),
    Script(
        "client half-closes", 6, roles.upload, roles.take_upload, ("done",), delay=3
    ),
    Script(
        "server half-closes",
        6,
        roles.go_on_after_the_end,
        roles.end_first,
        ("done",),
        up=(1, _MIB // 4),
        delay=3,
    ),
    Script(
        "idle, then on", 16, roles.ask_twice, roles.answer_twice, ("done",), delay=15
    ),
    Script(
        "byte by byte",
        12,
        roles.ask_in_drops,
        roles.answer_in_drops,
        ("done",),
        up=(5, 30),
        down=(5, 30),
        seconds=12,
    ),
    Script(
        "slow client",
        6,
        roles.download_slowly,
        roles.serve_download,
        ("done",),
        down=(_MIB // 2, 3 * _MIB // 2),
    ),
    Script(
        "slow server",
        6,
        roles.upload,
        roles.take_upload_slowly,
        ("done",),
        up=(_MIB // 2, 3 * _MIB // 2),
    ),
    Script(
        "client resets",
        4,
        roles.reset_while_sending,
        roles.see_the_reset,
        _CLIENT_RESET,
        up=_BULK,
        seconds=10,
    ),
    Script(
        "server resets",
        4,
        roles.see_the_reset,
        roles.reset_while_sending,
        _SERVER_RESET,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "client resets, both sending",
        2,
        roles.reset_while_sending,
        roles.see_the_reset_while_sending,
        _CLIENT_RESET,
        up=_BULK,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "server resets, both sending",
        2,
        roles.see_the_reset_while_sending,
        roles.reset_while_sending,
        _SERVER_RESET,
        up=_BULK,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "client resets, server not reading",
        1,
        roles.fill_and_reset,
        roles.read_after_the_reset,
        (*_CLIENT_RESET, "upstream_stalled"),
    ),
    Script(
        "server resets, client not reading",
        1,
        roles.read_after_the_reset,
        roles.fill_and_reset,
        (*_SERVER_RESET, "downstream_stalled"),
    ),
    Script("client stalls", 2, roles.stall, roles.flood, ("downstream_stalled",)),
    Script("server stalls", 2, roles.flood, roles.stall, ("upstream_stalled",)),
    Script("idle for ever", 12, roles.idle, roles.idle, ("idle",)),
    Script(
        "half-closed for ever",
        5,
        roles.end_and_idle,
        roles.idle_after_the_end,
        ("half_closed",),
    ),
    Script(
        "client leaves at once",
        4,
        roles.leave,
        roles.absent,
        ("done", "downstream_reset", "client_left"),
        introduces=False,
    ),
    Script(
        "client leaves during the dial",
        2,
        roles.leave,
        roles.absent,
        ("client_left",),
        delay=1.5,
        where=Where.HANGING,
        introduces=False,
        # A client that only half-closed waits for the server until the dial times out.
        late=("connect_timeout",),
    ),
    Script(
        "client asks, leaves during the dial",
        2,
        roles.leave,
        roles.absent,
        ("client_left", "connect_timeout"),
        delay=3,
        where=Where.HANGING,
    ),
    Script(
        "dial hangs",
        3,
        roles.be_given_up,
        roles.absent,
        ("connect_timeout",),
        where=Where.HANGING,
    ),
    Script(
        "server refuses",
        4,
        roles.be_refused,
        roles.absent,
        ("connect_refused",),
        where=Where.CLOSED,
        introduces=False,
    ),
)

_WEIGHTS = [script.weight for script in SCRIPTS]


def draw_session(seed: int, number: int) -> Session:
    """The session of this number: the same for the same seed."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 - to be repeated
    [script] = dice.choices(SCRIPTS, _WEIGHTS)
    return Session(
        number=number,
        script=script,
        up=dice.randint(*script.up),
        down=dice.randint(*script.down),
        # A third are not spread over time.
        seconds=dice.choice((0, 1, 1)) * dice.uniform(0, script.seconds),
        delay=dice.uniform(0, script.delay),
        coin=dice.random() < 0.5,
        small_buffer=dice.random() < 0.5,
    )
