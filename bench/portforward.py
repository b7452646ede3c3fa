"""Twisted's own relay as a program: `twisted.protocols.portforward`.

`python portforward.py PORT DESTINATION_PORT BACKLOG` relays on loopback and logs
nothing; with `--log`, it logs as by default: two lines for each connection, to standard
output, as `twistd -n` would.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from twisted.internet import epollreactor
from twisted.protocols import portforward
from twisted.python import log


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("port", type=int)
    options.add_argument("destination", type=int)
    options.add_argument("backlog", type=int)
    options.add_argument("--log", action="store_true")
    given = options.parse_args()

    epollreactor.install()
    from twisted.internet import reactor  # noqa: TID251

    factory: Any = portforward.ProxyFactory("127.0.0.1", given.destination)
    if given.log:
        log.startLogging(sys.stdout)
    else:
        factory.noisy = False
        portforward.ProxyClientFactory.noisy = False
    reactor.listenTCP(given.port, factory, backlog=given.backlog, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
