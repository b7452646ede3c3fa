"""Flows that go on elsewhere: at another address of their server, or at another server.

A host where no socket has the port refuses (ICMP).  A flow that its server has never
answered goes on at the next address of the server's name, and then at another server of
the pool, at once; its last datagrams are sent again.  One that was answered stays at
first: its server may be back in a moment, and nobody else knows the conversation.  It
goes when it was refused :data:`MAX_REFUSALS` times without an answer in between; at the
first refusal if its server is out or has left its pool, or if the name of its server
has another address by now.

A flow tries each address once after each look-up of the name, and a few servers of a
pool; those again after :data:`ANEW_AFTER`.

A server with state hears how its flows fare: one has failed if it was refused, or if it
had no answer.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import inf
from typing import Any

from relayd.core.flow_pools import CountedServer
from relayd.core.flows import Flow
from relayd.core.session import Ending
from relayd.datagrams.dialing import Connected
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.refusals import REFUSALS
from relayd.datagrams.servers import Server
from relayd.net.resolving import SocketAddress

#: Refusals without an answer in between after which a flow that was answered goes.
MAX_REFUSALS = 3

#: Why a flow has failed that was not refused.
NO_ANSWER = "no answer"

#: Servers of a pool that a flow tries one after the other, beside the first.
MAX_SERVERS = 3

#: Seconds after which a flow may try them again.
ANEW_AFTER = 10.0


class Trouble:
    """What a flow remembers whose server does not answer.

    :ivar refusals: how often it was refused,
    :ivar answers: after so many replies.
    :ivar servers: that it has tried, until `until`.
    :ivar looked: datagrams that it had sent and received when its server was first seen
        to be out.
    """

    __slots__ = ("answers", "looked", "refusals", "servers", "until")

    def __init__(self) -> None:
        self.refusals = 0
        self.answers = -1
        self.servers: list[Server] = []
        self.until = -inf
        self.looked: tuple[int, int] | None = None


class MovingFlow(Flow):
    """What a flow knows of where it goes.

    :ivar ledger: of its relay.
    :ivar relay: the relay.
    :ivar server: the present server.
    :ivar tried: the addresses of the server that the flow has had; the last is the
        present one.
    :ivar since: when it came to this server.
    :ivar awaits: this server has not answered it.
    """

    __slots__ = (
        "_look_up",
        "_trouble",
        "awaits",
        "ledger",
        "relay",
        "server",
        "since",
        "tried",
    )

    ledger: Ledger[Any]
    relay: FlowRelay
    send: Callable[[bytes], Any]
    server: Server
    tried: list[SocketAddress]

    def __init__(self, key: Hashable, host: str, now: float) -> None:
        Flow.__init__(self, key, host, now)
        self.since = now
        self._trouble: Trouble | None = None

    def arrive(self, connected: Connected) -> None:
        """It goes there from now on."""
        self.server = connected.server
        self.tried = connected.tried
        self.awaits = True
        #: The number of the look-up whose addresses are in `tried`.
        self._look_up = connected.server.look_ups

    def follow(self, heirs: Mapping[Server, Server]) -> None:
        """Its server is another object from now on, at the same place; its socket and
        what it knows stay.

        :param heirs: the servers of now, by those of before: its own is one of these.
        """
        before = self.server
        self.server = server = heirs[before]
        current = self._look_up == before.look_ups
        self._look_up = server.look_ups if current else -1
        if self._trouble is not None:
            had = self._trouble.servers
            self._trouble.servers = [heirs.get(each, each) for each in had]
        if not server.moves:
            self.ledger.unanswered.forget(self)

    def client_sent(self, run: Sequence[bytes], now: float) -> None:
        """The client has sent these, and the table must be updated (`due`)."""
        if self.server.moves:
            self.keep(run, now)
        self.ledger.table.outbound(self, now)

    def keep(self, run: Sequence[bytes], now: float) -> None:
        """Keep datagrams that may have to be sent again, elsewhere."""
        # Without another address nothing need be kept.
        server = self.server
        if (
            self.awaits
            and (server.state is not None or server.left or len(server.addresses) > 1)
            and self.ledger.table.flows.get(self.key) is self
        ):
            self.ledger.unanswered.add(self, run, now)

    def answered(self) -> None:
        """Its server `moves`, and has answered it for the first time."""
        self.ledger.unanswered.forget(self)
        self._trouble = None
        server = self.server
        if server.state is not None:
            server.answered_at = self.ledger.now()
            self.ledger.two_way = True
            server.state.connected()

    def may_redial(self, problem: OSError) -> bool:
        """Whether an error, without an answer behind it, is a reason to go."""
        server = self.server
        if not server.moves or problem.errno not in REFUSALS:
            return False
        if self.awaits or self.stranded or not server.has(self.tried[-1]):
            return True
        trouble = self.trouble
        if trouble.answers != self.down_datagrams:
            trouble.answers, trouble.refusals = self.down_datagrams, 0
        trouble.refusals += 1
        return trouble.refusals >= MAX_REFUSALS

    @property
    def trouble(self) -> Trouble:
        """What it remembers of its server."""
        if self._trouble is None:
            self._trouble = Trouble()
        return self._trouble

    def redial_next(self, problem: OSError) -> None:
        """Its server does not answer: go elsewhere, if there is another place.

        :param problem: what is wrong.
        """
        if self._look_up != self.server.look_ups:
            # Addresses that refused before that look-up may work now.
            self._look_up = self.server.look_ups
            self.tried = self.tried[-1:]
        if self.relay.redial(self, problem):
            self.send_again()

    def send_again(self) -> None:
        """It has moved: its last datagrams, if they had no answer, are sent again."""
        counters = self.ledger.counters
        for data in self.ledger.unanswered.of(self, self.ledger.now()):
            try:
                self.send(data)
            except OSError:
                counters.not_resent += 1
            else:
                counters.resent += 1

    def tried_servers(self) -> list[Server]:
        """The servers that it must not try now; the present one is the last."""
        trouble, now = self.trouble, self.ledger.now()
        if now >= trouble.until:
            trouble.servers, trouble.until = [], now + ANEW_AFTER
        if self.server not in trouble.servers:
            trouble.servers.append(self.server)
        return trouble.servers

    # -- what a server with state is told

    def over(self, unanswered: bool) -> None:
        """It has ended, at a server with state.

        :param unanswered: for want of an answer.
        """
        state = self.server.state
        if state is None:
            return
        if not self.awaits:
            state.closed()
        elif unanswered and self.proves:
            state.failed(Ending.CONNECT_TIMEOUT, NO_ANSWER)
        else:
            state.cancelled()

    @property
    def stranded(self) -> bool:
        """Its server has left its pool, or is one with state that is out."""
        server = self.server
        state = server.state
        return server.left or (state is not None and (state.draining or not state.up))

    def left_for(self, other: Server | None, problem: OSError) -> None:
        """It leaves its server.

        :param other: where it goes; None: nobody else can be chosen, and it stays.
        :param problem: a refusal, that there is no answer (ETIMEDOUT), or that checks
            have found it down (ECANCELED).
        """
        server = self.server
        if server.state is not None:
            self._tell_left(server.state, problem)
        state = (other or server).state
        if state is not None:
            state.began()
        self.since = self.ledger.now()
        self.trouble.looked = None

    def _tell_left(self, state: CountedServer, problem: OSError) -> None:
        if problem.errno == errno.ECANCELED:
            if self.awaits:
                state.cancelled()
            else:
                state.closed()
        elif problem.errno != errno.ETIMEDOUT and self._judges:
            state.failed(Ending.CONNECT_REFUSED, problem.strerror or "")
        elif not self.awaits:
            state.closed()
        elif self.proves:
            state.failed(Ending.CONNECT_TIMEOUT, NO_ANSWER)
        else:
            state.cancelled()

    @property
    def _judges(self) -> bool:
        """Whether it says something of its server.  One that has left is judged by
        nobody."""
        return self.server.judged and not self.server.left

    @property
    def proves(self) -> bool:
        """Whether that it had no answer says something of its server.

        It says nothing where no server has answered anybody yet, as with a protocol
        without answers, or if this one has answered another flow meanwhile.
        """
        answered_at = self.server.answered_at
        return self._judges and self.ledger.two_way and answered_at < self.since
