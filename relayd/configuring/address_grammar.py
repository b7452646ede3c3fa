"""Parses the addresses to listen on and to connect to.

An address is a short form:

    8080  :8080                      a port
    127.0.0.1:8080  [::1]:8080       an address and a port
    localhost:8080                   a name and a port
    unix:/run/x.sock                 a UNIX socket
    udp:53  udp:127.0.0.1:53         datagrams, by port or address and port
    systemd:web  udp:systemd:dns     a listener: the sockets with this name that systemd
                                     has passed on (:mod:`relayd.net.activation`)

    original  udp:original           a destination: where the client meant to go
    10.0.0.5:original                a destination: that host, and the port that the
                                     client meant (`udp:` as well)

    5000-5100  10.0.0.5:5000-5100    each of these ports (`udp:` as well)

or any Twisted endpoint string (`tcp:8080:interface=127.0.0.1`, `tls:…`,
`systemd:…`), which Twisted parses.

A short-form listener without a host listens on all addresses, IPv4 and IPv6;
`[::]` is IPv6 only and `0.0.0.0` IPv4 only.  A short-form destination without
a host is this machine, 127.0.0.1; so is `0.0.0.0`, and `[::]` is `[::1]`.  Names are
looked up when they are dialled, each time.

Multicast groups and broadcast addresses are neither listened on nor dialled.

A destination may be a name that stands for several servers, and have options:
:mod:`relayd.configuring.server_grammar`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import attrs

from relayd.configuring.endpoint_strings import has_proxy_header, passed_name
from relayd.configuring.hosts import ipv6_host, is_ipv6, named_host
from relayd.configuring.server_options import PLAIN, ServerOptions
from relayd.core.errors import ConfigError
from relayd.core.names import ORIGINAL, host_port, is_name, name_of_original
from relayd.core.networks import unmapped

#: Endpoint types that Twisted parses itself, without a plugin.
_BUILT_IN = frozenset({"tcp", "ssl", "unix"})

DIGITS = re.compile(r"[0-9]+")

#: What the type of an endpoint string looks like: no address does.
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*")

#: What one of two parsers makes of a text.
SomeAddress = TypeVar("SomeAddress")

#: Returns the types of endpoint strings that are known.
_Known = Callable[[], frozenset[str]]

_EXPECTED = (
    "expected a port, host:port, [ipv6]:port, unix:/path or a Twisted endpoint string"
)

#: sockaddr_un holds 108 bytes on Linux, the last of them NUL; others less.
_UNIX_PATH_LIMIT = 107


@attrs.frozen
class HostPort:
    """A short form with a port; `host` is None if none was written.

    :ivar options: of a destination, as of all others: what is said of the server.
    """

    host: str | None
    port: int
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        return host_port(self.host, self.port) if self.host else f":{self.port}"


@attrs.frozen
class UnixPath:
    """The short form `unix:/path`."""

    path: str
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class UdpAddress:
    """The short form `udp:` with a host and a port, or a port.

    :ivar passed: of a listener, the name of the sockets that systemd has passed on,
        instead of a host and a port.
    """

    host: str | None
    port: int
    passed: str = ""
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        if self.passed:
            return f"udp:systemd:{self.passed}"
        return "udp:" + (
            host_port(self.host, self.port) if self.host else f"{self.port}"
        )


@attrs.frozen
class EndpointString:
    """A string in Twisted's own grammar."""

    text: str
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        return self.text


@attrs.frozen
class OriginalAddress:
    """A destination that the client itself names: where it meant to go.

    :ivar host: a host to which all of them go, on the port that each of them meant;
        None: to the address that each of them meant.
    :ivar udp: it is one of datagrams.
    """

    host: str | None = None
    udp: bool = False
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        where = name_of_original(self.host)
        return f"udp:{where}" if self.udp else where


StreamAddress = HostPort | UnixPath | EndpointString
Address = StreamAddress | UdpAddress

#: Where a server may be, of connections and of datagrams.
StreamServer = StreamAddress | OriginalAddress
DatagramServer = UdpAddress | OriginalAddress


@attrs.frozen
class PortRange:
    """A short form with several ports.

    :ivar first: that with the first port.
    :ivar last: the last port.
    """

    first: HostPort | UdpAddress
    last: int

    def __len__(self) -> int:
        return self.last - self.first.port + 1

    def __getitem__(self, number: int) -> HostPort | UdpAddress:
        """The address of one port, from 0 up."""
        return attrs.evolve(self.first, port=self.first.port + number)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


_RANGE = re.compile(r"(.*?)([0-9]+)-([0-9]+)")


def parse_range(
    text: str, parse: Callable[[str], SomeAddress]
) -> SomeAddress | PortRange:
    """Parse an address that may have several ports.

    :param parse: of one with one port: `parse_listener`, or `parse_destination`.
    :raises ConfigError: `text` is not an address, or not a range of ports.
    """
    match = _RANGE.fullmatch(text)
    if match is None or (match[1] and not match[1].endswith(":")):
        return parse(text)
    before, low, high = match.groups()
    first, last = (_port_of_range(text, before + port, parse) for port in (low, high))
    if not isinstance(first, HostPort | UdpAddress):
        return parse(text)
    if not isinstance(last, type(first)):
        return parse(text)
    if not 0 < first.port < last.port:
        raise ConfigError(
            f"bad address {text!r}: expected a range of ports such as 5000-5100"
        )
    return PortRange(first, last.port)


def _port_of_range(
    text: str, port: str, parse: Callable[[str], SomeAddress]
) -> SomeAddress:
    """The first or the last address of a range; an error quotes the whole."""
    try:
        return parse(port)
    except ConfigError as problem:
        why = str(problem).removeprefix(f"bad address {port!r}: ")
        raise ConfigError(f"bad address {text!r}: {why}") from None


def parse_listener(text: str) -> Address:
    """Parse the address of a listener.

    :raises ConfigError: `text` is not an address; the message quotes it.
    """
    if text.removeprefix("udp:") == ORIGINAL or text.endswith(f":{ORIGINAL}"):
        raise ConfigError(
            f"bad address {text!r}: {ORIGINAL} is where clients meant to go, a"
            " destination: give a listener its port"
        )
    where = _parse(text, _listening_types, lowest_port=0)
    if isinstance(where, EndpointString) and has_proxy_header(text):
        raise ConfigError(
            f"bad address {text!r}: haproxy: is not supported; write the listener that"
            " is in it, and give --accept-proxy (in a file: accept_proxy) with the"
            " balancer's network"
        )
    return where


def parse_destination(text: str) -> Address | OriginalAddress:
    """Parse the address of a server.

    :raises ConfigError: `text` is not an address; the message quotes it.
    """
    udp, rest = text.startswith("udp:"), text.removeprefix("udp:")
    if rest != ORIGINAL and not rest.endswith(f":{ORIGINAL}"):
        return _parse(text, _dialling_types, lowest_port=1)
    return _parse_original(text, rest.removesuffix(ORIGINAL), udp)


def _parse_original(text: str, host: str, udp: bool) -> Address | OriginalAddress:
    """A destination that ends with `original`, or an endpoint string that does.

    :param host: what stands before that word.
    """
    if not host:
        return OriginalAddress(udp=udp)
    inner = host.removesuffix(":")
    if inner.startswith("[") and inner.endswith("]"):
        return OriginalAddress(ipv6_host(inner[1:-1], text), udp)
    # As with any port, but in what an error quotes.
    port = "1"
    try:
        where = _parse(host + port, _dialling_types, lowest_port=1)
    except ConfigError as problem:
        why = str(problem).removeprefix(f"bad address {host + port!r}: ")
        raise ConfigError(f"bad address {text!r}: {why}") from None
    if not isinstance(where, HostPort):
        return _parse(text, _dialling_types, lowest_port=1)
    if where.host is None:
        raise ConfigError(
            f"bad address {text!r}: write {ORIGINAL} alone, or a host before it"
        )
    if udp and is_name(where.host):
        raise ConfigError(
            f"bad address {text!r}: write the address of the host: names are not looked"
            " up for each datagram"
        )
    return OriginalAddress(where.host, udp)


def _listening_types() -> frozenset[str]:
    from twisted.internet.interfaces import IStreamServerEndpointStringParser

    return _types(IStreamServerEndpointStringParser)


def _dialling_types() -> frozenset[str]:
    from twisted.internet.interfaces import IStreamClientEndpointStringParserWithReactor

    return _types(IStreamClientEndpointStringParserWithReactor)


# Asking takes half a millisecond, and a file may have a thousand relays.  What is asked
# takes a tenth of a second to import, and most files have short forms only.
@lru_cache(maxsize=2)
def _types(parsers: Any) -> frozenset[str]:
    """The types of endpoint strings that Twisted and its plugins know."""
    from twisted.plugin import getPlugins

    return _BUILT_IN | {plugin.prefix.lower() for plugin in getPlugins(parsers)}


def _parse(text: str, known: _Known, lowest_port: int) -> Address:
    if not text or text != text.strip() or not text.isprintable():
        raise ConfigError(f"bad address {text!r}: {_EXPECTED}")
    scheme, colon, rest = text.partition(":")
    if scheme == "unix" and colon and rest[:1] in ("", ":"):
        raise ConfigError(f"bad address {text!r}: expected a path behind unix:")
    if scheme == "unix" and rest.startswith("/") and not re.search(r"[:\\]", rest):
        if len(rest.encode()) > _UNIX_PATH_LIMIT:
            raise ConfigError(
                f"bad address {text!r}: a UNIX socket's path has at most "
                f"{_UNIX_PATH_LIMIT} bytes, this one {len(rest.encode())}"
            )
        return UnixPath(rest)
    if colon and scheme == "udp":
        if (name := passed_name(rest)) and "systemd" in known():
            return UdpAddress(None, 0, name)
        try:
            where = _parse(rest, frozenset[str], lowest_port)
        except ConfigError as problem:
            # With the text as it was written.
            why = str(problem).removeprefix(f"bad address {rest!r}: ")
            raise ConfigError(f"bad address {text!r}: {why}") from None
        if isinstance(where, HostPort):
            return UdpAddress(where.host, where.port)
        raise ConfigError(f"bad address {text!r}: expected udp:host:port or udp:port")
    if colon and _TYPE.fullmatch(scheme) and scheme.lower() in known():
        return EndpointString(text)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        return HostPort(ipv6_host(host[1:-1], text), _port(port, text, lowest_port))
    if port.startswith("//"):
        raise ConfigError(
            f"bad address {text!r}: unknown endpoint type {scheme!r}; {_EXPECTED}"
        )
    if ":" in host or text.startswith("["):
        if scheme and not text.startswith("[") and not is_ipv6(text):
            raise ConfigError(
                f"bad address {text!r}: unknown endpoint type {scheme!r}; {_EXPECTED}"
            )
        raise ConfigError(
            f"bad address {text!r}: write an IPv6 address in brackets, [::1]:8080"
        )
    return HostPort(
        named_host(host, text) if host else None, _port(port, text, lowest_port)
    )


def _port(digits: str, text: str, lowest: int) -> int:
    if not DIGITS.fullmatch(digits):
        raise ConfigError(
            f"bad address {text!r}: {digits!r} is not a port; {_EXPECTED}"
        )
    # Compared by length first: a thousand digits are refused, not converted.
    if len(digits) > 5 or not lowest <= int(digits) <= 65535:
        raise ConfigError(
            f"bad address {text!r}: a port here is {lowest} to 65535, not {digits}"
        )
    return int(digits)


def dialled_host(host: str | None) -> str:
    """The host of a destination: this machine, if none or the wildcard is written.

    Linux takes the wildcard for this machine, too; other systems don't.
    """
    if host is None:
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    address = unmapped(address)
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
