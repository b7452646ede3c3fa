"""Ends sessions and flows as an operator says, while their relays run.

A session is reset, whatever its stage, with the ending `killed`: whoever waits for its
gate, is in a handshake, has a server dialled, or is relayed.  One that had an ending
already, and is being closed, is reset too; its ending stays, and it is not counted.  A
flow is forgotten; its client gets a new one with its next datagram.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from twisted.logger import Logger

from relayd.control.steering import Invalid, Unknown, Work
from relayd.core.session import Ending
from relayd.operating.listing import (
    Shown,
    Source,
    Wanted,
    parts,
    relays_of,
    stream_sources,
)
from relayd.operating.listing_flows import flow_sources

log = Logger(namespace="relayd.control")

#: How many are ended in one part of the work: each takes some 0.1 ms.
AT_ONCE = 20

#: What the log says, unless it is told more.
BY_OPERATOR = "by its operator"


def kill(
    shown: Iterable[Shown],
    *,
    sessions: Iterable[int] | None = None,
    client: str | None = None,
    server: str | None = None,
    relay: str | None = None,
    why: str = BY_OPERATOR,
) -> Work:
    """End those that match all that is given.

    :param sessions: ids; flows have none, and are left alone then.
    :param client: an address or a network.
    :param server: its name, label or address.
    :param relay: its name.
    :param why: for the log.
    :return: `{killed: n}`.
    :raises Invalid: nothing is given, or the client is no address and no network.
    :raises Unknown: there is no such relay, or no session has one of the ids,
        which are all that is given.
    """
    others = client is not None or server is not None or relay is not None
    if sessions is None and not others:
        raise Invalid("say whom: sessions, a client, a server or a relay")
    if sessions is not None:
        sessions = tuple(sessions)
    wanted = Wanted.of(client, server, sessions)
    chosen = relays_of(shown, relay)
    killed = found = 0
    for victims in _matching(stream_sources(chosen), wanted):
        found += len(victims)
        for each in victims:
            killed += _end_session(each, why)
        yield
    if sessions and not others and not found:
        named = ", ".join(map(str, sessions[:10]))
        raise Unknown(f"there is no session {named}")
    for one in chosen:
        if one.kind != "udp":
            continue
        for factory, _ in one.generations:
            [source] = flow_sources([Shown(one.name, "udp", [factory])])
            for victims in _matching([source], wanted):
                for each in victims:
                    killed += source.lives(each)
                    factory.end(each, Ending.KILLED.word)
                yield
    return {"killed": killed}


def _matching(sources: Sequence[Source], wanted: Wanted) -> Iterator[Sequence[Any]]:
    """Those that are meant, some at a time; empty now and then."""
    for source in sources:
        for part in parts(source.living):
            found = [
                each
                for each in part
                if source.lives(each) and source.matches(each, wanted)
            ]
            for at in range(0, len(found), AT_ONCE):
                yield found[at : at + AT_ONCE]
            if not found:
                yield ()


def _end_session(protocol: Any, why: str) -> bool:
    """Whether it is this that ends it."""
    session = protocol.session
    ends_it = session.ending is None
    try:
        protocol.abort_session(Ending.KILLED, why)
    except Exception:
        log.failure("session {id} could not be killed", id=session.id)
        return False
    return ends_it
