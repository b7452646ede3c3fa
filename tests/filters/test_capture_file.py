"""Capture files: appended to, begun anew, full, in the way, taken away."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, globalLogPublisher
from zope.interface import implementer

from relayd.core.filtering import SPLICE
from relayd.filters import capture_file, pcapng
from relayd.filters.capture import Capture
from relayd.filters.capture_file import LEAST_SIZE, MOST_KNOWN, RETRY, CaptureFile
from tests.support.captured import Captured
from tests.support.captures import Stream, sections_of, streams_of

#: As many bytes as are read at once.
CHUNK = bytes(range(256)) * 256


@pytest.fixture
def clock() -> Clock:
    made = Clock()
    made.advance(5000)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.pcapng"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log says of captures."""
    found: list[str] = []

    @implementer(ILogObserver)
    def note(event: Any) -> None:
        if event["log_namespace"] == "relayd.capture":
            found.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(note)
    yield found
    globalLogPublisher.removeObserver(note)


def all_streams(*paths: Path) -> list[Stream]:
    """The streams of files, each of which is whole."""
    return [
        stream
        for path in paths
        for section in sections_of(path.read_bytes())
        for stream in streams_of(section)
    ]


def ended(path: Path, why: str) -> str:
    return (
        f"the capture to {path} has ended: {why}; sessions go on, and those that begin"
        " in 60 s or later are captured again"
    )


# -- who has it open


def test_it_is_open_while_a_session_is_captured(path: Path, clock: Clock) -> None:
    factory = Capture(str(path))
    first = Captured(factory, clock, 1)
    second = Captured(factory, clock, 2)
    first.end()
    assert CaptureFile.of(str(path)).is_open
    second.end()
    assert not CaptureFile.of(str(path)).is_open
    assert len(all_streams(path)) == 2


def test_the_next_session_goes_on_in_the_same_section(path: Path, clock: Clock) -> None:
    factory = Capture(str(path))
    for number in 1, 2, 3:
        Captured(factory, clock, number).end()
    [section] = sections_of(path.read_bytes())
    assert len(streams_of(section)) == 3


def test_a_reload_goes_on_with_it(path: Path, clock: Clock) -> None:
    """The old factory's sessions and those of the new one have one writer."""
    before = Captured(Capture(str(path), keep=1), clock, 1)
    after = Captured(Capture(str(path), keep=2), clock, 2)
    before.say("up", b"before")
    after.say("up", b"after")
    before.end()
    after.say("up", b", too")
    after.end()
    [section] = sections_of(path.read_bytes())
    assert [each.said[0] for each in streams_of(section)] == [b"before", b"after, too"]


def test_a_file_of_another_process_is_appended_to(path: Path, clock: Clock) -> None:
    """With a section of its own; its mode stays."""
    other = pcapng.section("dumpcap") + pcapng.interface("eth0", "wires")
    path.write_bytes(other)
    path.chmod(0o640)
    Captured(Capture(str(path)), clock).end()
    first, second = sections_of(path.read_bytes())
    assert path.read_bytes().startswith(other)
    assert first.application == "dumpcap"
    assert len(streams_of(second)) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_empty_file_is_begun(path: Path, clock: Clock) -> None:
    path.touch()
    Captured(Capture(str(path)), clock).end()
    assert len(all_streams(path)) == 1


def test_one_that_somebody_has_changed_meanwhile_gets_a_section(
    path: Path, clock: Clock
) -> None:
    factory = Capture(str(path))
    Captured(factory, clock, 1).end()
    path.write_bytes(path.read_bytes() + pcapng.section("editcap"))
    Captured(factory, clock, 2).end()
    assert len(sections_of(path.read_bytes())) == 3
    assert len(all_streams(path)) == 2


def test_one_that_was_moved_away_is_begun(path: Path, clock: Clock) -> None:
    factory = Capture(str(path))
    Captured(factory, clock, 1).end()
    moved = path.rename(path.with_name("moved"))
    Captured(factory, clock, 2).end()
    assert len(all_streams(path)) == len(all_streams(moved)) == 1


@pytest.mark.parametrize("deleted", [False, True])
def test_one_that_is_moved_away_while_it_is_open_is_begun(
    path: Path, clock: Clock, deleted: bool
) -> None:
    """With the next session, though others have it open; they go on in it."""
    factory = Capture(str(path))
    moved = path.with_name("moved")
    one = Captured(factory, clock, 1)
    one.say("up", b"before")
    path.rename(moved)
    if deleted:
        moved.unlink()
    two = Captured(factory, clock, 2)
    one.say("up", b"after")
    two.say("up", b"two")
    one.end()
    two.end()
    [section] = sections_of(path.read_bytes())
    payloads = [each.payload for each in section.packets if each.payload]
    assert payloads == [b"after", b"two"]
    if not deleted:
        assert [each.said[0] for each in all_streams(moved)] == [b"before"]


def test_one_that_ends_in_a_block_is_begun_anew(
    path: Path, clock: Clock, lines: list[str]
) -> None:
    """Its writer was killed: what is behind that block could not be read."""
    Captured(Capture(str(path)), clock, 1).end()
    cut = path.read_bytes()[:-6]
    path.write_bytes(cut)
    Captured(Capture(str(path)), clock, 2).end()
    assert len(all_streams(path)) == 1
    assert path.with_name("c.pcapng.1").read_bytes() == cut
    assert lines == [
        f"the capture {path} ends in the middle of a packet: it is begun anew"
    ]


def test_only_one_process_writes_to_a_file(
    path: Path, clock: Clock, lines: list[str]
) -> None:
    path.touch()
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        # A check of the settings of one that runs finds nothing wrong.
        one = Captured(Capture(str(path)), clock)
        assert not one.filters
    assert lines == [ended(path, "another process writes to it")]


def test_file_systems_without_locks_do(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    Captured(Capture(str(path)), clock).end()
    assert len(all_streams(path)) == 1


# -- sizes


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_it_is_begun_anew_when_it_is_long(path: Path, clock: Clock, keep: int) -> None:
    factory = Capture(str(path), size=LEAST_SIZE, keep=keep)
    one = Captured(factory, clock)
    for _ in range(100):
        one.say("down", CHUNK)
        clock.advance(0)
    one.end()
    kept = [path.with_name(f"c.pcapng.{number + 1}") for number in range(keep)]
    assert sorted(path.parent.iterdir()) == sorted([path, *kept])
    for each in [path, *kept]:
        assert each.stat().st_size <= LEAST_SIZE
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
        [section] = sections_of(each.read_bytes())
        assert section.packets
    for each in kept:
        assert each.stat().st_size > LEAST_SIZE - 70_000


def test_nothing_is_lost_between_two_files(path: Path, clock: Clock) -> None:
    one = Captured(Capture(str(path), size=LEAST_SIZE, keep=9), clock)
    for _ in range(60):
        one.say("up", CHUNK)
    one.end()
    files = sorted(path.parent.iterdir(), key=lambda each: each.name, reverse=True)
    assert len(files) == 4
    packets = [
        packet for each in files for packet in sections_of(each.read_bytes())[0].packets
    ]
    [section] = sections_of(files[0].read_bytes())
    section.packets = packets
    [stream] = streams_of(section)
    assert stream.said == (CHUNK * 60, b"")
    assert stream.finished == ["up", "down"]


def test_one_that_is_long_already_is_begun_anew(path: Path, clock: Clock) -> None:
    other = pcapng.section("dumpcap")
    path.write_bytes(other * (LEAST_SIZE // len(other) + 1))
    size = path.stat().st_size
    Captured(Capture(str(path), size=LEAST_SIZE), clock).end()
    assert len(all_streams(path)) == 1
    assert path.with_name("c.pcapng.1").stat().st_size == size


def test_what_waits_is_bounded(path: Path, clock: Clock) -> None:
    """Many sessions may be read in one turn."""
    one = Captured(Capture(str(path)), clock)
    for _ in range(40):
        one.say("up", CHUNK)
    assert 40 * len(CHUNK) - path.stat().st_size < capture_file.MOST_GATHERED
    one.end()
    assert all_streams(path)[0].said == (CHUNK * 40, b"")


def test_an_old_one_that_cant_be_renamed_ends_the_capture(
    path: Path, clock: Clock, lines: list[str]
) -> None:
    path.with_name("c.pcapng.1").mkdir()
    one = Captured(Capture(str(path), size=LEAST_SIZE, keep=1), clock)
    answers = [one.say("up", CHUNK) for _ in range(20) if one.filters.get("up")]
    assert answers[-1] is SPLICE
    assert lines == [ended(path, "Is a directory")]
    one.end()


def test_another_process_that_has_the_new_one_first_ends_the_capture(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and the lock."""
    one = Captured(Capture(str(path), size=LEAST_SIZE), clock)

    def refuse(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.flock", refuse)
    answers = [one.say("up", CHUNK) for _ in range(20) if one.filters.get("up")]
    assert answers[-1] is SPLICE
    assert lines == [ended(path, "another process writes to it")]
    one.end()


# -- errors


@pytest.fixture
def little_room() -> Iterator[int]:
    """No file may be longer than this; SIGXFSZ is ignored, as Python has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 300_001
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    yield room
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_full_ends_the_capture_and_no_session(
    path: Path, clock: Clock, lines: list[str], little_room: int
) -> None:
    one = Captured(Capture(str(path)), clock, 1)
    other = Captured(Capture(str(path)), clock, 2)
    passed = 0
    while "up" in one.filters:
        one.say("up", CHUNK)
        clock.advance(0)
        passed += 1
    assert passed < 10
    assert lines == [ended(path, "File too large")]
    # The other finds out with its next bytes; and so do the other directions.
    for each, course in (other, "up"), (other, "down"), (one, "down"):
        assert each.say(course, b"x") is SPLICE  # type: ignore[arg-type]
    one.close()
    other.close()
    assert len(lines) == 1
    # What it has is whole.
    assert little_room - 70_000 < path.stat().st_size <= little_room
    first, second = all_streams(path)
    said = first.said[0]
    assert len(said) > 3 * len(CHUNK)
    assert (CHUNK * 10).startswith(said)
    assert second.said == (b"", b"")


def test_a_capture_that_has_ended_is_tried_again_a_minute_later(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = Capture(str(path))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        Captured(factory, clock, 1).end()
        assert lines == [ended(path, "No space left on device")]
        assert not Captured(factory, clock, 2).filters
        clock.advance(RETRY)
        # And it is still full, which is another line.
        Captured(factory, clock, 3).end()
        assert len(lines) == 2
        clock.advance(RETRY - 0.1)
        assert not Captured(factory, clock, 4).filters
    clock.advance(0.1)
    five = Captured(factory, clock, 5)
    five.say("up", b"five")
    five.end()
    assert len(lines) == 2
    [stream] = all_streams(path)
    assert stream.said == (b"five", b"")


def test_what_was_written_in_part_is_taken_away(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every byte of what waits."""
    real = os.write
    for number in range(0, 600, 7):
        with monkeypatch.context() as patch:
            calls: list[int] = []

            def little(
                to: int, data: bytes, calls: Any = calls, room: int = number
            ) -> int:
                if calls or not room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                calls.append(room)
                return real(to, data[:room])

            patch.setattr("os.write", little)
            one = Captured(Capture(str(path)), clock, number)
            one.say("up", b"x" * 200)
            one.end()
        assert len(lines) == 1
        lines.clear()
        # Every block that is there is whole.
        assert number - 270 < path.stat().st_size <= number
        all_streams(path)
        path.unlink()
        clock.advance(RETRY)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "text"])
def test_what_is_in_the_way_later_is_not_written_to(
    path: Path, clock: Clock, lines: list[str], kind: str
) -> None:
    """Between the check of the settings and the first session."""
    factory = Capture(str(path))
    target = path.with_name("target")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        target.touch()
        path.symlink_to(target)
    else:
        path.write_text("127.0.0.1 localhost\n")
    one = Captured(factory, clock)
    assert not one.filters
    [line] = lines
    assert line.startswith(f"the capture to {path} has ended: ")
    if kind == "link":
        assert not target.stat().st_size
    if kind == "text":
        assert path.read_text() == "127.0.0.1 localhost\n"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_not_even_opened(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A device may do something when it is."""
    factory = Capture(str(path))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    opened: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.open", lambda *args: opened.append(args))
        assert not Captured(factory, clock).filters
        with pytest.raises(ValueError, match="can't capture"):
            Capture(str(path))
    assert not opened


def test_a_link_that_comes_between_is_not_followed(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = Capture(str(path))
    target = path.with_name("target")
    target.touch()
    path.symlink_to(target)
    monkeypatch.setattr(capture_file, "_refuse_others", lambda path: None)
    assert not Captured(factory, clock).filters
    assert lines == [ended(path, "Too many levels of symbolic links")]
    assert not target.stat().st_size


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_one_of_somebody_else_in_a_folder_for_all_is_not_written_to(
    path: Path,
    clock: Clock,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
) -> None:
    """Who has put it there could read it."""
    path.touch()
    path.parent.chmod(mode)
    user = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: user)
    one = Captured(Capture(str(path)), clock)
    assert bool(one.filters) is (mode == 0o755)
    why = "it belongs to another user, in a folder that is for all"
    assert lines == ([] if one.filters else [ended(path, why)])
    one.end()
    assert bool(path.stat().st_size) is (mode == 0o755)


def test_without_descriptors_the_session_goes_on(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = Capture(str(path))

    def none_left(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("os.open", none_left)
        assert not Captured(factory, clock).filters
    assert lines == [ended(path, "Too many open files")]


# -- filters of single sessions, which do not outlive them


def test_it_is_known_how_a_file_was_left_of_which_no_filter_is_left(
    path: Path, clock: Clock
) -> None:
    """As of a route: each session has a filter of its own."""
    for number in 1, 2, 3:
        Captured(Capture(str(path)), clock, number).end()
        gc.collect()
    [section] = sections_of(path.read_bytes())
    assert len(streams_of(section)) == 3


def test_an_error_is_told_once_for_all_of_them(
    path: Path, clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    for number in range(10):
        Captured(Capture(str(path)), clock, number).end()
        gc.collect()
    assert lines == [ended(path, "No space left on device")]


def test_only_so_many_files_are_known(tmp_path: Path, clock: Clock) -> None:
    """Also if each client has a file of its own; and none of them is open."""
    for number in range(MOST_KNOWN + 5):
        Captured(Capture(str(tmp_path / f"{number}.pcapng")), clock, number).end()
    gc.collect()
    known = [CaptureFile._all.get(str(each)) for each in tmp_path.iterdir()]
    left = [each for each in known if each is not None]
    assert len(left) == MOST_KNOWN
    assert not any(each.is_open for each in left)
    forgotten = tmp_path / "0.pcapng"
    assert CaptureFile._all.get(str(forgotten)) is None
    # It is appended to all the same.
    Captured(Capture(str(forgotten)), clock, 1000).end()
    assert len(all_streams(forgotten)) == 2


def test_one_that_is_written_to_is_not_forgotten(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "c.pcapng"
    one = Captured(Capture(str(path)), clock)
    for number in range(MOST_KNOWN + 5):
        Captured(Capture(str(tmp_path / f"{number}.pcapng")), clock, number).end()
    gc.collect()
    other = Captured(Capture(str(path)), clock, 2)
    one.say("up", b"one")
    other.say("up", b"other")
    one.end()
    assert CaptureFile.of(str(path)).is_open
    other.end()
    assert not CaptureFile.of(str(path)).is_open
    [section] = sections_of(path.read_bytes())
    assert [each.said[0] for each in streams_of(section)] == [b"one", b"other"]


def test_a_session_that_can_not_be_captured_leaves_no_file_open(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("relayd.filters.capture.SessionCapture", fails)
    with pytest.raises(RuntimeError):
        Captured(Capture(str(path)), clock)
    assert not CaptureFile.of(str(path)).is_open
