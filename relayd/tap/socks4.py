"""`twistd socks4`: its options, and its service."""

from __future__ import annotations

from typing import Any

from twisted.application.service import MultiService

from relayd.configuring.address_settings import SOCKS4
from relayd.configuring.command_line import socks4_section
from relayd.configuring.given import Layers
from relayd.configuring.source import Source
from relayd.tap.options import TableOptions

EXAMPLES = """
Without options it serves this machine's own programs, on 127.0.0.1:1080 (and
--pidfile= keeps twistd from writing twistd.pid into the current folder):
  twistd -n --pidfile= socks4
  curl --socks4 127.0.0.1 http://127.0.0.1:8000/

A listener that other machines can reach needs --allow-client, or --open.  Such a
proxy refuses loopback, link-local, cloud metadata and private addresses and this
machine's own, but for those that an --allow-dest names by their network:
  twistd -n --pidfile= socks4 --listen 1080 --allow-client 192.168.0.0/16
  twistd -n --pidfile= socks4 -l 1080 --allow-client 10.0.0.0/8 --allow-dest 10.2.0.0/16

--allow-dest and --deny-dest are read in order and the first that matches decides;
a destination that no rule matches is allowed.  A rule is CIDR or NAME, with :PORTS
if it is about some ports only: 443, 80,443 or 8000-8999.  Networks are IPv4 or IPv6
([2001:db8::/32]:443) and match every address, however it was asked for.  Names match
what 4a clients ask for: example.com, *.example.com (any name below it), or * (any
destination at all):
  --deny-dest '*:25'
      no mail; everything else
  --allow-dest '*.example.com:80,443' --deny-dest '*'
      these web servers; nothing else
  --deny-dest 203.0.113.7 --allow-dest 203.0.113.0/24 --deny-dest '*'
      a network but for one address of it; nothing else

A user id (--userid) is what the client says, and proves nothing.  --ident asks the
client's host, which may lie as well.
"""


class Options(TableOptions):
    """The command line of `twistd socks4`."""

    service = "socks4"
    rows = SOCKS4
    synopsis = "[--listen ADDRESS ...] [--allow-client CIDR ...] [options]"
    longdesc = "A SOCKS4 and SOCKS4a proxy, for CONNECT and BIND."
    examples = EXAMPLES

    def layers(self) -> Layers:
        given = [*self.chosen, *self.given]
        process = [each for each in given if each.setting.process]
        own = [each for each in given if not each.setting.process]
        layers = Layers(process, [socks4_section(own)])
        self.source = Source(layers, layers)
        return layers


def makeService(options: Options, reactor: Any = None) -> MultiService:
    """The service for these options.

    :raises CannotStart: Twisted can't use one of the endpoint strings.
    """
    if reactor is None:
        from twisted.internet import reactor
    return options.service_of(reactor)
