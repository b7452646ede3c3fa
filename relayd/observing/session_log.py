"""The log lines of sessions: one as each ends; more if verbose."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.logger import Logger

from relayd.core.escapes import Words
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.observing.line_limit import MAX_LINES, LineLimit
from relayd.observing.line_log import EVENTS, LineLog
from relayd.observing.log_fields import are_fields, loggable_facts

log = Logger(namespace="relayd.observers")
_NAMESPACE = "relayd.session"
session_log = Logger(namespace=_NAMESPACE)

# Looking a member up in an enum goes through its metaclass each time.
_DONE = Ending.DONE

#: Facts that are more than their text, in JSON or in a line of text; of these a failure
#: is not to be feared.
_PLAIN = (int, float, type(None), Words)

_NO_FACTS: Mapping[str, object] = {}

#: The fields of the line itself.
_FIELDS = frozenset(
    [
        *("session", "relay", "client", "peer", "listener", "upstream", "connect"),
        *("attempts", "duration", "up", "down", "ending", "code", "detail"),
    ]
)


class SessionLog(Observer):
    """Writes one line when a session ends.

    There is none for one that ended without a byte, by its client alone
    (:attr:`Session.is_silent`): a balancer's health checks would be most of the log.

    The line is `key=value` pairs in a fixed order, or a JSON object, as `lines` says.
    It goes to `lines`; or it is an event, with the same facts as fields of the names
    that they have in text, for structured logs.  A fact
    that was added to the session (:attr:`Session.facts`) and has the name of another
    field is called `fact_…`; one that can't be turned into text is left out.

    Of clients that were not admitted, a hundred a second get a line.
    """

    #: Sessions that ended without a byte have lines, too.
    tells_silent = False
    #: That a fact of a session can't be logged was logged once.
    _failure_logged = False

    def __init__(self, lines: LineLog = EVENTS) -> None:
        self._lines = lines
        self._format = lines.format
        self._limit = LineLimit(_warn)

    @property
    def left_out(self) -> int:
        """How many clients that were not admitted got no line."""
        return self._limit.left_out

    def closed(self, session: Session) -> None:
        ending = session.ending
        if not session.up.read and session.is_silent and not self.tells_silent:
            return
        added, facts = self._facts(session)
        line = self._format.session_closed(session, added)
        if not self._lines.takes(_NAMESPACE, line):
            word, code = (ending.word, ending.code) if ending else ("", "")
            self._event(line, session, session.duration, word, code, facts)

    def interim(self, session: Session, now: float) -> None:
        """Write a line about a session that goes on, with its totals so far.

        :param now: seconds, on the clock of the session's times.
        """
        added, facts = self._facts(session)
        line = self._format.session_interim(session, now, added)
        if not self._lines.takes(_NAMESPACE, line):
            self._event(line, session, now - session.opened_at, "", "", facts)

    def _event(
        self,
        line: str,
        session: Session,
        duration: float,
        word: str,
        code: str,
        facts: Mapping[str, object],
    ) -> None:
        session_log.info(
            "{line}",
            line=self._lines.event_text(line),
            session=session.id,
            relay=session.relay,
            client=session.client,
            peer=session.peer,
            listener=session.listener,
            upstream=session.upstream,
            connect=session.connect_seconds,
            attempts=session.attempts,
            duration=duration,
            up=session.up.read,
            down=session.down.read,
            ending=word,
            code=code,
            detail=session.detail,
            **facts,
        )

    def _facts(self, session: Session) -> tuple[str, Mapping[str, object]]:
        """The facts that were added to a session: as a line has them, and as fields."""
        facts: Mapping[str, object] = _NO_FACTS
        try:
            facts = session.facts
            if not facts:
                return "", facts
            if not are_fields(tuple(facts), _FIELDS):
                raise ValueError("the facts can't be fields as they are")
            return self._format.facts(facts.items()), facts
        except Exception:
            loggable = self._facts_of(session)
            shown = [
                (name, fact if isinstance(fact, _PLAIN) else said)
                for name, fact, said in loggable
            ]
            return (
                self._format.facts(shown),
                {name: fact for name, fact, _ in loggable},
            )

    def _facts_of(self, session: Session) -> list[tuple[str, object, str]]:
        """The facts of a session that can be logged, if one of them can't."""
        try:
            return loggable_facts(session.facts.items(), _FIELDS, self._fact_failed)
        except Exception:
            self._fact_failed(None)
            return []

    def _fact_failed(self, name: object) -> None:
        """Log a failed fact, once: every session may have such a fact."""
        if not self._failure_logged:
            self._failure_logged = True
            log.failure(
                "a fact of a session can't be logged and is left out of its line, as"
                " others like it will be"
            )

    def refused(self, session: Session, why: str) -> None:
        # Whoever is refused comes again, as fast as they like.
        if self._limit.allows(int(session.ended_at or 0)):
            self.closed(session)


def _warn(left_out: int) -> None:
    log.warn(
        "{max_lines} clients were not admitted in a second: the rest of them get no"
        " line ({left_out} left out so far)",
        max_lines=MAX_LINES,
        left_out=left_out,
    )


class QuietSessionLog(SessionLog):
    """Writes a line only for a session that did not end well.

    A session ends well when both directions reached their end and all was
    delivered.
    """

    def closed(self, session: Session) -> None:
        if session.ending is not _DONE:
            super().closed(session)


class VerboseSessionLog(SessionLog):
    """Writes a line when a session opens, dials and connects, too.

    And one for each that ended without a byte.
    """

    tells_silent = True

    def opened(self, session: Session) -> None:
        self._step("opened", session)

    def dialing(self, session: Session) -> None:
        self._step("dialing", session)

    def connected(self, session: Session) -> None:
        self._step("connected", session)

    def _step(self, what: str, session: Session) -> None:
        line = self._format.session_step(what, session)
        if self._lines.takes(_NAMESPACE, line):
            return
        session_log.info(
            "{line}",
            line=self._lines.event_text(line),
            session=session.id,
            relay=session.relay,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
        )
