"""What an explanation says, and what it is asked about: a client, an instant, a place.

:mod:`relayd.operating.explaining` makes them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

import attrs
from twisted.internet.task import Clock
from twisted.python.failure import Failure

import relayd
from relayd.admission.hours import Hours
from relayd.core.errors import ConfigError
from relayd.core.names import host_port, is_address, is_name

EXPECTED_CLIENT = "an address such as 10.0.0.5 or 2001:db8::5, or unix"

EXPECTED_DESTINATION = "HOST:PORT, such as 203.0.113.7:443, [2001:db8::7]:443 or a name"

EXPECTED_INSTANT = "a date and a time such as 2026-12-24T03:00, or with +01:00 or Z"

#: How an instant is given.
Instant = str | datetime

#: What that is.
Moment = datetime

#: A client of a UNIX socket, as the log has it.
UNIX_CLIENT = "unix:"

_WITH_PORT = re.compile(r"\[(.*)\](?::([0-9]{1,5}))?|([^:]*):([0-9]{1,5})")


class StillClock:
    """The clock of a relay that is asked, and does not run."""

    def seconds(self) -> float:
        """Always 0."""
        return 0.0

    def callLater(self, *_: Any, **__: Any) -> NoReturn:
        """:raises RuntimeError: nothing is ever due."""
        raise RuntimeError("this clock stands still")


class PassingClock(Clock):
    """One whose time passes at once, for as long as that is of use."""

    def pass_while(self, waits: Callable[[], bool], limit: float) -> None:
        """Let it pass, from one timer to the next.

        :param waits: whether somebody waits still.
        :param limit: until then at most, in seconds.
        """
        while waits() and (timers := self.getDelayedCalls()):
            due = min(each.getTime() for each in timers)
            if due > limit:
                break
            self.advance(max(0.0, due - self.seconds()))


@attrs.frozen
class Step:
    """One thing that a client meets.

    :ivar step: what: `rules`, `hours`, `pool` and so on.
    :ivar result: what comes of it, in a word or two.
    :ivar why: in words; names the rule, or the setting, that decides.
    """

    step: str
    result: str
    why: str

    def __str__(self) -> str:
        return f"{self.step}: {self.result}: {self.why}"


#: Results of steps.
OK, REFUSED, UNKNOWN = "ok", "refused", "not known"


class GetsNoFurther(Exception):
    """A step refuses the client."""


def meet(steps: list[Step], step: str, result: str, why: str) -> None:
    """Note what a client meets.

    :raises GetsNoFurther: that refuses it.
    """
    steps.append(Step(step, result, why))
    if result == REFUSED:
        raise GetsNoFurther


def _in_order(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(steps)


@attrs.frozen
class Explanation:
    """What becomes of a client, and why; :func:`str` is for people.

    :ivar admitted: no step refuses it.  It may have to wait, and its server may still
        not answer.
    :ivar steps: in the order in which the client meets them; the one that refuses it is
        the last.
    :ivar server: the name of the server that it would get, or where a proxy would take
        it; None: none, or it can't be told before.
    """

    admitted: bool
    steps: Sequence[Step] = attrs.field(converter=_in_order)
    server: str | None

    def __str__(self) -> str:
        wide = max(len(each.step) for each in self.steps)
        lines = [
            f"{each.step:{wide}}  {each.result}: {each.why}" for each in self.steps
        ]
        end = "refused" if not self.admitted else f"admitted, to {self.server}"
        return "\n".join(
            [*lines, end if self.server or not self.admitted else "admitted"]
        )

    @property
    def as_json(self) -> dict[str, Any]:
        """The same for programs: `admitted`, `steps`, `server`."""
        return {
            "admitted": self.admitted,
            "steps": [attrs.asdict(each) for each in self.steps],
            "server": self.server,
        }

    def said(self, step: str) -> Step:
        """The first step of this name.

        :raises LookupError: the client does not meet it.
        """
        for each in self.steps:
            if each.step == step:
                return each
        met = ", ".join(each.step for each in self.steps)
        raise LookupError(f"no step {step!r}: the client meets {met}")


def client_of(text: str) -> str:
    """The name of a client, as gates know it (:mod:`relayd.core.addresses`).

    :param text: its address, with or without a port, or `unix`.
    :raises ConfigError: it is neither.
    """
    if text == "unix" or text.startswith(UNIX_CLIENT):
        return UNIX_CLIENT
    host, port = text, 0
    match = _WITH_PORT.fullmatch(text)
    if match:
        host = match[1] or match[3] or ""
        port = int(match[2] or match[4] or 0)
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        port = 65536
    if port > 65535:
        raise ConfigError(f"bad client {text!r}: expected {EXPECTED_CLIENT}")
    # A listener for both versions says so, too.
    mapped = getattr(address, "ipv4_mapped", None)
    return host_port(str(mapped or host), port)


def destination_of(text: str) -> tuple[str, int]:
    """Where a proxy's client wants to go: a host and a port.

    :raises ConfigError: it is something else.
    """
    match = _WITH_PORT.fullmatch(text)
    if match and (match[2] or match[4]):
        host = match[1] or match[3] or ""
        port = int(match[2] or match[4])
        if 0 < port < 65536 and (is_address(host) or is_name(host)):
            return host, port
    raise ConfigError(f"bad destination {text!r}: expected {EXPECTED_DESTINATION}")


def instant_of(at: Instant, hours: Iterable[Hours]) -> datetime:
    """An instant.

    :param at: as ISO 8601 has it.  Without a zone it is a time of the clocks that a
        relay's hours go by; of UTC, if it has none.
    :param hours: the relay's.
    :raises ConfigError: it is something else; or it takes a zone, as the hours have
        several, or as these clocks never show that time.
    """
    moment = at
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            raise ConfigError(f"bad time {at!r}: expected {EXPECTED_INSTANT}") from None
    if moment.tzinfo is not None:
        return moment
    zones = list(dict.fromkeys(each.zone for each in hours)) or [ZoneInfo("UTC")]
    if len(zones) > 1:
        names = ", ".join(map(str, zones))
        raise ConfigError(
            f"bad time {str(at)!r}: the relay's hours are those of {names}: give it"
            " with +01:00, or Z"
        )
    there = moment.replace(tzinfo=zones[0])
    if there.astimezone(UTC).astimezone(zones[0]).replace(tzinfo=None) != moment:
        raise ConfigError(
            f"bad time {str(at)!r}: the clocks of {zones[0]} are set forward past it"
        )
    return there


def place_of(reason: Failure) -> str:
    """Where an operator's own function has failed, `FILE:LINE`; empty if nobody knows.

    The last line of its own file: what it has called there is not its author's.
    """
    ours = os.path.join(os.path.dirname(relayd.__file__), "")
    frames = traceback.extract_tb(reason.getTracebackObject())
    others = [each for each in frames if not each.filename.startswith(ours)]
    own = [each for each in others if each.filename == others[0].filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
