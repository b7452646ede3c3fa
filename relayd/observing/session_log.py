"""The log lines of sessions: one as each ends; more if verbose."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.logger import Logger

from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.observing.line_log import EVENTS, LineLog
from relayd.observing.log_fields import are_fields, loggable_facts, one_line

log = Logger(namespace="relayd.observers")
_NAMESPACE = "relayd.session"
session_log = Logger(namespace=_NAMESPACE)

# Looking a member up in an enum goes through its metaclass each time.
_DONE = Ending.DONE

#: The fields of the line itself.
_FIELDS = frozenset(
    [
        *("session", "relay", "client", "peer", "listener", "upstream", "connect"),
        *("attempts", "duration", "up", "down", "ending", "code", "detail"),
    ]
)


class SessionLog(Observer):
    """Writes one line when a session ends.

    The line is `key=value` pairs in a fixed order.  It goes to `lines`; or it is an
    event, with the same facts as fields of those names, for structured logs.  A fact
    that was added to the session (:attr:`Session.facts`) and has the name of another
    field is called `fact_…`; one that can't be turned into text is left out.
    """

    #: That a fact of a session can't be logged was logged once.
    _failure_logged = False

    def __init__(self, lines: LineLog = EVENTS) -> None:
        self._lines = lines

    def closed(self, session: Session) -> None:
        ending = session.ending
        word, code = (ending.word, ending.code) if ending else ("", "")
        duration = session.duration
        client = session.client
        if session.peer != client and session.peer:
            # A balancer's connection, whose PROXY header names the client.
            client = f"{client} peer={session.peer}"
        connect = session.connect_seconds
        # Formatted here: formatting nine fields by the logger would take 20
        # microseconds instead of 12 for each session.
        line = begin = (
            f"session={session.id} relay={session.relay or '-'}"
            f" client={client} listener={session.listener}"
            f" upstream={session.upstream or '-'}"
            f" connect={'-' if connect is None else f'{connect:.3f}'}"
            f" attempts={session.attempts}"
            f" duration={duration:.3f} up={session.up.read} down={session.down.read}"
            f" ending={word} code={code}"
        )
        facts: Mapping[str, object]
        try:
            facts = session.facts
            if facts:
                if not are_fields(tuple(facts), _FIELDS):
                    raise ValueError("the facts can't be fields as they are")
                for name, fact in facts.items():
                    line += f" {name}={fact}"
        except Exception:
            loggable = self._facts_of(session)
            line = begin + "".join(f" {name}={text}" for name, _, text in loggable)
            facts = {name: fact for name, fact, _ in loggable}
        if session.detail:
            line += f" detail={session.detail!r}"
        line = one_line(line)
        if self._lines.takes(_NAMESPACE, line):
            return
        session_log.info(
            "{line}",
            line=line,
            session=session.id,
            relay=session.relay,
            client=session.client,
            peer=session.peer,
            listener=session.listener,
            upstream=session.upstream,
            connect=connect,
            attempts=session.attempts,
            duration=duration,
            up=session.up.read,
            down=session.down.read,
            ending=word,
            code=code,
            detail=session.detail,
            **facts,
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
        where = f"client={session.client} listener={session.listener}"
        self._write("opened", session, where)

    def dialing(self, session: Session) -> None:
        self._write("dialing", session, f"upstream={session.upstream}")

    def connected(self, session: Session) -> None:
        self._write("connected", session, f"upstream={session.upstream}")

    def _write(self, what: str, session: Session, where: str) -> None:
        line = one_line(
            f"{what} session={session.id} relay={session.relay or '-'} {where}"
        )
        if self._lines.takes(_NAMESPACE, line):
            return
        session_log.info(
            "{line}",
            line=line,
            session=session.id,
            relay=session.relay,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
        )
