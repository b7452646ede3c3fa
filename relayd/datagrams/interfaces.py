"""What flows and listeners see of each other and of their relay.

The relay makes listeners and flows, a listener hands datagrams to flows, and a flow
replies by its listener.  So that their modules import each other in one way only, each
is given what it calls as one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from relayd.datagrams.replies import Replies


class FlowRelay(Protocol):
    """A relay, as its listeners and flows see it."""

    @property
    def draining(self) -> bool:
        """It takes no new client."""

    def admit(self, listener: Any, key: Any) -> Any:
        """The new flow of a client that has none, or None: counted as dropped.

        :param key: what identifies the client at this listener.
        """

    def redial(self, flow: Any, problem: OSError) -> bool:
        """Connect a flow to the next address of its server.

        :param problem: how the one that it has has refused.
        :return: whether there was one.
        """

    def end(self, flow: Any, ending: str, by: str = "") -> None:
        """End a flow: close its socket, forget it, and notify the observer.

        :param by: the client for which it is evicted, as text.
        """

    def fail(self, flow: Any) -> None:
        """An exception of a flow is being handled: it ends, and nothing else."""


class FlowListener(Protocol):
    """A listener, as its flows see it.

    :ivar number: no other listener of this process has it.
    :ivar port: its own.
    :ivar flows: those whose clients send to it, by key.
    :ivar replies: those that are pending.
    """

    number: int
    port: int
    flows: dict[Any, Any]
    replies: Replies

    def name(self, key: Any) -> str:
        """The address that a client has sent to, as text."""

    def envelope(self, key: Any) -> bytes:
        """What a batch of replies needs to know of a client."""

    def replier(self) -> Callable[[bytes, Any], Any]:
        """What sends one datagram to a client."""

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        """Send a client several datagrams of one size, in one call.

        :raises OSError: none was sent, but with ENOBUFS.
        """
