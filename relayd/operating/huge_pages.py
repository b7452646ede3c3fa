"""The process's memory in huge pages, which the processor finds faster (Linux 6.1).

What a session needs is spread over the memory of the interpreter, in pages of 4 KiB.
The processor remembers where some hundreds or thousands of pages are.  For the others
it asks tables in memory, in a virtual machine those of two machines.  A relay with few
sessions has more pages than that already: in huge pages of 2 MiB a short session takes
6 to 11 % less CPU (docs/costs.md).

Python asks for memory in parts of 1 MiB, to which the kernel gives no huge pages by
itself.  So it is asked to move what is there (madvise(2), MADV_COLLAPSE), as the
process starts, and later when it has grown.  Only areas are moved whose pages are in
use, all but :data:`UNUSED`, as /proc/self/pagemap tells: the process takes hardly more
memory by it.  The kernel may take a while to find a huge page, so this is done in a
thread.

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
from twisted.internet.defer import Deferred, maybeDeferred
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

#: Seconds from one look at how much memory there is to the next; and how much more of
#: it, in bytes, is worth another search.
EACH, GROWN = 5.0, 256 * 1024

#: What /proc/PID/pagemap has for each page, in bytes.  The highest bit says whether it
#: is in memory.
_ENTRY = 8
_ABSENT = bytes(range(0x80))

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
    """

    size: int
    _pagemap: int

    @classmethod
    def opened(cls) -> Self | None:
        """As it is asked for; None where there are no huge pages to be had.

        To be called before rights are given up: /proc/self/pagemap is root's then.
        """
        try:
            if "[never]" in (SYSTEM / "enabled").read_text():
                return None
            size = int((SYSTEM / "hpage_pmd_size").read_text())
            return cls(size, os.open(PROCESS / "pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Give the descriptor back."""
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
                if self._is_full(address):
                    call(
                        "madvise",
                        ctypes.c_void_p(address),
                        ctypes.c_size_t(self.size),
                        MADV_COLLAPSE,
                    )
        except OSError as problem:
            # Else there is no huge page now, or what was found is gone by now.
            return problem.errno not in _NEVER
        return True

    def _is_full(self, address: int) -> bool:
        pages = self.size // _page()
        entries = os.pread(self._pagemap, pages * _ENTRY, address // _page() * _ENTRY)
        # The last byte of each entry has its highest bit.
        present = entries[_ENTRY - 1 :: _ENTRY].translate(None, _ABSENT)
        return len(present) >= pages - UNUSED


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
        self._next: IDelayedCall | None = None
        self._work: Deferred[Any] | None = None

    def privilegedStartService(self) -> None:
        """Open what takes privileges."""
        super().privilegedStartService()
        self._memory = Memory.opened()

    def startService(self) -> None:
        """Begin, once the reactor runs."""
        super().startService()
        # `twist` starts services without the privileged step.
        self._memory = self._memory or Memory.opened()
        if self._memory is not None:
            self._look_later(self._memory, 0)

    def stopService(self) -> Deferred[None] | None:
        """End; waits for what is under way."""
        super().stopService()
        return self.close()

    def close(self) -> Deferred[None] | None:
        """Give everything back; waits for what is under way."""
        memory, self._memory = self._memory, None
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if memory is None:
            return None
        if self._work is None:
            memory.close()
            return None
        return self._work.addCallback(lambda _: memory.close())

    def _look(self, memory: Memory) -> None:
        """Begin to move, if there is more than there was."""
        self._next = None
        with suppress(OSError):
            resident = memory.resident()
            if resident < self._seen + GROWN:
                self._look_later(memory, EACH)
                return
            self._seen = resident
            # A sandbox may allow no more threads.
            self._work = maybeDeferred(aside, self._reactor, memory.gather)
            self._work.addCallback(self._moved, memory)
            self._work.addErrback(self._failed)

    def _moved(self, again: bool, memory: Memory) -> None:
        self._work = None
        if again and self._memory is not None:
            self._look_later(memory, EACH)

    def _failed(self, failure: Any) -> None:
        self._work = None
        log.failure("the memory stays in small pages", failure)

    def _look_later(self, memory: Memory, seconds: float) -> None:
        self._next = self._clock.callLater(seconds, self._look, memory)
