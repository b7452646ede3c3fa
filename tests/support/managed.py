"""A process that manages the rules of its relays: a fake has the kernel's part."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from relayd.configuring.address_grammar import HostPort, UdpAddress
from relayd.configuring.config import Relay, ServerDialing, UdpRelay
from relayd.core.errors import NetfilterError
from relayd.core.interception import parse_intercept
from relayd.netfilter.rules import RelayRules, rules_of
from relayd.operating.managed_rules import ManagedRules
from tests.support.steered import Standing, result

MARK = 0x1000
LISTENER = "192.0.2.1"

#: No other test run claims the names of these relays.
OWN = f"m{os.getpid()}"
WEB, DNS = f"{OWN}-web", f"{OWN}-dns"


class Kernel:
    """Has the rules; a set of names stands for what it does not let be done.

    :ivar has: the rules of each relay.
    :ivar calls: what was asked of it, and for whom.
    :ivar warns: what may keep the rules from doing something.
    """

    def __init__(self) -> None:
        self.has: dict[str, RelayRules] = {}
        self.calls: list[str] = []
        self.refuses = set[str]()
        self.warns: list[str] = []

    def _asked(self, what: str, names: Collection[str]) -> None:
        assert names
        self.calls.append(f"{what} {' '.join(sorted(names))}".replace(f"{OWN}-", ""))
        if what in self.refuses:
            raise NetfilterError("it takes CAP_NET_ADMIN")

    def apply(self, rules: Sequence[RelayRules], mark: int) -> None:
        assert mark == MARK
        self._asked("apply", [each.name for each in rules])
        self.has.update({each.name: each for each in rules})

    def remove(self, names: Collection[str], mark: int) -> None:
        assert mark == MARK
        self._asked("remove", names)
        for name in names:
            self.has.pop(name, None)

    def lost(self, rules: Sequence[RelayRules], mark: int) -> list[str]:
        assert mark == MARK
        self._asked("lost", [each.name for each in rules])
        return [each.name for each in rules if self.has.get(each.name) != each]

    def cautions(self, rules: Sequence[RelayRules], mark: int) -> list[str]:
        assert rules
        assert mark == MARK
        if "cautions" in self.refuses:
            raise NetfilterError("ip is gone")
        return self.warns

    def relays_there(self) -> set[str]:
        self.calls.append("list")
        if "relays_there" in self.refuses:
            raise NetfilterError("it takes CAP_NET_ADMIN")
        return {*self.has}

    def did(self) -> list[str]:
        """What it was asked for since."""
        did, self.calls = self.calls, []
        return did


class Watch:
    """Stands for what tells of changes by others.

    :ivar look: what it calls then.
    :ivar is_on: it was started, and not stopped.
    :ivar why_not: why it can't be.
    :ivar misses: how often something was missing.
    """

    def __init__(self, _: Any, look: Callable[[], None]) -> None:
        self.look = look
        self.is_on = False
        self.why_not = ""
        self.misses = 0

    def start(self) -> None:
        self.is_on = not self.why_not

    def stop(self) -> None:
        self.is_on, self.why_not = False, ""

    def missed(self) -> None:
        self.misses += 1


@attrs.define(eq=False)
class Served:
    """A factory, or a UDP relay: who lives in it."""

    name: str
    registry: list[str] = attrs.field(factory=list)


@attrs.define(eq=False)
class Unit:
    """A relay as it was built."""

    settings: Any
    served: Served

    @property
    def name(self) -> str:
        return str(self.settings.name)

    @property
    def kind(self) -> str:
        return "udp" if isinstance(self.settings, UdpRelay) else "tcp"


class Process:
    """A process with relays, and what manages their rules."""

    def __init__(self, *relays: Any) -> None:
        self.reactor: Any = Standing()
        self.kernel = Kernel()
        self.units: dict[str, Unit] = {}
        self.config, self.service = self, self
        self.netfilter_mark = MARK
        self._former: list[Served] = []
        for each in relays:
            self.units[each.name] = Unit(each, Served(each.name))
        managed: Any = self
        self.watch: Any = None
        self.rules = ManagedRules(
            *(managed, self.reactor, "relayd", self.kernel), watching=self._watching
        )

    def _watching(self, reactor: Any, look: Callable[[], None]) -> Any:
        self.watch = Watch(reactor, look)
        return self.watch

    @property
    def former(self) -> list[Served]:
        return [each for each in self._former if each.registry]

    @property
    def served(self) -> list[Served]:
        return [*(each.served for each in self.units.values()), *self.former]

    def change(self, *relays: Any) -> Deferred[Sequence[str]]:
        """Have these relays; those that are not named stay."""
        for each in relays:
            before = self.units.get(each.name)
            served = Served(each.name)
            if before is not None and isinstance(each, UdpRelay):
                served = before.served
            elif before is not None:
                self._former.append(before.served)
            self.units[each.name] = Unit(each, served)
        return self.rules.follow()

    def drop(self, name: str) -> None:
        self._former.append(self.units.pop(name).served)
        assert result(self.rules.follow()) == []

    def has(self, relay: Any) -> bool:
        """Whether the kernel has all that a relay needs, and no more."""
        return self.kernel.has.get(relay.name) == rules_of(relay)


def web(**more: Any) -> Relay:
    """Transparent, and clients are brought to it."""
    given = {
        "intercepts": [parse_intercept("192.0.2.2:80")],
        "dialing": ServerDialing(transparent=True),
        "name": WEB,
        **more,
    }
    port = HostPort("192.0.2.9", 80)
    return Relay([HostPort(LISTENER, 16000)], [port], **given)


def dns(server: str = "192.0.2.53", **more: Any) -> UdpRelay:
    given = {"dialing": ServerDialing(transparent=True), "name": DNS, **more}
    return UdpRelay([UdpAddress(LISTENER, 53)], [UdpAddress(server, 53)], **given)


PLAIN = ServerDialing()
