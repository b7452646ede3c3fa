"""Relays that a program changes while they run, beside a control socket.

It relays a port to one server for a few seconds, then to another, and so on; those who
are connected stay with theirs::

    python examples/steered.py 127.0.0.1:8080 10.0.0.5:80 10.0.0.6:80
    relayctl --control unix:steered.sock sessions --watch
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.application.service import MultiService
from twisted.internet import reactor as installed_reactor
from twisted.internet.task import LoopingCall
from twisted.logger import globalLogBeginner, textFileLogObserver

from relayd.operating import ControlService, EmbeddedRelays

#: Seconds that each server has.
TURN = 3.0


def service_of(
    reactor: Any, listen: str, servers: Sequence[str], socket: str
) -> MultiService:
    """The relay, its control socket, and what changes it."""
    relays = EmbeddedRelays.from_settings(
        reactor, {"tcp": {"web": {"listen": listen, "dest": servers[0]}}}
    )
    turns = itertools.cycle([*servers[1:], servers[0]])

    def next_server() -> Any:
        return relays["web"].update({"dest": next(turns)})

    together = MultiService()
    relays.setServiceParent(together)
    ControlService(reactor, socket, relays.steering).setServiceParent(together)
    LoopingCall(next_server).start(TURN, now=False)
    return together


def main(listen: str = "127.0.0.1:8080", *servers: str) -> None:
    """Serve until Ctrl-C."""
    reactor: Any = installed_reactor
    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stdout)])
    socket = str(Path("steered.sock").absolute())
    service = service_of(reactor, listen, list(servers) or ["127.0.0.1:8081"], socket)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
