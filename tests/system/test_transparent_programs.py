"""Programs behind a relay that is their gateway: their logs say who the client is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.process import RelayProcess
from tests.system.datagrams import serving
from tests.system.gateway import (
    GATEWAY_PORT,
    PORT,
    V4,
    Addresses,
    Gateway,
    each_family,
    stopped,
)
from tests.system.programs import program, run
from tests.system.web_servers import WebServer, nginx
from tests.system.wire import at

pytestmark = pytest.mark.system

PAGE = "<!doctype html><title>A page</title><p>Relayed {number}.</p>\n"

#: A name that the name servers know, and its address.
NAME, ADDRESS = "host.test", "10.53.0.1"

#: How many pages one curl gets at once.
PAGES = 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the web servers serve."""
    path = tmp_path / "served"
    path.mkdir()
    for number in range(PAGES):
        (path / f"{number}.html").write_text(PAGE.format(number=number))
    (path / "large").write_bytes(bytes(8 << 20))
    return path


def web(family: Addresses, name: str) -> list[str]:
    """A relay of the web: to its server's address, or to where the client asks."""
    host = {"asked": family.asked, "server": family.server}[name]
    dest = at(family.server, PORT) if name == "asked" else "original"
    every = "::" if family.family == 6 else "0.0.0.0"
    listen = family.asked if name == "asked" else every
    return [
        *("-l", at(listen, GATEWAY_PORT), "-d", dest),
        *("--transparent", "--intercept", at(host, PORT)),
    ]


@contextmanager
def web_server(
    network: Gateway, family: Addresses, folder: Path
) -> Iterator[RelayProcess]:
    """`python -m http.server`, which prints a line for each request."""
    words = ("-u", "-m", "http.server", "--bind", family.server, str(PORT))
    command = network.server.runs(sys.executable, *words, "--directory", folder)
    with serving(*command, saying=r"^Serving HTTP on ") as running:
        yield running


def curl(network: Gateway, *args: str | Path) -> str:
    words = ("--silent", "--show-error", "--fail", "--max-time", "60", "--noproxy", "*")
    return run(*network.client.runs(program("curl"), *words, *args))


@each_family
@pytest.mark.parametrize("asked", ["asked", "server"])
def test_curl_and_nginx(
    network: Gateway, family: Addresses, asked: str, folder: Path, tmp_path: Path
) -> None:
    """50 pages at once, and 8 MiB; the access log has the client's address alone."""
    log = tmp_path / "access.log"
    command = nginx(tmp_path, "web", PORT, family.server, root=folder, log=log)
    server = WebServer(network.server, command, family.server, PORT)
    with server.started(), network.relaying(*web(family, asked)) as running:
        before = len(log.read_text().splitlines())
        root = f"http://{at(getattr(family, asked), PORT)}"
        curl(network, f"{root}/large", "--output", tmp_path / "large")
        assert (tmp_path / "large").read_bytes() == bytes(8 << 20)
        said = curl(
            network,
            *("--parallel", "--parallel-immediate", "--parallel-max", str(PAGES)),
            f"{root}/[0-{PAGES - 1}].html",
        )
        numbers = {int(each) for each in re.findall(r"Relayed (\d+)", said)}
        assert numbers == set(range(PAGES))
        running.ended("done", PAGES + 1)
        lines = log.read_text().splitlines()[before:]
        assert len(lines) == PAGES + 1
        assert {each.split()[0] for each in lines} == {family.client}


@each_family
def test_curl_and_http_server(
    network: Gateway, family: Addresses, folder: Path
) -> None:
    """HTTP/1.0, which says that all has come by closing."""
    with (
        web_server(network, family, folder) as server,
        network.relaying(*web(family, "asked")) as running,
    ):
        for number in range(3):
            url = f"http://{at(family.asked, PORT)}/{number}.html"
            assert curl(network, url) == PAGE.format(number=number)
        running.ended("done", 3)
        lines = server.wait_for(r'^(\S+) - - .*"GET /\d\.html HTTP/1\.1" 200', 3)
        assert {each[1] for each in lines} == {family.client}


def test_chromium(network: Gateway, folder: Path, tmp_path: Path) -> None:
    """A browser shows the page; both web servers see the machine that it is on."""
    family, log = V4, tmp_path / "access.log"
    command = nginx(tmp_path, "web", PORT, family.other, root=folder, log=log)
    nginx_there = WebServer(network.server, command, family.other, PORT)
    relays = (
        *("-l", f"0.0.0.0:{GATEWAY_PORT}", "-d", "original", "--transparent"),
        *("--intercept", at(family.server, PORT)),
        *("--intercept", at(family.other, PORT)),
    )
    with (
        web_server(network, family, folder) as server,
        nginx_there.started(),
        network.relaying(*relays) as running,
    ):
        for number, host in enumerate((family.server, family.other)):
            shown = run(
                *network.client.runs(program("chromium"), "--headless"),
                *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--no-first-run", "--no-proxy-server", "--disable-sync"),
                *("--disable-background-networking", "--disable-component-update"),
                f"--user-data-dir={tmp_path / f'profile{number}'}",
                *("--dump-dom", f"http://{at(host, PORT)}/{number}.html"),
            )
            assert f"<p>Relayed {number}.</p>" in shown
        # It has not gone past the relay.
        hosts = {each["upstream"] for each in running.ended("done", 2)}
        assert hosts == {at(each, PORT) for each in (family.server, family.other)}
        [line] = server.wait_for(r'^(\S+) - - .*"GET /0\.html HTTP/1\.1" 200')
        assert line[1] == family.client
        lines = [each for each in log.read_text().splitlines() if "/1.html" in each]
        assert {each.split()[0] for each in lines} == {family.client}


@contextmanager
def dnsmasq(
    network: Gateway, hosts: tuple[str, ...], _: Path
) -> Iterator[RelayProcess]:
    """dnsmasq at these addresses, which says who asks."""
    command = network.server.runs(
        *(program("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null"),
        *("--port=53", "--bind-interfaces", "--no-resolv", "--no-hosts", "--no-poll"),
        *("--user=root", "--pid-file=", "--log-facility=-", "--log-queries"),
        *(f"--listen-address={host}" for host in hosts),
        *("--local=/test/", f"--host-record={NAME},{ADDRESS}"),
    )
    with serving(*command, saying="started, version") as running:
        yield running


@contextmanager
def unbound(
    network: Gateway, hosts: tuple[str, ...], folder: Path
) -> Iterator[RelayProcess]:
    """unbound at these addresses, which says who asks."""
    config = folder / "unbound.conf"
    lines = [
        f'directory: "{folder}"',
        *('chroot: ""', 'username: ""', 'pidfile: ""', "use-syslog: no"),
        *(f"interface: {host}" for host in hosts),
        *("access-control: 0.0.0.0/0 allow", "access-control: ::/0 allow"),
        *("port: 53", "log-queries: yes", 'module-config: "iterator"'),
        f'local-data: "{NAME}. A {ADDRESS}"',
    ]
    config.write_text(
        "server:\n"
        + "".join(f"  {line}\n" for line in lines)
        + "remote-control:\n  control-enable: no\n"
    )
    command = network.server.runs(program("unbound"), "-d", "-p", "-c", config)
    with serving(*command, saying="start of service") as running:
        yield running


#: What each says of a question: who asks.
ASKED = {
    dnsmasq: r"query\[A\] host\.test from (\S+)",
    unbound: r"info: (\S+) host\.test\. A IN",
}

each_name_server = pytest.mark.parametrize("name_server", ASKED)


def dig(network: Gateway, host: str, *args: str) -> str:
    words = ("-r", f"@{host}", "+tries=1", "+time=5", "+short", "+notcp", *args)
    return run(*network.client.runs(program("dig"), *words, NAME, "A")).strip()


@each_family
@each_name_server
def test_dig(
    network: Gateway,
    family: Addresses,
    name_server: object,
    tmp_path: Path,
) -> None:
    """To the relay's address, and to two servers' own: it hears whom it has asked.

    The query log has the client's address.
    """
    every = "[::]" if family.family == 6 else "0.0.0.0"
    hosts = (family.server, family.other)
    relays = (
        *("-l", f"udp:{every}:{GATEWAY_PORT}", "-d", "udp:original"),
        *(word for host in hosts for word in ("--intercept", at(host, 53))),
        "--transparent",
        *("-l", f"udp:{at(family.asked, 53)}", "-d", f"udp:{at(family.server, 53)}"),
        "--transparent",
    )
    with (
        name_server(network, hosts, tmp_path) as server,  # type: ignore[operator]
        network.relaying(*relays) as running,
    ):
        for host in (family.asked, *hosts):
            # It takes no answer from elsewhere.
            assert dig(network, host) == ADDRESS
        lines = server.wait_for(ASKED[name_server], 3)  # type: ignore[index]
        assert {each[1] for each in lines} == {family.client}
        # No question has gone past the relay.
        stopped(running)
        flows = [(each["listener"], each["server"]) for each in running.flows(3)]
        assert sorted(flows) == sorted(
            (at(host, 53), at(family.server if host == family.asked else host, 53))
            for host in (family.asked, *hosts)
        )
