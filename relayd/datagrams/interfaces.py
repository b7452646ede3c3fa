"""Interfaces of flows and listeners to each other and to their relay.

The relay makes listeners and flows, a listener passes datagrams to flows, and a flow
replies through its listener.  With these interfaces their modules import each other in
one direction only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from relayd.datagrams.replies import Replies


class FlowRelay(Protocol):
    """A relay, as its listeners and flows see it."""

    @property
    def draining(self) -> bool:
        """It accepts no new client."""

    def admit(self, listener: Any, key: Any, data: Any) -> Any:
        """Open a flow for a client; None: refused, and counted as dropped.

        Or it waits for a server, with a copy of what it has sent.

        :param key: what identifies the client at this listener.
        :param data: what it has sent; of the flow, it is sent by the caller.
        """

    def keep_time(self) -> None:
        """There is a flow, which may expire."""

    def redial(self, flow: Any, problem: OSError) -> bool:
        """Connect a flow to the next address of its server.

        :param problem: the error of its present address.
        :return: whether there was another address.
        """

    def send_away(self, flow: Any, problem: OSError) -> bool:
        """Connect a flow, whose server has state, to another server of its pool.

        :param problem: why.
        :return: whether there was another one.
        """

    def end(self, flow: Any, ending: str, by: str = "") -> None:
        """End a flow: close its socket, forget it, and notify the observer.

        :param by: the client for which it is evicted, as text.
        """

    def fail(self, flow: Any) -> None:
        """Called in an `except`: end the flow that raised, and log it."""


class FlowListener(Protocol):
    """A listener, as its flows see it.

    :ivar number: unique in this process.
    :ivar sock: its socket.
    :ivar port: its local port.
    :ivar wild: it is bound to all addresses.
    :ivar closed: its relay has closed it.
    :ivar retired: it has the flows that it has, and gets no others; `deaf`: nor does it
        receive.
    :ivar flows: of the clients that send to it, by client key at this listener.
    :ivar replies: its pending replies.
    """

    number: int
    sock: Any
    port: int
    wild: bool
    closed: bool
    retired: bool
    deaf: bool
    flows: dict[Any, Any]
    replies: Replies

    def name(self, key: Any) -> str:
        """The address that a client has sent to, as text."""

    def envelope(self, key: Any) -> Any:
        """A client's addresses, as a batch of replies needs them."""

    def replier(self, to: Any) -> Callable[[bytes, Any], Any]:
        """The function that sends one datagram to a client.

        :param to: where to reply to, which has what is needed for it from now on.
        :raises OSError: it can't be sent from where the client expects it.
        """

    def gone(self, to: Any) -> None:
        """The flow that had this for where to reply to has ended, or got no socket."""

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        """Send a client several datagrams of one size, in one call.

        :raises OSError: none was sent; with ENOBUFS, some may have been.
        """


#: Of a flow: its listener; its client's key there, its address, and where to reply to.
Ends = tuple[FlowListener, tuple[Any, Any, Any]]
