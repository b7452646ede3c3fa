"""The relays that are compared, and how each is started.

Each is one process with one relaying thread (socat: one more process for each
connection; Dante: processes for each stage of a session, more when they are busy).  It
has the settings of its package except for what the workload needs: limits for the
connections, a long backlog, timeouts that never fire.

relayd logs a line for each session by default, and so do all that can, unless the
workload says that all are quiet.  The log is their standard output, which is /dev/null
for all alike.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

from attrs import frozen

from bench.children import (
    CannotMeasure,
    Child,
    child,
    cpu,
    free_port,
    memory,
    program,
)
from bench.own_relays import (
    Setup,
    relayd,
    relayd_copying,
    relayd_first,
    relayd_passing,
    relayd_pool,
    relayd_route,
    relayd_sni,
    relayd_socks4,
    relayd_thousand,
    relayd_transparent,
    relayd_watched,
    twistd_command,
)
from bench.places import HERE, Places
from bench.pythons import other_twistd
from relayd.core import settings

#: Settings of all relays: relayd's own defaults.
BACKLOG = settings.BACKLOG.default
RECEIVE_BUFFER = settings.UDP_RCVBUF.default

#: Limit of pairs for HAProxy and nginx: 8,000, and spare ones for the loads.
MAX_PAIRS = 8_500

#: HAProxy's options for splicing.
SPLICE = ("splice-request", "splice-response")

#: The module of Debian's libnginx-mod-stream.
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


#: What a relay relays, and how; see `Relay`.
Kind = Literal[
    "stream",
    "pool",
    "filtered",
    "routed",
    "transparent",
    "socks4",
    "udp",
    "transparent-udp",
]


@frozen
class Relay:
    """A relay to measure.

    :param command: writes its configuration, and returns its command line.
    :param forks: it is several processes: one for each connection, or for each kind of
        work; not measured with thousands of connections.
    :param logs: it can log each session.
    :param grows: it is measured from 10 to 8,000 connections.
    :param narrow: it is measured at requests and short sessions only: for the rest it
        is the same as another one.
    :param optional: without what it needs, it is left out, which is said.
    :param kind: what it relays: streams, to very many servers, through filters (or as
        if there were some), as a route or a server name says, from its clients'
        addresses, as a SOCKS4 proxy; or datagrams, also from its clients' addresses.
    :param checks: its servers are checked: they may get so many connections more in a
        window than it has clients.
    """

    name: str
    title: str
    command: Callable[[Setup], list[str]]
    forks: bool = False
    logs: bool = True
    grows: bool = True
    narrow: bool = False
    optional: bool = False
    kind: Kind = "stream"
    checks: int = 0

    @property
    def datagrams(self) -> bool:
        """Whether it relays datagrams, not streams."""
        return self.kind in ("udp", "transparent-udp")


@frozen
class Running:
    """A running relay."""

    relay: Relay
    child: Child
    port: int
    places: Places

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu(self.child.pid, forks=self.relay.forks)

    def memory(self) -> int:
        """Bytes of memory that it uses."""
        return memory(self.child.pid)


@contextmanager
def started(
    relay: Relay, destination: int, *, quiet: bool = False, places: Places = HERE
) -> Iterator[Running]:
    """A relay of this kind, started afresh, for the length of a block.

    :param quiet: it logs no sessions.
    """
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        port = free_port()
        place = places.relay
        setup = Setup(
            *(Path(name), port, destination, quiet), place.host, places.server.host
        )
        argv = place.runs(relay.command(setup))
        with child(relay.title, argv, Path(name)) as running:
            running.listening(port, udp=relay.datagrams)
            # The rest of its start must not count.
            time.sleep(0.2)
            yield Running(relay, running, port, places)


def _haproxy(*options: str) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        lines = [f"option {option}" for option in options]
        if not setup.quiet:
            lines += ["log stdout format raw local0", "option tcplog"]
        more = "\n  ".join(lines)
        (setup.folder / "haproxy.cfg").write_text(
            f"""\
global
  nbthread 1
  maxconn {MAX_PAIRS}
  maxpipes 100
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
  {more}
listen relay
  bind {setup.host}:{setup.port} backlog {BACKLOG}
  server origin {setup.server}:{setup.destination}
"""
        )
        return [program("haproxy"), "-db", "-f", "haproxy.cfg"]

    return command


def _nginx(setup: Setup) -> list[str]:
    return _nginx_stream(setup, f"backlog={BACKLOG}")


def _nginx_udp(setup: Setup) -> list[str]:
    return _nginx_stream(setup, f"udp rcvbuf={RECEIVE_BUFFER}")


def _nginx_stream(setup: Setup, listen: str) -> list[str]:
    if not STREAM_MODULE.exists():
        raise CannotMeasure(
            "nginx has no stream module: it is in Debian's package"
            " libnginx-mod-stream; `make system-deps` installs it"
        )
    log = "access_log off;" if setup.quiet else "access_log /dev/stdout session;"
    (setup.folder / "nginx.conf").write_text(
        f"""\
load_module {STREAM_MODULE};
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections {2 * MAX_PAIRS}; }}
stream {{
  log_format session '$remote_addr:$remote_port [$time_local] $protocol $status'
    ' $bytes_sent $bytes_received $session_time $upstream_addr';
  {log}
  server {{
    listen {setup.host}:{setup.port} {listen};
    proxy_pass {setup.server}:{setup.destination};
    proxy_timeout 1h;
  }}
}}
"""
    )
    return [
        program("nginx"),
        *("-e", "stderr", "-p", str(setup.folder), "-c", "nginx.conf"),
    ]


def _beside(file: str, setup: Setup) -> list[str]:
    """A relay in a file of this folder."""
    # -P: no imports from the file's own folder.
    return [
        *(sys.executable, "-P", str(Path(__file__).with_name(file))),
        *(str(setup.port), str(setup.destination)),
    ]


def _portforward(setup: Setup) -> list[str]:
    log = () if setup.quiet else ("--log",)
    return [*_beside("portforward.py", setup), str(BACKLOG), *log]


def _twisted_udp(setup: Setup) -> list[str]:
    return [*_beside("datagram_relay.py", setup), str(RECEIVE_BUFFER)]


def _socat(setup: Setup) -> list[str]:
    listen = f"TCP4-LISTEN:{setup.port},bind=127.0.0.1,fork,reuseaddr"
    return [
        program("socat"),
        f"{listen},backlog={BACKLOG}",
        f"TCP4:127.0.0.1:{setup.destination}",
    ]


def _dante(setup: Setup) -> list[str]:
    # Its manual has no other settings for speed: it decides itself how many processes
    # it has.  It logs a line for each session, when it ends, as relayd does.
    #
    # It connects from the port that its client connects from (see `SOURCE_PORTS` in
    # bench.loads); if that is in use, it takes one that is free on all addresses, and
    # there are few of those among thousands in TIME_WAIT: a session may then cost ten
    # times as much, or fail.  So it gets its own address, as it would on a machine of
    # its own; another one each time.
    address = f"127.1.{setup.port // 256}.{setup.port % 256}"
    to, ends = ("", "") if setup.quiet else ("logoutput: stdout", "log: disconnect")
    (setup.folder / "danted.conf").write_text(
        f"""\
{to}
internal: 127.0.0.1 port = {setup.port}
external: {address}
clientmethod: none
socksmethod: none
client pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 }}
socks pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 {ends} }}
"""
    )
    return [program("danted"), "-f", "danted.conf", "-p", "danted.pid"]


def _twistd_socks(setup: Setup) -> list[str]:
    return twistd_command(
        # It has no option to be quiet.  A publisher without observers is the cheapest
        # log.
        *(("--logger", "twisted.logger.LogPublisher") if setup.quiet else ()),
        *("socks", "--interface", "127.0.0.1", "--port", str(setup.port)),
    )


#: Figures of a measurement, by name.
Readings = dict[str, float]

#: Measures for some seconds.
Measure = Callable[[], Readings]

#: Starts a relay, and what else a measurement needs, for the length of a block; called
#: with about how many seconds a load may last.  It yields what measures, once or often.
Begin = Callable[[Relay, float], AbstractContextManager[Measure]]


def afresh(measure: Callable[[Relay, float], Readings]) -> Begin:
    """As `Begin`, with a function that starts a new relay each time."""

    @contextmanager
    def begin(relay: Relay, seconds: float) -> Iterator[Measure]:
        yield lambda: measure(relay, seconds)

    return begin


#: In the order in which they are shown.
RELAYS = {
    relay.name: relay
    for relay in (
        Relay("relayd-plane", "relayd, plane", relayd("plane")),
        Relay("relayd-twisted", "relayd, twisted", relayd("twisted")),
        Relay(
            "relayd-watched",
            "relayd, JSON+metrics",
            relayd_watched,
            narrow=True,
        ),
        Relay(
            "relayd-pool",
            "relayd, two servers",
            relayd_pool,
            narrow=True,
            # Two, every 5 s and at its start.
            checks=6,
        ),
        Relay(
            "relayd-hash",
            "relayd, client-hash, 1,000 servers",
            relayd_thousand("client-hash"),
            kind="pool",
        ),
        Relay(
            "relayd-thousand",
            "relayd, least-sessions, 1,000 servers",
            relayd_thousand("least-sessions"),
            kind="pool",
        ),
        Relay("relayd-copying", "relayd, copying", relayd_copying, kind="filtered"),
        Relay(
            "relayd-passing",
            "relayd, a filter that passes all",
            relayd_passing,
            kind="filtered",
        ),
        Relay(
            "relayd-first",
            "relayd, a filter that leaves at once",
            relayd_first,
            kind="filtered",
        ),
        Relay(
            "relayd-route",
            "relayd, a route that answers at once",
            relayd_route("at_once"),
            kind="routed",
        ),
        Relay(
            "relayd-peek",
            "relayd, a route that peeks",
            relayd_route("peeking"),
            kind="routed",
        ),
        Relay("relayd-sni", "relayd, by server name", relayd_sni, kind="routed"),
        Relay(
            "relayd-transparent",
            "relayd, transparent",
            relayd_transparent(),
            kind="transparent",
        ),
        Relay(
            "relayd-other-python",
            "relayd, other Python",
            relayd("plane", twistd=other_twistd),
            narrow=True,
            optional=True,
        ),
        Relay(
            "haproxy-splice",
            "HAProxy, splice",
            _haproxy(*SPLICE),
        ),
        Relay(
            "haproxy-smart",
            "HAProxy, splice, smart",
            _haproxy(*SPLICE, "tcp-smart-accept", "tcp-smart-connect"),
            narrow=True,
        ),
        Relay("haproxy", "HAProxy, no splice", _haproxy(), grows=False),
        Relay("nginx", "nginx stream", _nginx),
        Relay("portforward", "portforward", _portforward),
        Relay("socat", "socat", _socat, forks=True, logs=False, grows=False),
        Relay("relayd-socks4", "relayd, SOCKS4", relayd_socks4, kind="socks4"),
        Relay("dante", "Dante", _dante, forks=True, kind="socks4"),
        Relay("twistd-socks", "twistd socks", _twistd_socks, kind="socks4"),
        Relay("relayd-udp", "relayd, UDP", relayd("plane", "udp:"), kind="udp"),
        Relay(
            "relayd-udp-twisted",
            "relayd, UDP, twisted",
            relayd("twisted", "udp:"),
            kind="udp",
        ),
        Relay(
            "relayd-udp-transparent",
            "relayd, UDP, transparent",
            relayd_transparent("udp:"),
            kind="transparent-udp",
        ),
        Relay("nginx-udp", "nginx stream, UDP", _nginx_udp, kind="udp"),
        Relay("twisted-udp", "Twisted, UDP", _twisted_udp, logs=False, kind="udp"),
    )
}
