"""What the control socket can ask of a running relayd, and how that may be refused.

:class:`Steering` is all that the site knows of the relays; `operating/steering` is one.
Its methods are called in the reactor's thread, with values whose types are checked (the
table of routes says which): what they mean is Steering's to judge.  A method returns

- its answer;
- a Deferred of it, for what takes time: the answer comes once the change is made;
- a :data:`Work`, for what may be long: a generator that yields between its parts, so
  that the reactor goes on, and returns the answer.  It is closed if its client leaves;
  or
- a :class:`Stream`, for what goes on: bytes, and no JSON.

An answer is an object of JSON: keys are snake_case; times are RFC 3339 in UTC with
microseconds, such as 2026-12-24T03:00:00.000000Z; durations are numbers, in seconds.

A method raises a :class:`Refusal` (from a Deferred or a Work, too); anything else that
it raises is a defect, which is logged and answered with status 500.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs
from twisted.internet.defer import Deferred

from relayd.core.errors import RelayError

#: An object of JSON.
Json = dict[str, Any]

#: Makes an answer in parts; yields between them.
Work = Generator[None, None, Json]

#: By what sessions and flows are sorted, the most first.
Sort = Literal["bytes", "age", "rate"]

#: What an operator may say of a server; `auto`: nothing any more, its checks decide.
ServerState = Literal["up", "down", "drain", "auto"]

#: How many sessions or flows are listed, unless asked otherwise, and at most.
LISTED = 1000
MAX_LISTED = 100_000


class Refusal(RelayError):
    """What was asked for is not done, and nothing has changed.

    :ivar status: of HTTP.
    :ivar outcome: the word of the log for it.
    :ivar problems: why, one clear line each; at least one.
    """

    status = 400
    outcome = "refused"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Unknown(Refusal):
    """There is no such relay, server or session; the line lists those that there are,
    ten at most.
    """

    status = 404


class Conflict(Refusal):
    """It is not possible now."""

    status = 409


class Outdated(Refusal):
    """The resource has changed since its client read it (If-Match)."""

    status = 412


class Invalid(Refusal):
    """A value, or a file, is wrong; each problem is a line."""

    status = 422


class Unfinished(Refusal):
    """What was asked for is done, and stays so; but not what should have followed."""

    status = 500
    outcome = "done in part"


@attrs.frozen
class Asker:
    """Who asks: the process at the other end, as the kernel knows it (SO_PEERCRED).

    :ivar pid: 0 if it is of another pid namespace.
    """

    uid: int
    gid: int
    pid: int

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


@attrs.frozen(kw_only=True)
class SessionQuery:
    """Which sessions are listed: those that match all that is given.

    :ivar relay: the name of theirs.
    :ivar client: an address or a network.
    :ivar server: its name, label or address.
    :ivar sort: what comes first; None: the order in which they came.
    :ivar limit: how many are listed.
    """

    relay: str | None = None
    client: str | None = None
    server: str | None = None
    sort: Sort | None = None
    limit: int = LISTED


@attrs.frozen(kw_only=True)
class FlowQuery(SessionQuery):
    """The same of flows, and of the NAT table."""


class Sink(Protocol):
    """Takes what a :class:`Stream` has for its client."""

    def give(self, block: bytes) -> bool:
        """Send a block.

        :return: False: it is not sent, as the client is too slow, or has left.
        """

    def end(self, why: str, last: bytes = b"") -> None:
        """There is no more; called again, it does nothing.

        :param why: for the log, in a few words.
        :param last: a short block, which is sent however slow the client is.
        """


class Stream(Protocol):
    """An answer that goes on, in blocks of bytes, until it ends."""

    def begin(self, sink: Sink) -> None:
        """Called once: give the sink blocks from now on, and end it at last.

        :raises Refusal: it is not possible now; the sink is not to be used then.
        """

    def stop(self, why: str) -> None:
        """Give no more blocks, and end the sink now, with what is left to say.

        Not called once the sink was ended.
        """


class Steering(Protocol):
    """A running relayd, as it can be seen and steered.

    `by` is who asks.  The design of an answer is the schema of its route.
    """

    # -- what there is

    def status(self) -> Json: ...

    def relays(self) -> Work: ...

    def relay(self, name: str) -> Json: ...

    def revision(self, relay: str, server: str = "") -> str:
        """What changes with each change of a relay, or of one of its servers.

        :return: printable ASCII without quotes, for an ETag.
        """

    def sessions(self, query: SessionQuery) -> Work: ...

    def flows(self, query: FlowQuery) -> Work: ...

    def nat(self, query: FlowQuery) -> Work: ...

    def servers(self, relay: str | None) -> Work: ...

    def server(self, relay: str, server: str) -> Json:
        """One server, by its name or its label."""

    def limits(self) -> Work: ...

    def diff(self) -> Json: ...

    def merged(self) -> Json: ...

    def explain(
        self,
        relay: str,
        client: str,
        at: str | None,
        dest: str | None,
        first: str | None,
        sni: str | None,
        *,
        runs: bool,
    ) -> Deferred[Json]: ...

    # -- what can be changed

    def set(self, relay: str, settings: Mapping[str, Any], by: Asker) -> Deferred[Json]:
        """Change settings of a relay.

        :param settings: by key, as a file has them; None: back to what the file says.
        """

    def start(self, relay: str, by: Asker) -> Deferred[Json]: ...

    def stop(self, relay: str, cut: bool, by: Asker) -> Deferred[Json]: ...

    def drain(self, relay: str, within: float | None, by: Asker) -> Deferred[Json]: ...

    def pause(self, relay: str, seconds: float | None, by: Asker) -> Json: ...

    def resume(self, relay: str, by: Asker) -> Json: ...

    def set_server(
        self,
        relay: str,
        server: str,
        state: ServerState | None,
        weight: int | None,
        within: float | None,
        by: Asker,
    ) -> Json:
        """Change a server; what is None stays as it is."""

    def kill(
        self,
        sessions: Sequence[int] | None,
        client: str | None,
        server: str | None,
        relay: str | None,
        by: Asker,
    ) -> Work: ...

    def capture(self, session: int, most_bytes: int | None, by: Asker) -> Stream:
        """What a living session says, as pcapng.

        :param most_bytes: it ends after so many of each direction.
        """

    def reload(
        self, discard: bool, confirm: float | None, by: Asker
    ) -> Deferred[Json]: ...

    def confirm(self, by: Asker) -> Json: ...

    # -- the log

    def log_levels(self) -> Json: ...

    def set_log_level(self, namespace: str, level: str, by: Asker) -> Json: ...
