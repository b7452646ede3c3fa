"""A capture of a session that goes on: what its reader takes, and what it does not."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.filtering import SPLICE
from relayd.core.session import Ending
from relayd.filters.live_capture import LiveCapture
from tests.support.captured import COURSES, Captured
from tests.support.captures import Section, sections_of, streams_of


class Sink:
    """Takes blocks, while it has room.

    :ivar data: what it has taken.
    :ivar done: with what it was told that it is over.
    """

    def __init__(self) -> None:
        self.data = b""
        self.has_room = True
        self.done: list[str] = []

    def __call__(self, block: bytes) -> bool:
        assert not self.done
        assert len(block) <= 65536
        if self.has_room:
            self.data += block
        return self.has_room

    @property
    def section(self) -> Section:
        [section] = sections_of(self.data)
        return section


@pytest.fixture
def clock() -> Clock:
    made = Clock()
    made.advance(5000)
    return made


@pytest.fixture
def sink() -> Sink:
    return Sink()


def captured(sink: Sink, clock: Clock, most: int | None = None) -> Captured:
    """A session that has gone on for ten seconds, captured from now on."""
    factory = LiveCapture(sink, most, sink.done.append)
    return Captured(factory, clock, opened_at=clock.seconds() - 10, relay="web")


def counts(section: Section) -> tuple[int, int]:
    """How many packets there were, and how many were dropped."""
    [received] = struct.unpack("<Q", section.statistics[4])
    [dropped] = struct.unpack("<Q", section.statistics[5])
    return received, dropped


def test_it_begins_now(sink: Sink, clock: Clock) -> None:
    """With a handshake that it has not seen, which its comment says."""
    one = captured(sink, clock)
    [stream] = streams_of(sink.section)
    assert stream.comments == [
        (
            "session=1 relay=web client=192.0.2.1:1001 listener=192.0.2.9:80"
            " upstream=192.0.2.2:8080 (captured from its second 10.000 on, after up=0"
            " down=0 bytes)"
        )
    ]
    one.end()


def test_all_of_it(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock)
    data = bytes(range(256)) * 256
    one.say("up", b"question")
    one.say("down", data)
    clock.advance(2)
    one.end()
    [stream] = streams_of(sink.section)
    assert stream.said == (b"question", data)
    assert stream.finished == ["up", "down"]
    assert counts(sink.section) == (len(sink.section.packets), 0)
    found = sink.section.statistics
    assert found[1] == b"ending=done"
    assert found["time"] - stream.times[0] == 2_000_000
    assert struct.unpack("<II", found[2])[1] == stream.times[0] & 0xFFFFFFFF
    assert found[3] == struct.pack(
        "<II", found["time"] >> 32, found["time"] & 0xFFFFFFFF
    )
    assert sink.done == ["done"]


def test_what_is_not_taken_is_a_gap_that_is_counted(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock)
    one.say("up", b"one")
    sink.has_room = False
    assert one.say("up", b"not seen") == b"not seen"
    assert one.say("down", b"neither") == b"neither"
    sink.has_room = True
    one.say("up", b"three")
    one.end()
    [stream] = streams_of(sink.section)
    assert stream.up == [b"one", None, b"three"]
    # Its FIN comes behind what is missing.
    assert stream.down == [None]
    received, dropped = counts(sink.section)
    assert dropped == 2
    assert received == len(sink.section.packets) + 2


def test_the_gap_is_as_long_as_what_is_missing(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock)
    sink.has_room = False
    one.say("up", b"x" * 70_000)
    sink.has_room = True
    one.say("up", b"y")
    first, *_ = [each for each in sink.section.packets if each.flags == 2]
    last = [each for each in sink.section.packets if each.payload]
    assert [each.payload for each in last] == [b"y"]
    assert last[0].sequence - first.sequence & 0xFFFFFFFF == 70_001
    one.end()


def test_so_many_bytes_of_each_direction(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock, most=4)
    assert one.say("up", b"123456") is SPLICE
    assert not sink.done
    one.say("down", b"123")
    assert one.say("down", b"4") is SPLICE
    assert sink.done == [""]
    [stream] = streams_of(sink.section)
    assert stream.said == (b"1234", b"1234")
    assert not stream.finished
    assert not stream.reset
    assert sink.section.statistics[1] == b"the session goes on"


def test_a_direction_that_ends_before_it_has_so_many(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock, most=4)
    one.say("up", b"12")
    one.filters["up"].end()
    one.filters.pop("up").close()
    assert not sink.done
    assert one.say("down", b"1234") is SPLICE
    assert sink.done == [""]


def test_one_that_is_taken_off(sink: Sink, clock: Clock) -> None:
    """Its reader has left."""
    one = captured(sink, clock)
    for each in COURSES:
        made = one.filters.pop(each)
        assert made.remove() == b""
        made.close()
    assert sink.done == [""]
    assert sink.section.statistics[1] == b"the session goes on"


@pytest.mark.parametrize("ending", [Ending.DOWNSTREAM_RESET, Ending.KILLED])
def test_one_that_is_reset(sink: Sink, clock: Clock, ending: Ending) -> None:
    one = captured(sink, clock)
    one.close(ending)
    [stream] = streams_of(sink.section)
    assert stream.reset
    assert stream.comments[1:] == [f"ending={ending.word}"]
    assert sink.done == [ending.word]


def test_a_sink_that_takes_nothing_more(sink: Sink, clock: Clock) -> None:
    one = captured(sink, clock)
    sink.has_room = False
    for _ in range(10):
        one.say("down", b"x" * 65536)
    one.end()
    assert sink.done == ["done"]
    assert not sink.section.statistics


def test_two_of_them_are_two(sink: Sink) -> None:
    """Which are told apart as one of them is taken off."""
    same: Any = sink
    assert LiveCapture(same) != LiveCapture(same)
    assert LiveCapture(same).joins
