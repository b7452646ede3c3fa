"""What a route adds to the line of a session in the access log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Self

from relayd.core.routing import MOST_FACTS, checked_fact


class Facts(MutableMapping[str, Any]):
    """Facts for the access log, by name; each is checked as it is set, and is text."""

    __slots__ = ("_facts",)

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}

    def __setitem__(self, name: str, value: object) -> None:
        """Set one.

        :raises ValueError: there can be no such fact, or there are too many.
        """
        text = checked_fact(name, value)
        if len(self._facts) >= MOST_FACTS and name not in self._facts:
            raise ValueError(f"a session has {MOST_FACTS} facts at most")
        self._facts[name] = text

    def __getitem__(self, name: str) -> str:
        return self._facts[name]

    def __delitem__(self, name: str) -> None:
        del self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __ior__(self, others: Mapping[str, object]) -> Self:
        self.update(others)
        return self

    def __repr__(self) -> str:
        return repr(self._facts)
