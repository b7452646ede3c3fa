"""Filters for tests: each does one thing, and tells what was done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relayd.core.filtering import (
    LATER,
    SPLICE,
    Answer,
    EndSession,
    Filter,
    FilterFactory,
    Way,
)


class Own(Filter):
    """Passes on, and counts how often it was closed."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Makes(FilterFactory):
    """Makes filters of a class, of one direction or both.

    :ivar made: all of them.
    """

    def __init__(
        self,
        kind: Callable[..., Own],
        *args: Any,
        course: str = "",
        name: str = "own",
    ) -> None:
        self.kind, self.args, self.course, self.name = kind, args, course, name
        self.made: list[Any] = []

    def build_filter(self, way: Way) -> Any:
        if self.course not in ("", way.course):
            return None
        made = self.kind(way, *self.args)
        self.made.append(made)
        return made

    def of(self, course: str) -> Any:
        """The only filter of this direction."""
        [found] = [each for each in self.made if each.way.course == course]
        return found

    def closed_once(self) -> bool:
        """All were, and nobody more often."""
        return all(each.closed == 1 for each in self.made)


class Marks(Own):
    """Puts a letter behind each chunk."""

    def __init__(self, way: Way, mark: bytes) -> None:
        super().__init__(way)
        self.mark = mark

    def data(self, data: bytes) -> bytes:
        return data + self.mark


class Keeps(Own):
    """Holds everything until it is told to let it go."""

    def __init__(self, way: Way, most_held: int = 256 << 10) -> None:
        super().__init__(way)
        self.kept = b""
        self.most_held = most_held
        self.is_ending = False

    @property
    def held(self) -> int:  # type: ignore[override]
        return len(self.kept)

    def data(self, data: bytes) -> bytes:
        self.kept += data
        return b""

    def end(self) -> bytes | Answer:
        self.is_ending = True
        return LATER

    def remove(self) -> bytes:
        kept, self.kept = self.kept, b""
        return kept

    def let_go(self, count: int | None = None) -> None:
        """Pass on so many bytes, or all."""
        count = len(self.kept) if count is None else count
        data, self.kept = self.kept[:count], self.kept[count:]
        if self.is_ending and not self.kept:
            self.way.finish(data)
        else:
            self.way.pass_on(data)


class Delays(Keeps):
    """Lets all go in the reactor's next turn."""

    call: Any = None

    def data(self, data: bytes) -> bytes:
        if self.call is None:
            self.call = self.way.clock.callLater(0, self.now)
        return super().data(data)

    def now(self) -> None:
        self.call = None
        self.let_go()

    def end(self) -> bytes | Answer:
        return super().end() if self.call is not None else b""

    def remove(self) -> bytes:
        self._cancel()
        return super().remove()

    def close(self) -> None:
        self._cancel()
        super().close()

    def _cancel(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call.cancel()


class Sees(Own):
    """Has seen enough after so many bytes, and holds some of them until then."""

    def __init__(self, way: Way, enough: int = 0, holds: int = 0) -> None:
        super().__init__(way)
        self.left, self.holds = enough, holds
        self.kept = b""

    @property
    def held(self) -> int:  # type: ignore[override]
        return len(self.kept)

    def data(self, data: bytes) -> bytes | Answer:
        if self.left <= 0:
            return SPLICE
        self.left -= len(data)
        data = self.kept + data
        cut = max(len(data) - self.holds, 0)
        self.kept = data[cut:]
        return data[:cut]

    def end(self) -> bytes:
        kept, self.kept = self.kept, b""
        return kept


class Ends(Own):
    """Ends its session at an exclamation mark."""

    def __init__(self, way: Way, reset: bool = True) -> None:
        super().__init__(way)
        self.reset = reset

    def data(self, data: bytes) -> bytes:
        before, mark, _ = data.partition(b"!")
        if mark:
            raise EndSession("it was shouted", before, reset=self.reset)
        return data


class Grows(Own):
    """Makes many of each byte."""

    def __init__(self, way: Way, growth: int) -> None:
        super().__init__(way)
        self.growth = growth
        self.largest = 0

    def data(self, data: bytes) -> bytes:
        made = data * self.growth
        self.largest = max(self.largest, len(made))
        return made


class Breaks(Own):
    """Raises where it is told to."""

    def __init__(self, way: Way, where: str) -> None:
        super().__init__(way)
        self.where = where
        if where == "build":
            raise ZeroDivisionError("as it was made")

    def data(self, data: bytes) -> bytes | Answer:
        if self.where == "data":
            raise ZeroDivisionError("by data")
        return LATER if self.where == "answer" else data

    def end(self) -> bytes | Answer:
        if self.where == "end":
            raise ZeroDivisionError("by the end")
        return SPLICE if self.where == "end's answer" else b""

    def remove(self) -> bytes:
        if self.where == "remove":
            raise ZeroDivisionError("by removal")
        return b""
