"""The errors of relayd: few kinds, each with one line for the person who reads it.

Every message says what was wrong, quotes the offending text, and says what is
expected or what to do.  Nothing here imports anything of ours.
"""


class RelayError(Exception):
    """Anything that relayd itself raises."""


class ConfigError(RelayError):
    """A setting can't be used: a bad address, a bad number, a missing partner."""


class ListenError(RelayError):
    """A listener can't be opened: the port is taken, or not permitted."""


class Refused(RelayError):
    """A gate turns a client away, or a policy is against what it asks for.

    :ivar why: the reason, in a few words for the log.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class HandshakeFailed(RelayError):
    """A TLS handshake failed, or the peer's certificate is not the one it should be."""


class CannotStart(SystemExit, RelayError):
    """A service can't start: print one line, exit with status 1.

    `twistd` prints a traceback for any exception that escapes from a service
    as it starts, except SystemExit, whose text the interpreter prints alone.
    But it removes its pid file, and tells the parent of a daemon, only for an
    Exception.  So this is both.
    """
