"""A relay for datagrams, whose server sees its clients' own addresses and ports.

The server (a name server, say) answers to the client; the kernel brings that to this
machine, and to the socket of the client's flow.  It takes CAP_NET_RAW, and a rule of
netfilter (docs/transparent.md).  A line for each flow that has ended::

    python examples/transparent_dns.py 192.168.0.2 53 192.168.0.1 53
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import reactor as installed_reactor

from relayd.endpoints import DialOptions
from relayd.errors import RelayError
from relayd.flow_log import Counters, Flow, FlowFacts
from relayd.udp_nat import Server, UdpNat
from relayd.udp_sockets import bind_udp


class Told:
    """Prints who was relayed to whom, and as whom."""

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """A flow has ended."""
        print(f"{facts.client} as {facts.port} -> {facts.server}", flush=True)

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        """The relay has ended; what was dropped says which clients it could not be."""
        print(f"dropped: {dict(counters.dropped)}", flush=True)


def serve(reactor: Any, host: str, port: str, to_host: str, to_port: str) -> None:
    """Relay until the reactor stops."""
    options = DialOptions(transparent=True)
    # Without the right, nobody could be served.
    options.check()
    nat = UdpNat(
        reactor, [Server(to_host, int(to_port))], dialing=options, observer=Told()
    )
    [listener] = nat.listen([bind_udp(host, int(port))])
    print(f"listening on port {listener.port}", flush=True)
    reactor.addSystemEventTrigger("before", "shutdown", nat.close)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) != 5:
        return "usage: transparent_dns.py HOST PORT SERVER-HOST SERVER-PORT"
    reactor: Any = installed_reactor
    try:
        serve(reactor, *sys.argv[1:])
    except (OSError, RelayError, ValueError) as problem:
        return f"transparent_dns: {getattr(problem, 'strerror', None) or problem}"
    reactor.run()
    return None


if __name__ == "__main__":
    sys.exit(main())
