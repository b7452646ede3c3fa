"""PROXY headers, between relayd and the programs that have them.

HAProxy, nginx and curl say who their clients are, and relayd reads it; relayd says it,
and HAProxy, nginx and dnsdist read it.  All of them are on 127.0.0.0/8, where each may
have an address of its own: what one program says of another is told apart from where
the bytes come from.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.process import (
    RelayProcess,
    Server,
    eventually,
    read_all,
    read_exactly,
    relay,
)
from tests.system.datagrams import serving
from tests.system.programs import http_server, listens, program, run

pytestmark = pytest.mark.system

#: Where clients connect from.
CLIENT = "127.0.0.9"

HAPROXY = """
defaults
  mode {mode}
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend all
  bind 127.0.0.1:{port}{accept}
  {more}
"""

NGINX = """
daemon off;
{modules}
worker_processes 1;
error_log stderr;
pid {folder}/pid;
events {{}}
{kind} {{
  access_log off;
  {temporary}
  server {{
    {more}
  }}
}}
"""

TEMPORARY = "".join(
    f"{kind}_temp_path {{folder}}/{kind};"
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)

STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"


@contextmanager
def haproxy(folder: Path, mode: str, more: str, accept: str = "") -> Iterator[int]:
    """HAProxy on a port of 127.0.0.1."""
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(mode=mode, port=port, accept=accept, more=more))
    with serving(program("haproxy"), "-db", "-f", config):
        eventually(lambda: listens(port), "HAProxy listens")
        yield port


@contextmanager
def nginx(folder: Path, kind: str, more: str) -> Iterator[int]:
    """nginx on a port of 127.0.0.1, which is `{port}` in what it is told."""
    port = free_port()
    config = folder / "nginx.conf"
    loaded = kind == "stream" and Path(STREAM_MODULE).exists()
    config.write_text(
        NGINX.format(
            folder=folder,
            kind=kind,
            modules=f"load_module {STREAM_MODULE};" if loaded else "",
            temporary=TEMPORARY.format(folder=folder) if kind == "http" else "",
            more=more.format(port=port),
        )
    )
    with serving(program("nginx"), "-c", config, "-p", folder):
        eventually(lambda: listens(port), "nginx listens")
        yield port


def client_of(port: int) -> socket.socket:
    """A client from CLIENT."""
    return socket.create_connection(("127.0.0.1", port), 30, (CLIENT, 0))


@contextmanager
def behind(server: Server) -> Iterator[RelayProcess]:
    """A relay whose clients come by a balancer."""
    options = ("-l", "127.0.0.1:0", "--accept-proxy", "127.0.0.1")
    with relay(*options, "-d", server.address) as running:
        yield running


def check_named(running: RelayProcess, server: Server, port: int) -> dict[str, str]:
    """A client that connects to a balancer is the relay's client.

    :param port: the balancer's.
    :return: what the relay's log says.
    """
    with client_of(port) as client:
        name = f"{CLIENT}:{client.getsockname()[1]}"
        client.sendall(b"question")
        with server.accept() as upstream:
            assert read_exactly(upstream, 8) == b"question"
            upstream.sendall(b"answer")
        assert read_all(client) == b"answer"
    [line] = running.sessions()
    assert line["client"] == name
    assert line["peer"].startswith("127.0.0.1:")
    assert (line["up"], line["down"]) == ("8", "6")
    return line


@pytest.mark.parametrize(
    "how",
    [
        "send-proxy",
        "send-proxy-v2",
        "send-proxy-v2 proxy-v2-options crc32c,unique-id",
    ],
)
def test_haproxy_names_its_clients(tmp_path: Path, how: str) -> None:
    with Server() as server, behind(server) as running:
        more = (
            "unique-id-format id-%pid\n  default_backend relay\n"
            f"backend relay\n  server relay 127.0.0.1:{running.port} {how}"
        )
        with haproxy(tmp_path, "tcp", more) as port:
            line = check_named(running, server, port)
        if "unique-id" in how:
            assert re.fullmatch(r"id-\d+", line["unique_id"])


def said_to(server: Server) -> bytes:
    """What the next client says, at most four bytes; empty if it just leaves."""
    with server.accept() as upstream:
        try:
            return upstream.recv(4)
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
def test_haproxy_checks_leave_no_line(tmp_path: Path, how: str) -> None:
    """It says that they are its own; the server behind the relay is asked."""
    with Server() as server, behind(server) as running:
        more = (
            "default_backend relay\nbackend relay\n  server relay"
            f" 127.0.0.1:{running.port} {how} check check-send-proxy inter 100ms"
        )
        with haproxy(tmp_path, "tcp", more) as port:
            checks = [said_to(server) for _ in range(3)]
            assert checks == [b""] * 3
            with client_of(port) as client:
                client.sendall(b"data")
                while said_to(server) != b"data":
                    pass
        [line] = running.sessions()
        assert line["client"].startswith(f"{CLIENT}:")


def test_nginx_names_its_clients(tmp_path: Path) -> None:
    with Server() as server, behind(server) as running:
        more = (
            "listen 127.0.0.1:{port}; proxy_protocol on;"
            f" proxy_pass 127.0.0.1:{running.port};"
        )
        with nginx(tmp_path, "stream", more) as port:
            check_named(running, server, port)


def test_curl_names_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    options = ("-l", "127.0.0.1:0", "--accept-proxy", CLIENT)
    with (
        http_server(tmp_path) as server,
        relay(*options, "-d", server.address) as running,
    ):
        curl = (
            *(program("curl"), "--disable", "--noproxy", "*", "--silent", "--fail"),
            *("--interface", CLIENT, f"http://127.0.0.1:{running.port}/file"),
        )
        assert run(*curl, "--haproxy-protocol") == "content"
        [line] = running.ended("done")
        assert line["client"].startswith(f"{CLIENT}:")
        # A header that was not announced is a request that no server understands, and
        # the other way round.
        done = os.spawnv(os.P_WAIT, curl[0], list(curl))
        assert done != 0
        running.ended("bad_request")


# -- told to servers

#: How HAProxy, and nginx, answer every request: with what they were told.
TELL_HAPROXY = (
    "http-request return status 200 content-type text/plain"
    ' lf-string "%[src]:%[src_port] %[dst]:%[dst_port]"'
)
TELL_NGINX = (
    "listen 127.0.0.1:{port} proxy_protocol; location / {{ return 200"
    ' "$proxy_protocol_addr:$proxy_protocol_port'
    ' $proxy_protocol_server_addr:$proxy_protocol_server_port"; }}'
)


REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def telling(folder: Path, name: str) -> AbstractContextManager[int]:
    """A web server, by name, that answers with what it was told."""
    if name == "haproxy":
        return haproxy(folder, "http", TELL_HAPROXY, " accept-proxy")
    return nginx(folder, "http", TELL_NGINX)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("behind_it", ["haproxy", "nginx"])
def test_a_web_server_is_told(tmp_path: Path, version: str, behind_it: str) -> None:
    with telling(tmp_path, behind_it) as port:
        options = ("-l", "127.0.0.1:0", "--send-proxy", version)
        with relay(*options, "-d", f"127.0.0.1:{port}") as running:
            with client_of(running.port) as client:
                here = f"{CLIENT}:{client.getsockname()[1]}"
                client.sendall(REQUEST)
                answer = read_all(client).decode()
            assert answer.startswith("HTTP/1.1 200")
            assert answer.endswith(f"\r\n\r\n{here} 127.0.0.1:{running.port}")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("behind_it", ["haproxy", "nginx"])
def test_a_client_without_an_address_is_served(
    tmp_path: Path, version: str, behind_it: str
) -> None:
    """There is nothing to tell of a UNIX socket's, and no server may refuse that."""
    path = str(tmp_path / "relay")
    with telling(tmp_path, behind_it) as port:
        options = ("-l", f"unix:{path}", "--send-proxy", version)
        with (
            relay(*options, "-d", f"127.0.0.1:{port}"),
            socket.socket(socket.AF_UNIX) as client,
        ):
            client.connect(path)
            client.sendall(REQUEST)
            assert read_all(client).startswith(b"HTTP/1.1 200")


DNSDIST = """
setLocal("127.0.0.1:{port}")
setACL("127.0.0.0/8")
setProxyProtocolACL("127.0.0.1/32")
addAction(NetmaskGroupRule(newNMG_of("{client}/32")), SpoofAction("192.0.2.9"))
addAction(AllRule(), SpoofAction("192.0.2.1"))
"""


def test_dnsdist_is_told_with_each_datagram(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "dnsdist.conf"
    group = "function newNMG_of(each) local n = newNMG() n:addMask(each) return n end"
    config.write_text(group + DNSDIST.format(port=port, client=CLIENT))
    dig = program("dig")
    with serving(
        *(program("dnsdist"), "--supervised", "--disable-syslog", "-C", config),
        port=port,
    ):
        options = ("-l", "udp:127.0.0.1:0", "--send-proxy", "v2")
        with relay(*options, "-d", f"udp:127.0.0.1:{port}") as running:
            for source, address in ((CLIENT, "192.0.2.9"), ("127.0.0.8", "192.0.2.1")):
                asked = (
                    *(dig, "+short", "+tries=1", "-b", source),
                    *("@127.0.0.1", "-p", str(running.port), "a.example"),
                )
                for _ in range(2):
                    assert run(*asked).strip() == address
