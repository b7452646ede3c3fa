"""Who of this process has which address of somebody else's."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from relayd.datagrams import transparent
from relayd.datagrams.transparent import NotAsClient, Places, is_host
from tests.datagrams.places import Kernel, PlacingSocket
from tests.datagrams.support import problem

CLIENTS = [("10.0.0.1", 1), ("10.0.0.1", 2), ("10.0.0.2", 1)]
USES = [("192.0.2.1", 53), ("192.0.2.2", 53), ("192.0.2.3", 53), 7]


class PlacesMachine(RuleBasedStateMachine):
    """Sockets come and go, of ours and of others, as they like."""

    placed: Bundle[Any] = Bundle("placed")
    foreign: Bundle[Any] = Bundle("foreign")

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()
        self.places = Places()
        self.ours: dict[tuple[Any, Any], Any] = {}
        self.others: set[Any] = set()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(transparent, "places", self.places)

    def teardown(self) -> None:
        self.patched.undo()

    @rule(target=placed, where=st.sampled_from(CLIENTS), use=st.sampled_from(USES))
    def place(self, where: Any, use: Any) -> Any:
        sock = PlacingSocket(self.kernel)
        alone = any(where == each for each in self.others)
        try:
            found = self.places.place(sock, where, use)
        except NotAsClient as refused:
            assert refused.errno == errno.EADDRNOTAVAIL
            assert refused.reason == "no_source"
            # The same twice, or somebody else has it.
            assert (where, use) in self.ours or alone
            return multiple()
        assert (where, use) not in self.ours
        assert not alone
        assert found.name == where
        self.ours[where, use] = found
        return where, use

    @rule(which=consumes(placed))
    def close(self, which: Any) -> None:
        self.ours.pop(which).close()

    @rule(target=foreign, where=st.sampled_from(CLIENTS), shared=st.booleans())
    def come(self, where: Any, shared: bool) -> Any:
        """Another program gets no address that one of ours has alone."""
        if any(each == where for each, _ in self.ours):
            sock = PlacingSocket(self.kernel)
            sock.shared = shared
            holders = [each for (at, _), each in self.ours.items() if at == where]
            if not shared or (len(holders) == 1 and not holders[0].shared):
                with pytest.raises(OSError, match="in use"):
                    sock.bind(where)
            return multiple()
        if where in self.others:
            return multiple()
        sock = PlacingSocket(self.kernel)
        sock.shared = shared
        sock.bind(where)
        self.others.add(where)
        return where, sock

    @rule(which=consumes(foreign))
    def go(self, which: Any) -> None:
        self.others.remove(which[0])
        which[1].close()

    @invariant()
    def knows_its_own(self) -> None:
        known = {
            (place[:2], use)
            for place, uses in self.places.taken.items()
            for use in uses
        }
        assert known == set(self.ours)
        assert all(self.places.taken.values())
        assert len(self.kernel.bound) == len(self.ours) + len(self.others)


PlacesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPlaces = PlacesMachine.TestCase


@pytest.mark.parametrize(
    ("where", "number", "said"),
    [
        (
            ("10.0.0.1", 123),
            errno.EACCES,
            (
                "can't send as 10.0.0.1:123: a port below 1024 takes the right"
                " CAP_NET_BIND_SERVICE"
            ),
        ),
        (
            ("10.0.0.1", 4000),
            errno.EACCES,
            "can't send as 10.0.0.1:4000: Permission denied",
        ),
        (
            ("2001:db8::1", 4000, 0, 0),
            errno.EADDRINUSE,
            "another program of this machine has [2001:db8::1]:4000",
        ),
    ],
)
def test_what_an_address_can_not_be_had_for(where: Any, number: int, said: str) -> None:
    sock: Any = PlacingSocket(Kernel())

    def bind(_: Any) -> None:
        raise problem(number)

    sock.bind = bind
    places = Places()
    with pytest.raises(NotAsClient) as raised:
        places.place(sock, where, 1)
    assert raised.value.strerror == said
    assert not places.taken


@pytest.mark.parametrize(
    ("host", "one"),
    [
        ("10.0.0.1", True),
        ("2001:db8::1", True),
        ("127.0.0.1", True),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("::", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("255.255.255.255", False),
        ("127.255.255.255", False),
    ],
)
def test_whose_address_the_kernel_would_not_take(host: str, one: bool) -> None:
    """It binds such a socket, and sends from an address of its own."""
    assert is_host(host) is one
