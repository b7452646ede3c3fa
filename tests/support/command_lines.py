"""Command lines, as `twistd` parses them."""

from __future__ import annotations

from twisted.application.service import MultiService
from twisted.internet import reactor

from relayd.operating.running import RelayService
from relayd.tap.relayd import Options, makeService

#: A command line that works, to add options to.
GOOD = ("--listen", "127.0.0.1:0", "--dest", "80")


def make(*argv: str) -> RelayService:
    """The relays that a command line makes."""
    options = Options()
    options.parseOptions(argv)
    service = makeService(options, reactor)
    assert isinstance(service, MultiService)
    [relays] = [each for each in service if isinstance(each, RelayService)]
    return relays
