"""The interfaces of the objects that are plugged into relayd.

Where Twisted has an interface (endpoints, producers, protocols, services),
relayd uses that.  These few are the rest.  All of them are called in the
reactor's thread and must return at once: no I/O, no waiting.  Only a gate may answer
later, by a Deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.python.failure import Failure
from zope.interface import Attribute, Interface

from relayd.core.session import Direction, Session


class ILease(Interface):
    """The right to be here, held by one session."""

    def release() -> None:
        """Give the place back.  Called exactly once, when the session has ended."""


class IGate(Interface):
    """Decides which clients are served."""

    def enter(session: Any) -> Any:
        """Admit the client, before anything is dialled for it.

        Called once for each accepted connection, with `client`, `peer` and `listener`
        known: behind the PROXY header, if there is to be one.  Of a UDP relay, for each
        new flow.

        :param session: a :class:`relayd.core.session.Session`; of a UDP relay, a
            :class:`relayd.core.flows.NewFlow`.
        :return: an :class:`ILease`.  Or a Deferred or a coroutine of one: the client
            waits, and nothing is read from it, for the handshake timeout at most.  If
            it leaves before, or the relay shuts down, the Deferred is cancelled if it
            has a canceller; a lease that comes all the same is released at once.
            Datagrams don't wait: for a UDP relay such an answer is a refusal.
        :raises relayd.core.errors.Refused: to turn the client away, or the Deferred
            fails with that; the client is reset, observers hear `refused`, and nothing
            is released.
        """


class ISelector(Interface):
    """Chooses a server from a pool.

    It may have three methods more.  `session_over(server)` is called when a session of
    a server has ended: its load is less.  `room_changed(server)` is called when a
    server has become full (`server.is_full`), or is so no longer.  Whoever has that, in
    the same class as `choose`, is given full servers as well and chooses none of them:
    the candidates are the same object however many sessions begin and end.  All others
    get a new sequence then, which takes longer the more servers there are.

    And a third: `foretell(candidates, session)` returns what `choose` would return now,
    and changes nothing; None if that can't be told.  Operators ask it.
    """

    def choose(candidates: Sequence[object], session: Any) -> object | None:
        """Return one of `candidates` for this session, or None to refuse.

        It is asked once for each attempt.  It changes no server and no session; turns
        that it keeps count of are its own.

        :param candidates: the servers that may be chosen, in the operator's order; the
            same object as before, if they are the same servers with the same weights.
        :param session: a :class:`relayd.core.session.Session`; of a UDP relay, a
            :class:`relayd.core.flows.NewFlow`.
        """


class ICounted(Interface):
    """A server whose sessions are counted.

    Each `began` is followed by exactly one `failed`, `cancelled`, `closed` or `reset`.
    """

    label = Attribute("""What its operator calls it; empty for nothing.""")

    def began() -> None:
        """An attempt begins: it is dialled."""

    def connected() -> None:
        """The attempt has succeeded."""

    def failed(ending: Any, detail: str) -> None:
        """The attempt has failed.

        :param ending: the :class:`relayd.core.session.Ending`; None: for want of
            something on this machine, which says nothing about the server.
        """

    def cancelled() -> None:
        """The attempt was given up; that says nothing about the server."""

    def closed() -> None:
        """The session that the attempt was for is over; it had succeeded."""

    def reset(why: str, provoked: bool) -> None:
        """The same, but the server has reset it, without having said anything.

        :param why: in words.
        :param provoked: it was sent something, which it may not have liked.
        """


class IProxyPolicy(Interface):
    """Decides what the clients of a proxy may do.

    Each method lets it be by returning, or raises :class:`relayd.core.errors.Refused`,
    whose `why` goes to the log; the client gets no more than a rejection.
    """

    def admit(user_id: bytes, session: Session) -> None:
        """A request was read, for whatever destination.

        :param user_id: what the client calls its user.  It proves nothing.
        """

    def permit(address: str, port: int, name: str, session: Session) -> None:
        """The client is to be relayed to `address`, or to be connected from there.

        Called for every address of a name, of which only those that are permitted
        are dialled.

        :param address: an IPv4 or IPv6 address as text.
        :param name: the host name that was asked for, or empty.
        """


class IObserver(Interface):
    """Is notified of what happens to sessions.

    Every accepted connection is reported either by one `refused`, or by one
    `opened`, a `dialing` for each attempt, a `connected` for each that has succeeded,
    and one `closed`.  Nearly always one succeeds at most: a server that resets its
    connection at once is followed by another.  There is no event for a chunk of data:
    read the session's counters.  An observer that raises is logged and not called
    again; the session goes on.
    """

    def opened(session: Session) -> None:
        """A client was accepted and admitted."""

    def dialing(session: Session) -> None:
        """A server was chosen (`session.upstream`) and is being dialled."""

    def connected(session: Session) -> None:
        """The upstream connection stands; bytes flow from here on."""

    def closed(session: Session) -> None:
        """Both connections are gone; `ending`, times and counters are final."""

    def refused(session: Session, why: str) -> None:
        """The client was not admitted.

        A gate refused it (`ending` is REFUSED, `reason` says why in a word), or failed
        (FAILED); it led back here (LOOP); or the client left, its time was over, or the
        relay shut down before its PROXY header was read or a gate had answered; or that
        header was none.
        """


class INamedClients(Interface):
    """A protocol factory that needs only the name of a client.

    For listeners whose connections have their options set
    (:func:`relayd.net.transports.set_options`).  One that knows the name need not make
    an address object then, a thirtieth of what Python does for a short session.
    """

    def takes_names() -> bool:
        """Whether `build_named` will do instead of `buildProtocol`, for all clients.

        Asked each time a listener opens.  False if `buildProtocol` is overridden: in a
        subclass, in a mixin, or on the object.
        """

    def build_named(client: str) -> Any:
        """`IProtocolFactory.buildProtocol` for a client of this name.

        :param client: what :func:`relayd.core.addresses.address_name` makes of its
            address.
        """


class IShedsClients(Interface):
    """A protocol factory that can end some of its clients when descriptors run out."""

    def shed_clients() -> None:
        """Descriptors have run out and the listener waits: end what may be ended."""


class IDial(Interface):
    """A connection that is being made."""

    def cancel() -> None:
        """Cancel the dial.  The caller is not notified."""


class ICaller(Interface):
    """What dials, and is notified of the outcome."""

    def speaks_first() -> bool:
        """Asked before connect(2): are the first bytes for the server at hand?

        If so, the handshake's last segment waits for them, and the caller writes them,
        and then calls :func:`relayd.net.handshake_ack.go_on`, as soon as it is told of
        the connection.
        """

    def build_leg(address: Any) -> Any:
        """The connection stands: `IProtocolFactory.buildProtocol` for it."""

    def leg_connected(leg: Any) -> None:
        """What `build_leg` made is connected."""

    def dial_failed(reason: Failure) -> None:
        """There is no connection."""


class IHopListener(Interface):
    """A caller, or a factory, that notes connections to this process."""

    def dial_started(sock: Any, address: Any) -> bool:
        """A dial begins to a port on which this process listens.

        Called right after a connect(2) that takes time: it can't be accepted yet.

        :param address: where it leads, as the socket module has it.
        :return: whether it leads to this process: the dial is then reset if it is
            cancelled, so that its other end sees that.
        """


class IOnBehalf(Interface):
    """A caller, or a factory, whose dial is for a client that is relayed.

    Asked by dials from the client's own address (:mod:`relayd.net.transparent`), and by
    those to where the client meant to go (:mod:`relayd.net.original`).
    """

    def client_host() -> str:
        """The client's address, as text, with its scope if it needs one.

        :return: empty if it has none: it came by a UNIX socket.
        """

    def original() -> tuple[int, Any]:
        """Where the client meant to go: the family, and the address as the socket
        module has it.

        What becomes of the dial says nothing about the server then.

        :raises OSError: that can't be told.
        :raises relayd.core.errors.LeadsBack: to this relay itself.
        """

    def goes_to(endpoint: Any) -> None:
        """The dial goes on by another endpoint, to where that leads.

        :raises relayd.core.errors.LeadsBack: to this relay itself.
        """


class IDialer(Interface):
    """A client endpoint that answers with a call instead of a Deferred.

    A relay dials once for each session, and the Deferred is a twelfth of what
    Python does for a short one.  A relay takes any `IStreamClientEndpoint`; this
    is for those that can do better.
    """

    peer_name = Attribute("""What the log calls the address that it leads to.""")

    def dial(caller: Any) -> IDial | None:
        """Connect a protocol of the caller's.

        The connection's options are set (:func:`relayd.net.transports.set_options`).

        :param caller: an :class:`ICaller`, which is told of a connection or of a
            failure, once: from within this call, or later unless it cancels the dial.
        :return: what to cancel, if the caller has not been told yet; None: it has.
        """


class IResetListener(Interface):
    """A protocol that can be notified of a reset while it is not reading."""

    def wants_reset() -> bool:
        """Whether to be notified now, and not after what is still to be read.

        Asked by transports that learn of a reset while their protocol has them paused.
        """


class ILossListener(Interface):
    """A protocol that may be subclassed, and has to be notified of its loss."""

    def lost_anyway(reason: Failure) -> None:
        """`connectionLost`, or an override of it, has raised: clean up all the same.

        Does nothing if that has been done.
        """


class ISpliceable(Interface):
    """A stream transport that can move bytes to and from another one by itself."""

    unsent = Attribute("""Bytes that were written to it, or moved to it, and that the
        kernel has not taken yet.""")

    blocked = Attribute("""Whether it is not read because the other one is full.""")

    clear = Attribute("""Whether what is written goes straight to the kernel: it is
        connected, nothing waits, and neither it nor its write side is to be closed.""")

    def has_unread() -> bool:
        """Whether something has arrived that was not read: bytes, or an end."""

    def relay_soon(then: Callable[[], object]) -> None:
        """Read what has arrived, unless it is paused, before events report it.

        :param then: called after that.
        """

    def keep_pace(direction: Direction) -> None:
        """From now on, read no more than the `pace` of this direction grants.

        Once it is spliced, what is read is spent; else, that is the protocol's to do.
        """

    def read_much() -> None:
        """From now on, give the protocol up to 256 KiB at once, for it expects bulk.

        There may be several such pieces in a row.  Others get 64 KiB.  Nothing changes
        for one that keeps a pace.
        """

    def write_on(data: bytes) -> None:
        """As `write`, but a producer is paused only if something waits to be sent.

        :param data: not empty.  `write` pauses a streaming producer at each write of
            more than 64 KiB, for a turn of the reactor, as Twisted's transports do and
            some producers expect.
        """

    def splice(peer: object, here: Direction, there: Direction, splicer: Any) -> bool:
        """From now on, move what either reads to the other.

        What is read here is added to `here.read` instead of being given to the
        protocol, and what is read from `peer` to `there.read`.  While something waits
        to be written to one of them, the other is not read.  Nothing is passed on but
        bytes.  The protocols are still notified of the loss (`close_both` excepted)
        and of nothing else.
        `pauseProducing` and `resumeProducing` mean what they always do.

        :param splicer: an :class:`ISplicer`, which is notified of the ends of data.
        :return: whether it will; False if `peer` is of another kind, or one of
            the two is lost: write to them, as to any transport.
        """

    def splice_one_way(peer: object, direction: Direction, splicer: Any) -> bool:
        """From now on, move what is read here to `peer`; the other way stays as it is.

        As :meth:`splice`, of one direction: what is read here is added to
        `direction.read`, nothing is read here while something waits to be written to
        `peer`, and this connection's protocol is notified of its loss and of nothing
        else.  What `peer` reads is given to its protocol, which is notified of
        everything, as if nothing had been spliced; and what is written here, and by
        which producers, is as ever.  Unless `peer` has been told to move what it reads
        to this one: then it goes on with that, and both ways are spliced.

        :param splicer: is notified of the end of data of this direction.
        :return: as :meth:`splice`; and False if a producer is registered with `peer`,
            whose source this is to be.
        """

    def unsplice() -> None:
        """Move nothing more: what either reads is given to its protocol again.

        Asked of either, whichever ways they were spliced.  What has been moved already
        is written.  The splicer is notified no more, the protocols are of everything.
        They can be spliced again at once.
        """

    def close_both(protocol: object, peers: object) -> bool:
        """Close this connection and the one that it is spliced to, at once.

        To be asked when both directions have ended.  The protocols are not notified of
        the loss: the caller knows.

        :param protocol: this connection's, and
        :param peers: the other one's.
        :return: whether they are closed.  Not if one is of another protocol, has not
            ended or has failed, or has ever had a producer, a buffer or a pipe, or
            if only one way is spliced: use `loseConnection`.
        """


class ISplicer(Interface):
    """What has joined two ISpliceable transports."""

    def ended(direction: Direction, sink: Any) -> None:
        """The last byte of a direction has been read.

        Pass the end on at once: the last bytes may wait for it.

        :param sink: the transport that they went to.
        """
