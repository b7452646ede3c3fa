"""nginx and HAProxy as web servers that say their names."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tests.support.process import RelayProcess, eventually
from tests.system.datagrams import serving
from tests.system.namespaces import Machine
from tests.system.programs import program

NGINX = """
daemon off;
master_process off;
error_log stderr;
pid {folder}/pid;
events {{}}
http {{
  access_log {log};
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen {host}:{port} {listen};
    keepalive_timeout 0;
    location / {{ {answer}; }}
  }}
}}
"""

HAPROXY = """
global
  nbthread 1
defaults
  mode http
  timeout client 30s
frontend all
  bind {host}:{port}
  http-request return status 200 content-type text/plain string {name}
"""


def nginx(
    folder: Path,
    name: str,
    port: int,
    host: str = "127.0.0.1",
    listen: str = "",
    *,
    root: Path | None = None,
    log: Path | str = "off",
) -> tuple[str | Path, ...]:
    """The command of an nginx that says its name.

    :param listen: further parameters of its `listen`.
    :param root: it serves the files of this folder instead.
    :param log: the file in which it notes each request.
    """
    own = folder / name
    own.mkdir(exist_ok=True)
    config = own / "nginx.conf"
    words = {
        "port": port,
        "host": f"[{host}]" if ":" in host else host,
        "listen": listen,
        "answer": f"root {root}" if root else f'return 200 "{name}"',
        "log": log,
    }
    config.write_text(NGINX.format(folder=own, **words))
    return program("nginx"), "-c", config, "-p", own


def haproxy(
    folder: Path, name: str, port: int, host: str = "127.0.0.1"
) -> tuple[str | Path, ...]:
    """The same of HAProxy."""
    config = folder / f"{name}.cfg"
    config.write_text(HAPROXY.format(port=port, name=name, host=host))
    return program("haproxy"), "-db", "-f", config


@attrs.define
class WebServer:
    """One of them on a machine, which can be started again.

    :param command: see :func:`nginx`.
    """

    machine: Machine
    command: tuple[str | Path, ...]
    host: str
    port: int
    process: RelayProcess | None = None

    def listens(self) -> bool:
        """Whether its port takes connections.

        What /proc/net says is kept by the kernel, for a process, from one namespace to
        the other.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with self.machine.inside(), socket.socket(family) as client:
            return client.connect_ex((self.host, self.port)) == 0

    @contextmanager
    def started(self) -> Iterator[None]:
        """It serves, for the length of a block, or until it is stopped."""
        with serving(*self.machine.runs(*self.command)) as self.process:
            eventually(self.listens, "it listens")
            yield

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.signal(number)

    def stop(self) -> None:
        """Kill it, and wait until it is gone."""
        assert self.process is not None
        self.process.signal(signal.SIGKILL)
        self.process.wait()
