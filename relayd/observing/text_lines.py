"""Lines of a log as text: `key=value` pairs in a fixed order, for people and scripts.

What a peer or a program has chosen (the name of a UNIX socket, a detail) can neither
break a line nor hide a part of it (:func:`relayd.observing.log_fields.one_line`).
"""

from __future__ import annotations

from collections.abc import Iterable

from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.core.session import Session
from relayd.observing.log_fields import one_line


class TextLines:
    """Makes lines of text; :class:`relayd.observing.json_lines.JsonLines` has the same
    methods.
    """

    def facts(self, facts: Iterable[tuple[str, object]]) -> str:
        """What a session's line ends with, for the facts that were added to it."""
        return "".join([f" {name}={fact}" for name, fact in facts])

    def session_closed(self, session: Session, facts: str) -> str:
        """The line of a session that has ended.

        :param facts: what :meth:`facts` has made.
        """
        ending = session.ending
        word, code = (ending.word, ending.code) if ending else ("", "")
        end = f" ending={word} code={code}{facts}"
        if session.rare is not None and session.detail:
            end += f" detail={session.detail!r}"
        return one_line(_session(session, session.duration) + end)

    def session_interim(self, session: Session, now: float, facts: str) -> str:
        """The line of one that goes on; it has no ending.

        :param now: seconds, on the clock of the session's times.
        """
        return one_line(f"interim {_session(session, now - session.opened_at)}{facts}")

    def session_step(self, what: str, session: Session) -> str:
        """The line of one that was `opened`, is `dialing`, or is `connected`."""
        where = (
            f"client={session.client} listener={session.listener}"
            if what == "opened"
            else f"upstream={session.upstream}"
        )
        return one_line(
            f"{what} session={session.id} relay={session.relay or '-'} {where}"
        )

    def flow_closed(self, flow: Flow, facts: FlowFacts) -> str:
        """The line of a flow that has ended."""
        by = f" by={facts.by}" if facts.by else ""
        return one_line(f"{_flow(flow, facts)} ending={facts.ending}{by}")

    def flow_interim(self, flow: Flow, facts: FlowFacts) -> str:
        """The line of one that goes on."""
        return one_line(f"interim {_flow(flow, facts)}")

    def datagrams(self, relay: str, listeners: str, counters: Counters) -> str:
        """The line of a UDP relay that has ended."""
        return one_line(f"datagrams relay={relay} listener={listeners} {counters.line}")


def _session(session: Session, duration: float) -> str:
    client = session.client
    if session.peer != client and session.peer:
        # A balancer's connection, whose PROXY header names the client.
        client = f"{client} peer={session.peer}"
    connect = session.connect_seconds
    # Formatted here: formatting these fields by the logger would take 20 microseconds
    # instead of 12 for each session.
    return (
        f"session={session.id} relay={session.relay or '-'}"
        f" client={client} listener={session.listener}"
        f" upstream={session.upstream or '-'}"
        f" connect={'-' if connect is None else f'{connect:.3f}'}"
        f" attempts={session.attempts}"
        f" duration={duration:.3f} up={session.up.read} down={session.down.read}"
    )


def _flow(flow: Flow, facts: FlowFacts) -> str:
    return (
        f"flow relay={facts.relay} client={facts.client} listener={facts.listener}"
        f" port={facts.port} server={facts.server} age={facts.age:.3f}"
        f" up={flow.up_datagrams}/{flow.up_bytes}"
        f" down={flow.down_datagrams}/{flow.down_bytes}"
    )
