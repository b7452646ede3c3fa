"""When the relay was stopped, and that it always goes on."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soak.stops import LATE_REMEMBERED, LEAST, REMEMBERED, Stops, stop_now_and_then

times = st.integers(min_value=0, max_value=60)


@given(
    marks=st.lists(times, unique=True, max_size=12).map(sorted),
    since=times,
    length=times,
)
def test_the_time_in_which_the_relay_was_stopped(
    marks: list[int], since: int, length: int
) -> None:
    stops = Stops()
    for number, mark in enumerate(marks):
        (stops.end if number % 2 else stops.begin)(mark)
    until = since + length
    stopped = set()
    for began, ended in zip(marks[::2], [*marks[1::2], until], strict=False):
        stopped |= set(range(began, ended))
    assert stops.within(since, until) == len(stopped & set(range(since, until)))
    assert stops.count == (len(marks) + 1) // 2


def test_the_kept_stops_are_limited() -> None:
    stops = Stops()
    for number in range(10 * REMEMBERED):
        stops.begin(2 * number)
        stops.end(2 * number + 1)
    assert stops.within(0, 1e9) == REMEMBERED


def test_a_wait_does_not_count_the_time_of_a_stop() -> None:
    async def run() -> tuple[bool, float]:
        stops = Stops()
        began_at = time.monotonic()
        stops.begin(began_at)
        asyncio.get_running_loop().call_later(0.1, lambda: stops.end(time.monotonic()))
        came = await stops.wait(asyncio.Event(), 0.05)
        return came, time.monotonic() - began_at

    came, waited = asyncio.run(run())
    assert not came
    assert waited >= 0.15


def test_lateness_of_this_process_is_recorded() -> None:
    stops = Stops()
    stops.was_late(10.0, 10.0 + LEAST / 2)
    stops.was_late(20.0, 22.0)
    stops.begin(30.0)
    stops.end(35.0)
    assert stops.late_within(0.0, 21.0) == 1.0
    assert stops.latest_within(0.0, 100.0) == 2.0
    assert stops.latest_within(21.5, 100.0) == 0.5
    assert stops.within(0.0, 100.0) == 5.0
    assert stops.delay_within(0.0, 100.0) == 7.0
    for number in range(3 * LATE_REMEMBERED):
        stops.was_late(100.0 + number, 100.5 + number)
    assert stops.late_within(0.0, 1e9) == LATE_REMEMBERED / 2


def test_a_wait_ends_with_its_event() -> None:
    async def run() -> bool:
        event = asyncio.Event()
        asyncio.get_running_loop().call_soon(event.set)
        return await Stops().wait(event, 60)

    assert asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.01, 60])
def test_a_stopped_relay_is_always_continued(seconds: float) -> None:
    said: list[str] = []

    async def run() -> Stops:
        stops = Stops()
        stopping = asyncio.ensure_future(
            stop_now_and_then(
                stops,
                random.Random(1),
                every=0.001,
                seconds=seconds,
                suspend=lambda: said.append("stop"),
                resume=lambda: said.append("go"),
            )
        )
        await asyncio.sleep(0.05)
        stopping.cancel()
        await asyncio.wait([stopping])
        return stops

    stops = asyncio.run(run())
    assert stops.count >= 1
    assert said == ["stop", "go"] * stops.count
    now = time.monotonic()
    assert stops.within(now, now + 1) == 0
