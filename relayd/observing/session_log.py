"""The log's lines of sessions: one as each ends, and more if asked."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.logger import Logger

from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.observing.log_fields import are_fields, one_by_one

log = Logger(namespace="relayd.observers")
session_log = Logger(namespace="relayd.session")

# An enum's members cost a look-up by its metaclass each time.
_DONE = Ending.DONE

#: The fields of the line itself.
_FIELDS = frozenset(
    [
        *("session", "relay", "client", "listener", "upstream", "duration"),
        *("up", "down", "ending", "code", "detail"),
    ]
)


def _one_line(text: str) -> str:
    """`text`, with whatever would break or hide its line escaped."""
    if text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


class SessionLog(Observer):
    """Writes one line when a session ends.

    The line is `key=value` pairs in a fixed order; the event carries the same
    facts as fields of those names, for structured log observers.  A fact of a session's
    own (:attr:`Session.facts`) that has the name of another field is called `fact_…`,
    and one that has no text is left out.
    """

    #: A session's own facts have failed, and that was logged.
    _told = False

    def closed(self, session: Session) -> None:
        ending = session.ending
        word, code = (ending.word, ending.code) if ending else ("", "")
        duration = session.duration
        # Formatted here: the logger's own formatting of nine fields would make
        # the line cost 20 microseconds instead of 12, once for every session.
        line = begin = (
            f"session={session.id} relay={session.relay or '-'}"
            f" client={session.client} listener={session.listener}"
            f" upstream={session.upstream or '-'}"
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
            said = self._facts_of(session)
            line = begin + "".join(f" {name}={text}" for name, _, text in said)
            facts = {name: fact for name, fact, _ in said}
        if session.detail:
            line += f" detail={session.detail!r}"
        session_log.info(
            "{line}",
            line=_one_line(line),
            session=session.id,
            relay=session.relay,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
            duration=duration,
            up=session.up.read,
            down=session.down.read,
            ending=word,
            code=code,
            detail=session.detail,
            **facts,
        )

    def _facts_of(self, session: Session) -> list[tuple[str, object, str]]:
        """The facts of a session that can be logged, where one of them can't."""
        try:
            return one_by_one(session.facts.items(), _FIELDS, self._fact_failed)
        except Exception:
            self._fact_failed(None)
            return []

    def _fact_failed(self, name: object) -> None:
        """Log that once: every session may have such a fact."""
        if not self._told:
            self._told = True
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
        self._say("opened", session, where)

    def dialing(self, session: Session) -> None:
        self._say("dialing", session, f"upstream={session.upstream}")

    def connected(self, session: Session) -> None:
        self._say("connected", session, f"upstream={session.upstream}")

    def _say(self, what: str, session: Session, where: str) -> None:
        line = f"{what} session={session.id} relay={session.relay or '-'} {where}"
        session_log.info(
            "{line}",
            line=_one_line(line),
            session=session.id,
            relay=session.relay,
            client=session.client,
            listener=session.listener,
            upstream=session.upstream,
        )
