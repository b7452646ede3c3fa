"""How a lost peer is noticed: keepalive probes, and the user timeout.

TCP keepalive (tcp(7)) probes a connection on which nothing moves.  The user timeout
(TCP_USER_TIMEOUT, RFC 5482) is how long sent data may stay unacknowledged, and bytes
wait for a peer whose window is shut, before the kernel gives up.  With it, the kernel
counts no unanswered probes: it gives up when that time is over.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs

#: Whether accepted connections have the listening socket's options.
KEEPALIVE_IS_INHERITED = sys.platform.startswith("linux")

#: What the kernel takes: seconds, and probes.
_MAX_SECONDS, _MAX_PROBES = 32767, 127

#: The kernel has the user timeout in milliseconds, in an int.
_MAX_MILLISECONDS = (1 << 31) - 1

EXPECTED_KEEPALIVE = (
    "seconds before the first probe, seconds between probes (each up to"
    f" {_MAX_SECONDS}) and probes (up to {_MAX_PROBES}), such as 60,15,4"
)

_UNIX = int(socket.AF_UNIX)
_TCP, _SOCKET = int(socket.IPPROTO_TCP), int(socket.SOL_SOCKET)
_KEEPALIVE = int(socket.SO_KEEPALIVE)

# macOS has another name for the first.
_IDLE = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
_INTERVAL = getattr(socket, "TCP_KEEPINTVL", None)
_COUNT = getattr(socket, "TCP_KEEPCNT", None)
_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)


def _up_to(most: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    def check(_: object, attribute: attrs.Attribute[int], value: int) -> None:
        if not (isinstance(value, int) and 1 <= value <= most):
            raise ValueError(
                f"keepalive's {attribute.name} is a number from 1 to {most},"
                f" not {value!r}"
            )

    return check


@attrs.frozen
class Keepalive:
    """The figures of TCP keepalive.

    With the kernel's own (7,200, 75, 9) the idle timeout would come first.

    :ivar idle: seconds before the first probe.
    :ivar interval: seconds between probes.
    :ivar count: unanswered probes after which the peer is lost.
    :raises ValueError: one of them is out of the kernel's bounds.
    """

    idle: int = attrs.field(default=60, validator=_up_to(_MAX_SECONDS))
    interval: int = attrs.field(default=15, validator=_up_to(_MAX_SECONDS))
    count: int = attrs.field(default=4, validator=_up_to(_MAX_PROBES))

    def __str__(self) -> str:
        return f"{self.idle},{self.interval},{self.count}"


#: What a relay has unless told otherwise.
KEEPALIVE = Keepalive()


def parse_keepalive(text: str) -> Keepalive:
    """The figures of `IDLE,INTERVAL,COUNT`.

    :raises ValueError: they are none; the message says what is expected.
    """
    figures = text.split(",")
    plain = all(each.isascii() and each.isdigit() for each in figures)
    if plain and len(figures) == 3 and max(map(len, figures)) <= 5:
        with suppress(ValueError):
            return Keepalive(*map(int, figures))
    raise ValueError(f"expected {EXPECTED_KEEPALIVE}")


def checked_user_timeout(seconds: float, stall: float) -> float:
    """A user timeout that can be used.

    :param stall: seconds after which a relay itself gives up a peer that takes nothing;
        0 is never.
    :raises ValueError: it is negative, or not longer than that: the relay, which knows
        slow readers and says what was wrong, would not come to it.
    """
    if not seconds >= 0:
        raise ValueError(f"user_timeout must not be negative: {seconds!r}")
    if 0 < seconds <= stall:
        raise ValueError(
            f"user_timeout must be longer than the stall timeout, {stall:g} s, or 0:"
            f" {seconds!r}"
        )
    return seconds


def set_keepalive(sock: socket.SocketType, how: Keepalive = KEEPALIVE) -> None:
    """Turn on keepalive probes, which detect lost peers.

    A relay sets them on its listening sockets; a connection that did not inherit them
    gets them when it has lasted for a while: a short session does without.
    """
    if sock.family == _UNIX:
        return
    for level, option, value in (
        (_SOCKET, _KEEPALIVE, 1),
        (_TCP, _IDLE, how.idle),
        (_TCP, _INTERVAL, how.interval),
        (_TCP, _COUNT, how.count),
    ):
        if option is not None:
            try:  # noqa: SIM105 - suppress() costs more than the call
                sock.setsockopt(level, option, value)
            except OSError:
                # Then the system's default applies.
                pass


def set_user_timeout(sock: socket.SocketType, seconds: float) -> None:
    """Set the user timeout, where the system has it."""
    if sock.family != _UNIX and _USER_TIMEOUT is not None:
        value = min(max(1, round(seconds * 1000)), _MAX_MILLISECONDS)
        with suppress(OSError):
            sock.setsockopt(_TCP, _USER_TIMEOUT, value)


def watch_peer(
    sock: Any, keepalive: Keepalive, user_timeout: float, *, dialled: bool
) -> None:
    """Set both on a connection that lasts.

    :param user_timeout: seconds; 0 leaves it as it is.
    :param dialled: its endpoint may have set one or both, which stay.
    """
    if not (dialled and _has(sock, _SOCKET, _KEEPALIVE)):
        set_keepalive(sock, keepalive)
    if user_timeout and not (dialled and _has(sock, _TCP, _USER_TIMEOUT)):
        set_user_timeout(sock, user_timeout)


def _has(sock: Any, level: int, option: int | None) -> bool:
    if option is None:
        return False
    try:
        return bool(sock.getsockopt(level, option))
    except OSError:
        # A UNIX socket, or a sandbox.
        return False
