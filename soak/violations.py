"""The violations of a soak: counted, and the first of them in full.

Each violation is printed as it is found, until there are too many; the summary at the
end has a few of each script, with the ending from the relay's log.
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

    :ivar label: its kind and number.
    :ivar ending: from the relay's log; empty until it is there.
    :ivar violated: a violation of it has been counted.
    """

    ending: str
    violated: bool

    @property
    def script(self) -> Named: ...

    @property
    def label(self) -> str: ...


@attrs.define(eq=False)
class Violations:
    """Violations, counted; the first of them in full.

    :param print_line: called with a line for each of the first PRINTED as it is found,
        and with a last line when there are more.
    :ivar scripts: how many, by the script's name.
    """

    #: How many are printed as they are found.
    PRINTED = 20

    #: How many are in the summary, and how many of one script.
    FIRST, FIRST_OF_SCRIPT = 24, 3

    print_line: Callable[[str], None]
    scripts: Counter[str] = attrs.Factory(Counter)
    _first: list[tuple[Judged | None, str]] = attrs.Factory(list)

    @property
    def count(self) -> int:
        return self.scripts.total()

    def add(self, judged: Judged | None, who: str, what: str) -> None:
        """Count it, unless it may follow from an earlier one of the same session."""
        if judged is not None:
            if judged.violated:
                return
            judged.violated = True
        name = judged.script.name if judged else "no session"
        self.scripts[name] += 1
        label = f", {judged.label}" if judged else ""
        text = " ".join(f"{name}{label}, {who}: {what}".split())
        if self.count <= self.PRINTED:
            self.print_line(text)
        elif self.count == self.PRINTED + 1:
            self.print_line("there are more; from here on they are only counted")
        if len(self._first) < self.FIRST and self.scripts[name] <= self.FIRST_OF_SCRIPT:
            self._first.append((judged, text))

    def lines(self) -> list[str]:
        """The first few, each with the ending of its session from the log."""
        return [
            f"{text}; ending={judged.ending}" if judged and judged.ending else text
            for judged, text in self._first
        ]
