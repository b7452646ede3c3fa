"""Tests for transports, and endpoints that make them, of an embedder.

`StreamTransportContract` is a suite of tests that a transport must pass to be used in a
relay: relayd's own pass it, and Twisted's.  A test case connects a transport, and
inherits the tests::

    from twisted.trial.unittest import TestCase
    from relayd.testing import Peer, StreamTransportContract

    class TestMine(StreamTransportContract, TestCase):
        async def connect(self, protocol) -> Peer:
            ...

`examples/own_transport_contract.py` is a complete example.  Trial and pytest run it.
With the plugin pytest-twisted a plain class is enough, without TestCase.  Nothing is
imported here that relayd itself does not need.

- :class:`StreamTransportContract` tests all that a relay relies on, of a transport
  whose other end is any :class:`Peer`; :class:`SocketTransportContract` also tests what
  is particular to sockets, and its peers are :class:`SocketPeer`.
- :class:`ConnectionContract` and :class:`SocketConnectionContract` are shorter, for a
  transport that differs from a tested one only in its addresses.
- :class:`FakeTransport` is a transport without a network, for tests of protocols.

For a transport whose peer can't reset it, set `resets = False`.  For one that keeps its
buffer elsewhere than Twisted's do, override :meth:`ConnectionContract.unsent`; a relay
does not find that buffer either, and takes it for empty.

:func:`explain` is for tests of settings: whether a client would be served, by which
server, and which rule decides (`examples/test_policy.py`).

:func:`decide` and :func:`decide_later` are for tests of routes: what one decides about
a client, without a socket.
"""

from relayd.testing.connection import ConnectionContract
from relayd.testing.contract import StreamTransportContract
from relayd.testing.explanation import explain
from relayd.testing.fakes import FakeTransport
from relayd.testing.peers import Peer, SocketPeer
from relayd.testing.protocols import Plain, Producer, Recorder
from relayd.testing.routes import decide, decide_later
from relayd.testing.sockets import SocketConnectionContract, SocketTransportContract
from relayd.testing.suite import turns, until

__all__ = (
    "ConnectionContract",
    "FakeTransport",
    "Peer",
    "Plain",
    "Producer",
    "Recorder",
    "SocketConnectionContract",
    "SocketPeer",
    "SocketTransportContract",
    "StreamTransportContract",
    "decide",
    "decide_later",
    "explain",
    "turns",
    "until",
)
