"""What is a host name, what is an address, and what is neither."""

from __future__ import annotations

import ipaddress
import re

# RFC 952 wants no hyphen at either end; names that have one are in use, and whether
# they have addresses is for the resolver to say.
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def is_number(host: str) -> bool:
    """Whether a resolver reads this as an IPv4 address, or tries to.

    127.1, 2130706433 and 0x7f000001 are that.  A hyphen before or after a number makes
    no name of it: that would leave it to the resolver what a sign is.
    """
    last = host.removesuffix(".").split(".")[-1]
    return bool(_NUMBER.fullmatch(last.strip("-")))


def is_name(host: str) -> bool:
    """Whether this is a host name, and nothing that a resolver reads as a number."""
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
