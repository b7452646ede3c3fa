"""The listeners of a relay that is given what was meant for others.

It dials where its clients meant to go.  One who has connected to the listener itself
meant to go nowhere else: the relay would dial itself, without an end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

_ALL = ("0.0.0.0", "::")


class OwnListeners:
    """Where the listeners of one relay are.

    :ivar opened: their addresses and ports, and how often each is listened on.
    """

    def __init__(self) -> None:
        self.opened: Counter[tuple[str, int]] = Counter()

    def opens(self, host: str, port: int) -> None:
        """A listener opens."""
        self.opened[host, port] += 1

    def closes(self, host: str, port: int) -> None:
        """It closes, or serves another relay."""
        self.opened[host, port] -= 1
        if self.opened[host, port] <= 0:
            del self.opened[host, port]

    def has(self, host: str, port: int, is_own: Callable[[str], bool]) -> bool:
        """Whether a connection to this address would come to one of them.

        :param is_own: whether an address is this machine's.
        """
        if (host, port) in self.opened:
            return True
        return any((each, port) in self.opened for each in _ALL) and is_own(host)
