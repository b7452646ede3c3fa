"""Observers of sessions: the session log, and several observers as one.

Subclass :class:`Observer` and override the hooks that you want; the others are never
called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from twisted.logger import Logger
from zope.interface import implementer

from relayd.core.interfaces import IObserver
from relayd.core.session import Session

log = Logger(namespace="relayd.observers")


@implementer(IObserver)
class Observer:
    """Has every hook, and does nothing in it."""

    def opened(self, session: Session) -> None:
        """See :meth:`IObserver.opened`."""

    def dialing(self, session: Session) -> None:
        """See :meth:`IObserver.dialing`."""

    def connected(self, session: Session) -> None:
        """See :meth:`IObserver.connected`."""

    def closed(self, session: Session) -> None:
        """See :meth:`IObserver.closed`."""

    def refused(self, session: Session, why: str) -> None:
        """See :meth:`IObserver.refused`."""


_HOOKS = ("opened", "dialing", "connected", "closed", "refused")


def _not_hooked(session: object, why: str = "") -> None:
    """A hook without an observer."""


@implementer(IObserver)
class Observers:
    """Calls several observers.

    One that raises is logged with its traceback and dropped: it is not called again,
    neither by these nor by others that contain these.

    :ivar parents: others that contain these; an embedder's observers may be a part of
        several relays'.
    """

    opened: Callable[[Session], None]
    dialing: Callable[[Session], None]
    connected: Callable[[Session], None]
    closed: Callable[[Session], None]
    refused: Callable[[Session, str], None]

    def __init__(self, *observers: IObserver) -> None:
        self._observers = list(observers)
        self.parents: weakref.WeakSet[Observers] = weakref.WeakSet()
        for each in observers:
            if isinstance(each, Observers):
                each.parents.add(self)
        self.set_hooks()

    def set_hooks(self) -> None:
        """Make the hooks anew from the observers that there are now."""
        # Five calls for each session, most of which no observer has a hook for.
        for name in _HOOKS:
            heard = list(self.hooks(name))
            setattr(self, name, self._notifier(heard) if heard else _not_hooked)
        for whole in list(self.parents):
            whole.set_hooks()

    def hooks(self, name: str) -> Iterator[tuple[Callable[..., None], IObserver]]:
        """The hooks of one name, each with its observer."""
        for each in self._observers:
            if isinstance(each, Observers):
                yield from each.hooks(name)
            elif getattr(type(each), name, None) is not getattr(Observer, name):
                yield getattr(each, name), each

    def _notifier(
        self, heard: list[tuple[Callable[..., None], IObserver]]
    ) -> Callable[..., None]:
        """A function that calls several hooks."""
        hooks = [hook for hook, _ in heard]

        # With arguments that are written out, which costs a session a third of what
        # passing on `*facts` does.
        def tell(session: Session, why: str | None = None) -> None:
            # Dropping an observer makes new lists, so this loop is undisturbed.
            for hook in hooks:
                try:
                    if why is None:
                        hook(session)
                    else:
                        hook(session, why)
                except Exception:
                    # Not by its `__self__`: a hook need not be a method.
                    self._drop(*next(each for each in heard if each[0] is hook))

        return tell

    def _drop(self, hook: Callable[..., None], culprit: IObserver) -> None:
        """A hook has raised: log that, and drop its observer."""
        log.failure(
            "observer {culprit} failed in {hook} and is not called again",
            culprit=shown(culprit),
            hook=getattr(hook, "__name__", "a hook"),
        )
        self.forget(culprit)

    def forget(self, culprit: IObserver) -> None:
        """Drop an observer, here and in every part of these."""
        for each in self._observers:
            if isinstance(each, Observers):
                each.forget(culprit)
        self._observers = [o for o in self._observers if o is not culprit]
        self.set_hooks()


def shown(what: object) -> str:
    """What is plugged in, as text for the log, even if its `__repr__` raises."""
    try:
        return repr(what)
    except Exception:
        return object.__repr__(what)
