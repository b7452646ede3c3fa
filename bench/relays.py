"""The relays that are compared, and how each is started.

Each is one process with one relaying thread (socat: one more process for each
connection; Dante: processes for each stage of a session, more when they are busy).  It
has the settings of its package except for what the workload needs: limits for the
connections, a long backlog, timeouts that never fire.  Whether it logs a line for each
session is the measurement's choice; the log goes to /dev/null.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from attrs import frozen

from bench.children import (
    CannotMeasure,
    Child,
    beside_python,
    child,
    cpu,
    free_port,
    memory,
    program,
)
from relayd.core import settings

#: Settings of all relays: relayd's own defaults.
BACKLOG = settings.BACKLOG.default
RECEIVE_BUFFER = settings.UDP_RCVBUF.default

#: Limit of pairs for HAProxy and nginx: 8,000, and spare ones for the loads.
MAX_PAIRS = 8_500

#: The module of Debian's libnginx-mod-stream.
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


@frozen
class Setup:
    """The settings of a relay."""

    #: For its configuration.
    folder: Path
    #: Where it listens, on 127.0.0.1.
    port: int
    #: The server's port, on 127.0.0.1.  A proxy's clients choose it.
    destination: int
    #: Whether it logs each session.
    logs: bool


@frozen
class Relay:
    """A relay to measure.

    :param command: writes its configuration, and returns its command line.
    :param forks: it is several processes: one for each connection, or for each kind of
        work; not measured with thousands of connections.
    :param logs: it can log each session.
    :param grows: it is measured from 10 to 8,000 connections.
    :param kind: what it relays: streams, streams as a SOCKS4 proxy, or datagrams.
    """

    name: str
    title: str
    command: Callable[[Setup], list[str]]
    forks: bool = False
    logs: bool = True
    grows: bool = True
    kind: Literal["stream", "socks4", "udp"] = "stream"


@frozen
class Running:
    """A running relay."""

    relay: Relay
    child: Child
    port: int

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu(self.child.pid, forks=self.relay.forks)

    def memory(self) -> int:
        """Bytes of memory that it uses."""
        return memory(self.child.pid)


@contextmanager
def started(relay: Relay, destination: int, *, logs: bool = False) -> Iterator[Running]:
    """A relay of this kind, started afresh, for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        port = free_port()
        argv = relay.command(Setup(Path(name), port, destination, logs))
        with child(relay.title, argv, Path(name)) as running:
            running.listening(port, udp=relay.kind == "udp")
            # The rest of its start must not count.
            time.sleep(0.2)
            yield Running(relay, running, port)


def _twistd(*words: str) -> list[str]:
    return [beside_python("twistd"), "-n", "--pidfile=", "--reactor=epoll", *words]


def _relayd(transport: str, scheme: str = "") -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        return _twistd(
            "relayd",
            *("--transport", transport),
            *(() if setup.logs else ("--quiet",)),
            *("--listen", f"{scheme}127.0.0.1:{setup.port}"),
            *("--dest", f"{scheme}127.0.0.1:{setup.destination}"),
        )

    return command


def _haproxy(splice: str) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        log = "log stdout format raw local0\n  option tcplog" if setup.logs else ""
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
  {splice}
  {log}
listen relay
  bind 127.0.0.1:{setup.port} backlog {BACKLOG}
  server origin 127.0.0.1:{setup.destination}
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
    log = "access_log /dev/stdout session;" if setup.logs else "access_log off;"
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
    listen 127.0.0.1:{setup.port} {listen};
    proxy_pass 127.0.0.1:{setup.destination};
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
    log = ("--log",) if setup.logs else ()
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


def _relayd_socks4(setup: Setup) -> list[str]:
    return _twistd(
        "socks4",
        *("--transport", "plane", "--quiet"),
        *("--listen", f"127.0.0.1:{setup.port}"),
    )


def _dante(setup: Setup) -> list[str]:
    # Its manual has no other settings for speed: it decides itself how many processes
    # it has.  Nothing is logged unless a destination is set.
    #
    # It connects from the port that its client connects from (see `SOURCE_PORTS` in
    # bench.loads); if that is in use, it takes one that is free on all addresses, and
    # there are few of those among thousands in TIME_WAIT: a session may then cost ten
    # times as much, or fail.  So it gets its own address, as it would on a machine of
    # its own; another one each time.
    address = f"127.1.{setup.port // 256}.{setup.port % 256}"
    (setup.folder / "danted.conf").write_text(
        f"""\
internal: 127.0.0.1 port = {setup.port}
external: {address}
clientmethod: none
socksmethod: none
client pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 }}
socks pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 }}
"""
    )
    return [program("danted"), "-f", "danted.conf", "-p", "danted.pid"]


def _twistd_socks(setup: Setup) -> list[str]:
    return _twistd(
        # It always logs a line for each session.  A publisher without observers is
        # the cheapest log.
        *("--logger", "twisted.logger.LogPublisher"),
        *("socks", "--interface", "127.0.0.1", "--port", str(setup.port)),
    )


#: In the order in which they are shown.
RELAYS = {
    relay.name: relay
    for relay in (
        Relay("relayd-plane", "relayd, plane", _relayd("plane")),
        Relay("relayd-twisted", "relayd, twisted", _relayd("twisted")),
        Relay(
            "haproxy-splice",
            "HAProxy, splice",
            _haproxy("option splice-request\n  option splice-response"),
        ),
        Relay("haproxy", "HAProxy, no splice", _haproxy(""), grows=False),
        Relay("nginx", "nginx stream", _nginx),
        Relay("portforward", "portforward", _portforward),
        Relay("socat", "socat", _socat, forks=True, logs=False, grows=False),
        Relay("relayd-socks4", "relayd, SOCKS4", _relayd_socks4, kind="socks4"),
        Relay("dante", "Dante", _dante, forks=True, kind="socks4"),
        Relay("twistd-socks", "twistd socks", _twistd_socks, kind="socks4"),
        Relay("relayd-udp", "relayd, UDP", _relayd("plane", "udp:"), kind="udp"),
        Relay(
            "relayd-udp-twisted",
            "relayd, UDP, twisted",
            _relayd("twisted", "udp:"),
            kind="udp",
        ),
        Relay("nginx-udp", "nginx stream, UDP", _nginx_udp, kind="udp"),
        Relay("twisted-udp", "Twisted, UDP", _twisted_udp, logs=False, kind="udp"),
    )
}
