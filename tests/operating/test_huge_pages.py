"""The memory of a process in huge pages."""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from relayd.operating import huge_pages
from relayd.operating.huge_pages import EACH, GROWN, HugePages, Memory, areas
from tests.conftest import descriptors

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="it is Linux that has them"
)

SIZE = 2 << 20

#: The pages of an area, as /proc/self/pagemap tells of them: one that is in memory.
PAGES = SIZE // os.sysconf("SC_PAGE_SIZE")
PRESENT, ABSENT = (1 << 63 | 1 << 55).to_bytes(8, "little"), bytes(8)

MAPS = """\
00400000-00900000 r-xp 00000000 fe:00 7                                  /usr/bin/x
00a00000-00e00000 rw-p 00500000 fe:00 7                                  /usr/bin/x
01100000-01700000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000600000-7f00007ff000 rw-p 00000000 00:00 0
7f0000800000-7f0000c00000 ---p 00000000 00:00 0
7f0001000000-7f0001400000 rw-s 00000000 00:01 9                          /dev/zero
7f0001800000-7f0001a00000 rw-p 00000000 00:00 0                          [anon: py]
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_whole_areas_of_the_heap_and_nameless_memory_are_looked_at() -> None:
    assert [*areas(MAPS, SIZE)] == [
        *(0x1200000, 0x1400000),
        *(0x7F0000000000, 0x7F0000200000),
        0x7F0001800000,
    ]


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 12), st.integers(0, 9))
def test_areas_are_whole_and_none_is_left_out(begin: int, pages: int, log: int) -> None:
    size, first, last = 4096 << log, begin * 4096, (begin + pages) * 4096
    found = [*areas(f"{first:x}-{last:x} rw-p 00000000 00:00 0 \n", size)]
    every = range(first // size * size, last, size)
    assert found == [a for a in every if a >= first and a + size <= last]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder instead of the kernel's."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{SIZE}\n")
    (tmp_path / "statm").write_text("9000 3000 2000 1 0 2000 0\n")
    monkeypatch.setattr(huge_pages, "SYSTEM", tmp_path)
    monkeypatch.setattr(huge_pages, "PROCESS", tmp_path)
    return tmp_path


#: What is told of areas: whether they are full.
Told = Callable[..., Memory]


@pytest.fixture
def told(system: Path) -> Iterator[Told]:
    made: list[Memory] = []

    def tell(*pages: int) -> Memory:
        """Areas of which so many pages are in memory."""
        begin = 16 * SIZE
        (system / "maps").write_text(
            f"{begin:x}-{begin + len(pages) * SIZE:x} rw-p 00000000 00:00 0 \n"
        )
        with (system / "pagemap").open("wb") as table:
            table.seek(begin // (SIZE // PAGES) * 8)
            for number in pages:
                table.write(PRESENT * number + ABSENT * (PAGES - number))
        memory = Memory.opened()
        assert memory is not None
        made.append(memory)
        return memory

    yield tell
    for memory in made:
        memory.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The areas that the kernel is asked to move."""
    found: list[int] = []

    def call(name: str, address: Any, size: Any, advice: int) -> int:
        assert (name, size.value, advice) == ("madvise", SIZE, 25)
        found.append(address.value // SIZE - 16)
        return 0

    monkeypatch.setattr(huge_pages, "call", call)
    return found


def test_what_is_not_full_stays_so_that_nothing_is_added(
    told: Told, asked: list[int]
) -> None:
    memory = told(PAGES, PAGES - 9, PAGES - 8, 0)
    assert memory.gather()
    assert asked == [0, 2]


@pytest.mark.parametrize(
    ("number", "again"),
    [
        (errno.EINVAL, False),
        (errno.EPERM, False),
        (errno.ENOSYS, False),
        (errno.ENOMEM, True),
        (errno.EAGAIN, True),
        (errno.EBUSY, True),
    ],
)
def test_a_refusal_ends_it_and_a_lack_only_this_time(
    number: int, again: bool, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def call(*args: object) -> int:
        calls.append(args)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huge_pages, "call", call)
    assert told(PAGES, PAGES).gather() is again
    assert len(calls) == 1


def test_what_the_operator_forbids_or_the_kernel_lacks_is_not_tried(
    system: Path, told: Told
) -> None:
    told()
    (system / "enabled").write_text("always madvise [never]\n")
    assert Memory.opened() is None
    (system / "enabled").unlink()
    assert Memory.opened() is None


def test_without_its_table_nothing_is_tried(system: Path) -> None:
    """Where /proc is not there, or belongs to another user."""
    assert Memory.opened() is None


class Threads:
    """What is done in a thread, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.works: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        monkeypatch.setattr(huge_pages, "aside", self.aside)

    def aside(self, _: Any, work: Callable[[], Any]) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()
        self.works.append((work, done))
        return done

    def work(self) -> None:
        work, done = self.works.pop()
        done.callback(work())


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


def started(clock: Clock) -> HugePages:
    service = HugePages(clock)
    service.startService()
    clock.advance(EACH)
    return service


def grow(system: Path, size: int) -> None:
    """The process has so much more in memory, in bytes."""
    pages = int((system / "statm").read_text().split()[1])
    pages += size // os.sysconf("SC_PAGE_SIZE")
    (system / "statm").write_text(f"9000 {pages} 2000 1 0 2000 0\n")


def test_it_is_done_soon_and_again_when_there_is_more(
    system: Path, told: Told, asked: list[int], threads: Threads
) -> None:
    told(PAGES)
    clock = Clock()
    service = started(clock)
    assert not asked
    threads.work()
    assert asked == [0]
    grow(system, GROWN - 4096)
    clock.advance(EACH)
    assert not threads.works
    grow(system, 4096)
    clock.advance(EACH)
    threads.work()
    assert asked == [0, 0]
    service.stopService()
    assert not clock.getDelayedCalls()


def test_its_end_waits_for_no_more_than_one_area(
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    threads: Threads,
) -> None:
    told(PAGES, PAGES, PAGES)
    clock = Clock()
    service = started(clock)
    calls = []

    def call(*args: object) -> int:
        calls.append(args)
        service.stopService()
        return 0

    monkeypatch.setattr(huge_pages, "call", call)
    before = len(descriptors())
    threads.work()
    assert len(calls) == 1
    assert len(descriptors()) == before - 1, "closed by now, and not while it is used"
    assert not clock.getDelayedCalls()


def test_nothing_is_left_if_another_part_cannot_start(told: Told) -> None:
    told(PAGES)
    clock = Clock()
    before = len(descriptors())
    service = HugePages(clock)
    service.startService()
    assert len(descriptors()) == before + 1
    service.close()
    service.close()
    assert len(descriptors()) == before
    assert not clock.getDelayedCalls()


#: What a relay does that begins as root and goes on as somebody else.  Says whether it
#: has opened what is root's, and how much was moved, in KiB; 0 if nothing could be.
GIVING_UP = """
import mmap, os, re
from pathlib import Path
from twisted.internet.task import Clock
from relayd.operating.huge_pages import HugePages, Memory
service = HugePages(Clock())
service.privilegedStartService()
os.setgroups([]), os.setgid(65534), os.setuid(65534)
service.startService()
links = [f"/proc/self/fd/{number}" for number in range(3, 30)]
print(any("pagemap" in os.readlink(each) for each in links if os.path.islink(each)))
room = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE)
room.write(b"x" * len(room))
moved = Memory.opened().gather()
told = re.findall(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps").read_text())
print(sum(map(int, told)) if moved else "refused")
"""


def test_what_root_has_opened_is_left_to_nobody_else() -> None:
    """It would tell where in the machine's memory each page is."""
    if os.geteuid() != 0:
        pytest.skip("it takes root to give that up")
    memory = Memory.opened()
    if memory is None:
        pytest.skip("no huge pages here (/sys/kernel/mm/transparent_hugepage)")
    memory.close()
    command = [sys.executable, "-c", GIVING_UP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    opened, moved = done.stdout.split()
    assert opened == "False"
    assert moved == "refused" or int(moved) >= 3 * SIZE // 1024


def test_where_it_is_refused_it_is_not_tried_again(
    told: Told, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "gather", lambda _: False)
    told(PAGES)
    clock = Clock()
    service = started(clock)
    threads.work()
    assert not clock.getDelayedCalls()
    service.stopService()


def test_where_there_are_none_it_does_nothing(system: Path, threads: Threads) -> None:
    clock = Clock()
    service = started(clock)
    assert not threads.works
    assert not clock.getDelayedCalls()
    service.stopService()


def test_a_thread_that_cannot_be_started_is_told_and_nothing_else(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aside(*_: object) -> Deferred[Any]:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(huge_pages, "aside", aside)
    told(PAGES)
    failures: list[Any] = []
    monkeypatch.setattr(
        huge_pages.log, "failure", lambda *said: failures.append(said), raising=False
    )
    service = started(Clock())
    [(text, failure)] = failures
    assert text == "the memory stays in small pages"
    assert failure.check(RuntimeError)
    service.stopService()


def test_the_kernel_moves_what_is_full() -> None:
    """And what is in it stays."""
    memory = Memory.opened()
    if memory is None:
        pytest.skip("no huge pages here (/sys/kernel/mm/transparent_hugepage)")
    size = memory.size
    with mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE) as room:
        text = os.urandom(4096)
        room.write(text * (4 * size // 4096))
        again = memory.gather()
        memory.close()
        if not again:
            pytest.skip("the kernel has no MADV_COLLAPSE, or a sandbox refuses")
        told = Path("/proc/self/smaps").read_text()
        found = map(int, re.findall(r"AnonHugePages: +(\d+) kB", told))
        assert sum(found) * 1024 >= 3 * size
        assert room[:] == text * (4 * size // 4096)
