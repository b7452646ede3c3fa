"""`twistd relayd`: its options, and the service that they describe."""

from __future__ import annotations

from typing import Any, ClassVar

from twisted.application.service import MultiService

from relayd import config
from relayd.endpoints import parse_destination, parse_listener
from relayd.errors import CannotStart, ConfigError
from relayd.log_file import log_file_of
from relayd.service import make_service
from relayd.tap.options import StreamOptions

EXAMPLES = """
ADDRESS is 8080, :8080, 127.0.0.1:8080, [::1]:8080, localhost:8080,
unix:/run/x.sock, or a Twisted endpoint string such as
tcp:8080:interface=127.0.0.1, tls:example.com:443 or systemd:domain=INET:index=0.
udp:53, udp:127.0.0.1:53 and udp:[::1]:53 are for datagrams.
A listener without a host listens on all addresses, IPv4 and IPv6; port 0 picks
a free one, which the log names.  A destination without a host is this machine.

Examples:
  twistd -n --pidfile= relayd --demo
      a relay on 127.0.0.1:8080 to a file server of this folder
  twistd -n --pidfile= relayd --listen 8080 --dest example.com:80
      every connection to port 8080 goes to example.com, port 80
  twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 -d 10.0.0.6:80
      to two servers in turn
  twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 -l [::1]:81 -d unix:/run/web
      two relays in one process
  twistd -n --pidfile= relayd -l udp:53 -d udp:9.9.9.9:53 -l 53 -d 9.9.9.9:53
      a name server's datagrams, and its TCP
  twistd -n --pidfile= relayd -l ssl:8443:privateKey=key.pem:certKey=crt.pem -d 8080
      TLS outside, plain inside

--pidfile= keeps twistd from writing twistd.pid into the current folder, and from
refusing to start where it finds one.

SIGTERM stops accepting and lets sessions finish for --drain-timeout; a second
one ends at once.  SIGUSR1 reopens the log file.
"""


class Options(StreamOptions):
    """The command line of `twistd relayd`."""

    service = "relayd"
    synopsis = (
        "--listen ADDRESS --dest ADDRESS [--dest ...] [--listen ... --dest ...] ..."
    )
    longdesc = "Relay TCP and UNIX stream connections, and UDP datagrams."

    optParameters: ClassVar[list[Any]] = [
        [
            "udp-timeout",
            None,
            "300",
            (
                "Seconds that nothing need move in a UDP flow in use: datagrams went"
                " both ways, one of them later than 2 seconds after the first."
            ),
        ],
        [
            "udp-unreplied-timeout",
            None,
            "30",
            (
                "The same, until it is in use, answered or not (once answered, the"
                " shorter of the two); such flows make room for others."
            ),
        ],
        [
            "max-flows",
            None,
            None,
            (
                "UDP flows of a listener (default: what the limits of open files and of"
                " ports allow, shared by the listeners)."
            ),
        ],
        [
            "max-flows-per-client",
            None,
            None,
            "UDP flows of one client address (default: half of --max-flows).",
        ],
        [
            "reply-cap",
            None,
            "0",
            (
                "A UDP server's replies may have so many times the bytes of its "
                "client's; 0 is no limit."
            ),
        ],
        [
            "udp-rcvbuf",
            None,
            "4194304",
            "Bytes of datagrams that the kernel may keep for a UDP listener.",
        ],
    ]

    optFlags: ClassVar[list[Any]] = [
        [
            "no-refresh-inbound",
            None,
            "Don't let what a UDP server sends keep its flow alive.",
        ],
        ["demo", None, "Relay 127.0.0.1:8080 to a file server of the current folder."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self._given: list[config.Given] = []
        #: The settings, once `parseOptions` has returned.
        self.config = config.Config(())

    def opt_listen(self, address: str) -> None:
        """Where clients connect; opens a relay."""
        where = parse_listener(address)
        self._given.append(config.Given("--listen", address, where))

    def opt_dest(self, address: str) -> None:
        """Where to relay to: the --listen before it; several take turns."""
        where = parse_destination(address)
        self._given.append(config.Given("--dest", address, where))

    opt_l = opt_listen
    opt_d = opt_dest

    def getUsage(self, width: int | None = None) -> str:
        return f"{super().getUsage(width)}{EXAMPLES}"

    def postOptions(self) -> None:
        if self["demo"] and self._given:
            raise ConfigError("--demo brings its own listener and destination")
        self.config = config.Config(
            relays=() if self["demo"] else config.pair(self._given),
            udp=self._udp(),
            demo=bool(self["demo"]),
            **self.common(),
        )

    def _udp(self) -> config.UdpSettings:
        most = {
            name: None
            if self[option] is None
            else config.bound(f"--{option}", self[option])
            for name, option in (
                ("max_flows", "max-flows"),
                ("max_flows_per_client", "max-flows-per-client"),
            )
        }
        return config.UdpSettings(
            timeout=config.lifetime("--udp-timeout", self["udp-timeout"]),
            unreplied_timeout=config.lifetime(
                "--udp-unreplied-timeout", self["udp-unreplied-timeout"]
            ),
            refresh_inbound=not self["no-refresh-inbound"],
            reply_cap=config.ratio("--reply-cap", self["reply-cap"]),
            receive_buffer=config.receive_buffer(self["udp-rcvbuf"]),
            **most,
        )


def makeService(options: Options, reactor: Any = None) -> MultiService:
    """The service that `options` describe.

    :raises CannotStart: Twisted can't use one of the endpoint strings.
    """
    if reactor is None:
        from twisted.internet import reactor
    try:
        return make_service(options.config, reactor, log_file_of(options.parent))
    except ConfigError as problem:
        raise CannotStart(f"relayd: {problem}") from problem
