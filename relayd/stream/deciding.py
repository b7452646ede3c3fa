"""A client about which a route decides: what it has sent, and who waits for more.

What the client sends meanwhile is kept, as while a server is dialled, up to
:data:`relayd.stream.legs.HOLD_LIMIT`; it stays the session's first data.  The client
has until the handshake timeout.  If it leaves before, nobody needs the decision any
more, and the route is cancelled.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import INegotiated, IReactorTime
from twisted.python.failure import Failure

from relayd.core.errors import RelayError
from relayd.core.prelude import BadRequest
from relayd.core.routing import LONGEST_WHY, Decision, IRouter
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.tls import asked_name

#: Stages with a deadline that holds for the decision as well.
_HANDSHAKES = (Stage.HEADER, Stage.HANDSHAKE, Stage.PRELUDE, Stage.DECIDING)


#: An enum's members cost a look-up by its metaclass each time (Python 3.11).
_DECIDING = Stage.DECIDING


def begin_deciding(client: Any) -> None:
    """A client's route is to decide: within the time that its handshake has left."""
    _limit(client, _enter(client))


def _enter(client: Any) -> Stage:
    """It is DECIDING, if it was not; the stage before it."""
    before: Stage = client.session.stage
    if before is not _DECIDING:
        client.enter(_DECIDING)
    return before


def _limit(client: Any, before: Stage) -> None:
    """Limit the decision, unless the stage before it was limited."""
    if before not in _HANDSHAKES:
        client.set_deadline(client.factory.timeouts.handshake)


class Deciding:
    """See :class:`relayd.core.routing.Arriving`.

    :param client: a :class:`relayd.stream.routable.Routable`.
    """

    #: Its route has looked at what has come.
    _has_looked = False

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asked: Deferred[Any] | None = None
        self._waiting: list[Deferred[None]] = []
        self._is_over = False

    def start(self, router: IRouter) -> None:
        """Ask; the answer may come from within."""
        client = self._client
        before = _enter(client)
        client.pending = self
        asked = router.ask(self)
        client.factory.looks_first = self._has_looked
        if isinstance(asked, Decision):
            # Most do: that saves a Deferred, and a deadline.
            self._said(asked)
            return
        self._asked = asked
        asked.addBoth(self._said)
        if not self._is_over:
            _limit(client, before)
            client.wait_undecided()
        elif not asked.called:
            # Its first step has ended the session.
            asked.cancel()

    # -- what a route asks for

    @property
    def session(self) -> Any:
        """The session's record."""
        return self._client.session

    @property
    def clock(self) -> IReactorTime:
        """For timers."""
        clock: IReactorTime = self._client.factory.clock
        return clock

    @property
    def data(self) -> bytes:
        """All that has come."""
        self._has_looked = True
        held = self._client.held
        return b"" if held is None else bytes(held)

    @property
    def ended(self) -> bool:
        """Whether the client has ended its side."""
        return bool(self._client.direction.eof)

    @property
    def server_name(self) -> str | None:
        """What it has asked for in the TLS handshake that its listener does."""
        transport = self._client.transport
        return asked_name(transport) if INegotiated.providedBy(transport) else None

    @property
    def original(self) -> str:
        """Where it meant to go; empty: nobody knows."""
        # Few routes ask for it.
        from relayd.net.original import original_name

        try:
            return original_name(self._client.session, self._client.transport)
        except OSError:
            return ""

    def more(self) -> Deferred[None]:
        """See :meth:`Arriving.more`; never fires once it is over."""
        waiting: Deferred[None] = Deferred(self._forget)
        if self._is_over:
            # Not at once: a route that goes on all the same would never stop.
            return waiting
        self._waiting.append(waiting)
        self._client.reader = self._came
        return waiting

    def _forget(self, waiting: Deferred[None]) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)

    # -- what happens to the client

    def _came(self, data: bytes) -> None:
        client = self._client
        client.reader = None
        client.hold(data)
        self._wake()

    def client_ended(self) -> None:
        """It has ended its side."""
        self._client.reader = None
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            # One of them may have cancelled others.
            if not each.called:
                each.callback(None)

    def _said(self, said: Decision | Failure) -> None:
        """It is decided, or never will be."""
        self._end()
        client = self._client
        try:
            if isinstance(said, Failure):
                self._failed(said)
            elif client.session.ending is None:
                try:
                    client.carry_out(said)
                except RelayError:
                    # It can't be done.
                    self._failed(Failure())
        except Exception:
            client.failed(Failure())

    def _failed(self, reason: Failure) -> None:
        client = self._client
        if client.session.ending is not None:
            # It was cancelled.
            return
        if reason.check(BadRequest):
            if self.ended and not (client.direction.read or client.session.spoke):
                # A health check, as without a route: it has asked for nothing.
                client.end(Ending.CLIENT_LEFT, "said nothing")
                return
            client.end(Ending.BAD_REQUEST, reason.getErrorMessage()[:LONGEST_WHY])
            return
        client.factory.log_failure("its route failed", client.session, reason)
        # Of an exception whose own words fail, it says that.
        said = f"{type(reason.value).__name__}: {reason.getErrorMessage()}"
        client.route_failed(" ".join(said.split())[:LONGEST_WHY])

    def _end(self) -> None:
        client = self._client
        self._is_over = True
        self._waiting = []
        if client.pending is self:
            client.pending = None
            if client.reader is not None:
                client.reader = None

    # -- what is under way (Lifecycle.pending)

    def comes_on(self) -> bool:
        """It has a deadline, and that is all."""
        return False

    def overdue(self) -> None:
        """The route has had its time."""
        client = self._client
        limit = client.factory.timeouts.handshake
        why = f"the route did not decide in {limit:g} s"
        client.end(Ending.HANDSHAKE_TIMEOUT, why)

    def cancel(self) -> None:
        """Nobody waits for a decision any more."""
        self._is_over = True
        self._waiting = []
        if self._client.reader == self._came:
            self._client.reader = None
        if self._asked is not None:
            self._asked.cancel()
