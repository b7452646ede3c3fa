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
from relayd.session import Session

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


@implementer(IObserver)
class Observers:
    """Passes what it hears on to several, and survives each of them.

    One that raises is logged with its traceback and not called again.
    """

    def __init__(self, *observers: IObserver) -> None:
        self._hooks: dict[str, list[Callable[..., Any]]] = {
            name: [
                getattr(observer, name)
                for observer in observers
                if getattr(type(observer), name, None) is not getattr(Observer, name)
            ]
            for name in ("opened", "dialing", "connected", "closed", "refused")
        }

    def opened(self, session: Session) -> None:
        self._tell("opened", session)

    def dialing(self, session: Session) -> None:
        self._tell("dialing", session)

    def connected(self, session: Session) -> None:
        self._tell("connected", session)

    def closed(self, session: Session) -> None:
        self._tell("closed", session)

    def refused(self, session: Session, why: str) -> None:
        self._tell("refused", session, why)

    def _tell(self, name: str, *facts: Any) -> None:
        # Dropping an observer replaces its list, so this loop is undisturbed.
        for hook in self._hooks[name]:
            try:
                hook(*facts)
            except Exception:
                culprit = getattr(hook, "__self__", hook)
                log.failure(
                    "observer {culprit!r} failed in {hook} and is not called again",
                    culprit=culprit,
                    hook=name,
                )
                self._hooks = {
                    name: [h for h in hooks if getattr(h, "__self__", h) is not culprit]
                    for name, hooks in self._hooks.items()
                }


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
        )

    def refused(self, session: Session, why: str) -> None:
        self.closed(session)


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
