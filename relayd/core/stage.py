"""The stages of a stream session, and which may follow which.

A session is in exactly one stage, from the accept to the end of its last connection.
:data:`NEXT` is the table of transitions.  `Lifecycle.enter`
(:mod:`relayd.stream.lifecycle`) refuses what the table does not have.

    ACCEPTED -> HEADER or -> PRELUDE -> DECIDING -> DIALING ---> RELAYING -> OVER
                HANDSHAKE                  |           ^            ^
                                           +-----> LISTENING -------+

A relay that has no use for a stage leaves it out: a TCP relay on a plain listener goes
from ACCEPTED to DIALING.  A gate that takes its time adds one: WAITING, right after
ACCEPTED or HANDSHAKE.  A dial that failed may be followed by another, and so may a
server that resets its connection at once: from RELAYING back to DIALING.  From each
stage before RELAYING a session can end: CLOSING, while its client is told and closed,
and then OVER.
"""

from __future__ import annotations

from enum import Enum


class Stage(Enum):
    """Where a session is on its way."""

    #: The client is connected; the gate is asked, unless a header comes first.
    ACCEPTED = "accepted"
    #: A balancer is connected, and says whose connection it is (a PROXY header); then
    #: the gate is asked.
    HEADER = "header"
    #: The gate has not answered yet: nothing is read, and nothing is dialled.
    WAITING = "waiting"
    #: The client's TLS handshake is under way.
    HANDSHAKE = "handshake"
    #: The client says what it wants: a proxy's request.
    PRELUDE = "prelude"
    #: What it wants is decided, by something that takes time: ident, a name.
    DECIDING = "deciding"
    #: A server is dialled, with its TLS handshake.
    DIALING = "dialing"
    #: A listener waits for the peer (SOCKS BIND).
    LISTENING = "listening"
    #: The two connections are joined.
    RELAYING = "relaying"
    #: It ended before it was joined: the client is told, and closed.
    CLOSING = "closing"
    #: Its connections are gone.
    OVER = "over"

    # Enum's own is a Python function; a member is compared by identity.
    __hash__ = object.__hash__


#: Each stage, and those that may follow it.
NEXT = {
    Stage.ACCEPTED: {
        *(Stage.HEADER, Stage.WAITING, Stage.HANDSHAKE, Stage.PRELUDE, Stage.DECIDING),
        *(Stage.DIALING, Stage.CLOSING, Stage.OVER),
    },
    Stage.HEADER: {
        *(Stage.WAITING, Stage.PRELUDE, Stage.DECIDING, Stage.DIALING),
        *(Stage.CLOSING, Stage.OVER),
    },
    Stage.WAITING: {
        *(Stage.HANDSHAKE, Stage.PRELUDE, Stage.DECIDING, Stage.DIALING),
        *(Stage.CLOSING, Stage.OVER),
    },
    Stage.HANDSHAKE: {
        *(Stage.WAITING, Stage.PRELUDE, Stage.DECIDING, Stage.DIALING, Stage.LISTENING),
        *(Stage.CLOSING, Stage.OVER),
    },
    Stage.PRELUDE: {
        *(Stage.DECIDING, Stage.DIALING, Stage.LISTENING),
        *(Stage.CLOSING, Stage.OVER),
    },
    Stage.DECIDING: {Stage.DIALING, Stage.LISTENING, Stage.CLOSING, Stage.OVER},
    Stage.DIALING: {Stage.DIALING, Stage.RELAYING, Stage.CLOSING, Stage.OVER},
    Stage.LISTENING: {Stage.RELAYING, Stage.CLOSING, Stage.OVER},
    # Back if its server resets the connection at once: another is dialled.
    Stage.RELAYING: {Stage.DIALING, Stage.OVER},
    Stage.CLOSING: {Stage.OVER},
    Stage.OVER: set(),
}
