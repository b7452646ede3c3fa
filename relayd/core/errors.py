"""The errors of relayd: few kinds, each with one clear line.

Every message says what was wrong, quotes the offending text, and says what is
expected or what to do.  Nothing here imports anything of ours.
"""

import errno

#: What says that this process or machine has too little of something: descriptors,
#: memory, ports.
SHORTAGE = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EADDRNOTAVAIL,
    }
)


class RelayError(Exception):
    """Anything that relayd itself raises."""


class ConfigError(RelayError):
    """A setting can't be used: a bad address, a bad number, a missing partner."""


class ListenError(RelayError):
    """A listener can't be opened: the port is taken, or not permitted."""


class NetfilterError(RelayError):
    """Rules of netfilter, or their routes, can't be installed or removed."""


#: The words for why a gate refuses a client: what log lines begin with, and metrics
#: count by.  The last is for gates that are not ours.
REASONS = (
    *("client", "hours", "max_connects_per_client"),
    *("max_sessions_per_client", "max_sessions", "queue", "queue_timeout"),
    "gate",
)


class Refused(RelayError):
    """A gate refuses a client, or a policy refuses what it asks for.

    :ivar why: the reason, in a few words for the log.
    :ivar reason: the same as one of :data:`REASONS`; any other word is taken for
        `gate`, so that nobody's words grow without limit.
    """

    def __init__(self, why: str, reason: str = "gate") -> None:
        super().__init__(why)
        self.why = why
        self.reason = reason if reason in REASONS else "gate"


class LeadsBack(RelayError):
    """A client's way leads back to the relay that it came to."""


class HandshakeFailed(RelayError):
    """A TLS handshake failed, or the peer showed the wrong certificate."""


class CannotStart(SystemExit, RelayError):
    """A service can't start: print one line, exit with status 1.

    `twistd` prints a traceback for any exception that escapes from a service
    as it starts, except SystemExit: of that the interpreter prints only the text.
    But only for an Exception does it remove its pid file and notify a daemon's
    parent process.  So this is both.
    """
