"""Which filters a relay may be given by a program."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.testing import MemoryReactorClock

from relayd.core.filtering import FilterFactory, check_factories
from relayd.socks4 import Socks4Factory
from relayd.tcp import RelayFactory
from relayd.udp_nat import Server, UdpNat


class Streams(FilterFactory):
    name = "own"

    def build_filter(self, way: Any) -> Any: ...


class Flows(FilterFactory):
    def build_datagram_filter(self, way: Any) -> Any: ...


class Both(Streams, Flows):
    pass


class NotOfOurs:
    """One without the base class."""

    def build_filter(self, way: Any) -> Any: ...


@pytest.mark.parametrize(
    ("filters", "datagrams"),
    [
        ([], True),
        ([Streams(), Both(), NotOfOurs()], False),
        ([Flows(), Both()], True),
    ],
)
def test_those_that_serve_it(filters: list[Any], datagrams: bool) -> None:
    check_factories(filters, datagrams=datagrams)


@pytest.mark.parametrize(
    ("wrong", "datagrams", "line"),
    [
        (Streams(), True, "filter own is for streams, not for UDP flows"),
        (NotOfOurs(), True, "filter NotOfOurs is for streams, not for UDP flows"),
        (Flows(), False, "filter Flows is for UDP flows, not for streams"),
    ],
)
def test_those_of_the_other_kind(wrong: Any, datagrams: bool, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        check_factories([Both(), wrong], datagrams=datagrams)


WRONG: list[Any] = ["latency:100ms", Streams, None]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_factory(wrong: Any) -> None:
    clock: Any = MemoryReactorClock()
    server = TCP4ClientEndpoint(clock, "127.0.0.1", 80)
    for make in (
        lambda: RelayFactory(server, filters=[wrong]),
        lambda: Socks4Factory(clock, filters=[wrong]),
        lambda: UdpNat(clock, [Server("127.0.0.1", 53)], filters=[wrong]),
    ):
        with pytest.raises(TypeError, match="is no factory of filters"):
            make()
