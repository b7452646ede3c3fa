"""Which entry of a table is about a server name: exact, a wildcard, or any other.

    www.example.com    that name
    *.example.com      every name below it, with any number of labels before it
    (empty)            whatever no other is about, and clients without a name

An exact name goes before a wildcard, and a longer wildcard before a shorter one.  Names
are compared without case; a dot at the end is dropped (RFC 6066 3).  How many entries
there are makes no difference; a name is looked for once for each of its labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from relayd.core.names import is_name

T = TypeVar("T")

_WILDCARD = "*."


class ServerNames(Mapping[str, T]):
    """What there is for server names, by their patterns.

    :param entries: as they are written; they keep their order.
    :raises ValueError: one is no pattern, or is there twice.
    """

    def __init__(self, entries: Mapping[str, T]) -> None:
        self._entries: dict[str, T] = {}
        for written, value in entries.items():
            pattern = checked_pattern(written)
            if pattern in self._entries:
                raise ValueError(f"the server name {written!r} is there twice")
            self._entries[pattern] = value
        #: By what names end with, which begins with a dot.
        self._below = {
            pattern[1:]: value
            for pattern, value in self._entries.items()
            if pattern.startswith(_WILDCARD)
        }

    def __getitem__(self, pattern: str) -> T:
        return self._entries[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str | None) -> T | None:
        """What there is for a name.

        :param name: None or empty: a client that names no server.
        :return: None: nothing is about it.
        """
        entries = self._entries
        if name:
            name = name.lower().removesuffix(".")
            if name in entries:
                return entries[name]
            below = self._below
            at = name.find(".", 1) if below else -1
            while at > 0:
                if (ending := name[at:]) in below:
                    return below[ending]
                at = name.find(".", at + 1)
        return entries.get("")


def checked_pattern(text: str) -> str:
    """A pattern as it is compared: in lower case, without a dot at its end.

    :raises ValueError: it is none.
    """
    pattern = text.lower().removesuffix(".")
    if pattern and not is_name(pattern.removeprefix(_WILDCARD)):
        raise ValueError(
            f"bad server name {text!r}: expected a host name, '*.' before one, or"
            " nothing, for any other"
        )
    return pattern
