"""The servers that the relays connect to: nginx for HTTP, iperf3 for bulk.

Each measurement has its own server on its own port, so that it has no earlier
connections in TIME_WAIT, and its own counters.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, child, free_port, program
from bench.places import HERE, Place

#: The body of every HTTP response.
BODY = b"0123456789abcdef0123456789abcdef"

#: The name in the certificate of a server with TLS.
NAME = "origin.example"

_STATUS = re.compile(
    rb"Active connections: (\d+) \nserver accepts handled requests\n (\d+) \d+ (\d+) "
)


@frozen
class Counts:
    """The counters of an HTTP server, without the requests for them."""

    #: Connections that are open now.
    open: int
    #: Connections that it has accepted.
    accepted: int
    #: Requests that it has read.
    requests: int


class Site:
    """An HTTP server with counters.

    :ivar port: where it speaks HTTP.
    :ivar tls_port: where it speaks HTTP over TLS; 0: nowhere.
    :ivar certificate: by which clients know it there.
    """

    def __init__(
        self, port: int, tls_port: int, certificate: Path, place: Place
    ) -> None:
        self.port, self.tls_port, self.certificate = port, tls_port, certificate
        self._status_requests = 0
        with place.inside():
            self._connection = socket.create_connection((place.host, port), 10)

    def counts(self) -> Counts:
        """Its present counters."""
        self._connection.sendall(b"GET /counts HTTP/1.1\r\nHost: origin\r\n\r\n")
        text = b""
        while b"Waiting: " not in text or not text.endswith(b"\n"):
            part = self._connection.recv(65536)
            if not part:
                raise CannotMeasure("the HTTP server ended")
            text += part
        found = _STATUS.search(text)
        if found is None:
            raise CannotMeasure(f"the HTTP server's counts are unreadable: {text!r}")
        self._status_requests += 1
        active, accepted, requests = map(int, found.groups())
        return Counts(active - 1, accepted - 1, requests - self._status_requests)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def site(*, tls: bool = False, place: Place = HERE.server) -> Iterator[Site]:
    """An HTTP server for the length of a block.

    :param place: where it runs.
    :param tls: it speaks TLS at another port, too.
    """
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        port = free_port()
        tls_port, secure = 0, ""
        if tls:
            tls_port = free_port()
            _make_certificate(folder)
            secure = f"""
    listen {place.host}:{tls_port} ssl backlog=4096;
    ssl_certificate cert.pem;
    ssl_certificate_key key.pem;"""
        folders = "".join(
            f"  {kind}_temp_path {kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"""\
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 9000; multi_accept on; }}
http {{
{folders}
  access_log off;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
  server {{
    listen {place.host}:{port} backlog=4096;{secure}
    location / {{ return 200 {BODY.decode()}; }}
    location /counts {{ stub_status; }}
    location /client {{ return 200 $remote_addr; }}
  }}
}}
"""
        )
        argv = [program("nginx"), "-e", "stderr", "-p", name, "-c", "nginx.conf"]
        with child("the HTTP server", place.runs(argv), folder) as running:
            running.listening(port, *filter(None, [tls_port]))
            serving = Site(port, tls_port, folder / "cert.pem", place)
            try:
                yield serving
            finally:
                serving.close()


def _make_certificate(folder: Path) -> None:
    """Write `cert.pem` and `key.pem`: a certificate for `NAME` that its key signs."""
    argv = [
        *(program("openssl"), "req", "-x509", "-nodes", "-days", "2"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
        *("-keyout", "key.pem", "-out", "cert.pem"),
    ]
    with child("openssl", argv, folder, read=True) as running:
        running.output(PATIENCE)


@contextmanager
def sink() -> Iterator[int]:
    """An iperf3 server for one test after the other; its port."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        port = free_port()
        argv = [program("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port)]
        with child("the iperf3 server", argv, Path(name)) as running:
            running.listening(port)
            yield port
