"""What went wrong in a soak: counted, and the first few in words."""

from __future__ import annotations

from collections import Counter

import attrs

from bench.soak_scripts import Session


@attrs.define(eq=False)
class Violations:
    """What went wrong, counted; the first few in words.

    :ivar scripts: how often, by the script's name.
    """

    #: At most so many are told in words, and so many of one script.
    FIRST, FIRST_OF_SCRIPT = 10, 3

    scripts: Counter[str] = attrs.Factory(Counter)
    _first: list[tuple[Session | None, str]] = attrs.Factory(list)

    @property
    def count(self) -> int:
        return self.scripts.total()

    def add(self, session: Session | None, who: str, what: str) -> None:
        """Count it, unless it may follow from one of the same session before it."""
        if session is not None:
            if session.violated:
                return
            session.violated = True
        name = session.script.name if session else "no session"
        self.scripts[name] += 1
        if len(self._first) < self.FIRST and self.scripts[name] <= self.FIRST_OF_SCRIPT:
            number = f", connection {session.number}" if session else ""
            self._first.append((session, f"{name}{number}, {who}: {what}"))

    def lines(self) -> list[str]:
        """The first few, each with what the log has said of its session since."""
        return [
            f"{text}; ending={session.ending}" if session and session.ending else text
            for session, text in self._first
        ]
