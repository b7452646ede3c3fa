"""Those who hear what happens to sessions: the log, and several at once.

Subclass :class:`Observer` and override what you want to hear; hooks that are
not overridden are never called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger
from zope.interface import implementer

from relayd.interfaces import IObserver
from relayd.session import Ending, Session

log = Logger(namespace="relayd.observers")
session_log = Logger(namespace="relayd.session")


@implementer(IObserver)
class Observer:
    """Hears everything and does nothing."""

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


# An enum's members cost a look-up by its metaclass each time.
_DONE = Ending.DONE

_HOOKS = ("opened", "dialing", "connected", "closed", "refused")


def _nobody(session: object, why: str = "") -> None:
    """A hook that nobody listens to."""


@implementer(IObserver)
class Observers:
    """Passes what it hears on to several, and survives each of them.

    One that raises is logged with its traceback and not called again.
    """

    opened: Callable[[Session], None]
    dialing: Callable[[Session], None]
    connected: Callable[[Session], None]
    closed: Callable[[Session], None]
    refused: Callable[[Session, str], None]

    def __init__(self, *observers: IObserver) -> None:
        self._observers = list(observers)
        self._set_hooks()

    def _set_hooks(self) -> None:
        # Five calls for each session, most of which nobody hears.
        for name in _HOOKS:
            hooks = [
                getattr(observer, name)
                for observer in self._observers
                if getattr(type(observer), name, None) is not getattr(Observer, name)
            ]
            setattr(self, name, self._teller(hooks) if hooks else _nobody)

    def _teller(self, hooks: list[Callable[..., None]]) -> Callable[..., None]:
        """What calls several hooks."""

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
                    self._drop(hook)

        return tell

    def _drop(self, hook: Callable[..., None]) -> None:
        """It has raised: log that, and call its observer no more."""
        culprit: Any = getattr(hook, "__self__", hook)
        log.failure(
            "observer {culprit!r} failed in {hook} and is not called again",
            culprit=culprit,
            hook=getattr(hook, "__name__", hook),
        )
        self._observers = [o for o in self._observers if o is not culprit]
        self._set_hooks()


def _one_line(text: str) -> str:
    """`text`, with whatever would break or hide its line escaped."""
    if text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


class SessionLog(Observer):
    """Writes one line when a session ends.

    The line is `key=value` pairs in a fixed order; the event carries the same
    facts as fields of those names, for structured log observers.
    """

    def closed(self, session: Session) -> None:
        ending = session.ending
        word, code = (ending.word, ending.code) if ending else ("", "")
        duration = session.duration
        # Formatted here: the logger's own formatting of nine fields would make
        # the line cost 20 microseconds instead of 12, once for every session.
        line = (
            f"session={session.id} client={session.client}"
            f" listener={session.listener} upstream={session.upstream or '-'}"
            f" duration={duration:.3f} up={session.up.bytes} down={session.down.bytes}"
            f" ending={word} code={code}"
        )
        facts = session.facts
        for name, fact in facts.items():
            line += f" {name}={fact}"
        if session.detail:
            line += f" detail={session.detail!r}"
        session_log.info(
            "{line}",
            line=_one_line(line),
            session=session.id,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
            duration=duration,
            up=session.up.bytes,
            down=session.down.bytes,
            ending=word,
            code=code,
            detail=session.detail,
            **facts,
        )

    def refused(self, session: Session, why: str) -> None:
        self.closed(session)


class QuietSessionLog(SessionLog):
    """Writes a line only for a session that did not end well.

    A session ends well when both directions reached their end and all was
    delivered.
    """

    def closed(self, session: Session) -> None:
        if session.ending is not _DONE:
            super().closed(session)


class VerboseSessionLog(SessionLog):
    """Writes a line when a session opens, dials and connects, too."""

    def opened(self, session: Session) -> None:
        self._say(
            f"opened session={session.id} client={session.client}"
            f" listener={session.listener}",
            session,
        )

    def dialing(self, session: Session) -> None:
        self._say(f"dialing session={session.id} upstream={session.upstream}", session)

    def connected(self, session: Session) -> None:
        self._say(
            f"connected session={session.id} upstream={session.upstream}", session
        )

    def _say(self, line: str, session: Session) -> None:
        session_log.info(
            "{line}",
            line=_one_line(line),
            session=session.id,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
        )
