"""Sessions that never ran, for the tests of what is made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from soak.ends import End, Session
from soak.log import FlowLine
from soak.scripts import draw_session
from soak.stops import Stops

#: The relay's ports towards a server.
PORT, OTHER = "127.0.0.1:4000", "127.0.0.1:5000"

#: What the log says of a flow of four datagrams and their answers.
SAID = FlowLine(
    "127.2.0.1:5151", "127.0.0.1:53", PORT, 13.01, (4, 400), (4, 400), "expired"
)


def ends(*, shut: bool, sent: int, stops: Stops | None = None) -> tuple[End, End]:
    """A client that is about to see an end of data, and its server."""
    session = draw_session(1, 1)
    sock: Any = SimpleNamespace(fileno=lambda: -1)
    stops = stops or Stops()
    client = session.client = End(sock, session, True, stops)
    server = session.server = End(sock, session, False, stops)
    server.shut, server.sent = shut, sent
    return client, server


def session_of(name: str) -> Session:
    for number in range(1, 5000):
        session = draw_session(1, number)
        if session.script.name == name:
            return session
    raise LookupError(name)
