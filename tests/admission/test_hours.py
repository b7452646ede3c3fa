"""The hours of a relay: how they are written, midnight, and daylight saving."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.admission.hours import DAYS, OpeningHours, parse_hours


def at(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        # 2026-11-30 is a Monday.
        ("08:00-18:00", "2026-11-29 08:00", "2026-11-30 18:00"),
        ("Mon-Fri 08:00-18:00", "2026-11-30 17:59", "2026-11-29 12:00"),
        ("mon,Wed-Fri 00:00-24:00", "2026-12-02 23:59", "2026-12-01 12:00"),
        # Over the end of the week.
        ("Sat-Mon 08:00-18:00", "2026-11-30 08:00", "2026-12-01 08:00"),
        # Over midnight: the hours of the day before.
        ("Sun 22:00-06:00", "2026-11-30 05:59", "2026-11-29 05:59"),
        ("Sun 22:00-06:00", "2026-11-29 22:00", "2026-11-30 22:00"),
        ("22:00-00:00", "2026-11-29 23:59", "2026-11-30 00:00"),
        # Berlin is an hour before UTC in winter, two in summer.
        ("08:00-18:00 Europe/Berlin", "2026-11-30 07:00", "2026-11-30 17:00"),
        ("08:00-18:00 Europe/Berlin", "2026-07-30 06:00", "2026-07-30 16:00"),
    ],
)
def test_hours(text: str, inside: str, outside: str) -> None:
    hours = parse_hours(text)
    assert hours.include(at(inside))
    assert not hours.include(at(outside))
    assert str(hours) == text


def minutes_of(day: str) -> Iterator[datetime]:
    begin = at(day)
    for minute in range(24 * 60):
        yield begin + timedelta(minutes=minute)


def test_an_hour_that_comes_twice_is_served_twice() -> None:
    """Clocks are set back from 03:00 to 02:00, on the last Sunday of October."""
    hours = parse_hours("02:00-03:00 Europe/Berlin")
    assert sum(map(hours.include, minutes_of("2026-10-25"))) == 120


def test_an_hour_that_is_left_out_is_not_served() -> None:
    """Clocks are set forward from 02:00 to 03:00, on the last Sunday of March."""
    hours = parse_hours("02:00-03:00 Europe/Berlin")
    assert sum(map(hours.include, minutes_of("2026-03-29"))) == 0
    night = parse_hours("Sat 22:00-06:00 Europe/Berlin")
    served = [*minutes_of("2026-03-28"), *minutes_of("2026-03-29")]
    assert sum(map(night.include, served)) == 7 * 60


@given(
    st.sets(st.sampled_from(DAYS), min_size=1),
    st.integers(0, 1439),
    st.integers(0, 1440),
    st.integers(0, 5_000_000).map(lambda n: at("2020-01-01") + timedelta(minutes=n)),
    st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"]),
)
def test_hours_are_as_the_clock_on_the_wall_shows(
    days: set[str], begin: int, end: int, moment: datetime, zone: str
) -> None:
    """The naive reading: from one day and time to another, on that zone's clocks."""
    if begin == end:
        return
    times = "-".join(f"{n // 60:02}:{n % 60:02}" for n in (begin, end))
    hours = parse_hours(f"{','.join(sorted(days))} {times} {zone}")
    there = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    expected = False
    for back in (0, 1):
        day = (there - timedelta(days=back)).replace(hour=0, minute=0)
        day = day.replace(second=0, microsecond=0)
        last = end if end > begin else end + 1440
        if DAYS[day.weekday()] in days:
            expected |= (
                day + timedelta(minutes=begin) <= there < day + timedelta(minutes=last)
            )
    assert hours.include(moment) is expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected hours such as"),
        ("Mon-Fri", "expected hours such as"),
        ("Mon Tue 08:00-18:00", "expected hours such as"),
        ("Mon 08:00-18:00 UTC UTC", "expected hours such as"),
        ("Mo 08:00-18:00", "'Mo' is no day: expected Mon, Tue"),
        ("Mon- 08:00-18:00", "'Mon-' is no day"),
        (", 08:00-18:00", "'' is no day"),
        ("8:00-18:00", "no range of times: expected one such as 08:00-18:00"),
        ("08:00", "no range of times"),
        ("08:60-18:00", "no range of times"),
        ("24:00-25:00", "no range of times"),
        ("08:00-24:01", "no range of times"),
        ("\u0660\u0668:00-18:00", "no range of times"),
        ("08:00-08:00", "has no time in it: for a whole day write 00:00-24:00"),
        ("00:00-24:00 Europe/Atlantis", "unknown zone 'Europe/Atlantis': expected"),
        ("00:00-24:00 Europe", "unknown zone 'Europe'"),
        ("00:00-24:00 ../../etc/passwd", "unknown zone"),
        ("00:00-24:00 /etc/localtime", "unknown zone"),
        ("00:00-24:00 a\0b", "unknown zone"),
    ],
)
def test_what_is_no_hours_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        parse_hours(text)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30) | st.text("MonTueFri-, :0123456789", max_size=30))
def test_any_text_is_hours_or_refused(text: str) -> None:
    try:
        hours = parse_hours(text)
    except ValueError:
        return
    assert hours.include(at("2026-01-01 00:00")) in (True, False)


class Wall:
    """The clock on the wall, set by the test."""

    def __init__(self, moment: str) -> None:
        self.moment = at(moment)
        self.asked = 0

    def __call__(self) -> datetime:
        self.asked += 1
        return self.moment


def test_the_wall_is_looked_at_once_a_second() -> None:
    """Of the monotonic clock: a step of the other is seen by then, either way."""
    clock, wall = Clock(), Wall("2026-11-30 07:59")
    hours = OpeningHours(
        [parse_hours("08:00-12:00"), parse_hours("14:00-18:00")], clock, wall
    )
    assert not hours.is_open()
    wall.moment = at("2026-11-30 08:00")
    clock.advance(0.5)
    assert not hours.is_open()
    clock.advance(0.5)
    assert hours.is_open()
    assert wall.asked == 2
    # Between the two, and in the second of them.
    for moment, is_open in (("12:00", False), ("14:00", True), ("07:00", False)):
        wall.moment = at(f"2026-11-30 {moment}")
        clock.advance(1)
        assert hours.is_open() is is_open
    with pytest.raises(ValueError, match="at least one"):
        OpeningHours([], clock)


def test_the_machines_clock_is_the_default() -> None:
    whole = "00:00-24:00"
    assert OpeningHours([parse_hours(whole)], Clock()).is_open()
