"""What went wrong in a soak: counted, and the first of it in words.

Each violation is told as it is found, until there are too many; the summary at the end
has a few of each script, with what the relay's log has said since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import attrs


class Named(Protocol):
    """A script."""

    @property
    def name(self) -> str: ...


class Judged(Protocol):
    """A session, or a flow of datagrams.

    :ivar label: what and which it is.
    :ivar ending: what the relay's log says of it; empty until it does.
    :ivar violated: something of it has been counted.
    """

    ending: str
    violated: bool

    @property
    def script(self) -> Named: ...

    @property
    def label(self) -> str: ...


@attrs.define(eq=False)
class Violations:
    """What went wrong, counted; the first of it in words.

    :param tell: gets a line about each of the first TOLD as it is found, and a last one
        when there are more.
    :ivar scripts: how often, by the script's name.
    """

    #: At most so many are told as they are found.
    TOLD = 20

    #: At most so many are in the summary, and so many of one script.
    FIRST, FIRST_OF_SCRIPT = 24, 3

    tell: Callable[[str], None]
    scripts: Counter[str] = attrs.Factory(Counter)
    _first: list[tuple[Judged | None, str]] = attrs.Factory(list)

    @property
    def count(self) -> int:
        return self.scripts.total()

    def add(self, judged: Judged | None, who: str, what: str) -> None:
        """Count it, unless it may follow from one of the same session before it."""
        if judged is not None:
            if judged.violated:
                return
            judged.violated = True
        name = judged.script.name if judged else "no session"
        self.scripts[name] += 1
        label = f", {judged.label}" if judged else ""
        text = " ".join(f"{name}{label}, {who}: {what}".split())
        if self.count <= self.TOLD:
            self.tell(text)
        elif self.count == self.TOLD + 1:
            self.tell("there are more; from here on they are only counted")
        if len(self._first) < self.FIRST and self.scripts[name] <= self.FIRST_OF_SCRIPT:
            self._first.append((judged, text))

    def lines(self) -> list[str]:
        """The first few, each with what the log has said of its session since."""
        return [
            f"{text}; ending={judged.ending}" if judged and judged.ending else text
            for judged, text in self._first
        ]
