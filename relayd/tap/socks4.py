"""`twistd socks4`: not built yet; says so and exits."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.application.service import Service
from twisted.python import usage

from relayd.errors import CannotStart


class Options(usage.Options):
    """Takes nothing yet."""

    longdesc = "A SOCKS4/4a proxy.  This release of relayd does not have it yet."

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Read the command line.

        :raises CannotStart: always, but for `--help` and `--version`.
        """
        try:
            super().parseOptions(options)
        except usage.UsageError as problem:
            raise CannotStart(f"socks4: {problem}") from problem
        raise CannotStart("socks4: not built yet; the next release has it")


def makeService(options: Options) -> Service:
    """Never reached: the options refuse first.

    :raises CannotStart: always.
    """
    raise CannotStart("socks4: not built yet; the next release has it")
