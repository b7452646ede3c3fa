"""What is made of an address: endpoints that listen and dial, or why there is none."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    _SystemdParser,
)
from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.python.systemd import ListenFDs

import relayd.operating.endpoints
from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    parse_destination,
    parse_listener,
)
from relayd.core.addresses import (
    address_name,
)
from relayd.core.errors import ConfigError
from relayd.core.process_settings import Transport
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from relayd.net.tls import ServerIdentity
from relayd.operating.endpoints import (
    dialing_endpoint,
    listening_endpoint,
    server_identity,
)
from relayd.plane.endpoints import (
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from tests.support.contracts import Recorder, until
from tests.support.process import Server

# -- what is made of them


@pytest.mark.parametrize(
    ("transport", "tcp", "unix"),
    [
        ("auto", PlaneTCPListenerEndpoint, PlaneUNIXListenerEndpoint),
        ("plane", PlaneTCPListenerEndpoint, PlaneUNIXListenerEndpoint),
        ("twisted", TCPListenerEndpoint, UNIXListenerEndpoint),
    ],
)
def test_a_short_form_listens_with_our_own(
    transport: Transport, tcp: type, unix: type
) -> None:
    """The listeners that wait out a full descriptor table, named as written."""
    for text, kind, where in (
        ("8080", tcp, "port 8080 of all addresses"),
        ("127.0.0.1:0", tcp, "127.0.0.1:0"),
        ("[::1]:80", tcp, "[::1]:80"),
        ("localhost:80", tcp, "localhost:80"),
        ("unix:/run/x", unix, "unix:/run/x"),
    ):
        address = parse_listener(text)
        endpoint: Any = listening_endpoint(address, reactor, transport=transport)
        assert type(endpoint) is kind
        assert IStreamServerEndpoint.providedBy(endpoint)
        assert endpoint.where == where


def test_the_plane_is_refused_where_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quietly, unless it was asked for by name."""
    address = parse_listener("8080")
    lame = Clock()
    with pytest.raises(ConfigError, match="transport plane needs Linux"):
        listening_endpoint(address, lame, transport="plane")
    assert type(listening_endpoint(address, lame)) is TCPListenerEndpoint
    monkeypatch.setattr(sys, "platform", "plan9")
    assert type(listening_endpoint(address, reactor)) is TCPListenerEndpoint
    assert type(dialing_endpoint(address, reactor)) is SocketEndpoint
    with pytest.raises(ConfigError, match="this is plan9"):
        dialing_endpoint(address, reactor, "plane")


def test_an_endpoint_string_listens_with_twisted() -> None:
    """What its own grammar describes is its own to open."""
    for text, kind in (
        ("tcp:8080:interface=127.0.0.1", TCP4ServerEndpoint),
        ("unix:/run/x.sock:mode=600", UNIXServerEndpoint),
    ):
        assert type(listening_endpoint(parse_listener(text), reactor)) is kind


@pytest.mark.parametrize(
    ("transport", "by_socket"),
    [("plane", PlaneSocketEndpoint), ("twisted", SocketEndpoint)],
)
def test_what_dials_an_address(transport: Transport, by_socket: type) -> None:
    """Addresses and names are dialled by our own sockets, the rest by Twisted's."""
    for text, kind in (
        ("8080", by_socket),
        ("127.0.0.1:80", by_socket),
        ("[::1]:80", by_socket),
        ("[::1%1]:80", by_socket),
        ("unix:/run/x", by_socket),
        ("localhost:80", NameEndpoint),
        ("example.com.:80", NameEndpoint),
        ("tcp:127.0.0.1:80", TCP4ClientEndpoint),
        ("unix:/run/x:timeout=3", UNIXClientEndpoint),
    ):
        endpoint = dialing_endpoint(parse_destination(text), reactor, transport)
        assert type(endpoint) is kind
        assert IStreamClientEndpoint.providedBy(endpoint)


def test_names_are_not_looked_up_before_they_are_dialled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that has no address yet, or another one later, is no error at start."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    dialing_endpoint(parse_destination("name.invalid:80"), reactor)
    listening_endpoint(parse_listener("name.invalid:80"), reactor)


async def reach(text: str) -> str:
    """Dial a destination, and close again; the name of what was reached."""
    protocol = Recorder()
    endpoint = dialing_endpoint(parse_destination(text), reactor)
    await endpoint.connect(Factory.forProtocol(lambda: protocol))
    name = address_name(protocol.transport.getPeer())
    protocol.transport.loseConnection()
    await until(lambda: "lost" in protocol.events)
    return name


@pytest_twisted.ensureDeferred
async def test_a_tcp_destination_is_reached() -> None:
    """Without a host it is this machine; a name is looked up when dialled."""
    with Server() as server:
        port = server.socket.getsockname()[1]
        for host in ("", ":", "127.0.0.1:", "localhost:"):
            assert await reach(f"{host}{port}") == f"127.0.0.1:{port}"


@pytest_twisted.ensureDeferred
async def test_an_ipv6_destination_is_reached() -> None:
    """Without Twisted's endpoints, which would look the address up."""
    with Server(socket.AF_INET6) as server:
        assert await reach(server.address) == server.address


@pytest_twisted.ensureDeferred
async def test_a_unix_destination_is_reached(tmp_socket: Path) -> None:
    """`unix:/path` to connect to."""
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        assert await reach(server.address) == server.address


# -- what can't be made


def unusable(make: Any, where: Address) -> str:
    """What a refusal says of an endpoint string; checks that it quotes it in a line."""
    with pytest.raises(ConfigError) as caught:
        make(where, reactor)
    message = str(caught.value)
    named = f"bad endpoint {str(where)!r}: "
    assert message.startswith(named)
    assert message.isprintable()
    return message.removeprefix(named)


def test_a_bad_server_string_is_one_line() -> None:
    """Whatever Twisted's parsers stumble over is quoted, with the reason."""
    for text, why in (
        ("tcp:", "'' is not a number"),
        ("tcp:http", "'http' is not a number"),
        ("tcp:80:nosuch=1", "it has no argument 'nosuch'"),
        (
            "TCP:80",
            (
                "Twisted can't use it (ValueError: Unknown endpoint type: 'tcp');"
                " see its manual on endpoint strings"
            ),
        ),
        ("tcp:80:a=\\", "it ends with a backslash"),
        ("unix:/s:mode=rw", "'rw' is not a number"),
        (
            "ssl:443:privateKey=/nowhere/key.pem",
            "can't read '/nowhere/key.pem': No such file or directory",
        ),
        (
            f"ssl:443:privateKey={__file__}",
            "its PEM files are not a certificate with its key (unsupported)",
        ),
        (
            "systemd:domain=INET",
            (
                "Twisted can't use it (ValueError: Specify exactly one of descriptor"
                " index or name); see its manual on endpoint strings"
            ),
        ),
    ):
        assert unusable(listening_endpoint, parse_listener(text)) == why


def test_a_socket_that_systemd_has_not_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line counts those that it has, and says how it is done."""
    for passed, counted in (
        ([], "0 sockets"),
        ([9], "1 socket"),
        ([8, 9], "2 sockets"),
    ):
        names = [f"name{number}" for number in passed]
        monkeypatch.setattr(_SystemdParser, "_sddaemon", ListenFDs(passed, names))
        for text in (
            "systemd:domain=INET:index=2",
            "systemd:domain=INET:name=web",
            "SystemD:domain=UNIX:index=2",
        ):
            assert unusable(listening_endpoint, parse_listener(text)) == (
                f"systemd has passed {counted} to this process (LISTEN_FDS,"
                " LISTEN_FDNAMES), and this is none of them: let its .socket unit"
                " start it"
            )


def test_a_folder_without_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twisted, from its release 26 on, would serve nobody, and tell each client so."""
    monkeypatch.setattr(
        relayd.operating.endpoints, "serverFromString", lambda _, text: text
    )
    for folder in (tmp_path, tmp_path / "none"):
        for text in (f"tls:{folder}:443", f"TLS:port=443:path={folder}"):
            assert unusable(listening_endpoint, EndpointString(text)) == (
                f"there is no .pem file in the folder {str(folder)!r}, which should"
                " have certificates and their keys"
            )
    (tmp_path / "one.pem").touch()
    listening_endpoint(EndpointString(f"tls:{tmp_path}:443"), reactor)


def test_a_bad_client_string_is_one_line() -> None:
    """The same for those that connect."""
    for text, why in (
        ("tcp:80", "it lacks 'port'"),
        ("tcp:host=a:port=b", "'b' is not a number"),
        ("tcp:a:80:timeout=x", "'x' is not a number"),
        ("tls:example.com", "it lacks 'port'"),
        ("tls:example.com:https", "'https' is not a number"),
        (
            "tls:a:443:trustRoots=/nowhere",
            "'/nowhere' is not a folder that can be read; it should have .pem files",
        ),
        (
            "ssl:a:443:caCertsDir=/nowhere",
            "'/nowhere' is not a folder that can be read; it should have .pem files",
        ),
        (
            "tls:a:443:certificate=/nowhere",
            "can't read '/nowhere': No such file or directory",
        ),
        (
            r"tls:\:\:1:443",
            (
                r"Twisted dials no IPv6 address of its own accord: add"
                r" :endpoint=tcp\:\\\:\\\:1\:443"
            ),
        ),
    ):
        assert unusable(dialing_endpoint, parse_destination(text)) == why


def test_the_name_of_a_servers_certificate() -> None:
    """The host of `tls:`, whatever is dialled; and what `ssl:` is told."""
    for text, name in (
        ("tls:example.com:443", "example.com"),
        ("TLS:example.com:443", "example.com"),
        ("tls:host=example.com:port=443", "example.com"),
        ("tls:port=443:host=example.com", "example.com"),
        ("tls:192.0.2.1:443", "192.0.2.1"),
        (r"tls:ex\ample.com:443", "example.com"),
        ("tls:bücher.example:443", "bücher.example"),
        (r"tls:a:443:endpoint=tcp\:b\:443", "a"),
        (r"tls:\:\:1:443:endpoint=tcp\:\\\:\\\:1\:443", "::1"),
        ("ssl:a:443:hostname=b", "b"),
        ("SSL:host=a:port=443:hostname=b", "b"),
        ("ssl:a:443", None),
        ("tcp:a:443", None),
        ("unix:/tls:timeout=3", None),
        ("a:443", None),
        ("unix:/run/x", None),
    ):
        where = parse_destination(text)
        dialing_endpoint(where, reactor)
        identity = None if name is None else ServerIdentity(name, alone=True)
        assert server_identity(where) == identity


def test_a_client_string_with_an_impossible_port_is_one_line() -> None:
    """Twisted would find out when it dials, for every session anew."""
    for text in ("tcp:example.com:0", "tcp:h:99999", "tcp:h:-1", "tls:example.com:0"):
        port = text.rpartition(":")[2]
        with pytest.raises(ConfigError) as caught:
            dialing_endpoint(parse_destination(text), reactor)
        assert str(caught.value) == (
            f"bad endpoint {text!r}: a port here is 1 to 65535, not {port}"
        )


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (OSError("first line\n  second line"), "(OSError: first line second line)"),
        (KeyError(), "(KeyError: KeyError)"),
        (IndexError("nothing of systemd's"), "(IndexError: nothing of systemd's)"),
    ],
)
def test_a_parser_may_raise_anything(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, says: str
) -> None:
    """Several lines become one; an error without words is named by its kind."""

    def stumble(*_: Any) -> Any:
        raise problem

    monkeypatch.setattr(relayd.operating.endpoints, "serverFromString", stumble)
    monkeypatch.setattr(relayd.operating.endpoints, "clientFromString", stumble)
    for make in (listening_endpoint, dialing_endpoint):
        assert says in unusable(make, EndpointString("x:y"))


def test_an_unknown_interface_is_one_line() -> None:
    """`%eth7` on a machine without eth7: an error of the settings, which names it."""
    where = parse_destination("[fe80::1%no-such-if]:80")
    with pytest.raises(ConfigError, match="fe80::1%no-such-if"):
        dialing_endpoint(where, reactor)
