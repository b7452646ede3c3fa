"""What a route is: a row of the table of what can be asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import attrs
from twisted.internet.defer import Deferred

from relayd.control.steering import Asker, Json, Steering, Stream, Work
from relayd.control.values import Field, Fields, Text, Value

#: No keys.
NOTHING = Fields()


@attrs.frozen
class Asked:
    """A request whose types are right.

    :ivar path: the parts of its path that have a name.
    :ivar may_change: whoever asks may change things, too.
    """

    path: Json
    query: Json
    body: Json
    by: Asker
    may_change: bool = False


#: Answers a request.
Call = Callable[[Steering, Asked], Json | Deferred[Json] | Work | Stream]

#: What an ETag is made of: printable ASCII without quotes.
Tag = Callable[[Steering, Asked], str]


@attrs.frozen(kw_only=True)
class Route:
    """One row.

    :ivar name: of the operation, in the description.
    :ivar help: what it does.
    :ivar answer: the name of the answer's schema; none of a stream.
    :ivar types: of the parts of its path that have a name and are no text.
    :ivar body: None: it has none.
    :ivar changes: it changes something, so not everybody may ask for it.
    :ivar streams: its answer goes on, and is bytes of this media type.
    :ivar secret: its answer has what not everybody may see.
    :ivar tag: the resource that it is about has an ETag.
    """

    method: str
    path: str
    name: str
    help: str
    answer: str
    call: Call
    types: Mapping[str, Value] = attrs.field(factory=dict)
    query: Fields = NOTHING
    body: Fields | None = None
    changes: bool = False
    streams: str = ""
    secret: bool = False
    tag: Tag | None = None

    @property
    def is_logged(self) -> bool:
        """Whether the log says who has asked for it."""
        return self.changes or bool(self.streams)

    @property
    def parts(self) -> Sequence[str]:
        return self.path.split("/")[1:]

    @property
    def names(self) -> list[str]:
        """The parts of its path that have a name."""
        return [each[1:-1] for each in self.parts if each.startswith("{")]

    def match(self, parts: Sequence[str]) -> dict[str, str] | None:
        """The named parts of a path; None: it is of another route."""
        found = {}
        if len(parts) != len(self.parts):
            return None
        for own, part in zip(self.parts, parts, strict=True):
            if own.startswith("{") and part:
                found[own[1:-1]] = part
            elif own != part:
                return None
        return found


def of_relay(steering: Steering, asked: Asked) -> str:
    return steering.revision(asked.path["relay"])


def of_server(steering: Steering, asked: Asked) -> str:
    return steering.revision(asked.path["relay"], asked.path["server"])


def of_changes(steering: Steering, asked: Asked) -> str:
    return _digest(steering.diff())


def of_levels(steering: Steering, asked: Asked) -> str:
    return _digest(steering.log_levels())


def _digest(answer: Json) -> str:
    text = json.dumps(answer, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


#: Keys that several routes have.
RELAY = Field(name="relay", type=Text(), help="The name of a relay.")
CLIENT = Field(name="client", type=Text(), help="An address or a network of clients.")
SERVER = Field(name="server", type=Text(), help="A server's name, label or address.")

ANY_RELAY = "/v1/relays/{relay}"
ANY_SERVER = "/v1/relays/{relay}/servers/{server}"
