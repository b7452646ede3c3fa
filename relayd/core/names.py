"""Tells host names, addresses and numbers apart, and writes them with a port."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from itertools import islice

# RFC 952 allows no hyphen at either end.  Names that have one are in use, and whether
# they have addresses is for the resolver to say.
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")

#: A destination: where the client meant to go; or the port of one, likewise.
ORIGINAL = "original"

EXPECTED_INTERFACE = "the name of an interface, such as eth1"

#: How many names a line has, of those that may be many.
_SHOWN = 10

#: The longest name of an interface, in bytes (IFNAMSIZ of Linux, without its NUL).
_MAX_INTERFACE = 15


def host_port(host: str, port: int | str) -> str:
    """A host and a port as text, the host in brackets if it is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def name_of_original(host: str | None = None) -> str:
    """What a destination is called that clients choose: `original`, or with a host that
    is given, `192.168.0.10:original`.
    """
    return ORIGINAL if host is None else host_port(host, ORIGINAL)


def is_number(host: str) -> bool:
    """Whether a resolver reads this as an IPv4 address, or tries to.

    Examples: 127.1, 2130706433, 0x7f000001.  A number with a hyphen before or after it
    counts as one, too: resolvers may differ in whether they read that as a sign.
    """
    last = host.removesuffix(".").split(".")[-1]
    return bool(_NUMBER.fullmatch(last.strip("-")))


def is_name(host: str) -> bool:
    """Whether this is a host name that no resolver reads as a number."""
    bare = host.removesuffix(".")
    return (
        len(bare) <= 253
        and all(map(_LABEL.fullmatch, bare.split(".")))
        and not is_number(host)
    )


def is_address(host: str) -> bool:
    """Whether this is an IPv4 or IPv6 address as text, without a scope."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def check_interface(text: str) -> str:
    """The name of an interface, which need not exist.

    :raises ValueError: no interface can have it.
    """
    plain = text.isprintable() and not set(text) & set(" /:%")
    if not plain or not 0 < len(text.encode()) <= _MAX_INTERFACE or text in (".", ".."):
        raise ValueError(f"expected {EXPECTED_INTERFACE}")
    return text


def first_of(names: Collection[str]) -> str:
    """Names for one line, however many there are: `a, b and 12 more`."""
    shown = ", ".join(islice(names, _SHOWN))
    left = len(names) - _SHOWN
    return f"{shown} and {left} more" if left > 0 else shown
