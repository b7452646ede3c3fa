"""Running the tests of a contract, under any runner that supports coroutines.

A contract is a class of coroutine methods without a transport.  A test case inherits
them: a :class:`twisted.trial.unittest.TestCase`, which trial and pytest run, or a plain
class that pytest collects.  The latter needs the plugin pytest-twisted: without it
pytest does not support coroutines, and fails them.  No runner is imported here.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import LogLevel, eventAsText, globalLogPublisher

#: Turns of the reactor that a test waits for a condition.
PATIENCE = 2000

Test = Callable[..., Awaitable[None]]


def pause(seconds: float) -> Deferred[None]:
    """Let the reactor run for a while."""
    from twisted.internet import reactor

    return deferLater(reactor, seconds)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Run the reactor until `condition()` is true.

    :raises AssertionError: it does not become true.
    """
    for turn in range(PATIENCE):
        if condition():
            return
        await pause(0 if turn < 50 else 0.001)
    raise AssertionError(f"never happened: {what or condition}")


async def turns(count: int = 20) -> None:
    """Run the reactor long enough for pending work to be done."""
    for _ in range(count):
        await pause(0)
    await pause(0.001)


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    """Check that the block raises an exception of this class."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def each(**values: list[str] | list[bool]) -> Callable[[Test], Test]:
    """Make a test for each combination of these values of its arguments.

    Each is a method, with the values in its name.
    """

    def mark(test: Test) -> Test:
        test.values = values | getattr(test, "values", {})  # type: ignore[attr-defined]
        return test

    return mark


def checked(test: Test) -> Test:
    """Make a test, after which what it has opened is closed and checked."""

    @functools.wraps(test)
    async def run(self: Suite, **values: object) -> None:
        self.begin()
        try:
            await test(self, **values)
        finally:
            await self.end()

    return run


def _with(test: Test, values: dict[str, object]) -> Any:
    async def run(self: Suite) -> None:
        await test(self, **values)

    run.__doc__ = test.__doc__
    return run


def _is_of(kind: type[Exception], event: dict[str, Any]) -> bool:
    # Twisted's old log has it under the other name.
    failure = event.get("log_failure") or event.get("failure")
    return failure is not None and failure.check(kind) is not None


class Suite:
    """Tests, and what they log."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, test in list(vars(cls).items()):
            values: dict[str, Any] = getattr(test, "values", {})
            if name.startswith("test_") and values:
                delattr(cls, name)
                for chosen in itertools.product(*values.values()):
                    words = "_".join(str(value).replace(" ", "_") for value in chosen)
                    case = _with(test, dict(zip(values, chosen, strict=True)))
                    case.__name__ = f"{name}_{words}"
                    case.__qualname__ = f"{cls.__qualname__}.{name}_{words}"
                    setattr(cls, f"{name}_{words}", case)

    def begin(self) -> None:
        """Called before each test."""
        self._failures: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self._observe)  # type: ignore[arg-type]

    async def end(self) -> None:
        """Called after each test."""
        # Deferreds log their unhandled errors as they are collected.
        gc.collect()
        globalLogPublisher.removeObserver(self._observe)  # type: ignore[arg-type]
        texts = [eventAsText(event) for event in self._failures]
        assert not texts, "logged failures:\n" + "\n".join(texts)

    def _observe(self, event: dict[str, Any]) -> None:
        if event["log_level"] >= LogLevel.error:
            self._failures.append(event)

    def logged(self, kind: type[Exception]) -> None:
        """Check that one exception of this class was logged, and expect it.

        It is removed from trial's logged errors, too.  Override this for another runner
        that fails a test for logged errors.
        """
        gc.collect()
        found = [event for event in self._failures if _is_of(kind, event)]
        assert len(found) == 1, f"{len(found)} {kind.__name__} were logged, not one"
        self._failures.remove(found[0])
        flush = getattr(self, "flushLoggedErrors", None)
        if flush is not None:
            flush(kind)
