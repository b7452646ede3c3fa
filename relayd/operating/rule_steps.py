"""What is to be done about the netfilter rules of relays, and what there is of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from relayd.configuring.config import Relay, UdpRelay
from relayd.core.errors import NetfilterError
from relayd.core.names import first_of
from relayd.netfilter.rules import RelayRules, rules_of
from relayd.operating.units import Unit


class Netfilter(Protocol):
    """Changes the rules of the kernel; see :mod:`relayd.netfilter.applying`.

    Each of these waits for the programs that it runs, and may raise a NetfilterError.
    """

    def apply(self, rules: Sequence[RelayRules], mark: int) -> None: ...

    def remove(self, names: Sequence[str], mark: int) -> None: ...

    def lost(self, rules: Sequence[RelayRules], mark: int) -> list[str]: ...

    def cautions(self, rules: Sequence[RelayRules], mark: int) -> list[str]: ...

    def relays_there(self) -> Collection[str]: ...


@attrs.frozen
class There:
    """What the kernel has of a relay, or is to have.

    :ivar udp: it is a UDP relay.
    :ivar intake: new clients are brought to it.
    :ivar sure: False: a change of it has failed.
    """

    rules: RelayRules
    udp: bool
    intake: bool = True
    sure: bool = True


@attrs.define
class Step:
    """What is to be done, for several relays at once.

    :ivar do: does it.
    :ivar done: the word for the log.
    :ivar wanted: what the kernel has of each relay then; None: nothing.
    :ivar why_not: why it has failed.
    """

    do: Callable[[], object]
    done: str
    wanted: Mapping[str, There | None]
    why_not: str = ""

    def __str__(self) -> str:
        whose = first_of(self.wanted)
        if self.why_not:
            return f"netfilter rules of {whose} not {self.done}: {self.why_not}"
        return f"netfilter rules of {whose} {self.done}"


def carry_out(steps: Iterable[Step]) -> None:
    """Do all of these, also those that follow one that fails; in any thread."""
    for each in steps:
        try:
            each.do()
        except NetfilterError as problem:
            each.why_not = str(problem)


def needed_by(unit: Unit) -> RelayRules | None:
    """What a relay needs, by what it was built from; None: nothing."""
    settings = unit.settings
    return rules_of(settings) if isinstance(settings, Relay | UdpRelay) else None
