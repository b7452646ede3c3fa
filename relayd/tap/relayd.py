"""`twistd relayd`: its options, and its service."""

from __future__ import annotations

from typing import Any

from twisted.application.service import MultiService

from relayd.configuring.address_settings import RELAYD
from relayd.configuring.command_line import OF_ONE_RELAY, relay_sections
from relayd.configuring.given import Layers
from relayd.configuring.source import Source
from relayd.core.errors import ConfigError
from relayd.core.process_settings import CONFIG, DEMO
from relayd.tap.options import TableOptions

EXAMPLES = """
ADDRESS is 8080, :8080, 127.0.0.1:8080, [::1]:8080, localhost:8080,
unix:/run/x.sock, or a Twisted endpoint string such as
tcp:8080:interface=127.0.0.1, tls:example.com:443 or systemd:domain=INET:index=0.
udp:53, udp:127.0.0.1:53 and udp:[::1]:53 are for datagrams.
A listener without a host listens on all addresses, IPv4 and IPv6; port 0 picks
a free port, which the log shows.  A destination without a host is this machine.

Examples:
  twistd -n --pidfile= relayd --demo
      a relay on 127.0.0.1:8080 to a file server of this folder
  twistd -n --pidfile= relayd --listen 8080 --dest example.com:80
      every connection to port 8080 goes to example.com, port 80
  twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 -d 10.0.0.6:80
      to two servers in turn
  twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 -l [::1]:81 -d unix:/run/web
      two relays in one process
  twistd -n --pidfile= relayd --name db -l 81 -d db:5432 --name web -l 80 -d web:80
      two relays with names, which the log shows
  twistd -n --pidfile= relayd -l 5000-5100 -d 10.0.0.5:5000-5100
      each of these ports, to the same port there
  twistd -n --pidfile= relayd -l 443 --sni db.example.com=db:443 --sni =web:443
      TLS clients of one name to one server, and all others to another
  twistd -n --pidfile= relayd --config /etc/relayd/relayd.toml
      what a file says: several relays of all kinds, each with its own settings
  twistd -n --pidfile= relayd -l udp:53 -d udp:9.9.9.9:53 -l 53 -d 9.9.9.9:53
      a name server's datagrams, and its TCP
  twistd -n --pidfile= relayd -l ssl:8443:privateKey=key.pem:certKey=crt.pem -d 8080
      clients connect with TLS, the server gets plain TCP

--pidfile= keeps twistd from writing twistd.pid into the current folder, and from
refusing to start where it finds one.

SIGTERM stops accepting and lets sessions finish for --drain-timeout; a second
one ends the relay at once.  SIGUSR1 reopens the log file.
"""


class Options(TableOptions):
    """The command line of `twistd relayd`."""

    service = "relayd"
    rows = RELAYD
    synopsis = (
        "--listen ADDRESS --dest ADDRESS [--dest ...] [--listen ... --dest ...] ..."
    )
    longdesc = "Relay TCP and UNIX stream connections, and UDP datagrams."
    examples = EXAMPLES

    def layers(self) -> Layers:
        given = [*self.chosen, *self.given]
        process = [each for each in given if each.setting.process]
        given = [each for each in given if not each.setting.process]
        own = [each for each in given if each.setting in OF_ONE_RELAY]
        every = [each for each in given if each.setting not in OF_ONE_RELAY]
        if self[DEMO.option] and own:
            raise ConfigError(
                f"--demo brings its own listener and destination: leave out {own[0]}"
            )
        layers = Layers(process, relay_sections(own), every)
        config = self[CONFIG.option]
        if config is None:
            self.source = Source(layers, layers)
            return layers
        # Imports cattrs, which nothing else needs.
        from relayd.configuring.file import read_layers

        self.source = Source.of_file(layers, config.value, read_layers)
        return self.source.first


def makeService(options: Options, reactor: Any = None) -> MultiService:
    """The service for these options.

    :raises CannotStart: Twisted can't use one of the endpoint strings.
    """
    if reactor is None:
        from twisted.internet import reactor
    return options.service_of(reactor)
