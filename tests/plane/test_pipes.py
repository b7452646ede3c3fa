"""Pipes for splicing: how many there are, who has them, and where none can be had."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from twisted.internet.task import Clock

from relayd.plane.pipes import (
    KEEP,
    PAUSE,
    PIPE_SIZE,
    PIPES_IN_USE,
    PIPES_KEPT,
    RESERVE,
    Pipe,
    Pipes,
)
from tests.conftest import descriptors
from tests.support.standing import refuse


def taken(pipes: Pipes) -> Pipe:
    """A pipe that can be had."""
    pipe = pipes.take()
    assert pipe is not None
    assert pipe.held == 0
    return pipe


@contextmanager
def spliced(clock: Clock | None = None) -> Iterator[Pipes]:
    """Pipes with one connection that splices; all are closed behind it."""
    before, clock = descriptors(), clock or Clock()
    pipes = Pipes(lambda: clock)
    pipes.add_user()
    yield pipes
    pipes.remove_user()
    assert (pipes.users, pipes.in_use) == (0, 0)
    assert not clock.getDelayedCalls()
    assert descriptors() == before


# -- one pipe


def test_a_pipe_is_large_and_blocks_nobody() -> None:
    """As large as anyone may have it, and it is not for children."""
    pipe = Pipe()
    try:
        assert fcntl.fcntl(pipe.read_end, fcntl.F_GETPIPE_SZ) == PIPE_SIZE
        for end in (pipe.read_end, pipe.write_end):
            assert not os.get_blocking(end)
            assert not os.get_inheritable(end)
        with pytest.raises(BlockingIOError):
            os.read(pipe.read_end, 1)
    finally:
        pipe.close()


def test_what_is_in_a_pipe_can_be_taken_out() -> None:
    """All of it, however it went in."""
    pipe = Pipe()
    try:
        assert pipe.read() == b""
        data = os.urandom(300_000)
        pipe.held = sum(
            os.write(pipe.write_end, data[at : at + 70_000])
            for at in range(0, len(data), 70_000)
        )
        assert pipe.read() == data
        assert pipe.held == 0
        with pytest.raises(BlockingIOError):
            os.read(pipe.read_end, 1)
    finally:
        pipe.close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY, errno.ENOMEM])
def test_a_pipe_that_may_not_be_large_is_none(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's pipes hold too much already (pipe(7)); no descriptor is left over."""
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "fcntl", refuse(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            Pipe()
    assert descriptors() == before


@pytest.mark.parametrize(("limit", "reserve"), [(1000, RESERVE), (100, 25)])
def test_the_last_descriptors_are_not_for_pipes(
    limit: int, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for clients and dials; of a small table, a quarter."""
    before = descriptors()
    with monkeypatch.context() as patched:
        ends = [os.dup(0), os.dup(0)]
        # The kernel hands out the lowest number: only what it is said to be counts.
        patched.setattr(resource, "getrlimit", lambda _: (limit, limit))
        last = limit - reserve
        patched.setattr(os, "pipe2", lambda _: (ends[0], last))
        patched.setattr(os, "close", lambda _: None)
        with pytest.raises(OSError, match="hardly any file descriptor is left"):
            Pipe()
        patched.setattr(fcntl, "fcntl", lambda *_: PIPE_SIZE)
        patched.setattr(os, "pipe2", lambda _: (ends[0], last - 1))
        assert Pipe().write_end == last - 1
    for end in ends:
        os.close(end)
    assert descriptors() == before


# -- those of a plane


@pytest.mark.cost
def test_an_empty_pipe_is_kept_for_the_next() -> None:
    """A test of cost.  The one that was used last, as long as anybody splices."""
    with spliced() as pipes:
        one, two = taken(pipes), taken(pipes)
        assert pipes.in_use == 2
        pipes.give(one)
        pipes.give(two)
        assert pipes.in_use == 0
        before = descriptors()
        assert taken(pipes) is two
        assert taken(pipes) is one
        assert descriptors() == before
        pipes.give(one)
        pipes.give(two)


def test_a_pipe_with_something_in_it_is_nobody_elses() -> None:
    with spliced() as pipes:
        before = descriptors()
        pipe = taken(pipes)
        os.write(pipe.write_end, b"somebody's")
        pipes.give(pipe, empty=False)
        assert pipes.in_use == 0
        assert descriptors() == before


@pytest.mark.cost
def test_pipes_are_kept_while_anybody_splices() -> None:
    """A test of cost.

    The last one who stops closes them; what is in use then is closed as it ends.
    """
    before, clock = descriptors(), Clock()
    pipes = Pipes(lambda: clock)
    pipes.add_user()
    pipes.add_user()
    one, two = taken(pipes), taken(pipes)
    pipes.give(one)
    pipes.remove_user()
    assert len(descriptors()) == len(before) + 4
    pipes.remove_user()
    assert len(descriptors()) == len(before) + 2
    pipes.give(two)
    assert descriptors() == before
    assert (pipes.users, pipes.in_use, pipes.refused) == (0, 0, 0)
    assert not clock.getDelayedCalls()


def test_pipes_that_nobody_asks_for_are_not_kept() -> None:
    """A connection that has spliced may be idle for hours."""
    clock = Clock()
    with spliced(clock) as pipes:
        before = descriptors()
        for _ in range(2):
            one, two = taken(pipes), taken(pipes)
            pipes.give(one)
            pipes.give(two)
            # Asked for now and then they stay.
            for _ in range(5):
                clock.advance(KEEP * 0.9)
                assert taken(pipes) is two
                pipes.give(two)
            clock.pump([KEEP, KEEP])
            assert descriptors() == before
            # No timer goes on for pipes that are not there.
            assert not clock.getDelayedCalls()


def test_a_pipe_that_is_in_use_is_not_tidied_up() -> None:
    clock = Clock()
    with spliced(clock) as pipes:
        held, kept = taken(pipes), taken(pipes)
        pipes.give(kept)
        clock.pump([KEEP, KEEP, KEEP])
        assert os.write(held.write_end, b"x") == 1
        assert pipes.in_use == 1
        pipes.give(held, empty=False)


def test_so_many_are_in_use_and_so_many_are_kept() -> None:
    """Who gets none copies; whoever comes after one was given back gets it."""
    with spliced() as pipes:
        before = len(descriptors())
        held = [taken(pipes) for _ in range(PIPES_IN_USE)]
        assert pipes.take() is None
        assert pipes.take() is None
        assert (pipes.in_use, pipes.refused) == (PIPES_IN_USE, 2)
        pipes.give(held.pop())
        held.append(taken(pipes))
        assert pipes.take() is None
        assert len(descriptors()) == before + 2 * PIPES_IN_USE
        for pipe in held:
            pipes.give(pipe)
        assert len(descriptors()) == before + 2 * PIPES_KEPT
        # Those that are kept are not made again.
        again = [taken(pipes) for _ in range(PIPES_KEPT)]
        assert len(descriptors()) == before + 2 * PIPES_KEPT
        for pipe in again:
            pipes.give(pipe)


@pytest.mark.cost
def test_a_pipe_that_can_not_be_had_is_asked_for_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A test of cost.  Asking at each read would cost more than copying does."""
    clock, asked = Clock(), 0

    def none_left(_: int) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with spliced(clock) as pipes:
        kept = taken(pipes)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pipe2", none_left)
            for _ in range(5):
                assert pipes.take() is None
            assert (asked, pipes.refused, pipes.in_use) == (1, 5, 1)
            clock.advance(PAUSE * 0.99)
            assert pipes.take() is None
            assert asked == 1
            clock.advance(PAUSE * 0.02)
            assert pipes.take() is None
            assert asked == 2
        # There are some, but the pause is not over; except for one that was kept.
        assert pipes.take() is None
        pipes.give(kept)
        assert taken(pipes) is kept
        clock.advance(PAUSE)
        pipes.give(taken(pipes))
        pipes.give(kept)


def test_a_full_descriptor_table_has_no_pipe() -> None:
    """For real: the kernel refuses, and nothing else happens."""
    clock = Clock()
    with spliced(clock) as pipes:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        try:
            for left in (0, 1):
                # None at all, and one of the two that it takes.
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, hard))
                assert pipes.take() is None
                clock.advance(PAUSE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert pipes.refused == 2
        pipes.give(taken(pipes))
