"""A session of which a test says what it does, with filters on both directions."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from relayd.core.filtering import SPLICE, Course, IFilter
from relayd.core.session import Ending, Session
from tests.support.filtering import FakeWay

COURSES: tuple[Course, Course] = ("up", "down")


class Captured:
    """A session whose directions are captured.

    :ivar filters: by direction.
    """

    def __init__(
        self, factory: Any, clock: Clock, number: int = 1, **facts: Any
    ) -> None:
        facts = {
            "client": f"192.0.2.1:{1000 + number}",
            "listener": "192.0.2.9:80",
            "upstream": "192.0.2.2:8080",
            "opened_at": clock.seconds(),
            "connected_at": clock.seconds(),
            "ordinal": number,
            **facts,
        }
        self.session = Session(number, **facts)
        shared: dict[str, Any] = {}
        self.ways = {
            each: FakeWay(each, self.session, clock, shared) for each in COURSES
        }
        self.filters = {}
        for each, way in self.ways.items():
            made = factory.build_filter(way)
            if made is not None:
                assert IFilter.providedBy(made)
                self.filters[each] = made

    def say(self, course: Course, data: bytes) -> Any:
        answer = self.filters[course].data(data)
        assert answer in (SPLICE, data)
        if answer is SPLICE:
            # As who has answered so is treated.
            assert self.filters[course].end() == b""
            self.filters.pop(course).close()
        return answer

    def close(self, ending: Ending | None = Ending.DONE, detail: str = "") -> None:
        self.session.ending, self.session.detail = ending, detail
        for each in self.filters.values():
            each.close()

    def end(self) -> None:
        """Both end, and the session with them."""
        for each in self.filters.values():
            assert each.end() == b""
        self.close()
