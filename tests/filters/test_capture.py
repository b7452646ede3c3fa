"""Sessions as a capture has them: what a reader finds, whatever they do."""

from __future__ import annotations

import os
import random
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import SPLICE, Course
from relayd.core.session import Ending
from relayd.filters.capture import Capture
from relayd.filters.loading import filter_of
from tests.support.captured import COURSES, Captured
from tests.support.captures import Section, Stream, sections_of, streams_of
from tests.support.filtering import run_filter


@pytest.fixture
def clock() -> Clock:
    made = Clock()
    made.advance(5000)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.pcapng"


def section_of(path: Path) -> Section:
    [section] = sections_of(path.read_bytes())
    return section


def stream_of(path: Path) -> Stream:
    [stream] = streams_of(section_of(path))
    return stream


def test_a_session(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path)), clock, relay="web", peer="192.0.2.8:7")
    clock.advance(0.25)
    one.say("up", b"question")
    clock.advance(0.25)
    one.say("down", b"answer")
    one.end()
    found = stream_of(path)
    assert found.client == ("192.0.2.1", 1001)
    assert found.server == ("192.0.2.2", 8080)
    assert found.said == (b"question", b"answer")
    assert found.finished == ["up", "down"]
    assert not found.reset
    [comment] = found.comments
    assert comment == (
        "session=1 relay=web client=192.0.2.1:1001 peer=192.0.2.8:7"
        " listener=192.0.2.9:80 upstream=192.0.2.2:8080"
    )
    since = [each - found.times[0] for each in found.times]
    assert since == [0] * 3 + [250_000] * 2 + [500_000] * 6


def test_the_file_is_its_owners_alone(path: Path, clock: Clock) -> None:
    Captured(Capture(str(path)), clock).end()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_handshake_is_when_the_server_was_connected(
    path: Path, clock: Clock
) -> None:
    one = Captured(Capture(str(path)), clock, connected_at=clock.seconds() - 1.5)
    one.say("up", b"x")
    one.end()
    times = stream_of(path).times
    assert times[3] - times[0] == 1_500_000


def test_times_are_of_the_machine(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read once: a clock that is set meanwhile moves no packet."""
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_123_456_789)
    one = Captured(Capture(str(path)), clock)
    monkeypatch.setattr("time.time_ns", lambda: 0)
    clock.advance(1)
    one.end()
    times = stream_of(path).times
    assert times[0] == 1_700_000_000_123_456
    assert times[-1] == 1_700_000_001_123_456


def test_what_is_captured_is_written_within_a_turn(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path)), clock)
    one.say("up", b"x")
    assert not path.stat().st_size
    clock.advance(0)
    assert stream_of(path).said == (b"x", b"")
    assert not clock.getDelayedCalls()
    one.end()


def test_a_half_close(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path)), clock)
    one.say("up", b"all")
    assert one.filters["up"].end() == b""
    clock.advance(0)
    assert stream_of(path).finished == ["up"]
    one.say("down", b"answer")
    one.filters["down"].end()
    one.close()
    assert stream_of(path).finished == ["up", "down"]
    assert stream_of(path).said == (b"all", b"answer")


def test_a_direction_that_is_closed_with_the_session_has_a_fin(
    path: Path, clock: Clock
) -> None:
    """With `--half-close off` the first end of data ends both."""
    one = Captured(Capture(str(path)), clock)
    one.filters["down"].end()
    one.close()
    assert stream_of(path).finished == ["down", "up"]


def test_a_direction_whose_filter_is_closed_before_the_other(
    path: Path, clock: Clock
) -> None:
    one = Captured(Capture(str(path)), clock)
    one.filters["up"].end()
    one.filters.pop("up").close()
    one.say("down", b"more")
    one.close(Ending.IDLE)
    found = stream_of(path)
    assert found.finished == ["up"]
    assert found.said == (b"", b"more")
    assert found.reset == "down"


@pytest.mark.parametrize(
    ("ending", "side"),
    [
        (Ending.DOWNSTREAM_RESET, "up"),
        (Ending.DOWNSTREAM_LOST, "up"),
        (Ending.DOWNSTREAM_STALLED, "up"),
        (Ending.DOWNSTREAM_WRITE_FAILED, "up"),
        (Ending.UPSTREAM_RESET, "down"),
        (Ending.UPSTREAM_LOST, "down"),
        (Ending.KILLED, "down"),
        (Ending.FILTERED, "down"),
    ],
)
def test_resets(path: Path, clock: Clock, ending: Ending, side: str) -> None:
    one = Captured(Capture(str(path)), clock)
    one.say("up", b"x")
    # A reset of the source looks to its filters like an end of data.
    one.session.ending = ending
    for each in one.filters.values():
        each.end()
    one.close(ending, "for a reason")
    found = stream_of(path)
    assert found.reset == side
    assert not found.finished
    assert found.comments[1:] == [f"ending={ending.word} for a reason"]


def test_an_abort_whose_ending_is_not_known_yet(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path)), clock)
    one.filters["up"].end()
    one.filters.pop("up").close()
    one.close(None)
    found = stream_of(path)
    assert found.finished == ["up"]
    assert found.reset == "down"
    assert found.comments[1:] == ["ending=aborted"]


def test_a_reset_that_comes_behind_what_others_hold(path: Path, clock: Clock) -> None:
    """The other direction is cut off before, and what is held is passed on."""
    one = Captured(Capture(str(path)), clock)
    one.session.ending = Ending.UPSTREAM_RESET
    one.filters.pop("up").close()
    one.say("down", b"the last words")
    one.filters["down"].end()
    one.close(Ending.UPSTREAM_RESET)
    found = stream_of(path)
    assert found.said == (b"", b"the last words")
    assert not found.finished
    assert found.reset == "down"


def test_an_end_after_which_nothing_can_be_written(path: Path, clock: Clock) -> None:
    """As of TLS: what the server would say has no way any more."""
    one = Captured(Capture(str(path)), clock)
    one.filters.pop("down").close()
    one.say("up", b"bye")
    one.filters["up"].end()
    one.close(None)
    found = stream_of(path)
    assert found.said == (b"bye", b"")
    assert found.finished == ["up", "down"]
    assert not found.reset


def test_one_direction(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path), direction="down"), clock)
    assert set(one.filters) == {"down"}
    one.say("down", b"banner")
    one.end()
    found = stream_of(path)
    assert found.said == (b"", b"banner")
    assert found.finished == ["down"]


def test_so_many_bytes_of_each_direction(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path), bytes=5), clock)
    assert one.say("up", b"123") == b"123"
    assert one.say("up", b"45678") is SPLICE
    assert one.say("down", b"1234") == b"1234"
    assert one.say("down", b"5") is SPLICE
    assert not one.filters
    assert not clock.getDelayedCalls()
    found = stream_of(path)
    assert found.said == (b"12345", b"12345")
    assert not found.finished
    assert not found.reset
    assert found.comments[1:] == ["no more is captured (bytes=)"] * 2


def test_a_direction_of_which_no_more_is_captured_has_no_fin(
    path: Path, clock: Clock
) -> None:
    one = Captured(Capture(str(path), bytes=5), clock)
    assert one.say("up", b"123456") is SPLICE
    one.end()
    assert stream_of(path).finished == ["down"]


def test_one_that_is_taken_off_ends_without_an_end(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path)), clock)
    one.say("up", b"x")
    for each in one.filters.values():
        assert each.remove() == b""
    one.close(None)
    found = stream_of(path)
    assert found.said == (b"x", b"")
    assert not found.finished
    assert not found.reset


@pytest.mark.parametrize(
    ("client", "upstream", "ends"),
    [
        ("unix:/run/c", "192.0.2.2:80", (("198.18.0.1", 1025), ("192.0.2.2", 80))),
        ("-", "192.0.2.2:80", (("198.18.0.1", 1025), ("192.0.2.2", 80))),
        # A PROXY header may say anything.
        ("192.0.2.2:80", "192.0.2.2:80", (("198.18.0.1", 1025), ("192.0.2.2", 80))),
        (
            "192.0.2.1:7",
            "[2001:db8::2]:80",
            (("::ffff:192.0.2.1", 7), ("2001:db8::2", 80)),
        ),
    ],
)
def test_ends(
    path: Path, clock: Clock, client: str, upstream: str, ends: tuple[Any, Any]
) -> None:
    Captured(Capture(str(path)), clock, client=client, upstream=upstream).end()
    found = stream_of(path)
    assert (found.client, found.server) == ends
    assert f"client={client}" in found.comments[0]


def test_a_server_with_a_name(path: Path, clock: Clock) -> None:
    Captured(Capture(str(path)), clock, upstream="db.example:5432").end()
    found = stream_of(path)
    assert found.server[0].startswith("198.19.")
    assert found.server[1] == 5432
    assert "upstream=db.example:5432" in found.comments[0]


def test_a_client_that_comes_again_from_its_port(path: Path, clock: Clock) -> None:
    """A reader tells the two apart by their first numbers."""
    factory = Capture(str(path))
    for number in 1, 2:
        one = Captured(factory, clock, number, client="192.0.2.1:7")
        one.say("up", b"%d" % number)
        one.end()
    first, second = streams_of(section_of(path))
    assert first.client == second.client
    assert [each.said for each in (first, second)] == [(b"1", b""), (b"2", b"")]
    asked = [each.sequence for each in section_of(path).packets if each.flags == 2]
    assert abs(asked[0] - asked[1]) > 1 << 16


def test_nothing_is_changed_held_or_left(path: Path) -> None:
    for end in True, False:
        outcome = run_filter(Capture(str(path)), [b"one", b"two"], end=end)
        assert outcome.output == b"onetwo"
        assert outcome.ended is None
        assert not outcome.most_held


# -- options


def test_options(path: Path) -> None:
    options = {"": str(path), "size": "2MiB", "keep": "3", "bytes": "4kB"}
    made = filter_of(FilterSpec("capture", {**options, "direction": "up"}), "tcp")
    assert made == Capture(str(path), 2 << 20, 3, 4000, "up")
    assert made != Capture(str(path), 2 << 20, 3, 4000, "down")
    assert made.name == "capture"
    assert not made.joins
    assert not path.exists(), "it is made for the first session"


def test_a_relative_path_is_one_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Capture("c.pcapng").file == str(tmp_path / "c.pcapng")


def make(path: Path, kind: str) -> None:
    """A file that a capture refuses."""
    if kind == "link":
        path.symlink_to(path.with_suffix(".other"))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("127.0.0.1 localhost\n")


REFUSED = {
    "link": "it is a symbolic link, which a capture does not follow",
    "folder": "expected a file, not a folder, a pipe or a device",
    "pipe": "expected a file, not a folder, a pipe or a device",
    "text": "it has something else than a pcapng capture",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(path: Path, kind: str) -> None:
    make(path, kind)
    with pytest.raises(ValueError, match=re.escape(REFUSED[kind])):
        Capture(str(path))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("/dev/full", "expected a file, not a folder, a pipe or a device"),
        ("/nonexistent/c.pcapng", "No such file or directory"),
        ("/dev/null/c.pcapng", "Not a directory"),
        ("/var/tmp/" + "c" * 253, "File name too long"),
        ("/var/tmp/c\0.pcapng", "expected a name without a null byte"),
    ],
)
def test_a_file_that_cant_be_written_is_one_line(file: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        filter_of(FilterSpec("capture", {"": file}), "tcp")
    shown = re.escape(file.replace("\0", r"\x00"))
    assert re.fullmatch(
        f"filter 'capture:.*': can't capture to {shown}: ({why})", str(caught.value)
    )


def test_a_folder_that_cant_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write to any.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="Permission denied"):
        Capture(str(path))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("size", "1000"), ("size", "no"), ("keep", "-1"), ("keep", "100")),
        *(("bytes", "0"), ("direction", "both"), ("sise", "1MiB")),
    ],
)
def test_options_out_of_their_bounds(path: Path, option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        filter_of(FilterSpec("capture", {"": str(path), option: value}), "tcp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"size": 5}, {"keep": 100}, {"bytes": 0}])
def test_the_same_in_python(path: Path, options: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        Capture(str(path), **options)


def test_it_is_for_streams(path: Path) -> None:
    with pytest.raises(ConfigError, match="not for a relay of udp"):
        filter_of(FilterSpec("capture", {"": str(path)}), "udp")


# -- any sessions


@attrs.frozen
class Script:
    """What a session does.

    :ivar steps: which direction, and its bytes; None is its end.
    """

    client: str
    upstream: str
    steps: Sequence[tuple[Course, bytes | None]]
    ending: Ending


CHUNKS = st.one_of(
    st.binary(max_size=20).filter(bool),
    st.sampled_from([1, 1460, 32767, 32768, 32769, 65536, 100_001]).map(
        lambda size: bytes(range(256)) * (size // 256) + bytes(size % 256)
    ),
)
SCRIPTS = st.builds(
    Script,
    st.sampled_from(["192.0.2.1:{}", "[2001:db8::1]:{}", "unix:", "-"]),
    st.sampled_from(["192.0.2.2:80", "[2001:db8::2]:80", "db.example:5432", "unix:/s"]),
    st.lists(st.tuples(st.sampled_from(COURSES), CHUNKS | st.none()), max_size=8),
    st.sampled_from(
        [Ending.DONE, Ending.DOWNSTREAM_RESET, Ending.UPSTREAM_RESET, Ending.KILLED]
    ),
)


@given(st.lists(SCRIPTS, min_size=1, max_size=5), st.integers(0, 999))
def test_any_sessions_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    scripts: list[Script],
    seed: int,
) -> None:
    """What a reader finds is what was said, in its order, and how it ended."""
    path = tmp_path_factory.mktemp("any") / "c.pcapng"
    clock, factory, chance = Clock(), Capture(str(path)), random.Random(seed)
    wanted: list[tuple[tuple[bytes, bytes], list[str], str]] = []
    plays: list[list[Callable[[], Any]]] = []
    for number, script in enumerate(scripts, 1):
        plays.append(_play(script, factory, clock, number, wanted))
    while any(plays):
        play = chance.choice([each for each in plays if each])
        play.pop(0)()
        clock.advance(chance.choice([0, 0.001]))
    assert not clock.getDelayedCalls()
    found = [
        stream for each in sections_of(path.read_bytes()) for stream in streams_of(each)
    ]
    assert sorted([(each.said, each.finished, each.reset) for each in found]) == sorted(
        wanted
    )


def _play(
    script: Script, factory: Capture, clock: Clock, number: int, wanted: list[Any]
) -> list[Callable[[], Any]]:
    """The steps of a session, as functions; what a reader is to find is added."""
    made: list[Captured] = []
    said = {"up": b"", "down": b""}
    finished: list[str] = []
    todo: list[Callable[[], Any]] = [
        lambda: made.append(
            Captured(
                factory,
                clock,
                number,
                client=script.client.format(number),
                upstream=script.upstream,
            )
        )
    ]
    for course, data in script.steps:
        if course in finished:
            continue
        if data is None:
            finished.append(course)
            todo.append(lambda course=course: made[0].filters[course].end())  # type: ignore[misc]
        else:
            said[course] += data
            todo.append(lambda course=course, data=data: made[0].say(course, data))  # type: ignore[misc]
    todo.append(lambda: made[0].close(script.ending))
    reset = ""
    if script.ending is Ending.DONE:
        finished += [each for each in COURSES if each not in finished]
    else:
        reset = "up" if script.ending is Ending.DOWNSTREAM_RESET else "down"
    wanted.append(((said["up"], said["down"]), finished, reset))
    return todo
