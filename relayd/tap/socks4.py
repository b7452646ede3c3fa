"""`twistd socks4`: its options, and the service that they describe."""

from __future__ import annotations

from typing import Any, ClassVar

from twisted.application.service import MultiService

from relayd import config
from relayd.endpoints import StreamAddress, UdpAddress, parse_listener
from relayd.errors import CannotStart, ConfigError
from relayd.log_file import log_file_of
from relayd.networks import Network
from relayd.rules import Rule, parse_rule
from relayd.service import make_socks4_service
from relayd.tap.options import StreamOptions

EXAMPLES = """
Without options it serves this machine's own programs, on 127.0.0.1:1080 (and
--pidfile= keeps twistd from writing twistd.pid into the current folder):
  twistd -n --pidfile= socks4
  curl --socks4 127.0.0.1 http://127.0.0.1:8000/

A listener that other machines can reach takes --allow-client, or --open.  Such a
proxy refuses loopback, link-local, cloud metadata and private addresses and this
machine's own, but for those that an --allow-dest names by their network:
  twistd -n --pidfile= socks4 --listen 1080 --allow-client 192.168.0.0/16
  twistd -n --pidfile= socks4 -l 1080 --allow-client 10.0.0.0/8 --allow-dest 10.2.0.0/16

--allow-dest and --deny-dest are read in order and the first that matches decides;
what none matches is allowed.  A rule is CIDR or NAME, with :PORTS if it is about
some ports only: 443, 80,443 or 8000-8999.  Networks are IPv4 or IPv6
([2001:db8::/32]:443) and match every address, however it was asked for.  Names match
what 4a clients ask for: example.com, *.example.com (any name below it), or * (any
destination at all):
  --deny-dest '*:25'
      no mail; everything else
  --allow-dest '*.example.com:80,443' --deny-dest '*'
      these web servers; nothing else
  --deny-dest 203.0.113.7 --allow-dest 203.0.113.0/24 --deny-dest '*'
      a network but for one address of it; nothing else

A user id (--userid) is what the client says.  --ident asks the client's host, which
may lie as well.
"""


class Options(StreamOptions):
    """The command line of `twistd socks4`."""

    service = "socks4"
    synopsis = "[--listen ADDRESS ...] [--allow-client CIDR ...] [options]"
    longdesc = "A SOCKS4 and SOCKS4a proxy, for CONNECT and BIND."

    optParameters: ClassVar[list[Any]] = [
        ["bind-address", None, None, "The IPv4 address that BIND listens on."],
        ["external-address", None, None, "The IPv4 address that BIND's reply names."],
        [
            "bind-timeout",
            None,
            "120",
            "Seconds that BIND waits for its peer; 0 means for ever.",
        ],
        [
            "max-handshakes",
            None,
            None,
            (
                "Clients in a handshake; the one that is longest in it makes room "
                "(default: a quarter of the limit of open files, 4096 at most)."
            ),
        ],
        [
            "max-handshakes-per-client",
            None,
            None,
            (
                "Those of one address; likewise "
                "(default: a quarter of --max-handshakes, 1024 at most)."
            ),
        ],
        ["max-binds", None, "256", "Clients that wait for a peer; more are refused."],
        ["max-binds-per-client", None, "8", "Those of one address; likewise."],
    ]

    optFlags: ClassVar[list[Any]] = [
        ["open", None, "Serve everybody who can reach the listener."],
        ["ident", None, "Ask each client's host for its user id (RFC 1413)."],
        ["no-bind", None, "Refuse BIND."],
        ["bind-any", None, "Let BIND wait for whoever comes (destination 0.0.0.0)."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self._listeners: list[StreamAddress] = []
        self._clients: list[Network] = []
        self._rules: list[Rule] = []
        self._user_ids: list[bytes] = []
        #: The settings, once `parseOptions` has returned.
        self.config = config.Socks4Config()

    def opt_listen(self, address: str) -> None:
        """Where clients connect (default: 127.0.0.1:1080); may be repeated."""
        where = parse_listener(address)
        if isinstance(where, UdpAddress):
            raise ConfigError(f"bad --listen {address!r}: SOCKS4 is not for datagrams")
        self._listeners.append(where)

    opt_l = opt_listen

    def opt_allow_client(self, network: str) -> None:
        """Serve the clients of this address or network, and no others; repeatable."""
        self._clients.append(config.client_network(network))

    def opt_allow_dest(self, rule: str) -> None:
        """Let clients go there; repeatable, see below."""
        self._rules.append(parse_rule("--allow-dest", rule, allow=True))

    def opt_deny_dest(self, rule: str) -> None:
        """Don't let clients go there; repeatable, see below."""
        self._rules.append(parse_rule("--deny-dest", rule, allow=False))

    def opt_userid(self, name: str) -> None:
        """Serve this user id, and no others; repeatable."""
        self._user_ids.append(config.user_id(name))

    def getUsage(self, width: int | None = None) -> str:
        return f"{super().getUsage(width)}{EXAMPLES}"

    def postOptions(self) -> None:
        listeners = self._listeners or [config.SOCKS4_LISTENER]
        config.check_openness(
            listeners, bounded=bool(self._clients), opened=bool(self["open"])
        )
        if self["no-bind"]:
            for option in ("bind-any", "bind-address", "external-address"):
                if self[option]:
                    raise ConfigError(
                        f"--no-bind and --{option} contradict each other: give one"
                    )
        external = self._ipv4("external-address")
        if external == "0.0.0.0":
            raise ConfigError(
                "bad --external-address '0.0.0.0': expected the address that BIND's"
                " peers connect to"
            )
        self.config = config.Socks4Config(
            listeners=listeners,
            clients=self._clients,
            rules=self._rules,
            user_ids=self._user_ids,
            ident=bool(self["ident"]),
            bind=not self["no-bind"],
            bind_any=bool(self["bind-any"]),
            bind_address=self._ipv4("bind-address"),
            external_address=external,
            bind_timeout=self.seconds("bind"),
            limits=config.Limits(
                **{
                    option.replace("-", "_"): config.bound(f"--{option}", self[option])
                    for option in (
                        "max-handshakes",
                        "max-handshakes-per-client",
                        "max-binds",
                        "max-binds-per-client",
                    )
                    if self[option] is not None
                }
            ),
            **self.common(),
        )

    def _ipv4(self, option: str) -> str | None:
        given = self[option]
        return None if given is None else config.ipv4_address(f"--{option}", given)


def makeService(options: Options, reactor: Any = None) -> MultiService:
    """The service that `options` describe.

    :raises CannotStart: Twisted can't use one of the endpoint strings.
    """
    if reactor is None:
        from twisted.internet import reactor
    try:
        return make_socks4_service(options.config, reactor, log_file_of(options.parent))
    except ConfigError as problem:
        raise CannotStart(f"socks4: {problem}") from problem
