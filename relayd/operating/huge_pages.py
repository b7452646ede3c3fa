"""The process's memory in huge pages, which the processor finds faster (Linux 6.1).

What a session needs is spread over the memory of the interpreter, in pages of 4 KiB.
The processor remembers where some hundreds or thousands of pages are.  For the others
it asks tables in memory, in a virtual machine those of two machines.  A relay with few
sessions has more pages than that already: in huge pages of 2 MiB a short session takes
6 to 11 % less CPU (docs/costs.md).

Python asks for memory in parts of 1 MiB, to which the kernel gives no huge pages by
itself.  So it is asked to move what is there (madvise(2), MADV_COLLAPSE), soon after
the process has started, and later when it has grown.  That takes some 50 ms of CPU at
first, which one that ends at once had better not spend.  Only areas are moved whose
pages are in use, all but :data:`UNUSED`, as /proc/self/pagemap tells: the process takes
hardly more memory by it.  The kernel may take a while to find a huge page, so this is
done in a thread, area by area; a process that stops waits for one at most.

That file tells root where in the machine's memory each page is as well, and goes on to
tell it by a descriptor that root has opened (Documentation/admin-guide/mm/pagemap.rst
of Linux).  So it is opened once rights are given up.  It may be root's alone then:
mincore(2) is asked, which many a sandbox lacks.

Where the operator has said `never` in /sys/kernel/mm/transparent_hugepage/enabled, or
the kernel or a sandbox refuses, everything stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import attrs
from twisted.application.service import Service
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.net.libc import call
from relayd.net.monotonic import monotonic
from relayd.operating.aside import aside

log = Logger(namespace="relayd.memory")

#: madvise(2): since Linux 6.1.
MADV_COLLAPSE = 25

#: Where the kernel says how it gives huge pages, and what a process has.
SYSTEM, PROCESS = Path("/sys/kernel/mm/transparent_hugepage"), Path("/proc/self")

#: Pages of an area that may be unused: 32 KiB in 2 MiB.
UNUSED = 8

#: Seconds from the start to a look at how much memory there is, and from one to the
#: next; and how much more of it, in bytes, is worth another search.
EACH, GROWN = 5.0, 256 * 1024

#: What /proc/PID/pagemap has for each page, in bytes.  The highest bit says whether it
#: is in memory; of the byte that mincore(2) has for it, the lowest.
_ENTRY = 8
_ABSENT, _NOT_IN_CORE = bytes(range(0x80)), bytes(range(0, 0x100, 2))

#: The kernel can't do it, or a sandbox does not let it.
_NEVER = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES}


def areas(maps: str, size: int) -> Iterator[int]:
    """The areas of private anonymous memory in which there may be a huge page.

    :param maps: what /proc/PID/maps says (proc_pid_maps(5)).
    :param size: of a huge page, in bytes.
    :return: the addresses of those that are whole.
    """
    for line in maps.splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        named = bool(name) and not name[0].startswith(("[heap]", "[anon"))
        if rights != "rw-p" or inode != "0" or named:
            continue
        begin, end = (int(text, 16) for text in span.split("-"))
        # Up to the next multiple.
        yield from range(begin + -begin % size, end - size + 1, size)


@attrs.define
class Memory:
    """The memory of this process.

    :ivar size: of a huge page, in bytes.
    :ivar is_over: nothing more is to be moved.
    """

    size: int
    #: None if it is root's.
    _pagemap: int | None
    is_over: bool = False

    @classmethod
    def opened(cls) -> Self | None:
        """As it is asked for; None where there are no huge pages to be had."""
        try:
            if "[never]" in (SYSTEM / "enabled").read_text():
                return None
            return cls(int((SYSTEM / "hpage_pmd_size").read_text()), _pagemap())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Give the descriptor back."""
        if self._pagemap is not None:
            os.close(self._pagemap)

    def resident(self) -> int:
        """How much is in memory, in bytes.

        :raises OSError: the system does not say.
        """
        pages = int((PROCESS / "statm").read_text().split()[1])
        return pages * _page()

    def gather(self) -> bool:
        """Move what is full into huge pages.

        :return: whether it is worth trying again, when there is more.
        """
        try:
            found = [*areas((PROCESS / "maps").read_text(), self.size)]
            for address in found:
                if self.is_over:
                    break
                if self._is_full(address):
                    self._ask("madvise", address, MADV_COLLAPSE)
        except OSError as problem:
            # Else there is no huge page now, or what was found is gone by now.
            return problem.errno not in _NEVER
        return True

    def _is_full(self, address: int) -> bool:
        pages = self.size // _page()
        if self._pagemap is None:
            told = ctypes.create_string_buffer(pages)
            self._ask("mincore", address, told)
            present = told.raw.translate(None, _NOT_IN_CORE)
        else:
            where = address // _page() * _ENTRY
            entries = os.pread(self._pagemap, pages * _ENTRY, where)
            # The last byte of each entry has its highest bit.
            present = entries[_ENTRY - 1 :: _ENTRY].translate(None, _ABSENT)
        return len(present) >= pages - UNUSED

    def _ask(self, name: str, address: int, what: object) -> None:
        call(name, ctypes.c_void_p(address), ctypes.c_size_t(self.size), what)


def _pagemap() -> int | None:
    try:
        return os.open(PROCESS / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return None


def _page() -> int:
    return os.sysconf("SC_PAGE_SIZE")


class HugePages(Service):
    """Moves the process's memory into huge pages, from its start to its stop.

    :param reactor: whose threads do so.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._memory: Memory | None = None
        self._seen = 0
        self._is_working = False
        self._next: IDelayedCall | None = None

    def startService(self) -> None:
        """Begin, in a while."""
        super().startService()
        self._memory = Memory.opened()
        if self._memory is not None:
            self._look_later(self._memory)

    def stopService(self) -> None:
        """End; what is under way ends soon."""
        super().stopService()
        self.close()

    def close(self) -> None:
        """See :meth:`stopService`."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.is_over = True
            if not self._is_working:
                memory.close()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _look(self, memory: Memory) -> None:
        """Begin to move, if there is more than there was."""
        self._next = None
        with suppress(OSError):
            resident = memory.resident()
            if resident < self._seen + GROWN:
                self._look_later(memory)
                return
            self._seen = resident
            # A sandbox may allow no more threads.
            self._is_working = True
            work = maybeDeferred(aside, self._reactor, memory.gather)
            work.addErrback(self._failed)
            work.addCallback(self._worked, memory)

    def _worked(self, again: bool, memory: Memory) -> None:
        self._is_working = False
        if memory.is_over:
            memory.close()
        elif again:
            self._look_later(memory)

    @staticmethod
    def _failed(failure: Any) -> bool:
        log.failure("the memory stays in small pages", failure)
        return False

    def _look_later(self, memory: Memory) -> None:
        self._next = self._clock.callLater(EACH, self._look, memory)
