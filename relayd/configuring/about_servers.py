"""Checks of destinations: what is said of their servers.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from relayd.configuring.address_settings import DEST
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.server_grammar import ServersOf, options_of
from relayd.configuring.server_options import PLAIN, ServerOptions

#: What is said of servers of datagrams, too.
_OF_DATAGRAMS = frozenset({"send_proxy"})


def about_servers(section: RelaySection) -> Iterator[str]:
    """What is wrong with the servers of one relay."""
    named: dict[str, Given] = {}
    for each in section.all(DEST.key):
        options = options_of(each.value)
        where = each.place.prefix
        if options.name is not None:
            first = named.setdefault(options.name, each)
            if first is not each:
                yield (
                    f"{where}{each} has the name {options.name!r}, as {first} has: give"
                    " each server its own"
                )
        if section.kind == "udp" and isinstance(each.value, ServersOf):
            yield f"{where}{each}: {each.value.how}: is not for udp"
        if section.kind == "udp":
            for option in _said(options):
                if option not in _OF_DATAGRAMS:
                    yield f"{where}{each}: {option} is not for udp"


def _said(options: ServerOptions) -> Iterator[str]:
    """The options that were given."""
    for field in attrs.fields(ServerOptions):
        if getattr(options, field.name) != getattr(PLAIN, field.name):
            yield field.name
