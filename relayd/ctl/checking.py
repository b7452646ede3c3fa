"""Reads and checks a configuration file as the service would, and opens nothing.

What a file says is read and checked by :mod:`relayd.configuring`.  The rest, the
service would find as it makes its endpoints: a broadcast address, a missing interface,
a limit that can't be had, a Twisted endpoint string that can't be used, a missing
certificate, a check or a route in Python that can't be imported.  The same functions
are asked here, with a reactor that never runs.  Most relays have short forms of
addresses and need none of them: importing them takes longer than reading a thousand
relays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import attrs

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    OriginalAddress,
    PortRange,
    UdpAddress,
    dialled_host,
)
from relayd.configuring.address_settings import DEST, METRICS_ADDRESS
from relayd.configuring.config import AnyRelay, Config, Socks4Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.endpoint_strings import parts
from relayd.configuring.file import STDIN, read_layers
from relayd.configuring.filter_settings import FILTER
from relayd.configuring.given import Given, Layers, key_of
from relayd.configuring.hosts import check_host
from relayd.configuring.pools_of_relay import as_server
from relayd.configuring.route_settings import ROUTE, SNI, SniEntry
from relayd.configuring.server_grammar import is_udp, options_of
from relayd.core.check_grammar import PythonCheck
from relayd.core.errors import ConfigError
from relayd.core.process_settings import MANAGE_NETFILTER, MAX_DESCRIPTORS, TRANSPORT
from relayd.core.setting_types import Kind
from relayd.ctl.exits import CommandFailed, Exit


@attrs.frozen
class Checked:
    """What a check has found.

    :ivar name: of the file.
    :ivar relays: how many the service would have.
    :ivar problems: a line each.
    """

    name: str
    relays: int
    problems: Sequence[str]


def read(path: str) -> tuple[Layers, Config]:
    """What a file says, checked; not what this machine has.

    :param path: of a file or a folder; `-` is standard input.
    :raises CommandFailed: there is no such file, or it is not valid.
    """
    if path != "-" and _is_missing(path):
        raise CommandFailed(Exit.NOT_FOUND, f"{path}: there is no such file or folder")
    layers = read_layers(path)
    try:
        return layers, configure(layers)
    except ConfigError as problem:
        raise CommandFailed(Exit.INVALID, *str(problem).splitlines()) from problem


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        # Why it can't be read, the reader says.
        return False
    return False


def check_file(path: str, *, file_only: bool = False) -> Checked:
    """Check a file.

    :param file_only: not whether this machine has what the file asks for.
    :raises CommandFailed: there is no such file.
    """
    name = STDIN if path == "-" else path
    try:
        layers, config = read(path)
    except CommandFailed as failed:
        if failed.exit != Exit.INVALID:
            raise
        return Checked(name, 0, failed.lines)
    problems = [] if file_only else list(unusable(layers, config))
    return Checked(name, len(config.relays), problems)


def unusable(layers: Layers, config: Config) -> Iterator[str]:
    """What the service would refuse as it makes its endpoints; a line each.

    :param config: of these layers.
    """
    machine = _Machine(config)
    for given in {key_of(each.setting): each for each in layers.process}.values():
        for problem in machine.about_process(given):
            yield f"{given.place}: {problem}"
    if config.demo:
        return
    for section, relay in zip(layers.sections, config.relays, strict=True):
        found, filters = False, dict[Given, bool]()
        for given in section.effective:
            if given.setting is SNI or given.setting.group == DEST.group:
                for problem in machine.about_address(as_server(given)):
                    found = True
                    yield f"{given.place}: {problem}"
            for problem in machine.about_check(given):
                yield f"{given.place}: {problem}"
            if given.setting is FILTER:
                filters[given] = True
                for problem in machine.about_filter(given, section.kind):
                    filters[given] = False
                    yield f"{given.place}: {problem}"
            if given.setting is ROUTE:
                for problem in machine.about_route(relay):
                    yield f"{given.place}: {problem}"
        if all(filters.values()):
            for problem in machine.about_filters(relay):
                yield f"{next(iter(filters)).place}: {problem}"
        if not found:
            for problem in machine.about_relay(relay):
                yield f"{section.place}: {problem}"


class _Machine:
    """What this machine has, for one configuration."""

    def __init__(self, config: Config) -> None:
        # Short forms are the same on either transport, but for what opens them.
        self._config = attrs.evolve(config, transport="twisted")
        self._reactor: Any = None
        #: The checks in Python that were imported; one of `[defaults]` is once.
        self._imported: set[int] = set()

    @property
    def reactor(self) -> Any:
        """One that never runs; it is not the global one."""
        if self._reactor is None:
            self._reactor = _idle_reactor()
        return self._reactor

    @cached_property
    def shop(self) -> Any:
        """What relays are built with, to see whether they can be."""
        from relayd.observing.line_log import LineLog
        from relayd.operating.units import Workshop

        return Workshop(self._config, self.reactor, LineLog())

    @cached_property
    def routes(self) -> Any:
        """The functions of routes: each module is imported once."""
        from relayd.operating.route_modules import Routes

        return Routes()

    def about_process(self, given: Given) -> Iterator[str]:
        """What is wrong with a setting of the process."""
        if given.setting is TRANSPORT:
            from relayd.operating.endpoints import on_plane

            yield from _problem(on_plane, given.value, self.reactor)
        elif given.setting is MAX_DESCRIPTORS:
            from relayd.operating.open_files import raise_open_files

            # The reactor of the service watches any number.
            yield from _problem(raise_open_files, given.value, None)
        elif given.setting is MANAGE_NETFILTER and given.value:
            from relayd.netfilter.programs import missing

            yield from missing()
        elif given.setting is METRICS_ADDRESS:
            if find_spec("prometheus_client") is None:
                yield (
                    "it needs a package that is not installed: pip install"
                    " 'relayd[metrics]'"
                )
            yield from self.about_address(given)

    def about_address(self, given: Given) -> Iterator[str]:
        """What is wrong with a listener, or a destination."""
        address, dialled = given.value, given.setting in (DEST, SNI)
        if isinstance(address, PortRange):
            address = address.first
        if isinstance(address, EndpointString):
            if not _is_passed(address.text):
                from relayd.operating.endpoints import (
                    dialing_endpoint,
                    listening_endpoint,
                )

                make = dialing_endpoint if dialled else listening_endpoint
                yield from _problem(make, address, self.reactor, transport="twisted")
        elif isinstance(address, HostPort | UdpAddress | OriginalAddress) and dialled:
            host = dialled_host(address.host)
            yield from _problem(check_host, host, str(address))
            if "%" in host and not is_udp(address):
                from relayd.operating.endpoints import dialing_endpoint

                yield from _problem(dialing_endpoint, address, self.reactor, "twisted")

    def about_check(self, given: Given) -> Iterator[str]:
        """Whether a check of servers in Python can be imported."""
        check = as_server(given).value
        if given.setting in (DEST, SNI) and not isinstance(check, SniEntry):
            check = options_of(check).check
        if isinstance(check, PythonCheck) and id(given) not in self._imported:
            self._imported.add(id(given))
            from relayd.operating.checks import function_of

            yield from _problem(function_of, check)

    def about_filter(self, given: Given, kind: Kind) -> Iterator[str]:
        """Whether a filter can be made."""
        from relayd.operating.filtering import check_filter

        for problem in _problem(check_filter, given.value, kind):
            yield problem.removeprefix("filter ")

    def about_filters(self, relay: AnyRelay) -> Iterator[str]:
        """Whether filters that can be made go together, and with their relay."""
        if not relay.filters:
            return
        from relayd.operating.filtering import made_filters

        for problem in _problem(made_filters, relay):
            yield from problem.splitlines()

    def about_route(self, relay: AnyRelay) -> Iterator[str]:
        """Whether the route of a relay can be imported, and names its pools."""
        from relayd.operating.routing import route_of

        yield from _problem(route_of, relay, self.routes)

    def about_relay(self, relay: AnyRelay) -> Iterator[str]:
        """What is wrong with a relay whose addresses can be used."""
        if isinstance(relay, UdpRelay) and relay.udp.max_flows is not None:
            # It depends on how servers are dialled.
            from relayd.operating.udp_relays import most_flows

            yield from _problem(most_flows, relay, self.shop.flows)
        # Whoever checks may lack the right that the service has.
        relay = _without_rights(relay)
        try:
            relay.dialing.options.check()
        except OSError as problem:
            yield str(problem.strerror)
            return
        if not isinstance(relay, UdpRelay):
            # See `about_route`.
            relay = attrs.evolve(relay, route=None)
        if isinstance(relay, UdpRelay):
            scoped = any("%" in str(each) for each in relay.destinations)
            if relay.udp.max_flows is not None or scoped:
                udp = attrs.evolve(relay.udp, max_flows=None)
                yield from self._problem_of(attrs.evolve(relay, udp=udp))
        elif isinstance(relay, Socks4Relay) and relay.socks4.bind_address:
            yield from self._problem_of(relay)

    def _problem_of(self, relay: AnyRelay) -> Iterator[str]:
        from relayd.operating.relays import unit_of

        listeners = [each for each in relay.listeners if not _is_passed(str(each))]
        relay = attrs.evolve(relay, listeners=listeners)
        yield from _problem(unit_of, relay, self.shop)


def _without_rights(relay: AnyRelay) -> AnyRelay:
    """A relay without what takes a right to dial."""
    if isinstance(relay, Socks4Relay):
        return attrs.evolve(relay, dialing=attrs.evolve(relay.dialing, mark=None))
    dialing = attrs.evolve(relay.dialing, mark=None, transparent=False)
    return attrs.evolve(relay, dialing=dialing)


def _problem(make: Any, *args: Any, **named: Any) -> Iterator[str]:
    """Why something can't be made, or nothing."""
    try:
        make(*args, **named)
    except ConfigError as problem:
        yield str(problem)


def _is_passed(text: str) -> bool:
    """Whether an address is a socket that systemd passes to the service."""
    plain, _ = parts(text.lower())
    return next((each for each in plain if each not in ("haproxy", "udp")), "") == (
        "systemd"
    )


def _idle_reactor() -> Any:
    """A reactor that is not the global one, never runs, and opens nothing."""
    from twisted.internet.selectreactor import SelectReactor

    class IdleReactor(SelectReactor):
        def installWaker(self) -> None:
            """It is never woken."""

    return IdleReactor()
