"""Calls of the C library, on descriptors of their own."""

from __future__ import annotations

import errno
import os
import select
import sys
import time
from typing import Any

import pytest

from relayd.net.libc import call, timerfd_create, timerfd_settime

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="timerfd(2) is Linux's")


def test_a_function_that_the_c_library_lacks_is_an_error() -> None:
    with pytest.raises(OSError, match="not implemented") as caught:
        call("no_such_call", 1, 2)
    assert caught.value.errno == errno.ENOSYS


def test_a_failed_call_raises_its_errno() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        call("close", -1)


def expires(descriptor: int) -> bool:
    """Whether a timerfd that is set to now wakes who waits for it."""
    timerfd_settime(descriptor, time.monotonic_ns() + 1)
    return select.select([descriptor], [], [], 5)[0] == [descriptor]


@LINUX
def test_a_timerfd() -> None:
    descriptor = timerfd_create()
    try:
        assert not os.get_blocking(descriptor)
        assert not os.get_inheritable(descriptor)
        timerfd_settime(descriptor, time.monotonic_ns() + 10**12)
        assert select.select([descriptor], [], [], 0)[0] == []
        assert expires(descriptor)
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        timerfd_settime(descriptor, 1)


@LINUX
def test_pythons_own_calls_are_used_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of Python 3.13: `os.timerfd_create` and `os.timerfd_settime_ns`."""
    asked: list[Any] = []

    def create(clockid: int, /, *, flags: int) -> int:
        asked.append((clockid, flags))
        return call("timerfd_create", clockid, flags)

    def settime(
        fd: int, /, *, flags: int = 0, initial: int = 0, interval: int = 0
    ) -> tuple[int, int]:
        asked.append((fd, flags, initial > 0, interval))
        return 0, 0

    monkeypatch.setattr(os, "timerfd_create", create, raising=False)
    monkeypatch.setattr(os, "timerfd_settime_ns", settime, raising=False)
    descriptor = timerfd_create()
    try:
        timerfd_settime(descriptor, 10**12)
    finally:
        os.close(descriptor)
    # CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC, TFD_TIMER_ABSTIME.
    flags = 0o4000 | 0o2000000
    assert asked == [(time.CLOCK_MONOTONIC, flags), (descriptor, 1, True, 0)]
